"""Pruning as Lightning callbacks."""

from symprune_lightning.callbacks.finetuning import MaskedFinetuning
from symprune_lightning.callbacks.gradual import Gradual
from symprune_lightning.callbacks.pruning import (
    Moment,
    PruningCallback,
    RunOptions,
    When,
    callbacks_of,
    layer_progress,
    pruning_target,
    score_watcher,
)
from symprune_lightning.callbacks.symprune import SymPrune

__all__ = [
    "Gradual",
    "MaskedFinetuning",
    "Moment",
    "PruningCallback",
    "RunOptions",
    "SymPrune",
    "When",
    "callbacks_of",
    "layer_progress",
    "pruning_target",
    "score_watcher",
]
