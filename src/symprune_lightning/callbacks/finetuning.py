"""Fine-tuning with fixed sparsity masks."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from symprune_lightning.callbacks.integration import (
    refuse_strategies,
    trainer_callbacks,
    weight_averages,
)
from symprune_lightning.callbacks.schedule import CubicSchedule
from symprune_lightning.checkpoints.masks import apply_masks, infer_masks, load_masks
from symprune_lightning.engine.distributed.dtensor import local_tensor
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.layers.changes import zero_masks
from symprune_lightning.engine.layers.match import match_layers
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.functional.packing import PackedMasks
from symprune_lightning.module import pruning_target

ZEROS = "zeros"


class MaskedFinetuning(Callback, PruningHooks):
    """Keeps pruned weights at zero during ``fit``.

    Before each optimizer step the gradients of pruned weights are zeroed, so that momentum, second
    moments and the gradient norm do not include them. After each step the pruned weights are reset
    to zero, regardless of the optimizer. The forward is unchanged. Costs one byte per weight on its
    device. Works with any optimizer of torch, gradient accumulation and clipping, mixed precision,
    DDP, FSDP2 and tensor parallel, and automatic or manual optimization. Averages of the weights
    that other callbacks keep (``WeightAveraging``, ``StochasticWeightAveraging``) are masked too.

    Source of the masks, in order of precedence:

    1. the checkpoint that ``fit(ckpt_path=…)`` resumes from,
    2. ``masks``,
    3. a callback that prunes in this ``fit`` (``SymPrune(when="fit_start")`` or gradually),
    4. the zeros of the model: of every layer that has some, but is not all zero.

    Masks created during this ``fit`` are merged with those of any source. Masks are saved in
    Lightning's checkpoints, as packed bits.

    Args:
        masks: A file or checkpoint folder with masks, masks by layer name (bool, ``(out_features,
            in_features)``, True = kept), or ``"zeros"``. A checkpoint without masks is refused
            unless this argument provides them.

    Attributes:
        masks: Masks by layer name once training has begun.

    Raises:
        ValueError: The masks belong to another model; or, when training begins, there are none.

    Examples:
        >>> from symprune_lightning import SymPrune, Trainer
        >>> trainer = Trainer(callbacks=[SymPrune(when="fit_start"), MaskedFinetuning()],
        ...                   logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, masks: str | PathLike[str] | Mapping[str, Tensor] | None = None) -> None:
        self.masks = PackedMasks()
        self._source = masks
        self._new_results: list[PruneResult] = []
        # parameter and where it is pruned, in its stored layout; empty until training begins
        self._zero_masks: list[tuple[Tensor, Tensor]] = []
        self._optimizer_hooks: list[Any] = []
        self._fit: tuple[Trainer, LightningModule] | None = None
        self._is_active = False
        self._restored = False
        self._checkpoint_has_no_masks = False

    def state_dict(self) -> dict[str, Any]:
        """Return the masks as packed bits."""
        if not self.masks:
            return {}
        packed = {name: self.masks.packed(name) for name in self.masks}
        return {
            "bits": {name: bits for name, (bits, _) in packed.items()},
            "columns": {name: columns for name, (_, columns) in packed.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the masks of a checkpoint."""
        self.masks = PackedMasks()
        for name, bits in state_dict["bits"].items():
            self.masks.add_packed(name, bits, state_dict["columns"][name])
        self._restored = True

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record whether the checkpoint that a fit resumes from has masks.

        Other calls restore callbacks, too, and so do tuners, before the first step.
        """
        resumes = trainer.state.fn == TrainerFn.FITTING and checkpoint["global_step"] > 0
        has_masks = bool(checkpoint["callbacks"].get(self.state_key))
        self._checkpoint_has_no_masks = resumes and not has_masks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies under which weights cannot be masked.

        Raises:
            ValueError: The strategy is ``FSDPStrategy`` or ``DeepSpeedStrategy``.
        """
        refuse_strategies(self, trainer)
        self._fit = (trainer, pl_module) if stage == "fit" else None
        if stage == "fit":  # before the state of a checkpoint is restored
            self.masks = PackedMasks()
            self._is_active = self._restored = self._checkpoint_has_no_masks = False
        self._new_results.clear()

    def on_pruning_end(self, result: PruneResult) -> None:
        """Add the masks of a run during ``fit``; pruned weights stay pruned."""
        if self._fit is None:
            return
        self._new_results.append(result)
        if self._is_active:  # training has begun: a schedule has pruned further
            self._merge_new_results()
            self._apply_masks(*self._fit)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register hooks that zero pruned weights after every optimizer step."""
        self._optimizer_hooks = [
            optimizer.register_step_post_hook(lambda *_: self._zero_weights())
            for optimizer in trainer.optimizers
        ]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Collect the masks; callbacks that prune before training have done so by now.

        Not at the start of an epoch: Lightning skips that hook when it resumes within one.
        """
        if self._is_active:
            return
        if not self._restored:
            self.masks = PackedMasks()
            self._merge(self._initial_masks(trainer, pl_module))
        self._merge_new_results()
        self._apply_masks(trainer, pl_module)
        self._is_active = True

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Zero the gradients of pruned weights, before they are clipped."""
        for parameter, pruned in self._zero_masks:
            if parameter.grad is not None:
                local_tensor(parameter.grad).masked_fill_(pruned, 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero pruned weights that other callbacks have replaced when training ended.

        Averages of the weights (``WeightAveraging``, ``StochasticWeightAveraging``) are copied
        into the model in ``on_train_end``.
        """
        self._zero_weights()
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the optimizer hooks and drop references."""
        self._detach()

    def _detach(self) -> None:
        for hook in self._optimizer_hooks:
            hook.remove()
        self._optimizer_hooks.clear()
        self._zero_masks.clear()
        self._new_results.clear()
        self._fit = None
        self._is_active = self._restored = self._checkpoint_has_no_masks = False

    def _initial_masks(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Tensor]:
        """Return the masks of the first source that has some; see the class."""
        target, source = pruning_target(module), self._source
        if isinstance(source, Mapping):
            return source
        if source is not None and source != ZEROS:
            return load_masks(Path(source))
        if self._new_results and source is None:
            return {}  # merged by the caller
        is_gradual = prunes_gradually(trainer)
        if self._checkpoint_has_no_masks and source is None and not is_gradual:
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} has no masks of MaskedFinetuning: use "
                f"MaskedFinetuning(masks='zeros') to infer them from the zeros in its weights, or "
                f"masks=<file>"
            )
        masks = infer_masks(target)
        if not masks and not self._new_results and not is_gradual:
            raise ValueError(
                f"{type(target).__name__} has no layer with zeros to keep: prune it first, add "
                f"SymPrune(when='fit_start') to the callbacks, or pass masks=<file>"
            )
        return masks

    def _merge_new_results(self) -> None:
        for result in self._new_results:
            self._merge(result.masks)
        self._new_results.clear()

    def _merge(self, masks: Mapping[str, Tensor]) -> None:
        """Merge masks: a weight is pruned if either mask prunes it."""
        packed = masks if isinstance(masks, PackedMasks) else PackedMasks(masks)
        for name in packed:
            bits, columns = packed.packed(name)
            if name in self.masks:
                bits = bits & self.masks.packed(name)[0]
            self.masks.add_packed(name, bits, columns)

    @torch.no_grad()
    def _apply_masks(self, trainer: Trainer, module: LightningModule) -> None:
        """Zero the pruned weights, in averages too, and the optimizer state of each."""
        for average in weight_averages(trainer, module):
            apply_masks(pruning_target(average), self.masks)
        layers = match_layers(pruning_target(module), self.masks)
        self._zero_masks = [
            (owner.get_parameter(name), pruned)
            for (owner, name), pruned in zero_masks(layers, self.masks).items()
        ]
        self._zero_weights()
        for optimizer in trainer.optimizers:
            for parameter, pruned in self._zero_masks:
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        local_tensor(value).masked_fill_(pruned, 0)

    @torch.no_grad()
    def _zero_weights(self) -> None:
        for parameter, pruned in self._zero_masks:
            local = local_tensor(parameter)
            # Lightning moves the model to the CPU before on_fit_end
            local.masked_fill_(pruned.to(local.device), 0)


def prunes_gradually(trainer: Trainer) -> bool:
    """Return whether a callback is going to prune while the model trains."""
    stages = (getattr(callback, "when", None) for callback in trainer_callbacks(trainer))
    return any(isinstance(stage, CubicSchedule) for stage in stages)
