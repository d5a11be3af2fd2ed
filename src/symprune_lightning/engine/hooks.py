"""Hooks into a pruning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from symprune_lightning.engine.result import BlockReport, LayerReport, PruneResult


class PruningHooks:
    """Base class for observers of a pruning run; every hook is a no-op.

    Pass instances as ``prune_model(hooks=[...])``. A Lightning callback that also inherits this
    class is called by the pruning callback of the same Trainer: ``class Mine(Callback,
    PruningHooks)``. Hooks run on every rank.

    Examples:
        >>> import torch
        >>> from symprune_lightning import prune_model
        >>> class Names(PruningHooks):
        ...     def on_layer_pruned(self, report, mask):
        ...         print(report.name, report.sparsity)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> _ = prune_model(model, [torch.randn(8, 4)], hooks=[Names()])
        0 0.5
        1 0.5
    """

    def on_pruning_start(self, layers: Sequence[str]) -> None:
        """Called before calibration.

        Args:
            layers: Names of the layers to prune, in model order.
        """

    def on_resume(self, folder: Path, layers: Sequence[str]) -> None:
        """Called before calibration, if a journal has layers of an earlier run.

        Args:
            folder: Folder of the journal.
            layers: Names of the recorded layers. Those of the last block are pruned once more and
                compared.
        """

    def on_layer_scored(self, layer: str, scores: Tensor, mask: Tensor) -> None:
        """Called with the scores of a layer and its mask before refining.

        Not called for solvers, which have no scores, nor for layers restored from a journal. With a
        pattern that permutes, columns are in the permuted order.

        Args:
            layer: Name of the layer.
            scores: Scores of the rows that this rank works on, ``(rows, in_features)``; −∞ where
                the weight was already zero.
            mask: Bool, same shape, True = kept. Not to be modified.
        """

    def on_layer_pruned(self, report: LayerReport, mask: Tensor) -> None:
        """Called after a layer was pruned.

        Args:
            report: Figures of the layer.
            mask: The final mask, bool, ``(out_features, in_features)``, True = kept.
        """

    def on_reconstruction_epoch(self, block: str, epoch: int, error: float) -> None:
        """Called after each epoch of the reconstruction of a block, and before the first one.

        Not called for blocks restored from a journal.

        Args:
            block: Name of the block.
            epoch: Number of finished epochs.
            error: Error on the held-out batches, see
                [`BlockReport`][symprune_lightning.BlockReport].
        """

    def on_block_reconstructed(self, report: BlockReport) -> None:
        """Called after a block was reconstructed, or restored from a journal.

        Args:
            report: Figures of the block.
        """

    def on_pruning_end(self, result: PruneResult) -> None:
        """Called after the last layer was pruned.

        Args:
            result: Masks and reports.
        """

    def on_stream_start(self) -> None:
        """Called before a checkpoint is pruned block by block, without being evaluated.

        Raise ``ValueError`` if the observer needs a model that is fully in memory.
        """

    def on_dense_evaluation_end(self, metrics: Mapping[str, float]) -> None:
        """Called after the dense model was evaluated, before pruning.

        Args:
            metrics: Metrics of the dense model.
        """

    def on_recovery_start(self) -> None:
        """Called by ``Trainer.prune`` before the pruned model is trained by ``Distillation``.

        Another evaluation follows.
        """

    def on_checkpoint_saved(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Called on rank 0 after the pruned checkpoint was written.

        Args:
            path: Folder of the checkpoint.
            manifest: Contents of its ``sparsity_manifest.json``.
        """
