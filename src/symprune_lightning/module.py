"""LightningModules for models of transformers that generate tokens.

Longer than 300 lines since the documentation of both modules lists all arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from os import PathLike
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX, load_model
from symprune_lightning.data.windows import WindowDataset, is_counted, num_replicas
from symprune_lightning.engine.distributed.dtensor import is_dtensor
from symprune_lightning.engine.distributed.sharding import shard_model_
from symprune_lightning.engine.forward.calibration import logits_of
from symprune_lightning.engine.layers.names import uncompiled
from symprune_lightning.engine.layers.select import decoder_blocks, prunable_layers
from symprune_lightning.functional.distillation import TeacherTokens, distillation_loss
from symprune_lightning.functional.schedule import warmup_cosine

Batch = Mapping[str, Tensor]
"""Keyword arguments of the model, such as ``input_ids``, and optionally ``labels``."""

TEACHER_INDICES, TEACHER_LOG_PROBS = "teacher_indices", "teacher_log_probs"
"""Keys of the predictions of a teacher in a batch, each ``(batch, tokens, k)``."""

MAX_LOGITS = 2**25
"""Maximum number of logits converted to float32 at once (128 MiB)."""


class TokenPerplexity(Perplexity):
    """Perplexity that is exact for any dtype, vocabulary size and number of tokens.

    ``torchmetrics.text.Perplexity`` computes the softmax in the dtype of the logits, which
    overflows in half precision, and returns infinity if a probability underflows. This subclass
    computes the log-softmax in float32, in chunks of tokens, and accumulates in float64.

    Examples:
        >>> metric = TokenPerplexity(ignore_index=-100)
        >>> metric.update(torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]]))
        >>> round(metric.compute().item(), 6)
        8.0
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Update the metric with a batch.

        Args:
            preds: Logits, shape ``(batch, tokens, vocabulary)``, any floating-point dtype.
            target: Token ids, shape ``(batch, tokens)``; positions with ``ignore_index`` are not
                counted.
        """
        chunk_size = max(1, MAX_LOGITS // preds.shape[-1])
        logits, targets = preds.flatten(0, 1), target.flatten()
        chunks = zip(torch.split(logits, chunk_size), torch.split(targets, chunk_size), strict=True)
        ignore_index = IGNORE_INDEX if self.ignore_index is None else self.ignore_index
        losses = [
            F.cross_entropy(chunk.float(), ids, ignore_index=ignore_index, reduction="sum")
            for chunk, ids in chunks
        ]
        # Not `+=`: a module that is moved to half precision also converts the states of its
        # metrics, and an in-place sum would stay in that dtype.
        self.total_log_probs = self.total_log_probs.double() + torch.stack(losses).double().sum()
        self.count = self.count.double() + (target != ignore_index).sum()

    def num_tokens(self) -> int:
        """Return the number of tokens that all ranks have counted; every rank must call this."""
        # a rank without a token has not updated its states, which would be float32
        self.total_log_probs, self.count = self.total_log_probs.double(), self.count.double()
        with self.sync_context():
            return int(self.count)


class TransformersModule(LightningModule):
    """LightningModule that prunes, evaluates and fine-tunes any model that generates tokens.

    For encoder-decoder, vision-language and speech models, such as those of
    ``AutoModelForSeq2SeqLM``, ``AutoModelForImageTextToText`` and ``AutoModelForSpeechSeq2Seq``.
    Batches are mappings of keyword arguments of the model, as its processor returns them, and
    optionally ``labels``; ``BatchDataModule`` yields such batches.

    Where batches contain ``labels``, validation logs ``val_loss`` (mean negative log-likelihood per
    label, in nats) and ``val_perplexity``, testing ``test_loss`` and ``test_perplexity``, as in
    ``CausalLMModule``; without labels, nothing is logged. Labels have the meaning that the model
    gives them: those of an encoder-decoder model are aligned with the logits, and the model derives
    ``decoder_input_ids`` from them; otherwise the logits at a position predict the label of the
    next one. Labels of ``-100`` are not counted: use them for padding and for the prompt, including
    image tokens. Training logs ``train_loss`` and requires labels.

    Args:
        pretrained: Hub name, local folder, path to a ``.gguf`` file, or a loaded model. Anything
            but a loaded model is loaded in ``configure_model``, by the class of transformers that
            the configuration lists in ``architectures``.
        dtype: ``"auto"`` for the dtype of the checkpoint (float32 for GGUF), or a name such as
            ``"bfloat16"``. Ignored for a loaded model. Default: ``"auto"``.
        learning_rate: Learning rate of AdamW in ``fit``. Default: ``2e-5``.
        lr_schedule: Schedule of the learning rate: ``"constant"``, or ``"cosine"`` (linear warm-up
            over 5 % of the steps, then cosine decay to zero). Default: ``"constant"``.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Attributes:
        model: The transformers model; ``None`` until ``configure_model``, which the Trainer calls.

    Raises:
        ValueError: ``lr_schedule`` is unknown. With a batch: the model returns no logits, it does
            not generate tokens but there are labels, or there is not one label per logit.
        FileNotFoundError: In ``configure_model``, if ``pretrained`` is a path that does not exist.

    Examples:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        ...                   decoder_start_token_id=0)
        >>> module = TransformersModule(T5ForConditionalGeneration(config))
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "labels": torch.tensor([[8, 1]])}
        >>> module(batch).shape
        torch.Size([1, 2, 32])
    """

    def __init__(
        self,
        pretrained: str | PathLike[str] | PreTrainedModel,
        dtype: str = "auto",
        learning_rate: float = 2e-5,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"lr_schedule is {lr_schedule!r}; it must be 'constant' or 'cosine'")
        self.model: PreTrainedModel | None
        if isinstance(pretrained, str | PathLike):
            pretrained = os.fspath(pretrained)
            self.save_hyperparameters()
            self.pretrained, self.model = pretrained, None
        else:
            self.save_hyperparameters(ignore="pretrained")
            self.pretrained, self.model = str(pretrained.config.name_or_path), pretrained
        self.dtype_name = dtype
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule
        self.trust_remote_code = trust_remote_code
        self.val_perplexity = TokenPerplexity(ignore_index=IGNORE_INDEX)
        self.test_perplexity = TokenPerplexity(ignore_index=IGNORE_INDEX)
        self._loader_metrics: dict[str, TokenPerplexity] = {}

    def configure_model(self) -> None:
        """Load the model, and shard it under ``ModelParallelStrategy``. Further calls do nothing.

        Layers are parallelized by the tensor-parallel plan of transformers over the
        ``tensor_parallel`` dimension of the device mesh, and each decoder block is sharded with
        FSDP2 over ``data_parallel``.

        Raises:
            ValueError: The model has no tensor-parallel plan, or its number of key-value heads is
                not divisible by the tensor-parallel size.
        """
        if self.model is None:
            self.model = load_model(
                self.pretrained, dtype=self.dtype_name, trust_remote_code=self.trust_remote_code
            ).train()  # as any module that is new; transformers loads in eval mode
        mesh = self.device_mesh
        if mesh is not None and not any(is_dtensor(p) for p in self.model.parameters()):
            config = self.model.config.get_text_config(decoder=True)
            blocks = list(decoder_blocks(self.model, prunable_layers(self.model)))
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            shard_model_(self.model, blocks, mesh, self.model.tp_plan or {}, heads)

    @property
    def prunable_model(self) -> PreTrainedModel:
        """The model to prune. Its layer names are those of the checkpoint.

        Raises:
            RuntimeError: The model is not loaded yet.
        """
        if self.model is None:
            raise RuntimeError(
                "the model is not loaded yet; a Trainer calls configure_model() first"
            )
        return self.model

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, shape ``(batch, tokens, vocabulary)``."""
        logits = logits_of(self._output(batch))
        if logits is None:
            raise ValueError(
                f"{type(self.prunable_model).__name__} returns no logits: pass a model with an "
                f"output projection, such as one loaded with AutoModelForCausalLM"
            )
        return logits

    def calibration_step(self, batch: Batch) -> Any:
        """Run the forward pass of a calibration batch and return the output of the model."""
        return self._output(batch)

    def _output(self, batch: Batch) -> Any:
        """Return the output of the model for a batch."""
        omitted = {TEACHER_INDICES, TEACHER_LOG_PROBS}
        if not self._is_encoder_decoder:
            omitted.add("labels")  # of which the model would compute a loss that is not used
        inputs: dict[str, Any] = {name: x for name, x in batch.items() if name not in omitted}
        if self.prunable_model.can_generate():
            inputs["use_cache"] = False
        return self.prunable_model(**inputs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean negative log-likelihood per label of a batch.

        With the predictions of a teacher in the batch (``Distillation``), return the mean
        divergence from them.

        Raises:
            ValueError: The batch has no labels.
        """
        targets = self._targets(batch)
        if targets is None and batch.get("labels") is None:
            raise ValueError("training requires labels: add 'labels' to each batch")
        targets = batch["labels"] if targets is None else targets  # none of which is counted
        logits = self._logits_for(batch, targets)
        if TEACHER_INDICES in batch:
            teacher = TeacherTokens(batch[TEACHER_INDICES], batch[TEACHER_LOG_PROBS])
            mask = batch.get("attention_mask")
            if self._is_encoder_decoder:  # whose attention mask is that of the encoder
                mask = targets != IGNORE_INDEX
            loss = distillation_loss(logits, teacher, None if mask is None else mask.bool())
        else:
            sums = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            # 0 in place of NaN for a batch without a counted label
            loss = sums / (targets != IGNORE_INDEX).sum().clamp_min(1)
        if self._trainer is not None:
            self._log_loss(loss)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _log_loss(self, loss: Tensor) -> None:
        """Log the loss outside ``torch.compile``, which cannot trace ``LightningModule.log``."""
        self.log("train_loss", loss, prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the perplexity with a batch, if it has labels."""
        metric = self._metric(self.val_perplexity, "val_dataloaders", dataloader_idx)
        self._update(metric, batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the perplexity with a batch, if it has labels."""
        metric = self._metric(self.test_perplexity, "test_dataloaders", dataloader_idx)
        self._update(metric, batch)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: an evaluation that was aborted has not done so."""
        self._reset(self.val_perplexity)

    def on_test_epoch_start(self) -> None:
        """Reset the metrics: an evaluation that was aborted has not done so."""
        self._reset(self.test_perplexity)

    def _reset(self, single: TokenPerplexity) -> None:
        self._loader_metrics.clear()
        single.reset()

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity over all batches and ranks."""
        self._log_perplexity("val", self.val_perplexity)

    def on_test_epoch_end(self) -> None:
        """Log loss and perplexity over all batches and ranks."""
        self._log_perplexity("test", self.test_perplexity)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW, and the schedule of its learning rate."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        if self.lr_schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(min(step, steps - 1), steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(self.prunable_model.config, "is_encoder_decoder", False))

    def _targets(self, batch: Batch) -> Tensor | None:
        """Return the token ids that the logits of a batch predict; ``None`` without labels.

        Returns:
            Token ids, shape ``(batch, tokens)``, aligned with the logits.
        """
        labels = batch.get("labels")
        if labels is None or bool((labels == IGNORE_INDEX).all()):
            return None
        if not self.prunable_model.can_generate():
            raise ValueError(
                f"{type(self.prunable_model).__name__} does not generate tokens, so its labels "
                f"have no perplexity: remove 'labels' from the batches, or write a LightningModule "
                f"with the metric of this model"
            )
        if not self._is_encoder_decoder:
            return _next_labels(labels)
        ids = batch.get("input_ids")
        is_input = ids is not None and ids.shape == labels.shape
        if is_input and bool(((labels == ids) | (labels == IGNORE_INDEX)).all()):
            raise ValueError(
                f"the labels are the input of the encoder of {type(self.prunable_model).__name__}: "
                f"pass the text that it is to generate, or no labels "
                f"(ProcessorDataModule(labels=False))"
            )
        return labels

    def _logits_for(self, batch: Batch, targets: Tensor) -> Tensor:
        """Return the logits of a batch, one for each target."""
        logits: Tensor = self(batch)
        if logits.shape[:2] != targets.shape:
            raise ValueError(
                f"the model returns logits of shape {tuple(logits.shape)} (batch, tokens, "
                f"vocabulary), but the labels have shape {tuple(targets.shape)}: pass one label "
                f"per token, -100 for tokens without one"
            )
        return logits

    def _update(self, metric: TokenPerplexity, batch: Batch) -> None:
        targets = self._targets(batch)
        if targets is not None:
            metric.update(self._logits_for(batch, targets), targets)
        elif batch.get("labels") is not None and any(map(is_dtensor, self.parameters())):
            self(batch)  # shards are gathered by all ranks, and others may count labels

    def _metric(
        self, single: TokenPerplexity, loaders_name: str, dataloader_idx: int
    ) -> TokenPerplexity:
        """Return ``single``, or the metric of one dataloader if there are several."""
        name = list(self._dataloaders(loaders_name))[dataloader_idx]
        if not name:
            return single
        if name not in self._loader_metrics:
            metric = TokenPerplexity(ignore_index=IGNORE_INDEX)
            self._loader_metrics[name] = metric.to(self.device)
        return self._loader_metrics[name]

    def _dataloaders(self, loaders_name: str) -> Mapping[str, Any]:
        """Return the dataloaders by name; a single one has the name ``""``."""
        loaders = None if self._trainer is None else getattr(self._trainer, loaders_name)
        if isinstance(loaders, Mapping):
            return {str(name): loader for name, loader in loaders.items()}
        if isinstance(loaders, Sequence):
            return {str(i) if len(loaders) > 1 else "": x for i, x in enumerate(loaders)}
        return {"": loaders}

    @property
    def _num_copies(self) -> int:
        """Number of ranks that evaluate the same batches, as those of tensor parallelism do."""
        return 1 if self._trainer is None else self.trainer.world_size // num_replicas(self.trainer)

    def _log_perplexity(self, stage: str, single: TokenPerplexity) -> None:
        metrics = dict(self._loader_metrics)
        loaders = self._dataloaders(f"{stage}_dataloaders")
        # Totals are merged, not perplexities averaged, so that every token has the same weight.
        # The copy is local to this rank; compute() reduces it over all ranks.
        overall = deepcopy(next(iter(metrics.values()))) if metrics else single
        for metric in list(metrics.values())[1:]:
            overall.merge_state(metric)
        values: dict[str, Tensor] = {}
        count = overall.num_tokens()
        if count:
            perplexity = overall.compute()
            values |= {f"{stage}_loss": perplexity.log(), f"{stage}_perplexity": perplexity}
            count //= self._num_copies
            values |= _bits_per_byte(f"{stage}_bits_per_byte", perplexity, count, loaders.values())
        for name, metric in metrics.items():
            count = metric.num_tokens()
            if count:
                perplexity = metric.compute()
                key = f"{stage}_bits_per_byte/{name}"
                values[f"{stage}_perplexity/{name}"] = perplexity
                count //= self._num_copies
                values |= _bits_per_byte(key, perplexity, count, [loaders[name]])
        self._reset(single)
        # compute() has already reduced the values; sync_dist only silences Lightning's warning
        self.log_dict(values, prog_bar=True, sync_dist=True)


class CausalLMModule(TransformersModule):
    """LightningModule that prunes, evaluates and fine-tunes a causal language model.

    Training logs ``train_loss`` (mean negative log-likelihood per token, in nats; with
    ``Distillation``, the mean divergence from the teacher). Validation logs ``val_loss`` (mean
    negative log-likelihood per token, in nats) and ``val_perplexity``, testing ``test_loss`` and
    ``test_perplexity``; all four are exact over all tokens of the evaluation set. With several
    dataloaders they are over the tokens of all of them, and ``val_perplexity/<name>`` is logged for
    each. With the texts of a ``CalibrationDataModule``, ``val_bits_per_byte`` is logged too: the
    loss of all tokens in bits per byte of UTF-8 text, which models with different tokenizers have
    in common. Without ``labels`` in a batch, the labels are ``input_ids`` except padding.

    Args:
        pretrained: Hub name, local folder, path to a ``.gguf`` file, or a loaded model. Anything
            but a loaded model is loaded in ``configure_model``.
        dtype: ``"auto"`` for the dtype of the checkpoint (float32 for GGUF), or a name such as
            ``"bfloat16"``. Ignored for a loaded model. Default: ``"auto"``.
        learning_rate: Learning rate of AdamW in ``fit``. Default: ``2e-5``.
        lr_schedule: Schedule of the learning rate: ``"constant"``, or ``"cosine"`` (linear warm-up
            over 5 % of the steps, then cosine decay to zero). Default: ``"constant"``.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Attributes:
        model: The transformers model; ``None`` until ``configure_model``, which the Trainer calls.

    Raises:
        ValueError: ``lr_schedule`` is unknown. In ``configure_model``, if the model is an
            encoder-decoder model. With a batch, if the model returns no logits.
        FileNotFoundError: In ``configure_model``, if ``pretrained`` is a path that does not exist.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> module = CausalLMModule(LlamaForCausalLM(config))
        >>> module.training_step({"input_ids": torch.tensor([[1, 2, 3]])}, 0).dim()
        0
    """

    def configure_model(self) -> None:
        """Load the model and shard it, as ``TransformersModule`` does.

        Raises:
            ValueError: The model is an encoder-decoder model, or it cannot be sharded.
        """
        super().configure_model()
        if self._is_encoder_decoder:
            raise ValueError(
                f"CausalLMModule is for decoder-only models, but {type(self.model).__name__} has "
                f"an encoder: use TransformersModule, with a BatchDataModule"
            )

    def _targets(self, batch: Batch) -> Tensor:
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"]
            if "attention_mask" in batch:
                labels = labels.masked_fill(~is_counted(batch["attention_mask"]), IGNORE_INDEX)
        return _next_labels(labels)


def pruning_target(module: nn.Module) -> nn.Module:
    """Return the module that is pruned, to which layer names are relative.

    This is the attribute ``prunable_model`` of the LightningModule if it has one, without the
    wrapper of ``torch.compile``; else the LightningModule itself.
    """
    target: nn.Module = getattr(module, "prunable_model", module)
    return uncompiled(target)


def _bits_per_byte(
    key: str, perplexity: Tensor, count: int, loaders: Iterable[Any]
) -> dict[str, Tensor]:
    """Return ``{key: bits per byte}``, or nothing unless all texts of the loaders were evaluated.

    Args:
        key: Name of the metric.
        perplexity: Perplexity per token.
        count: Number of tokens that were evaluated.
        loaders: The dataloaders.
    """
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    num_bytes = num_labels = 0
    for dataset in datasets:
        if not isinstance(dataset, WindowDataset) or not dataset.num_bytes:
            return {}
        num_bytes += dataset.num_bytes
        num_labels += dataset.num_labels
    if count != num_labels:  # as with limit_val_batches
        return {}
    return {key: perplexity.log2() * count / num_bytes}


def _next_labels(labels: Tensor) -> Tensor:
    """Return the label of the next position for each, ``IGNORE_INDEX`` for the last one.

    Args:
        labels: Token ids, shape ``(batch, tokens)``.
    """
    shifted: Tensor = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return shifted
