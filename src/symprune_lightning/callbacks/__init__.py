"""Callbacks: ``PruningCallback``, the life cycle, and ``SymPrune``, the method."""

from symprune_lightning.callbacks.pruning import (
    PruningCallback,
    When,
    layer_progress,
    pruning_target,
)
from symprune_lightning.callbacks.symprune import SymPrune

__all__ = ["PruningCallback", "SymPrune", "When", "layer_progress", "pruning_target"]
