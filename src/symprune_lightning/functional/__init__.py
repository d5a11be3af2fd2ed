"""Pruning methods as functions of tensors: statistics, scores, patterns, refiners, updates."""
