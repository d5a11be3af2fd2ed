"""Tensors in, tensors out: statistics, scores, patterns and refiners."""
