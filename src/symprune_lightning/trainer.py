"""A Lightning Trainer with callbacks for one call, and ``prune``.

Longer than 300 lines since the signatures of ``fit``, ``validate`` and ``test`` repeat Lightning's.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from symprune_lightning.callbacks.distillation import Distillation, find_distillation
from symprune_lightning.callbacks.integration import model_name
from symprune_lightning.callbacks.pruning import (
    PruneStage,
    PruningCallback,
    find_pruning_callback,
    pruning_callbacks,
    pruning_hooks,
)
from symprune_lightning.callbacks.recovery import recovery_callbacks, recovery_checkpoint
from symprune_lightning.callbacks.termination import raise_if_terminated
from symprune_lightning.checkpoints.export import (
    check_destination,
    name_unfinished,
    save_checkpoint,
)
from symprune_lightning.checkpoints.manifest import MANIFEST, build_manifest
from symprune_lightning.checkpoints.masks import hash_masks
from symprune_lightning.checkpoints.pretrained import local_folder
from symprune_lightning.checkpoints.streaming import StreamedCheckpoint
from symprune_lightning.checkpoints.weight_files import weight_files
from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.distributed.sharding import full_state_dict
from symprune_lightning.engine.files import hidden_sibling
from symprune_lightning.engine.layers.names import uncompiled
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.errors import PruningWarning
from symprune_lightning.module import CausalLMModule, TransformersModule, pruning_target

Callbacks = Callback | Sequence[Callback] | None


class Trainer(pl.Trainer):
    """Lightning's Trainer, with ``callbacks=`` for one call, and ``prune``.

    Takes the arguments of ``lightning.pytorch.Trainer``. Callbacks passed to ``fit``, ``validate``,
    ``test`` or ``prune`` are used for that call only. Unless a pruning callback has
    ``baseline=False``, ``validate`` and ``test`` evaluate the dense model first.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from symprune_lightning import CalibrationDataModule, CausalLMModule, SymPrune
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> module = CausalLMModule(LlamaForCausalLM(config))
        >>> texts = [[(i * j) % 32 for i in range(32)] for j in range(1, 9)]
        >>> data = CalibrationDataModule(texts, sequences=2, sequence_length=32,
        ...                              evaluation_sequences=2)
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False)
        >>> prune = SymPrune(sparsity=0.5)
        >>> metrics = trainer.validate(module, datamodule=data, callbacks=prune, verbose=False)
        >>> prune.result.sparsity
        0.5
    """

    callbacks: list[Callback]
    """The callbacks passed to the constructor; during a call, also those passed to the call."""

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        *,
        callbacks: Callbacks = None,
    ) -> None:
        """Run the full training routine; see ``lightning.pytorch.Trainer.fit``.

        Args:
            model: The LightningModule to fit.
            train_dataloaders: Training batches.
            val_dataloaders: Validation batches.
            datamodule: Replaces the dataloaders.
            ckpt_path: Checkpoint to resume from.
            weights_only: Passed to ``torch.load`` for ``ckpt_path``.
            callbacks: Callbacks for this call.
        """
        with self._with_callbacks([*self.callbacks, *_as_list(callbacks)]):
            super().fit(
                model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only
            )

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        *,
        callbacks: Callbacks = None,
    ) -> list[Mapping[str, float]]:
        """Evaluate on the validation set; see ``lightning.pytorch.Trainer.validate``.

        Args:
            model: The LightningModule to evaluate.
            dataloaders: Validation batches.
            ckpt_path: Checkpoint to evaluate.
            verbose: Whether to print the metrics.
            datamodule: Replaces the dataloaders.
            weights_only: Passed to ``torch.load`` for ``ckpt_path``.
            callbacks: Callbacks for this call.

        Returns:
            Metrics by dataloader; of the pruned model, if a callback prunes it.
        """
        evaluate = partial(
            super().validate,
            model,
            dataloaders=dataloaders,
            ckpt_path=ckpt_path,
            datamodule=datamodule,
            weights_only=weights_only,
        )
        with self._with_callbacks([*self.callbacks, *_as_list(callbacks)]):
            self._evaluate_dense("validate", model, evaluate, reloads=ckpt_path is not None)
            return evaluate(verbose=verbose)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        *,
        callbacks: Callbacks = None,
    ) -> list[Mapping[str, float]]:
        """Evaluate on the test set; see ``validate``.

        Args:
            model: The LightningModule to evaluate.
            dataloaders: Test batches.
            ckpt_path: Checkpoint to evaluate.
            verbose: Whether to print the metrics.
            datamodule: Replaces the dataloaders.
            weights_only: Passed to ``torch.load`` for ``ckpt_path``.
            callbacks: Callbacks for this call.

        Returns:
            Metrics by dataloader; of the pruned model, if a callback prunes it.
        """
        evaluate = partial(
            super().test,
            model,
            dataloaders=dataloaders,
            ckpt_path=ckpt_path,
            datamodule=datamodule,
            weights_only=weights_only,
        )
        with self._with_callbacks([*self.callbacks, *_as_list(callbacks)]):
            self._evaluate_dense("test", model, evaluate, reloads=ckpt_path is not None)
            return evaluate(verbose=verbose)

    def prune(
        self,
        model: LightningModule,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        output: str | None = None,
        stream: bool = False,
        *,
        callbacks: Callbacks = None,
    ) -> PruneResult:
        """Evaluate, prune, evaluate again, and write the pruned checkpoint.

        With a ``Distillation`` callback, the pruned model is trained with fixed masks for the
        Trainer's ``max_steps`` (or ``max_epochs``) and evaluated once more before it is written.
        The callback's ``sparse_metrics`` and the manifest contain this last evaluation.

        With ``output``, completed blocks, predictions of the dense model and checkpoints of the
        training are kept in ``.<output>.journal`` next to it until the checkpoint is written. After
        a crash, the same call resumes from there.

        Args:
            model: The LightningModule; to write a checkpoint, its ``prunable_model`` must be a
                transformers model, as that of ``TransformersModule``.
            dataloaders: Validation batches.
            datamodule: Replaces the dataloaders; its tokenizer is saved along.
            output: Folder for the checkpoint and its manifest; ``None`` writes nothing.
            stream: Whether to read, prune and write the model block by block, for a model larger
                than memory. No evaluation is run; ``model`` must not be loaded yet.
            callbacks: Callbacks for this call.

        Returns:
            Masks and reports; the model's weights are already zeroed.

        Raises:
            TypeError: ``output`` is given but the module wraps no transformers model.
            ValueError: There is not exactly one pruning callback with ``when="validate"``; an
                argument that streaming needs is missing; or ``Distillation`` has no number of
                steps or no training data.
            OSError: The folder cannot be written; raised before anything runs.
        """
        all_callbacks = [*self.callbacks, *_as_list(callbacks)]
        callback = find_pruning_callback(all_callbacks)
        distillation = find_distillation(all_callbacks)
        if distillation is not None:
            distillation.check_data(self, datamodule)
        module = uncompiled(model)
        if output is not None:
            path = check_destination(output, _checkpoint_size(module))
            name_unfinished(path)
            if (path / MANIFEST).is_file():
                rank_zero_info(f"the checkpoint {path} is replaced when the run is complete")
            if not isinstance(module, TransformersModule) or module.model is not None:
                _transformers_model(module)
        with (
            self._with_callbacks(all_callbacks),
            self._temporary_journal(callback, distillation, output) as folder,
        ):
            if stream:
                return self._prune_streamed(output, model, datamodule, callback)
            self.validate(model, dataloaders, verbose=False, datamodule=datamodule)
            result = callback.result
            if result is None or not callback.has_pruned(model):
                raise ValueError(
                    "nothing was pruned, because the validation set is empty: pass validation "
                    "batches, and check limit_val_batches"
                )
            if distillation is not None:
                self._recover(model, dataloaders, datamodule, distillation, result, folder)
            if output is not None:
                self._save(output, module, datamodule, callback, result)
            self.strategy.barrier()
        return result

    @contextmanager
    def _temporary_journal(
        self, callback: PruningCallback, distillation: Distillation | None, output: str | None
    ) -> Iterator[Path | None]:
        """Use a temporary folder next to the output for journals that the user has not placed.

        Yields:
            The folder; ``None`` without an output.
        """
        if output is None:
            yield None
            return
        folder = hidden_sibling(Path(output).expanduser().resolve(), "journal")
        journal, teacher = callback.journal, None if distillation is None else distillation.folder
        callback.journal = journal or folder
        if distillation is not None:
            distillation.folder = teacher or str(folder / "teacher")
        try:
            yield folder
            if self.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            callback.journal = journal
            if distillation is not None:
                distillation.folder = teacher

    def _recover(
        self,
        model: LightningModule,
        dataloaders: Any,
        datamodule: LightningDataModule | None,
        distillation: Distillation,
        result: PruneResult,
        folder: Path | None,
    ) -> None:
        """Train the pruned model with its zeros kept, and evaluate it again."""
        for hook in pruning_hooks(self):
            hook.on_recovery_start()
        checkpoint = None
        if folder is not None:
            settings = distillation.training_settings(self, model)
            settings["masks"] = hash_masks(result.masks)
            if isinstance(datamodule, CalibrationDataModule):
                settings["data"] = datamodule.settings
            checkpoint = recovery_checkpoint(self, folder, settings)
        limit, self.limit_val_batches = self.limit_val_batches, 0  # evaluated afterwards
        try:
            self.fit(
                model,
                datamodule=datamodule,
                ckpt_path=checkpoint,
                callbacks=recovery_callbacks(result.masks, folder),
            )
        finally:
            self.limit_val_batches = limit
        distillation.record_training(self)
        self.validate(model, dataloaders, verbose=False, datamodule=datamodule)

    def _prune_streamed(
        self,
        output: str | None,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        callback: PruningCallback,
    ) -> PruneResult:
        """Prune a checkpoint block by block, with the callbacks of this call."""
        if output is None or not isinstance(datamodule, CalibrationDataModule):
            raise ValueError("stream=True needs an output folder and a CalibrationDataModule")
        if not isinstance(module, CausalLMModule) or module.model is not None:
            raise ValueError("stream=True needs a CausalLMModule that is not loaded yet")
        if self.world_size > 1:
            raise ValueError("stream=True runs on one process: use devices=1")
        for hook in pruning_hooks(self):
            hook.on_stream_start()
        checkpoint = StreamedCheckpoint(
            module.pretrained,
            output,
            device=self.strategy.root_device,
            trust_remote_code=module.trust_remote_code,
        )
        stored = str(checkpoint.model.dtype).removeprefix("torch.")
        if module.dtype_name not in ("auto", stored):
            warnings.warn(
                f"a streamed checkpoint keeps the dtype of its source, {stored}: "
                f"dtype={module.dtype_name!r} of the module has no effect",
                PruningWarning,
                stacklevel=4,
            )
        with checkpoint, self._streaming(module, datamodule, checkpoint):
            result = callback.run_pruning(self, module, placement=checkpoint)
            manifest = self._manifest(module, datamodule, callback, result)
            checkpoint.save(manifest)
        self._notify_saved(output, manifest)
        return result

    @contextmanager
    def _streaming(
        self,
        module: CausalLMModule,
        datamodule: CalibrationDataModule,
        checkpoint: StreamedCheckpoint,
    ) -> Iterator[None]:
        """Attach module and data, and set up the callbacks, as a loop of Lightning does."""
        module.model = checkpoint.model
        self.strategy.connect(module)  # batches are transferred by the hooks of this module
        self.datamodule: LightningDataModule | None = datamodule
        try:
            for callback in self.callbacks:
                callback.setup(self, module, "validate")
            yield
            for callback in self.callbacks:
                callback.teardown(self, module, "validate")
        finally:
            module.model = None
            self.datamodule = None  # as Lightning does after a call

    def _save(
        self,
        output: str,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        callback: PruningCallback,
        result: PruneResult,
    ) -> None:
        model = _transformers_model(module)
        manifest = self._manifest(module, datamodule, callback, result)
        tokenizer = None
        if isinstance(datamodule, CalibrationDataModule):
            tokenizer = datamodule.tokenizer
        state = full_state_dict(model)
        Communicator.from_default_group().on_rank_zero(
            lambda: str(save_checkpoint(output, model, tokenizer, manifest, result.masks, state))
        )
        if self.is_global_zero:
            self._notify_saved(output, manifest)

    def _notify_saved(self, output: str, manifest: Mapping[str, Any]) -> None:
        path = Path(output).expanduser().resolve()
        for hook in pruning_hooks(self):
            hook.on_checkpoint_saved(path, manifest)

    def _manifest(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        callback: PruningCallback,
        result: PruneResult,
    ) -> dict[str, Any]:
        distillation = find_distillation(self.callbacks)
        limit: Any = self.limit_val_batches
        is_whole = limit is None or (isinstance(limit, float) and limit == 1)  # 1 is one batch
        return build_manifest(
            result,
            limit_val_batches=None if is_whole else limit,
            model=model_name(module),
            architecture=type(pruning_target(module)).__name__,
            settings=callback.settings,
            datamodule=datamodule if isinstance(datamodule, CalibrationDataModule) else None,
            distillation=None if distillation is None else distillation.settings,
            dense=callback.dense_metrics,
            pruned=callback.sparse_metrics,
        )

    def _evaluate_dense(
        self,
        stage: PruneStage,
        model: LightningModule | None,
        evaluate: Callable[..., list[Mapping[str, float]]],
        *,
        reloads: bool,
    ) -> None:
        """Evaluate the dense model if a pruning callback wants a baseline."""
        module = self.lightning_module if model is None else uncompiled(model)
        requesting = [
            callback
            for callback in pruning_callbacks(self.callbacks, stage)
            if callback.baseline and (reloads or not callback.has_pruned(module))
        ]
        if not requesting:
            return
        others = [c for c in self.callbacks if not isinstance(c, PruningCallback)]
        with self._with_callbacks(others):
            results = evaluate(verbose=False)
            raise_if_terminated(self)
            observers = pruning_hooks(self)
        # the weights of a checkpoint that was loaded may be pruned
        requesting = [callback for callback in requesting if not callback.has_pruned(module)]
        if not requesting:
            return
        metrics = {name: value for part in results for name, value in part.items()}
        for hook in [*requesting, *observers]:
            hook.on_dense_evaluation_end(metrics)

    @contextmanager
    def _with_callbacks(self, callbacks: list[Callback]) -> Iterator[None]:
        """Temporarily install callbacks (Checkpoint callbacks last, as Lightning requires)."""
        before = self.callbacks
        self.callbacks = sorted(callbacks, key=lambda c: isinstance(c, Checkpoint))
        try:
            yield
        finally:
            self.callbacks = before


def _checkpoint_size(module: LightningModule) -> int:
    """Return the size of a checkpoint's weights and masks in bytes; 0 if it is not known yet."""
    if isinstance(module, TransformersModule) and module.model is None:
        folder = local_folder(module.pretrained)
        if folder is None or module.dtype_name != "auto":
            return 0
        try:
            names = set(weight_files(folder).values())
            return sum((folder / name).stat().st_size for name in names)
        except OSError:  # reported when the model is loaded
            return 0
    parameters = list(pruning_target(module).parameters())
    return sum(p.numel() * p.element_size() + p.numel() // 8 for p in parameters)


def _transformers_model(module: LightningModule) -> PreTrainedModel:
    model = pruning_target(module)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"output= writes transformers models, and {type(model).__name__} is not one: set the "
            f"attribute `prunable_model` to the transformers model, or use Trainer.save_checkpoint"
        )
    return model


def _as_list(callbacks: Callbacks) -> list[Callback]:
    if callbacks is None:
        return []
    return [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
