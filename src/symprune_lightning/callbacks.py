"""Pruning as a Lightning callback."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch import nn

from symprune_lightning.display import layer_bar, summary
from symprune_lightning.engine.layers import LM_HEAD
from symprune_lightning.engine.method import Refine, check_group, refiners_of
from symprune_lightning.engine.prune import call_model, prune_model
from symprune_lightning.engine.result import Progress, PruneResult
from symprune_lightning.engine.schedule import Forward, Schedule, check_schedule
from symprune_lightning.functional.allocation import Allocation
from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.patterns import Group, Pattern, pattern_of
from symprune_lightning.functional.refiners import MaskRefiner
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.update import WeightUpdate

When = Literal["validate", "test", "fit_start", "fit_end"]
"""When a callback prunes: before ``validate`` or ``test`` evaluates, before or after ``fit``."""


class PruningCallback(Callback, ABC):
    """Base of callbacks that prune: finds the calibration data and the moment, calls ``prune``.

    Life cycle: at the moment that ``when`` names (never in the sanity check, never in the
    validation inside ``fit``) the callback takes the calibration batches, moves each to the
    module's device, and calls ``prune`` once for each module. Evaluation or training then goes on
    with the sparse weights.

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
        self, model: nn.Module, batches: Iterable[Any], forward: Forward | None, progress: Progress
    ) -> PruneResult:
        """Prune ``model`` in place.

        Args:
            model: The module, or its ``prunable_model``.
            batches: Calibration batches on the module's device.
            forward: As in ``prune_model``.
            progress: To be called after every layer.
        """

    def has_pruned(self, module: LightningModule) -> bool:
        """Whether this callback has pruned that module, and its weights are still as sparse.

        They are not after dense weights were loaded, or after a fit that does not keep the zeros.
        """
        if self.result is None or self._pruned is None or self._pruned() is not module:
            return False
        return self.result.holds_in(pruning_target(module))

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
        batches = _on_device(self._calibration_batches(trainer, module), trainer)
        with _progress(trainer) as progress:
            self.result = self.prune(
                pruning_target(module), batches, _forward(trainer, step), progress
            )
        self._pruned = weakref.ref(module)
        self.sparse_metrics = {}
        if moment in ("fit_start", "fit_end"):
            self._show(trainer)  # the metrics at hand are those of dense weights

    def _calibration_batches(self, trainer: Trainer, module: LightningModule) -> Iterator[Any]:
        """The batches; a generator, so that methods that need no data need not have any."""
        if self.calibration is not None:
            yield from self.calibration
            return
        datamodule = getattr(trainer, "datamodule", None)
        for owner in (datamodule, module):
            loader = getattr(owner, "calibration_dataloader", None)
            if callable(loader):
                yield from loader()
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


class SymPrune(PruningCallback):
    """Prunes by a score, a pattern and a refiner, in one pass over the calibration data.

    Args:
        score: Importance of each weight: a ``Score``, or its name such as ``"wanda"``.
        sparsity: Fraction of zeros in each group, in ``[0, 1)``; or by layer name:
            ``{"re:.*down_proj": 0.4, "re:.*": 0.5}``.
        pattern: ``"2:4"`` or a ``Pattern``, in place of ``sparsity`` and ``group``.
        group: Which weights compete: of one ``"output"`` channel, one ``"input"`` channel, the
            whole ``"layer"``, a decoder ``"block"``, or the ``"model"``.
        refine: A ``MaskRefiner``, its name (``"dsnot"``, ``"r2dsnot"``, ``"exactswap"``), several
            in a list, or for some layers only: ``{"re:.*self_attn.*": "dsnot"}``.
        update: A ``WeightUpdate`` or its name (``"obsupdate"``, ``"sparsegpt"``): changes the kept
            weights to make up for the pruned ones.
        allocation: An ``Allocation`` or its name (``"progression"``, ``"owl"``): divides the
            sparsity among layers.
        schedule: ``"layer"`` (one forward), ``"block"`` (two, as the reference implementations do)
            or ``"dense"``.
        ignore: Layers to leave dense: names, or regular expressions behind ``re:``. ``None`` spares
            the output projection ``lm_head``, a list of yours replaces that.
        only: Layers to prune, in the same way; ``None`` for all.
        when: See [`PruningCallback`][symprune_lightning.callbacks.PruningCallback].
        calibration: See `PruningCallback`.
        baseline: See `PruningCallback`.

    Raises:
        ValueError: An argument is wrong.

    Example:
        >>> SymPrune(score="wanda", sparsity=0.6).settings["score"]
        {'name': 'Wanda'}
    """

    def __init__(
        self,
        score: Score | str = "ria",
        *,
        sparsity: float | dict[str, float] = 0.5,
        pattern: Pattern | str | None = None,
        group: Group = "output",
        refine: MaskRefiner
        | str
        | list[MaskRefiner | str]
        | dict[str, MaskRefiner | str | list[MaskRefiner | str]]
        | None = None,
        update: WeightUpdate | str | None = None,
        allocation: Allocation | str | None = None,
        schedule: Schedule = "layer",
        ignore: list[str] | None = None,
        only: list[str] | None = None,
        when: When = "validate",
        calibration: Iterable[Any] | None = None,
        baseline: bool = True,
    ) -> None:
        super().__init__(when=when, calibration=calibration, baseline=baseline)
        check_schedule(schedule)
        for level in sparsity.values() if isinstance(sparsity, dict) else [sparsity]:
            pattern_of(pattern, sparsity=level, group=group)  # says at once what is wrong
        if pattern is None:
            check_group(group, schedule)
        self.score = by_name(Score, score)  # type: ignore[type-abstract]
        self.sparsity = sparsity
        self.pattern = None if pattern is None else pattern_of(pattern)
        self.group = group
        self.refine: Refine = None
        if isinstance(refine, dict):
            self.refine = {name: refiners_of(chain) for name, chain in refine.items()}
        elif refine is not None:
            self.refine = refiners_of(refine)
        self.update = None if update is None else by_name(WeightUpdate, update)  # type: ignore[type-abstract]
        self.allocation = None if allocation is None else by_name(Allocation, allocation)  # type: ignore[type-abstract]
        self.schedule = schedule
        self.ignore = list(LM_HEAD) if ignore is None else ignore
        self.only = only

    @property
    def settings(self) -> dict[str, Any]:
        """The method in plain values, as the manifest records it."""
        budget = ("sparsity", "group") if self.pattern is None else ("pattern",)
        rest = ("refine", "update", "allocation", "schedule", "ignore", "only", "when")
        return {name: _plain(getattr(self, name)) for name in ("score", *budget, *rest)}

    def prune(
        self, model: nn.Module, batches: Iterable[Any], forward: Forward | None, progress: Progress
    ) -> PruneResult:
        """See `PruningCallback`."""
        return prune_model(
            model,
            batches,
            score=self.score,
            sparsity=self.sparsity,
            pattern=self.pattern,
            group=self.group,
            refine=self.refine,
            update=self.update,
            allocation=self.allocation,
            schedule=self.schedule,
            ignore=self.ignore,
            only=self.only,
            forward=forward,
            progress=progress,
        )


def pruning_target(module: LightningModule) -> nn.Module:
    """What is pruned of a module, and what layer names are relative to."""
    target: nn.Module = getattr(module, "prunable_model", module)
    return target


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
def _progress(trainer: Trainer) -> Iterator[Progress]:
    if not _watched(trainer):
        yield lambda report, done, total: None
        return
    with layer_bar(Console()) as on_layer:
        yield on_layer


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__, **asdict(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
