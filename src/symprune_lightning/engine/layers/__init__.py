"""Prunable layers: kinds of layers, selection by name."""
