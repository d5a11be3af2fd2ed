"""Calibration, evaluation and training data: sources, windows of tokens, and data modules."""
