"""Base class of callbacks that prune.

Longer than 300 lines since the hooks of Lightning share the state of a run.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from symprune_lightning.callbacks.finetuning import MaskedFinetuning
from symprune_lightning.callbacks.integration import (
    calibration_batches,
    calibration_datamodule,
    calibration_forward,
    calibration_loss,
    communicator_of,
    metrics_of,
    refuse_spawned_processes,
    refuse_strategies,
    trainer_callbacks,
    transfer_batches,
    weight_averages,
)
from symprune_lightning.callbacks.progress import print_summary, progress_hooks
from symprune_lightning.callbacks.schedule import CubicSchedule
from symprune_lightning.callbacks.termination import stop_on_sigterm
from symprune_lightning.checkpoints.masks import apply_masks
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.layers.names import uncompiled
from symprune_lightning.engine.placement import WeightPlacement
from symprune_lightning.engine.prune import RunOptions
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.errors import PruningWarning
from symprune_lightning.module import pruning_target

PruneStage = Literal["validate", "test", "fit_start", "fit_end"]
"""Before ``validate`` or ``test`` evaluates, before the first or after the last training step."""

When = PruneStage | CubicSchedule
"""When a callback prunes: once at a stage, or gradually while the model trains."""


class PruningCallback(Callback, PruningHooks, ABC):
    """Base class of callbacks that prune: finds data and stage, and calls ``prune``.

    Life cycle: at the stage that ``when`` names (never in the sanity check, never in the
    validation inside ``fit``) the callback takes the calibration batches, moves each to the
    module's device, and calls ``prune`` once for each module. Evaluation or training then
    continues with the sparse weights. Callbacks of the same Trainer that are ``PruningHooks``
    observe the run.

    With several ranks, each takes every n-th of these batches, undivided, whatever their number.
    The loader must therefore yield all of them on every rank (no distributed sampler); no batch is
    dropped or counted twice.

    Calibration data: the ``calibration`` argument; else ``calibration_dataloader()`` of the data
    module; else ``calibration_dataloader()`` of the LightningModule.

    A batch is given to the module's ``calibration_step(batch)`` if it has one, else to the module
    itself: mappings as keyword arguments (whole to a ``forward`` that requires one argument and
    takes none of the keys), tuples and lists as positional ones. A module may name the submodule to
    prune in an attribute ``prunable_model``; layer names are then relative to it.

    Args:
        when: ``"validate"``, ``"test"``, ``"fit_start"``, ``"fit_end"``; or
            ``CubicSchedule(end=1000)`` to prune gradually while the model trains (keep the zeros
            with a ``MaskedFinetuning`` callback).
        calibration: Calibration batches, in place of the data module's.
        baseline: Whether ``symprune_lightning.Trainer`` evaluates the dense model first.
            Lightning's own Trainer evaluates once, after pruning.
        journal: Folder in which finished blocks are recorded; the same run resumes from it after a
            crash. With ``None``, ``Trainer.prune`` uses one next to its output.

    Attributes:
        result: Result of the last run, ``None`` before.
        seconds: Time of the last run: calibration forward, scores, masks, refining.
        dense_metrics: Metrics of the dense model, empty without a baseline.
        sparse_metrics: Metrics of the pruned model at its last evaluation; after training with
            ``Distillation``, of the trained one.

    Raises:
        ValueError: ``when`` is unknown, or a schedule is combined with a journal or an iterator.
    """

    def __init__(
        self,
        *,
        when: When = "validate",
        calibration: Iterable[Any] | None = None,
        baseline: bool = True,
        journal: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(when, CubicSchedule) and when not in get_args(PruneStage):
            raise ValueError(
                f"when is {when!r}; choose one of {get_args(PruneStage)}, or CubicSchedule(…)"
            )
        if isinstance(when, CubicSchedule) and journal is not None:
            raise ValueError(
                "journal= cannot be combined with CubicSchedule; resume from Lightning's "
                "checkpoints instead"
            )
        if isinstance(when, CubicSchedule) and isinstance(calibration, Iterator):
            raise ValueError(
                f"calibration is a {type(calibration).__name__}, which can be read once, and "
                f"CubicSchedule reads it at every step that prunes: pass a list or a data loader"
            )
        self.when: When = when
        self.journal = journal
        self.calibration = calibration
        self.baseline = baseline
        self.result: PruneResult | None = None
        self.seconds = 0.0
        self.dense_metrics: dict[str, float] = {}
        self.sparse_metrics: dict[str, float] = {}
        self._pruned_module: weakref.ref[LightningModule] | None = None
        self._resumed = False
        self._called_module: weakref.ref[LightningModule] | None = None
        self._last_step = -1
        self._initial_sparsity: dict[str, float] | None = None
        self._is_done = False

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The method as JSON values, as recorded in the manifest."""

    @abstractmethod
    def prune(
        self, model: nn.Module, batches: Iterable[Any], fraction: float, options: RunOptions
    ) -> PruneResult:
        """Prune ``model`` in place.

        Args:
            model: The module, or its ``prunable_model``.
            batches: This rank's calibration batches, on the module's device.
            fraction: Fraction of the final sparsity to reach now; 1 unless pruning is gradual.
            options: Run options, as for ``prune_with``.
        """

    @property
    def state_key(self) -> str:
        """Key in checkpoints, which differs for callbacks with other settings."""
        # Lightning prints it, and settings are long
        digest = hashlib.sha256(
            json.dumps(self.settings, sort_keys=True, default=str).encode()
        ).hexdigest()
        return self._generate_state_key(when=str(self.when), settings=digest[:8])

    def state_dict(self) -> dict[str, Any]:
        """Return whether the checkpoint's weights are pruned, and the state of a schedule."""
        called = None if self._called_module is None else self._called_module()
        if not self._resumed and (called is None or not self._is_result_of(called)):
            return {}
        return {
            "pruned": True,
            "step": self._last_step,
            "initial_sparsity": self._initial_sparsity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the flag that the checkpoint contains pruned weights, and a schedule's state."""
        self._resumed = bool(state_dict["pruned"])
        self._last_step = int(state_dict["step"])
        self._initial_sparsity = state_dict["initial_sparsity"]

    def _is_result_of(self, module: LightningModule) -> bool:
        """Return whether ``result`` is that of a module, whose weights may have changed since."""
        if self.result is None or self._pruned_module is None:
            return False
        return self._pruned_module() is uncompiled(module)

    def __getstate__(self) -> dict[str, Any]:
        # weak references cannot be pickled
        return {**self.__dict__, "_pruned_module": None, "_called_module": None}

    def has_pruned(self, module: LightningModule) -> bool:
        """Return whether this callback has pruned ``module`` and its pruned weights are still zero.

        They may not be after dense weights were loaded, or after a fit that does not keep zeros.
        """
        if self.result is None or not self._is_result_of(module):
            return False
        return self.result.is_applied_to(pruning_target(module))

    def run_pruning(
        self,
        trainer: Trainer,
        module: LightningModule,
        fraction: float = 1.0,
        placement: WeightPlacement | None = None,
    ) -> PruneResult:
        """Prune a module with its Trainer's data, precision, ranks and callbacks.

        Args:
            trainer: The Trainer.
            module: The module.
            fraction: Fraction of the final sparsity to reach.
            placement: Placement of the weights, if they are not in memory.
        """
        communicator = communicator_of(trainer)
        datamodule = calibration_datamodule(trainer)
        if datamodule is not None:
            datamodule.sample()  # while the model is dense and runs as usual
        batches = communicator.shard(calibration_batches(trainer, module, self.calibration))
        observers = [hook for hook in pruning_hooks(trainer) if hook is not self]
        start = time.perf_counter()
        with progress_hooks(trainer) as progress, stop_on_sigterm(trainer, communicator) as stop:
            self.result = self.prune(
                pruning_target(module),
                transfer_batches(batches, trainer),
                fraction,
                RunOptions(
                    forward=calibration_forward(trainer, module),
                    loss=calibration_loss(module),
                    placement=placement,
                    communicator=communicator,
                    journal=self.journal,
                    hooks=[*progress, *observers, stop],
                    initial_sparsity=self._initial_sparsity,
                ),
            )
        self.seconds = time.perf_counter() - start
        self._is_done = True
        # weights that a placement has unloaded cannot be checked again
        self._pruned_module = weakref.ref(module) if placement is None else None
        self.sparse_metrics = {}
        return self.result

    def on_dense_evaluation_end(self, metrics: Mapping[str, float]) -> None:
        """Store the metrics of the dense model."""
        self.dense_metrics = dict(metrics)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which layers cannot be read and written.

        Raises:
            ValueError: The strategy is ``FSDPStrategy`` or ``DeepSpeedStrategy``, or starts
                processes that do not return the pruned model, as ``ddp_spawn`` does.
        """
        refuse_strategies(self, trainer)
        if stage in ("validate", "test"):
            refuse_spawned_processes(self, trainer)
        self._called_module = weakref.ref(pl_module)
        self._is_done = False
        if stage == "fit":  # before the state of a checkpoint is restored
            self._last_step, self._resumed, self._initial_sparsity = -1, False, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the call has not pruned as ``when`` says, or if the zeros are lost.

        Other callbacks may have replaced the weights at the end of a fit, and a fit without
        ``MaskedFinetuning`` trains pruned weights again.
        """
        own = "fit" if isinstance(self.when, CubicSchedule) else self.when.partition("_")[0]
        # Tuner.lr_find and scale_batch_size end the fit before training starts
        if any(getattr(callback, "_early_exit", False) for callback in trainer_callbacks(trainer)):
            return
        # the weights of a checkpoint may be pruned
        if stage != own and not self._is_result_of(pl_module) and trainer.ckpt_path is None:
            rank_zero_info(
                f"{type(self).__name__}(when={self.when!r}) prunes in Trainer.{own}, and has "
                f"pruned nothing in this call of Trainer.{TrainerFn(stage).value}"
            )
        # a schedule may begin later than the fit ends, of which _check_schedule warns
        has_run = isinstance(self.when, CubicSchedule) and trainer.global_step > 0
        if stage == own and not self._is_done and not self._resumed and not has_run:
            warn(
                f"{type(self).__name__}(when={self.when!r}) pruned nothing in this {own}: no "
                f"batch was run (an empty loader, or a limit of 0 batches)"
            )
        if stage == "fit":
            self._check_schedule(trainer)
            self._check_zeros(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before ``Trainer.validate`` evaluates."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._maybe_prune("validate", trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before ``Trainer.test`` evaluates."""
        self._maybe_prune("test", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before the first training step.

        Not if the fit resumes from a checkpoint with weights that this callback has pruned.
        Earlier hooks run before the weights of a sharded checkpoint are loaded.
        """
        in_fit = isinstance(self.when, CubicSchedule) or self.when == "fit_start"
        keeps_zeros = any(isinstance(c, MaskedFinetuning) for c in trainer_callbacks(trainer))
        is_adapted = hasattr(pruning_target(pl_module), "peft_config")  # its weights are frozen
        if in_fit and not keeps_zeros and not is_adapted:
            warn(
                f"{type(self).__name__}(when={self.when!r}) prunes a model that is then trained, "
                f"which makes pruned weights nonzero again: add MaskedFinetuning() to the callbacks"
            )
        if not self._resumed:
            self._maybe_prune("fit_start", trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune further, if the schedule says so before the next optimizer step."""
        step = trainer.global_step
        if isinstance(self.when, CubicSchedule) and self.when.is_due(step, self._last_step):
            result = self.run_pruning(trainer, pl_module, self.when.fraction(step))
            # the first step that prunes a layer decides, also if a later one does not reach it
            measured = {x.name: x.initial_sparsity for x in result.layers}
            self._initial_sparsity = measured | (self._initial_sparsity or {})
            self._last_step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune after the last training step.

        Checkpoint callbacks have written dense weights before; ``Trainer.save_checkpoint`` after
        the fit writes sparse ones.
        """
        self._maybe_prune("fit_end", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the pruned model."""
        if self.when == "validate" and trainer.state.fn == TrainerFn.VALIDATING:
            self._record_metrics(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the pruned model."""
        if self.when == "test":
            self._record_metrics(trainer, pl_module)

    def _maybe_prune(self, stage: PruneStage, trainer: Trainer, module: LightningModule) -> None:
        if stage != self.when:
            return
        if self.has_pruned(module):
            self._is_done = True
            return
        result = self.run_pruning(trainer, module)
        for average in weight_averages(trainer, module):
            # Lightning evaluates and saves the averages of an earlier fit in place of the module
            if stage == "fit_end":
                apply_masks(pruning_target(average), result.masks)
            elif stage != "fit_start":  # MaskedFinetuning masks them when training starts
                average.load_state_dict(module.state_dict())
        if stage in ("fit_start", "fit_end"):  # callback_metrics belong to the dense model
            print_summary(trainer, result, self.dense_metrics, {})

    def _check_schedule(self, trainer: Trainer) -> None:
        if isinstance(self.when, CubicSchedule) and self._last_step < self.when.end:
            fraction = self.when.fraction(max(self._last_step, self.when.start))
            warn(
                f"the fit ended at step {trainer.global_step}, before the end of {self.when}: the "
                f"model has {fraction:.0%} of the final sparsity"
            )

    def _check_zeros(self, module: LightningModule) -> None:
        """Compare the weights with the result at the end of a fit."""
        if self.result is None or not self._is_result_of(module):
            return
        if not self.result.is_applied_to(pruning_target(module)):
            warn(
                f"weights that {type(self).__name__} pruned are not zero at the end of this fit, "
                f"so the model has fewer zeros than PruneResult.sparsity says "
                f"({self.result.sparsity:.4f}): add MaskedFinetuning() to the callbacks, and check "
                f"callbacks that replace the weights"
            )

    def _record_metrics(self, trainer: Trainer, module: LightningModule) -> None:
        """Store the metrics of the pruned model and print the summary if interactive."""
        if self.result is not None and self.has_pruned(module):
            self.sparse_metrics = dict(metrics_of(trainer))
            print_summary(trainer, self.result, self.dense_metrics, self.sparse_metrics)


def warn(message: str) -> None:
    """Warn from a hook of a Trainer."""
    warnings.warn(message, PruningWarning, stacklevel=3)


def pruning_hooks(trainer: Trainer) -> list[PruningHooks]:
    """Return the callbacks of a Trainer that observe pruning runs."""
    return [c for c in trainer_callbacks(trainer) if isinstance(c, PruningHooks)]


def pruning_callbacks(
    callbacks: Sequence[Callback], when: When | None = None
) -> list[PruningCallback]:
    """Return the callbacks that prune at a stage, or at any."""
    pruning = (c for c in callbacks if isinstance(c, PruningCallback))
    return [c for c in pruning if when is None or c.when == when]


def find_pruning_callback(callbacks: Sequence[Callback]) -> PruningCallback:
    """Return the callback that prunes before ``validate``.

    Raises:
        ValueError: There is not exactly one.
    """
    candidates = pruning_callbacks(callbacks, "validate")
    if len(candidates) != 1:
        raise ValueError(
            f"exactly one pruning callback with when='validate' is required, such as SymPrune(); "
            f"there are {len(candidates)}"
        )
    return candidates[0]
