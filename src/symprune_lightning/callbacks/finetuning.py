"""Training that keeps the zeros."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from symprune_lightning.callbacks.gradual import Gradual
from symprune_lightning.callbacks.pruning import (
    PruningCallback,
    callbacks_of,
    pruning_target,
    refuse_strategies,
)
from symprune_lightning.engine.parallel import local
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.functional.packing import pack, unpack
from symprune_lightning.masks import layers_of, load_masks, masks_of_zeros

ZEROS = "zeros"


class MaskedFinetuning(Callback):
    """Keeps pruned weights at zero during ``fit``.

    Before each optimizer step the gradients of pruned weights are zeroed, so that momentum, second
    moments and the gradient's norm do not see them; after it the weights are, whatever the
    optimizer did. The forward is as it was. Costs a byte for each weight on its device. Works with
    any optimizer of torch, gradient accumulation and clipping, mixed precision, DDP, FSDP2 and
    tensor parallel, and automatic or manual optimization.

    Where the masks come from, the first that there is:

    1. the checkpoint that ``fit(ckpt_path=…)`` goes on from,
    2. ``masks``,
    3. a callback that prunes in this ``fit`` (``SymPrune(when="fit_start")`` or gradually),
    4. the zeros of the model: of every layer that has some, but is not all zero.

    They are saved in Lightning's checkpoints, as packed bits.

    Args:
        masks: A file or checkpoint folder with masks, masks by layer name (bool, ``(out_features,
            in_features)``, True = kept), or ``"zeros"``. A checkpoint to go on from that has no
            masks is refused unless this says where they are.

    Attributes:
        masks: Masks by layer name once training has begun.

    Raises:
        ValueError: The masks are another model's; or, when training begins, there are none.

    Examples:
        >>> from symprune_lightning import SymPrune, Trainer
        >>> trainer = Trainer(callbacks=[SymPrune(when="fit_start"), MaskedFinetuning()],
        ...                   logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, masks: str | PathLike[str] | Mapping[str, Tensor] | None = None) -> None:
        self._given = masks
        self._bits: dict[str, Tensor] = {}
        self._columns: dict[str, int] = {}
        self._pruned: list[tuple[Tensor, Tensor]] = []
        self._followed: list[PruneResult] = []
        self._hooks: list[Any] = []
        self._restored = False
        self._lacking = False

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name to bool mask, ``(out_features, in_features)``, True = kept."""
        return {name: unpack(bits, self._columns[name]) for name, bits in self._bits.items()}

    def state_dict(self) -> dict[str, Any]:
        """The masks as packed bits."""
        return {"bits": self._bits, "columns": self._columns} if self._bits else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks of a checkpoint."""
        self._bits, self._columns = dict(state_dict["bits"]), dict(state_dict["columns"])
        self._restored = True

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note whether the checkpoint has masks."""
        self._lacking = not checkpoint["callbacks"].get(self.state_key)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which weights can't be reached.

        Raises:
            ValueError: The strategy is FSDP in its first version, or DeepSpeed.
        """
        refuse_strategies(self, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the weights zeroed after every step of the optimizers."""
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self._zero_weights())
            for optimizer in trainer.optimizers
        ]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the masks; other callbacks have pruned by now, if they do so before training."""
        if self._pruned:
            return
        if not self._restored:
            self._bits, self._columns = {}, {}
            self._take(*self._found(trainer, pl_module))
        self._followed = _results(trainer)
        self._apply(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Zero the gradients of pruned weights, before they are clipped."""
        further = [r for r in _results(trainer) if not any(r is known for known in self._followed)]
        if further:
            self._followed += further
            self._take(*(result.masks for result in further))
            self._apply(trainer, pl_module)
        for parameter, pruned in self._pruned:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(pruned, 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers and of the model."""
        self._let_go()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizers and of the model."""
        self._let_go()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._pruned.clear()
        self._restored = self._lacking = False

    def _found(self, trainer: Trainer, module: LightningModule) -> list[Mapping[str, Tensor]]:
        target, given = pruning_target(module), self._given
        if isinstance(given, Mapping):
            return [given]
        if given is not None and given != ZEROS:
            return [load_masks(Path(given))]
        results = _results(trainer)
        if results:
            return [result.masks for result in results]
        if self._lacking and given is None:
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} has no masks of MaskedFinetuning: pass "
                f"MaskedFinetuning(masks='zeros') to take them from the zeros in its weights, or "
                f"masks=<file>"
            )
        masks = masks_of_zeros(target)
        if not masks and not _will_prune(trainer):
            raise ValueError(
                f"{type(target).__name__} has no layer with zeros to keep: prune it first, add "
                f"SymPrune(when='fit_start') to the callbacks, or pass masks=<file>"
            )
        return [masks]

    def _take(self, *parts: Mapping[str, Tensor]) -> None:
        """Prune these too; what is pruned stays so."""
        for name, mask in chain.from_iterable(masks.items() for masks in parts):
            bits = pack(mask).cpu()
            self._bits[name] = self._bits.get(name, bits) & bits
            self._columns[name] = mask.shape[1]

    @torch.no_grad()
    def _apply(self, trainer: Trainer, module: LightningModule) -> None:
        """Zero the pruned weights, and what optimizers remember of them."""
        masks = self.masks
        self._pruned = []
        for layer in layers_of(pruning_target(module), masks):
            mask = masks[layer.name].to(layer.parameter.device)
            self._pruned.append((layer.parameter, layer.pruned(mask)))
        self._zero_weights()
        for optimizer in trainer.optimizers:
            for parameter, pruned in self._pruned:
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        local(value).masked_fill_(pruned, 0)

    @torch.no_grad()
    def _zero_weights(self) -> None:
        for parameter, pruned in self._pruned:
            local(parameter).masked_fill_(pruned, 0)


def _pruning(trainer: Trainer) -> list[PruningCallback]:
    """Callbacks that prune before or during training."""
    return [c for c in callbacks_of(trainer) if isinstance(c, PruningCallback) and c.prunes_in_fit]


def _results(trainer: Trainer) -> list[PruneResult]:
    return [c.result for c in _pruning(trainer) if c.result is not None]


def _will_prune(trainer: Trainer) -> bool:
    """Whether a callback is going to prune while the model trains."""
    return any(isinstance(callback.when, Gradual) for callback in _pruning(trainer))
