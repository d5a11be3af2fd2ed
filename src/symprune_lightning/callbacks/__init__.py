"""Pruning, fine-tuning and reports as Lightning callbacks."""
