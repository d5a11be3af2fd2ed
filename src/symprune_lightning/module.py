"""A causal language model of transformers as a LightningModule."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel

from symprune_lightning.engine.layers import decoder_blocks, prunable_layers
from symprune_lightning.engine.parallel import is_sharded, shard_
from symprune_lightning.pretrained import IGNORE, load_model

Batch = Mapping[str, Tensor]
"""``input_ids`` and, if there are any, ``attention_mask`` and ``labels``; each (batch, tokens)."""

CHUNK = 2**25
"""Most logits that are held in float32 at once: 128 MiB."""


class TokenPerplexity(Perplexity):
    """torchmetrics' ``Perplexity`` that is exact for any dtype, vocabulary and number of tokens.

    The parent takes the softmax in the logits' own dtype, which overflows in half precision and is
    infinite where a probability underflows. Here the logarithm of the softmax is taken in float32,
    in chunks of tokens, and totals are kept in float64.

    Examples:
        >>> metric = TokenPerplexity(ignore_index=-100)
        >>> metric.update(torch.zeros(1, 3, 8), torch.tensor([[1, 2, -100]]))
        >>> round(metric.compute().item(), 6)
        8.0
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions.

        Args:
            preds: Logits, ``(batch, tokens, vocabulary)``, any floating-point dtype.
            target: Token ids, ``(batch, tokens)``; ``ignore_index`` where none is to be predicted.
        """
        size = max(1, CHUNK // preds.shape[-1])
        flat, targets = preds.flatten(0, 1), target.flatten()
        chunks = zip(torch.split(flat, size), torch.split(targets, size), strict=True)
        ignored = IGNORE if self.ignore_index is None else self.ignore_index
        nats = [
            F.cross_entropy(logits.float(), ids, ignore_index=ignored, reduction="sum")
            for logits, ids in chunks
        ]
        # not `+=`: a module moved to half precision takes its metrics' totals along
        self.total_log_probs = self.total_log_probs.double() + torch.stack(nats).double().sum()
        self.count = self.count.double() + (target != ignored).sum()


class CausalLMModule(LightningModule):
    """Wraps a causal language model for pruning, evaluation and fine-tuning.

    Evaluation logs ``val_loss`` (mean nats per token) and ``val_perplexity`` (``test_…`` in
    ``test``), both exact over the whole set; training logs ``train_loss``. Of several dataloaders,
    these are over all tokens, and ``val_perplexity/<name>`` is over those of one.

    Args:
        pretrained: Hub name, local folder, path of a ``.gguf`` file, or a model that is loaded
            already.
        dtype: ``"auto"`` for the checkpoint's own (float32 for GGUF), or a name such as
            ``"bfloat16"``. Not used for a loaded model.
        learning_rate: Of AdamW, for ``fit``.
        trust_remote_code: Let the checkpoint run code of its own. Off unless you say so.

    Attributes:
        model: The transformers model; there after ``configure_model``, which the Trainer calls.

    Raises:
        FileNotFoundError: ``pretrained`` is a path, and nothing is there.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> module = CausalLMModule(LlamaForCausalLM(config))
        >>> module.training_step({"input_ids": torch.tensor([[1, 2, 3]])}, 0).dim()
        0
    """

    def __init__(
        self,
        pretrained: str | PathLike[str] | PreTrainedModel,
        dtype: str = "auto",
        learning_rate: float = 2e-5,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
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
        self.trust_remote_code = trust_remote_code
        self.val_perplexity = TokenPerplexity(ignore_index=IGNORE)
        self.test_perplexity = TokenPerplexity(ignore_index=IGNORE)
        self._by_loader: dict[str, TokenPerplexity] = {}

    def configure_model(self) -> None:
        """Load the model, once, and shard it if the strategy is ``ModelParallelStrategy``.

        Each decoder block is sharded by FSDP2, and its layers are divided by the tensor-parallel
        plan of transformers, over the two dimensions of the strategy's mesh.

        Raises:
            ValueError: The model can't be divided over so many processes.
        """
        if self.model is None:
            self.model = load_model(
                self.pretrained, dtype=self.dtype_name, trust_remote_code=self.trust_remote_code
            ).train()  # as any module that is new; transformers loads in eval mode
        mesh = self.device_mesh
        if mesh is not None and not any(is_sharded(p) for p in self.model.parameters()):
            config = self.model.config
            blocks = list(decoder_blocks(self.model, prunable_layers(self.model)))
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            shard_(self.model, blocks, mesh, self.model.tp_plan or {}, heads)

    @property
    def prunable_model(self) -> PreTrainedModel:
        """What is pruned; layers are named as in the checkpoint.

        Raises:
            RuntimeError: The model is not loaded yet.
        """
        if self.model is None:
            raise RuntimeError("the model is loaded by configure_model(), which a Trainer calls")
        return self.model

    def forward(self, batch: Batch) -> Tensor:
        """Logits, ``(batch, tokens, vocabulary)``."""
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        logits: Tensor = self.prunable_model(**inputs, use_cache=False).logits
        return logits

    def calibration_step(self, batch: Batch) -> Tensor:
        """One batch through the model, for its activations only."""
        logits: Tensor = self(batch)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean nats per token of a batch."""
        logits = self(batch)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), _targets(batch).flatten())
        if self._trainer is not None:
            self._log_loss(loss)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _log_loss(self, loss: Tensor) -> None:
        """Lightning's ``log`` looks at signatures, which compiled code can't."""
        self.log("train_loss", loss, prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the perplexity."""
        metric = self._metric(self.val_perplexity, "val_dataloaders", dataloader_idx)
        metric.update(self(batch), _targets(batch))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the perplexity."""
        metric = self._metric(self.test_perplexity, "test_dataloaders", dataloader_idx)
        metric.update(self(batch), _targets(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity over all batches and ranks."""
        self._log_perplexity("val", self.val_perplexity)

    def on_test_epoch_end(self) -> None:
        """Log the perplexity over all batches and ranks."""
        self._log_perplexity("test", self.test_perplexity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a constant rate."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def _metric(self, whole: TokenPerplexity, loaders: str, index: int) -> TokenPerplexity:
        """What a batch is added to: a metric for each loader, if there are several."""
        found = None if self._trainer is None else getattr(self._trainer, loaders)
        if isinstance(found, Mapping):
            name = str(list(found)[index])
        elif isinstance(found, Sequence) and len(found) > 1:
            name = str(index)
        else:
            return whole
        if name not in self._by_loader:
            self._by_loader[name] = TokenPerplexity(ignore_index=IGNORE).to(self.device)
        return self._by_loader[name]

    def _log_perplexity(self, stage: str, metric: TokenPerplexity) -> None:
        parts = {f"{stage}_perplexity/{k}": part for k, part in self._by_loader.items()}
        whole: Metric = metric if not parts else next(iter(parts.values())).clone()
        for part in list(parts.values())[1:]:
            whole.merge_state(part)
        perplexity = whole.compute()
        self._by_loader.clear()
        metric.reset()
        figures = {f"{stage}_loss": perplexity.log(), f"{stage}_perplexity": perplexity}
        figures |= {name: part.compute() for name, part in parts.items()}
        # equal on all processes already; told so, Lightning does not warn
        self.log_dict(figures, prog_bar=True, sync_dist=True)


def _targets(batch: Batch) -> Tensor:
    """For each position the token to be predicted there, ``IGNORE`` where there is none."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
    targets: Tensor = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return targets
