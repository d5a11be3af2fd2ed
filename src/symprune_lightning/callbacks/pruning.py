"""The life cycle that callbacks which prune share."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import nn
from torch.utils.data import DistributedSampler

from symprune_lightning.display import layer_bar, summary
from symprune_lightning.engine.parallel import ALONE, Ranks
from symprune_lightning.engine.prune import call_model
from symprune_lightning.engine.residence import Residence
from symprune_lightning.engine.result import Progress, PruneResult
from symprune_lightning.engine.schedule import Forward

When = Literal["validate", "test", "fit_start", "fit_end"]
"""When a callback prunes: before ``validate`` or ``test`` evaluates, before or after ``fit``."""


class PruningCallback(Callback, ABC):
    """Base of callbacks that prune: finds the calibration data and the moment, calls ``prune``.

    Life cycle: at the moment that ``when`` names (never in the sanity check, never in the
    validation inside ``fit``) the callback takes the calibration batches, moves each to the
    module's device, and calls ``prune`` once for each module. Evaluation or training then goes on
    with the sparse weights.

    In a run of several processes each takes every n-th of these batches, whole, whatever their
    number; so the loader must give all of them on every process (no distributed sampler), and no
    batch is dropped or counted twice.

    Calibration data: the ``calibration`` argument; else ``calibration_dataloader()`` of the data
    module; else ``calibration_dataloader()`` of the LightningModule.

    A batch is given to the module's ``calibration_step(batch)`` if it has one, else to the module
    itself: mappings as keywords, tuples and lists as positional arguments. A module may name the
    part to be pruned in an attribute ``prunable_model`` (layer names are then relative to it).

    Args:
        when: Which moment.
        calibration: Batches to calibrate on, in place of the data module's.
        baseline: Let ``symprune_lightning.Trainer`` evaluate the dense model first. Lightning's own
            Trainer evaluates once, after pruning.

    Attributes:
        result: What was pruned, ``None`` before.
        dense_metrics: Metrics of the dense model, empty without a baseline.
        sparse_metrics: Metrics of the pruned model, once it was evaluated.

    Raises:
        ValueError: ``when`` is unknown.
    """

    def __init__(
        self,
        *,
        when: When = "validate",
        calibration: Iterable[Any] | None = None,
        baseline: bool = True,
    ) -> None:
        if when not in get_args(When):
            raise ValueError(f"when is {when!r}; choose one of {get_args(When)}")
        self.when = when
        self.calibration = calibration
        self.baseline = baseline
        self.result: PruneResult | None = None
        self.dense_metrics: dict[str, float] = {}
        self.sparse_metrics: dict[str, float] = {}
        self._pruned: weakref.ref[LightningModule] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pruned": None}  # a weak reference can't be pickled

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The method in plain values, as the manifest records it."""

    @abstractmethod
    def prune(
        self,
        model: nn.Module | Residence,
        batches: Iterable[Any],
        forward: Forward | None,
        ranks: Ranks,
        progress: Progress,
    ) -> PruneResult:
        """Prune ``model`` in place.

        Args:
            model: The module, or its ``prunable_model``, or a checkpoint that is streamed.
            batches: This process's share of the calibration batches, on the module's device.
            forward: As in ``prune_model``.
            ranks: The Trainer's processes.
            progress: To be called after every layer.
        """

    def has_pruned(self, module: LightningModule) -> bool:
        """Whether this callback has pruned that module, and its weights are still as sparse.

        They are not after dense weights were loaded, or after a fit that does not keep the zeros.
        """
        if self.result is None or self._pruned is None or self._pruned() is not module:
            return False
        return self.result.holds_in(pruning_target(module))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which layers can't be read and written.

        Raises:
            ValueError: The strategy is FSDP in its first version, or DeepSpeed.
        """
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"{type(self).__name__} does not work under {type(trainer.strategy).__name__}, "
                f"which flattens or partitions weights out of sight: use strategy='ddp', or "
                f"ModelParallelStrategy (FSDP2 and tensor parallel)"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before ``Trainer.validate`` evaluates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._at("validate", trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before ``Trainer.test`` evaluates."""
        self._at("test", trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before the first training step."""
        self._at("fit_start", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune after the last training step.

        What checkpoint callbacks wrote before is dense; ``Trainer.save_checkpoint`` after the fit
        is not.
        """
        self._at("fit_end", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figures of an evaluation that was pruned for."""
        if self.when == "validate" and trainer.state.fn == TrainerFn.VALIDATING:
            self._finish(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figures of an evaluation that was pruned for."""
        if self.when == "test":
            self._finish(trainer, pl_module)

    def _at(self, moment: When, trainer: Trainer, module: LightningModule) -> None:
        if moment != self.when or self.has_pruned(module):
            return
        step = getattr(module, "calibration_step", None)
        ranks = _ranks(trainer)
        batches = ranks.deal(self._calibration_batches(trainer, module))
        with layer_progress(trainer) as progress:
            self.result = self.prune(
                pruning_target(module),
                _on_device(batches, trainer),
                _forward(trainer, step),
                ranks,
                progress,
            )
        self._pruned = weakref.ref(module)
        self.sparse_metrics = {}
        if moment in ("fit_start", "fit_end"):
            self._show(trainer)  # the metrics at hand are those of dense weights

    def _calibration_batches(self, trainer: Trainer, module: LightningModule) -> Iterator[Any]:
        """The batches; a generator, so that methods that need no data need not have any."""
        if self.calibration is not None:
            yield from _undivided(self.calibration)
            return
        datamodule = getattr(trainer, "datamodule", None)
        for owner in (datamodule, module):
            loader = getattr(owner, "calibration_dataloader", None)
            if callable(loader):
                yield from _undivided(loader())
                return
        raise ValueError(
            f"{type(self).__name__} has no calibration data: pass calibration=<a dataloader>, or "
            f"use a CalibrationDataModule, or give your data module a method "
            f"calibration_dataloader()"
        )

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep the metrics of the pruned model, and show all figures to who looks on."""
        if not self.has_pruned(module):
            return
        self.sparse_metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        if self.result is not None and _watched(trainer):
            for table in summary(self.result, self.dense_metrics, self.sparse_metrics):
                Console().print(table)


def pruning_target(module: LightningModule) -> nn.Module:
    """What is pruned of a module, and what layer names are relative to."""
    target: nn.Module = getattr(module, "prunable_model", module)
    return target


def _ranks(trainer: Trainer) -> Ranks:
    """The Trainer's processes; those that hold parts of the same layers run the same batches."""
    if not isinstance(trainer.strategy, ParallelStrategy) or trainer.world_size == 1:
        return ALONE
    if isinstance(trainer.strategy, ModelParallelStrategy):
        dealt = trainer.strategy.distributed_sampler_kwargs
        return Ranks.all(share=dealt["rank"], shares=dealt["num_replicas"])
    return Ranks.all()


def _forward(trainer: Trainer, step: Callable[[Any], object] | None) -> Forward:
    """A batch's way into the module, at the Trainer's precision."""

    def forward(model: nn.Module, batch: Any) -> object:
        with trainer.precision_plugin.forward_context():
            if step is not None:
                return step(batch)
            try:
                return call_model(model, batch)
            except TypeError as error:
                raise TypeError(
                    f"{error} (mappings are passed as keywords, tuples and lists as positional "
                    f"arguments; if forward takes something else, give the module a method "
                    f"calibration_step(batch))"
                ) from error

    return forward


def _undivided(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, if it gives all batches on every process."""
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise ValueError(
            "the calibration loader has a DistributedSampler, which repeats sequences to fill up; "
            "leave it out: batches are dealt to the processes here"
        )
    return loader


def _on_device(batches: Iterable[Any], trainer: Trainer) -> Iterator[Any]:
    """Through the steps that Lightning's own loops take a batch through."""
    for batch in batches:
        converted = trainer.precision_plugin.convert_input(batch)
        before = trainer.lightning_module._on_before_batch_transfer(converted)
        yield trainer.strategy.batch_to_device(before)


def _watched(trainer: Trainer) -> bool:
    """Whether a person looks on: rank 0, at a terminal, and bars are not switched off."""
    wanted = trainer.progress_bar_callback is not None
    return trainer.is_global_zero and wanted and Console().is_terminal


@contextmanager
def layer_progress(trainer: Trainer) -> Iterator[Progress]:
    """A bar of layers, where a person looks on."""
    if not _watched(trainer):
        yield lambda report, done, total: None
        return
    with layer_bar(Console()) as on_layer:
        yield on_layer
