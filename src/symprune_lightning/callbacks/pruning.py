"""The life cycle that callbacks which prune share."""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from symprune_lightning.callbacks.gradual import Gradual
from symprune_lightning.display import block_lines, layer_bar, summary
from symprune_lightning.engine.parallel import ALONE, Ranks
from symprune_lightning.engine.prune import call_model
from symprune_lightning.engine.residence import Residence
from symprune_lightning.engine.result import OnScores, Progress, PruneResult
from symprune_lightning.engine.schedule import Forward

if TYPE_CHECKING:
    from typing_extensions import Unpack

Moment = Literal["validate", "test", "fit_start", "fit_end"]
"""Before ``validate`` or ``test`` evaluates, before or after ``fit``."""

When = Moment | Gradual
"""When a callback prunes: once, at a moment; or little by little, while the model trains."""


class RunOptions(TypedDict):
    """How a run is run, not what it does: arguments of ``prune_model``.

    Attributes:
        forward: How a batch is given to the model.
        ranks: The Trainer's processes.
        journal: Where finished blocks are kept.
        on_scores: To be called with every layer's scores.
        progress: To be called after every layer.
    """

    forward: Forward | None
    ranks: Ranks
    journal: str | PathLike[str] | None
    on_scores: OnScores | None
    progress: Progress


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
        when: Which moment: ``"validate"``, ``"test"``, ``"fit_start"``, ``"fit_end"``; or
            ``Gradual(end=1000)``, to prune further and further while the model trains (keep the
            zeros by a ``MaskedFinetuning`` callback).
        calibration: Batches to calibrate on, in place of the data module's.
        baseline: Let ``symprune_lightning.Trainer`` evaluate the dense model first. Lightning's own
            Trainer evaluates once, after pruning.
        journal: Folder to keep finished blocks in: a run that was killed goes on from there when it
            is started again. ``Trainer.prune`` has one beside its output if this is ``None``.

    Attributes:
        result: What was pruned, ``None`` before.
        seconds: Time it took: calibration forward, scores, masks, refining.
        dense_metrics: Metrics of the dense model, empty without a baseline.
        sparse_metrics: Metrics of the pruned model, once it was evaluated.

    Raises:
        ValueError: ``when`` is unknown, or gradual with a journal.
    """

    def __init__(
        self,
        *,
        when: When = "validate",
        calibration: Iterable[Any] | None = None,
        baseline: bool = True,
        journal: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(when, Gradual) and when not in get_args(Moment):
            raise ValueError(f"when is {when!r}; choose one of {get_args(Moment)}, or Gradual(…)")
        if isinstance(when, Gradual) and journal is not None:
            raise ValueError(
                "a journal is for pruning at once; what is pruned gradually is in the checkpoints "
                "of the fit"
            )
        self.when: When = when
        self.journal = journal
        self.calibration = calibration
        self.baseline = baseline
        self.result: PruneResult | None = None
        self.seconds = 0.0
        self.dense_metrics: dict[str, float] = {}
        self.sparse_metrics: dict[str, float] = {}
        self._pruned: weakref.ref[LightningModule] | None = None
        self._resumed = False
        self._last_step = -1

    @property
    def state_key(self) -> str:
        """Tells callbacks with other settings apart in a checkpoint."""
        return self._generate_state_key(**self.settings)

    def state_dict(self) -> dict[str, Any]:
        """Whether the checkpoint's weights are pruned."""
        return {"pruned": True} if self.result is not None or self._resumed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know that a fit goes on from weights that this callback has pruned."""
        self._resumed = bool(state_dict["pruned"])

    @property
    def prunes_in_fit(self) -> bool:
        """Whether it prunes before or while a model trains."""
        return self.when == "fit_start" or isinstance(self.when, Gradual)

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
        share: float,
        **run: Unpack[RunOptions],
    ) -> PruneResult:
        """Prune ``model`` in place.

        Args:
            model: The module, or its ``prunable_model``, or a checkpoint that is streamed.
            batches: This process's share of the calibration batches, on the module's device.
            share: Share of the final sparsity that is wanted now; 1 unless pruning is gradual.
            run: For ``prune_model``.
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
        refuse_strategies(self, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before ``Trainer.validate`` evaluates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._at("validate", trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before ``Trainer.test`` evaluates."""
        self._at("test", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before the first training step.

        Not if the fit goes on from a checkpoint whose weights this callback has pruned. Earlier
        hooks come before the weights of a sharded checkpoint are there.
        """
        if not self._resumed:
            self._at("fit_start", trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune further, if that is due before the next optimizer step."""
        step = trainer.global_step
        if isinstance(self.when, Gradual) and self.when.is_due(step) and step != self._last_step:
            self._last_step = step
            self._prune(trainer, pl_module, self.when.share(step))

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

    def _prune(self, trainer: Trainer, module: LightningModule, share: float) -> None:
        ranks = _ranks(trainer)
        batches = self._calibration_batches(trainer, module)
        few = int(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if few:
            batches = islice(batches, few)
        start = time.perf_counter()
        # hooks on layers are not called from compiled code
        with layer_progress(trainer) as progress, torch.compiler.set_stance("force_eager"):
            self.result = self.prune(
                pruning_target(module),
                _on_device(ranks.deal(batches), trainer),
                share,
                forward=_forward(trainer, getattr(module, "calibration_step", None)),
                ranks=ranks,
                journal=self.journal,
                on_scores=score_watcher(trainer),
                progress=progress,
            )
        self.seconds = time.perf_counter() - start
        self._pruned = weakref.ref(module)
        self.sparse_metrics = {}

    def _at(self, moment: Moment, trainer: Trainer, module: LightningModule) -> None:
        if moment != self.when or self.has_pruned(module):
            return
        self._prune(trainer, module, 1.0)
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
    # what torch.compile gives has the module inside
    original: nn.Module = getattr(target, "_orig_mod", target)
    return original


def refuse_strategies(callback: Callback, trainer: Trainer) -> None:
    """Raise ``ValueError`` under a strategy that keeps weights where they can't be reached."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{type(callback).__name__} does not work under {type(trainer.strategy).__name__}, "
            f"which flattens or partitions weights out of sight: use strategy='ddp', or "
            f"ModelParallelStrategy (FSDP2 and tensor parallel)"
        )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, which it does not declare."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def score_watcher(trainer: Trainer) -> OnScores | None:
    """What is called with every layer's scores: the ``on_scores`` of callbacks that have one."""
    having = [c for c in callbacks_of(trainer) if hasattr(c, "on_scores")]
    watching: list[OnScores] = [callback.on_scores for callback in having]
    if not watching:
        return None

    def tell(name: str, scores: Tensor, mask: Tensor) -> None:
        for watch in watching:
            watch(name, scores, mask)

    return tell


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
    """A bar of layers where a person looks on, else a line for each block; or nothing at all."""
    if not trainer.is_global_zero or trainer.progress_bar_callback is None:
        yield lambda report, done, total: None
    elif _watched(trainer):
        with layer_bar(Console()) as on_layer:
            yield on_layer
    else:
        yield block_lines(Console(stderr=True, width=120))
