"""Recovery of a pruned model by distillation from the dense one.

Longer than 300 lines since storing the predictions and adding them to batches share their names.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import load_file, save_file
from torch import Tensor

from symprune_lightning.callbacks.finetuning import prunes_gradually
from symprune_lightning.callbacks.integration import (
    calibration_forward,
    communicator_of,
    transfer_batches,
)
from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.eval_mode import eval_mode
from symprune_lightning.engine.files import atomic_file
from symprune_lightning.engine.fingerprint import hash_weights
from symprune_lightning.engine.forward.calibration import logits_of
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.functional.distillation import TeacherTokens
from symprune_lightning.module import TEACHER_INDICES, TEACHER_LOG_PROBS, pruning_target


class Distillation(Callback, PruningHooks):
    """Trains the pruned model on the predictions of the dense model.

    Before the first layer is pruned, the dense model runs once over the training batches, and the
    log-probabilities of its ``top_k`` most probable tokens at each position are stored. During
    ``fit``, they are added to each batch as ``"teacher_indices"`` and ``"teacher_log_probs"``, each
    ``(batch, tokens, top_k)``. ``CausalLMModule.training_step`` then minimises `distillation_loss`
    in place of the cross-entropy. No second model is in memory.

    With ``Trainer.prune``, the pruned model is trained for the Trainer's ``max_steps`` or
    ``max_epochs`` with fixed masks, and evaluated again. In a ``fit`` of any Trainer, use it
    together with ``MaskedFinetuning`` and ``SymPrune(when="fit_start")`` or a ``CubicSchedule``.

    Training batches are mutable mappings with ``"input_ids"``, from the data module's
    ``train_dataloader`` or the loader of the ``fit``. Every pass must yield the same sequences, in
    any order.

    Args:
        top_k: Number of stored tokens per position, 8 bytes each. Default: 64.
        folder: Folder of the predictions, one file per sequence; must be visible to all ranks.
            Required to resume a ``fit`` in another process. Default: ``None``, which uses
            ``.<output>.journal/teacher`` in ``Trainer.prune(output=…)``, else a temporary folder.

    Raises:
        ValueError: ``top_k`` is below 1. In ``fit``: predictions for a training sequence are not
            stored, or a batch is not a mapping with ``"input_ids"``. In ``Trainer.prune``:
            ``stream=True``, or the number of steps or the training data is missing.

    Examples:
        >>> Distillation(top_k=32).top_k
        32
    """

    def __init__(self, top_k: int = 64, folder: str | None = None) -> None:
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        self.top_k = top_k
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._stored: Path | None = None
        self._run: tuple[Trainer, LightningModule] | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._keeps_stored = False
        self._training: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings and the steps taken, as recorded in the manifest."""
        return {"top_k": self.top_k, **self._training}

    def check_data(self, trainer: Trainer, datamodule: LightningDataModule | None) -> None:
        """Check the number of training steps and the training data before the run starts.

        Raises:
            ValueError: Neither ``max_steps`` nor ``max_epochs`` is set, there is no training data,
                or the Trainer was used before.
        """
        if trainer.global_step > 0:
            raise ValueError(
                f"this Trainer has taken {trainer.global_step} steps already, which count towards "
                f"its max_steps: prune with a new Trainer"
            )
        if trainer.max_steps == -1 and trainer.max_epochs is None:
            raise ValueError(
                "Distillation trains for the Trainer's max_steps or max_epochs, and neither is "
                "set: pass Trainer(max_steps=300), for example"
            )
        if datamodule is None:
            raise ValueError(
                "Distillation takes its training batches from a data module: pass datamodule=, "
                "such as CalibrationDataModule(training_sequences=…)"
            )
        if isinstance(datamodule, CalibrationDataModule) and not datamodule.training_sequences:
            raise ValueError(
                "Distillation needs training data: set training_sequences, or pass a data module "
                "with a train_dataloader"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_module": None}  # as PruningCallback

    def state_dict(self) -> dict[str, Any]:
        """Return the folder of the stored tokens, for a ``fit`` that resumes."""
        return {} if self._stored is None else {"folder": str(self._stored)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the folder."""
        self._stored = Path(state_dict["folder"])
        self._keeps_stored = True  # the weights of the checkpoint are pruned

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the module, whose dense weights are needed later."""
        self._run = trainer, pl_module
        self._keeps_stored = False
        # predictions that were stored when this module was pruned are for the fit that follows
        if self._module is None or self._module() is not pl_module:
            self._stored = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Drop the module."""
        self._run = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the module."""
        self._run = None

    def on_stream_start(self) -> None:
        """Refuse a model that is not in memory.

        Raises:
            ValueError: Always.
        """
        raise ValueError("Distillation trains the model, which cannot be combined with streaming")

    def on_pruning_start(self, layers: Sequence[str]) -> None:
        """Run the dense model over the training batches, and store its predictions."""
        if self._run is not None and not self._keeps_stored:
            self._store_all(*self._run)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the predictions of a model that is pruned while it trains."""
        if self._stored is None and prunes_gradually(trainer):
            self._store_all(trainer, pl_module)

    def _store_all(self, trainer: Trainer, module: LightningModule) -> None:
        communicator = communicator_of(trainer)
        folder = self._folder(communicator) / hash_weights(pruning_target(module))[:16]
        folder.mkdir(parents=True, exist_ok=True)
        error = None
        try:
            batches = _in_lockstep(_training_loader(trainer), communicator)
            with torch.inference_mode(False), torch.no_grad(), eval_mode(module):
                for batch, is_own in batches:
                    writes = is_own and communicator.contributes
                    self._store(trainer, module, batch, folder if writes else None)
        except Exception as raised:  # reported to the other ranks
            error = raised
        communicator.all_reduce_min(0, error)
        self._stored, self._module = folder, weakref.ref(module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the dense model's predictions to a batch."""
        self._keeps_stored = True  # from now on a schedule prunes a model that is trained
        folder, rows = self._stored, _rows(batch)
        files = [] if folder is None else [folder / _file_name(row, self.top_k) for row in rows]
        missing = len(rows) - sum(file.is_file() for file in files)
        if missing:
            raise ValueError(
                f"the dense model's predictions for {missing} of {len(rows)} sequences of "
                f"training batch {batch_idx} are not stored: prune in the same run "
                f"(SymPrune(when='fit_start') or Trainer.prune), and let the training loader yield "
                f"the same sequences in every pass"
            )
        tokens = [load_file(file) for file in files]
        for key in (TEACHER_INDICES, TEACHER_LOG_PROBS):
            stacked = torch.stack([sequence[key] for sequence in tokens])
            batch[key] = stacked.to(batch["input_ids"].device)

    def training_settings(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return what must agree for an interrupted training to be resumed, as JSON values."""
        return {
            "teacher": None if self._stored is None else self._stored.name,
            "top_k": self.top_k,
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
            "module": {key: repr(value) for key, value in module.hparams.items()},
        }

    def record_training(self, trainer: Trainer) -> None:
        """Record how the model was trained; also if a resumed ``fit`` had no step left."""
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[0]
        self._training = {
            "steps": trainer.global_step,
            "optimizer": type(optimizer).__name__,
            "learning_rate": group.get("initial_lr", group["lr"]),
        }

    def _store(
        self, trainer: Trainer, module: LightningModule, batch: Any, folder: Path | None
    ) -> None:
        """Run the dense model on a batch, and write its predictions if there is a folder."""
        rows = _rows(batch)
        files = [] if folder is None else [folder / _file_name(row, self.top_k) for row in rows]
        if trainer.world_size == 1 and all(file.is_file() for file in files):
            return  # stored by a run that was interrupted
        (moved,) = transfer_batches([batch], trainer)
        output = calibration_forward(trainer, module)(pruning_target(module), moved)
        logits = logits_of(output)
        if logits is None:
            raise ValueError(
                f"Distillation needs logits, but the forward returned {type(output).__name__}: "
                f"return them from calibration_step(batch) of the LightningModule"
            )
        tokens = TeacherTokens.of(logits, self.top_k)
        for i, file in enumerate(files):
            parts = {TEACHER_INDICES: tokens.indices[i], TEACHER_LOG_PROBS: tokens.log_probs[i]}
            # ranks may have equal sequences
            with atomic_file(file, f"partial-{trainer.global_rank}") as tmp:
                save_file({key: part.contiguous().cpu() for key, part in parts.items()}, tmp)

    def _folder(self, communicator: Communicator) -> Path:
        """Return the folder of all runs, the same on all ranks."""
        if self.folder is not None:
            return Path(self.folder).expanduser().resolve()
        path = None
        if communicator.rank == 0:
            self._temporary = tempfile.TemporaryDirectory(prefix="symprune-teacher-")
            path = self._temporary.name
        return Path(communicator.broadcast_text(path))


def find_distillation(callbacks: Sequence[Callback]) -> Distillation | None:
    """Return the callback that distils.

    Raises:
        ValueError: There are several.
    """
    candidates = [callback for callback in callbacks if isinstance(callback, Distillation)]
    if len(candidates) > 1:
        raise ValueError(f"there are {len(candidates)} Distillation callbacks: use one")
    return candidates[0] if candidates else None


def refuse_distillation(callbacks: Sequence[Callback], command: str) -> None:
    """Raise ``ValueError`` if there is a callback that distils, for a command that never trains."""
    if find_distillation(callbacks) is not None:
        raise ValueError(
            f"{command} does not train, so Distillation would have no effect: remove it from "
            f"trainer.callbacks, or use symprune prune"
        )


def _training_loader(trainer: Trainer) -> Any:
    """Return the loader of the training batches, before it is divided among ranks.

    Raises:
        ValueError: There is none.
    """
    if trainer.state.fn == TrainerFn.FITTING:
        # Trainer.train_dataloader has a distributed sampler
        return trainer.fit_loop._data_source.dataloader()
    datamodule = getattr(trainer, "datamodule", None)  # set by Lightning during a call
    if datamodule is None:
        raise ValueError(
            "Distillation needs training batches: use a data module with a train_dataloader, such "
            "as CalibrationDataModule(training_sequences=…)"
        )
    datamodule.setup("fit")  # as the fit that follows will do
    return datamodule.train_dataloader()


def _in_lockstep(loader: Any, communicator: Communicator) -> Iterator[tuple[Any, bool]]:
    """Yield this rank's batches, and the first one until all ranks have had equally many.

    A sharded model runs on all ranks at once. The second value is False for these repetitions.

    Raises:
        ValueError: The loader has no length, or is empty.
    """
    try:
        count = len(loader)
    except TypeError as error:
        raise ValueError(
            "Distillation stores a prediction for every training sequence, so the training loader "
            "must have a length"
        ) from error
    if not count:
        raise ValueError("the training loader is empty: pass at least one batch")
    size, first = communicator.data_world_size, None
    # a loader that shuffles has the same order on all ranks, and leaves the global generator alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i, batch in enumerate(loader):
            first = batch if first is None else first
            if i % size == communicator.data_rank:
                yield batch, True
        if count % size and communicator.data_rank >= count % size:
            yield first, False


def _rows(batch: Any) -> list[Tensor]:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise ValueError(
            f"Distillation needs training batches that are mappings with input_ids, but got "
            f"{type(batch).__name__}"
        )
    return list(batch["input_ids"])


def _file_name(row: Tensor, top_k: int) -> str:
    """Return the file of a sequence, by its tokens: loaders shuffle, ranks exchange sequences."""
    data = row.cpu().numpy().astype("<i8").tobytes()
    return f"{hashlib.sha256(data + str(top_k).encode()).hexdigest()[:32]}.safetensors"
