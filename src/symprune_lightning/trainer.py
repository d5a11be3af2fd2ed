"""A Lightning Trainer that takes callbacks for one call, and prunes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from transformers import PreTrainedModel

from symprune_lightning.callbacks import (
    Moment,
    PruningCallback,
    RunOptions,
    layer_progress,
    pruning_target,
    score_watcher,
)
from symprune_lightning.datamodule import CalibrationDataModule
from symprune_lightning.engine.layers import LM_HEAD
from symprune_lightning.engine.parallel import ALONE, whole_state
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.export import check_destination, manifest_of, save_checkpoint
from symprune_lightning.files import hidden
from symprune_lightning.module import CausalLMModule
from symprune_lightning.streaming import StreamedCheckpoint

Callbacks = Callback | Sequence[Callback] | None


class Trainer(pl.Trainer):
    """Lightning's Trainer, with ``callbacks=`` for one call, and ``prune``.

    Takes the arguments of ``lightning.pytorch.Trainer``. Callbacks given to ``fit``, ``validate``,
    ``test`` or ``prune`` are there for that call only. Unless a pruning callback says
    ``baseline=False``, ``validate`` and ``test`` evaluate the dense model first.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from symprune_lightning import CalibrationDataModule, CausalLMModule, SymPrune
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> module = CausalLMModule(LlamaForCausalLM(config))
        >>> data = CalibrationDataModule([list(range(32))] * 4, sequences=2, sequence_length=32,
        ...                              evaluation_sequences=2)
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False)
        >>> prune = SymPrune(sparsity=0.5)
        >>> metrics = trainer.validate(module, datamodule=data, callbacks=prune, verbose=False)
        >>> prune.result.sparsity
        0.5
    """

    callbacks: list[Callback]
    """Those given to the constructor, and in a call those given to the call."""

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
        """Run the full training routine.

        Args:
            model: As for Lightning's Trainer, like all but the last.
            train_dataloaders: Training batches.
            val_dataloaders: Validation batches.
            datamodule: In place of dataloaders.
            ckpt_path: Checkpoint to resume from.
            weights_only: How ``ckpt_path`` is read.
            callbacks: Callbacks for this call.
        """
        with self._with([*self.callbacks, *_listed(callbacks)]):
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
        """Evaluate on the validation set.

        Args:
            model: As for Lightning's Trainer, like all but the last.
            dataloaders: Validation batches.
            ckpt_path: Checkpoint to evaluate.
            verbose: Print the metrics.
            datamodule: In place of dataloaders.
            weights_only: How ``ckpt_path`` is read.
            callbacks: Callbacks for this call.

        Returns:
            Metrics by dataloader; of the pruned model, if a callback pruned it.
        """
        evaluate = partial(
            super().validate,
            model,
            dataloaders=dataloaders,
            ckpt_path=ckpt_path,
            datamodule=datamodule,
            weights_only=weights_only,
        )
        with self._with([*self.callbacks, *_listed(callbacks)]):
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
        """Evaluate on the test set.

        Args:
            model: As for Lightning's Trainer, like all but the last.
            dataloaders: Test batches.
            ckpt_path: Checkpoint to evaluate.
            verbose: Print the metrics.
            datamodule: In place of dataloaders.
            weights_only: How ``ckpt_path`` is read.
            callbacks: Callbacks for this call.

        Returns:
            Metrics by dataloader; of the pruned model, if a callback pruned it.
        """
        evaluate = partial(
            super().test,
            model,
            dataloaders=dataloaders,
            ckpt_path=ckpt_path,
            datamodule=datamodule,
            weights_only=weights_only,
        )
        with self._with([*self.callbacks, *_listed(callbacks)]):
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

        Args:
            model: A module; to write a checkpoint, one whose ``prunable_model`` is a transformers
                model, such as ``CausalLMModule``.
            dataloaders: Validation batches.
            datamodule: In place of dataloaders; its tokenizer is saved along.
            output: Folder for the checkpoint and its manifest; ``None`` writes nothing.
            stream: Read, prune and write the model block by block, for one that is larger than
                memory. It is not evaluated then, and ``model`` has to be one that is not loaded.
            callbacks: Callbacks for this call.

        While it runs, a folder ``.<output>.journal`` beside the output holds what is finished. A
        run that was killed goes on from there when the same is called again.

        Returns:
            Masks and reports; the model's weights are zeroed.

        Raises:
            TypeError: A checkpoint is asked for, of what is no transformers model.
            ValueError: There is not exactly one pruning callback with ``when="validate"``; or what
                is needed to stream is missing.
            OSError: The folder can't be written to; said before anything is run.
        """
        together = [*self.callbacks, *_listed(callbacks)]
        callback = _only_pruning(together)
        if output is not None:
            check_destination(output)
            if not isinstance(model, CausalLMModule):
                _transformers_model(model)
        with self._journalled(callback, output):
            if stream:
                return self._stream(output, model, datamodule, callback)
            self.validate(
                model, dataloaders, verbose=False, datamodule=datamodule, callbacks=callbacks
            )
            result = callback.result
            if result is None or not callback.has_pruned(model):
                raise ValueError("nothing was pruned: are there validation batches?")
            if output is not None:
                self._save(output, model, datamodule, callback, result, together)
            self.strategy.barrier()
        return result

    @contextmanager
    def _journalled(self, callback: PruningCallback, output: str | None) -> Iterator[None]:
        """Have a journal beside the output until that is written; one of the user's own stays."""
        if output is None or callback.journal is not None:
            yield
            return
        path = Path(output).expanduser().absolute()
        callback.journal = hidden(path, "journal")
        try:
            yield
            if self.is_global_zero:
                shutil.rmtree(callback.journal, ignore_errors=True)
        finally:
            callback.journal = None

    def _stream(
        self,
        output: str | None,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        callback: PruningCallback,
    ) -> PruneResult:
        if output is None or not isinstance(datamodule, CalibrationDataModule):
            raise ValueError("stream needs an output folder and a CalibrationDataModule")
        if not isinstance(module, CausalLMModule) or module.model is not None:
            raise ValueError("stream needs a CausalLMModule that names a checkpoint")
        if self.world_size > 1:
            raise ValueError("stream runs in one process: use devices=1")
        device = self.strategy.root_device
        checkpoint = StreamedCheckpoint(
            module.pretrained,
            output,
            device=device,
            ignore=getattr(callback, "ignore", LM_HEAD),
            trust_remote_code=module.trust_remote_code,
        )
        batches = (
            {name: x.to(device) for name, x in batch.items()}
            for batch in datamodule.calibration_dataloader()
        )
        with checkpoint, layer_progress(self) as progress:
            run = RunOptions(
                forward=None,
                ranks=ALONE,
                journal=callback.journal,
                on_scores=score_watcher(self),
                progress=progress,
            )
            start = time.perf_counter()
            result = callback.prune(checkpoint, batches, 1.0, **run)
            callback.result, callback.seconds = result, time.perf_counter() - start
            checkpoint.finish(self._manifest(module, datamodule, callback, result))
        return result

    def _save(
        self,
        output: str,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        callback: PruningCallback,
        result: PruneResult,
        callbacks: Sequence[Callback],
    ) -> None:
        model = _transformers_model(module)
        manifest = self._manifest(module, datamodule, callback, result)
        ours = datamodule if isinstance(datamodule, CalibrationDataModule) else None
        tokenizer = None if ours is None else ours.tokenizer
        state = whole_state(model)
        if self.is_global_zero:
            path = save_checkpoint(output, model, tokenizer, manifest, result.masks, state)
            for writer in (c for c in callbacks if hasattr(c, "write_report")):
                writer.write_report(path, manifest)

    @staticmethod
    def _manifest(
        module: LightningModule,
        datamodule: LightningDataModule | None,
        callback: PruningCallback,
        result: PruneResult,
    ) -> dict[str, Any]:
        named = getattr(module, "pretrained", None)
        return manifest_of(
            result,
            model=str(named or _transformers_model(module).config.name_or_path),
            settings=callback.settings,
            data=datamodule.settings if isinstance(datamodule, CalibrationDataModule) else None,
            dense=callback.dense_metrics,
            pruned=callback.sparse_metrics,
        )

    def _evaluate_dense(
        self,
        moment: Moment,
        model: LightningModule | None,
        evaluate: Callable[..., list[Mapping[str, float]]],
        *,
        reloads: bool,
    ) -> None:
        """Give pruning callbacks the metrics of the dense model, where they want them."""
        module = model or self.lightning_module
        pruning = [
            callback
            for callback in self.callbacks
            if isinstance(callback, PruningCallback)
            and callback.when == moment
            and callback.baseline
            and (reloads or not callback.has_pruned(module))
        ]
        if not pruning:
            return
        with self._with([c for c in self.callbacks if not isinstance(c, PruningCallback)]):
            metrics = evaluate(verbose=False)
        for callback in pruning:
            callback.dense_metrics = {k: v for part in metrics for k, v in part.items()}

    @contextmanager
    def _with(self, callbacks: list[Callback]) -> Iterator[None]:
        """Have these callbacks until the end; checkpoints come last, as Lightning wants it."""
        before = self.callbacks
        self.callbacks = sorted(callbacks, key=lambda c: isinstance(c, Checkpoint))
        try:
            yield
        finally:
            self.callbacks = before


def _transformers_model(module: LightningModule) -> PreTrainedModel:
    model = pruning_target(module)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"output= writes transformers models, and {type(model).__name__} is none: name one in "
            f"an attribute `prunable_model`, or use Trainer.save_checkpoint"
        )
    return model


def _listed(callbacks: Callbacks) -> list[Callback]:
    if callbacks is None:
        return []
    return [callbacks] if isinstance(callbacks, Callback) else list(callbacks)


def _only_pruning(callbacks: Sequence[Callback]) -> PruningCallback:
    found = [c for c in callbacks if isinstance(c, PruningCallback) and c.when == "validate"]
    if len(found) != 1:
        raise ValueError(
            f"prune needs exactly one pruning callback with when='validate', such as SymPrune(); "
            f"there are {len(found)}"
        )
    return found[0]
