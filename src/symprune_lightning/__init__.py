"""Post-training pruning of language models, as PyTorch Lightning callbacks.

Examples:
    >>> import torch
    >>> from symprune_lightning import prune_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> prune_model(model, [torch.randn(16, 8)], score="ria", sparsity=0.5).sparsity
    0.5
"""

from symprune_lightning.adapters import merge_adapters
from symprune_lightning.callbacks import Gradual, MaskedFinetuning, PruningCallback, SymPrune
from symprune_lightning.datamodule import CalibrationDataModule, TextSource
from symprune_lightning.engine.journal import JournalError
from symprune_lightning.engine.method import PruningWarning
from symprune_lightning.engine.parallel import RankError, Ranks
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.engine.result import LayerReport, PruneResult, PruningError
from symprune_lightning.export import export_model
from symprune_lightning.functional.allocation import (
    OWL,
    Allocation,
    Progression,
    Search,
    Uniform,
)
from symprune_lightning.functional.patterns import NM, Pattern, Unstructured
from symprune_lightning.functional.refiners import DSnoT, ExactSwap, MaskRefiner, R2DSnoT
from symprune_lightning.functional.scores import (
    RI,
    RIA,
    Diagonal,
    LpRIA,
    Magnitude,
    OutputWanda,
    Score,
    StochRIA,
    Symmetric,
    SymWanda,
    Wanda,
)
from symprune_lightning.functional.statistics import Moments, Statistics
from symprune_lightning.functional.update import OBSUpdate, SparseGPT, WeightUpdate
from symprune_lightning.masks import apply_masks, load_masks, masks_of_zeros, save_masks
from symprune_lightning.module import CausalLMModule
from symprune_lightning.streaming import StreamedCheckpoint
from symprune_lightning.trainer import Trainer

__all__ = [
    "NM",
    "OWL",
    "RI",
    "RIA",
    "Allocation",
    "CalibrationDataModule",
    "CausalLMModule",
    "DSnoT",
    "Diagonal",
    "ExactSwap",
    "Gradual",
    "JournalError",
    "LayerReport",
    "LpRIA",
    "Magnitude",
    "MaskRefiner",
    "MaskedFinetuning",
    "Moments",
    "OBSUpdate",
    "OutputWanda",
    "Pattern",
    "Progression",
    "PruneResult",
    "PruningCallback",
    "PruningError",
    "PruningWarning",
    "R2DSnoT",
    "RankError",
    "Ranks",
    "Score",
    "Search",
    "SparseGPT",
    "Statistics",
    "StochRIA",
    "StreamedCheckpoint",
    "SymPrune",
    "SymWanda",
    "Symmetric",
    "TextSource",
    "Trainer",
    "Uniform",
    "Unstructured",
    "Wanda",
    "WeightUpdate",
    "apply_masks",
    "export_model",
    "load_masks",
    "masks_of_zeros",
    "merge_adapters",
    "prune_model",
    "save_masks",
]
