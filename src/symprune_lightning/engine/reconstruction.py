"""Reconstruction of pruned blocks: the error of a block over all ranks, and its new weights."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.distributed.dtensor import local_tensor, shard_like
from symprune_lightning.engine.forward.block import BlockCall, call_on_copies, first_tensor
from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.forward.modes import TorchModes
from symprune_lightning.engine.forward.padding import aligned
from symprune_lightning.engine.forward.targets import BlockTargets
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.journal import Journal
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.changes import zero_masks
from symprune_lightning.engine.layers.names import module_names
from symprune_lightning.engine.result import BlockRecord, BlockReport, PruneResult
from symprune_lightning.errors import PruningWarning
from symprune_lightning.functional.reconstruction import BlockReconstruction, Weights
from symprune_lightning.functional.tensors import at_least_float32

TINY = torch.finfo(torch.float32).tiny


class BlockReconstructor:
    """Trains the kept weights of each block after it is pruned.

    Args:
        method: The settings.
        layers: The layers to prune.
        calibration: Model and batches.
        result: Masks of the layers pruned so far; receives the reports.
        journal: Journal to resume from and write to.
        hooks: Observers.

    Attributes:
        targets: Records the calls of blocks while the batches run.
    """

    def __init__(
        self,
        method: BlockReconstruction,
        layers: Sequence[Layer],
        calibration: Calibration,
        result: PruneResult,
        journal: Journal | None,
        hooks: Sequence[PruningHooks],
    ) -> None:
        self.method = method
        self.layers = layers
        self.calibration = calibration
        self.result = result
        self.journal = journal
        self.hooks = hooks
        self.targets = BlockTargets(dense=method.target == "model")
        self._names = module_names(calibration.model)

    @property
    def detached_blocks(self) -> list[str]:
        """Names of the blocks whose targets were not those of the dense model as requested."""
        detached = self.targets.detached_blocks
        return [name for block, name in self._names.items() if block in detached]

    def train(self, block: nn.Module, calls: Sequence[BlockCall]) -> None:
        """Train a block on all ranks' calls of it, and write its weights; a collective."""
        name = self._names[block]
        if any(report.name == name for report in self.result.blocks):
            return  # restored before the batches ran
        if self._is_finished(name):
            self._restore(block)
            return
        start = time.perf_counter()
        masks = self._masks(block)
        parameters = dict(block.named_parameters())
        trained = [
            key
            for key, parameter in parameters.items()
            if key in masks or (self.method.train_norms and parameter.dim() == 1)
        ]
        if not trained:
            return  # no batch reached any of its layers
        weights = {key: at_least_float32(parameters[key].detach()) for key in trained}
        objective = BlockObjective(block, calls, self.calibration.communicator)
        # the user's forward may have left inference mode enabled
        with torch.inference_mode(False), torch.no_grad():
            fit = self.method.fit(weights, masks, objective, partial(self._on_epoch, name))
        if len(fit.errors) <= self.method.epochs:
            warnings.warn(
                f"the training of block {name} diverged in epoch {len(fit.errors)} (its error is "
                f"not finite), so it has the best weights before; use a lower learning_rate",
                PruningWarning,
                stacklevel=2,
            )
        report = BlockReport(
            name=name,
            error=fit.errors[0],
            error_reconstructed=min(fit.errors),
            errors=fit.errors,
            learning_rate=fit.learning_rate,
            steps=fit.steps,
            seconds=time.perf_counter() - start,
        )
        best = fit.weights or {}
        record = BlockRecord(report, {k: w.to(parameters[k].dtype) for k, w in best.items()})
        self._commit(block, record)
        if self.journal is not None:
            self.journal.add_block(name, record)

    def restore(self, modules: set[nn.Module]) -> None:
        """Restore the finished blocks among modules that have just been loaded."""
        for block, name in self._names.items():
            if block in modules and self._is_finished(name):
                self._restore(block)

    def _is_finished(self, name: str) -> bool:
        return self.journal is not None and self.journal.is_finished_block(name)

    def _restore(self, block: nn.Module) -> None:
        assert self.journal is not None
        self._commit(block, self.journal.read_block(self._names[block], block))

    def _on_epoch(self, block: str, epoch: int, error: float) -> None:
        for hook in self.hooks:
            hook.on_reconstruction_epoch(block, epoch, error)

    def _masks(self, block: nn.Module) -> dict[str, Tensor]:
        """Map the parameters of pruned layers to masks of their stored shape, True = kept."""
        owners = {module: name for name, module in block.named_modules()}
        done = self.result.masks
        layers = [x for x in self.layers if x.module in owners and x.name in done]
        # layers of a packed parameter that were not reached are dense: nothing is pruned there
        return {
            ".".join(filter(None, (owners[module], name))): ~pruned
            for (module, name), pruned in zero_masks(layers, done).items()
        }

    def _commit(self, block: nn.Module, record: BlockRecord) -> None:
        """Write trained weights into the model, and add the report to the result."""
        for key, value in record.parameters.items():
            path, _, attribute = key.rpartition(".")
            module = block.get_submodule(path)
            change = partial(_copy_, module, attribute, value)
            change()
            self.calibration.placement.record_change(module, change)
        self.result.blocks.append(record.report)
        for hook in self.hooks:
            hook.on_block_reconstructed(record.report)


class BlockObjective:
    """The error of a block on the batches of all ranks.

    Args:
        block: The block.
        calls: This rank's calls of it.
        communicator: The ranks.
    """

    def __init__(
        self, block: nn.Module, calls: Sequence[BlockCall], communicator: Communicator
    ) -> None:
        self._forward = _Forward(block)
        self._dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
        self._calls = {call.number: call for call in calls}
        self._communicator = communicator
        self._tokens = self._count_tokens()

    @property
    def batches(self) -> Sequence[int]:
        """Global indices of the batches."""
        return sorted(self._tokens)

    def error(self, weights: Mapping[str, Tensor], batches: Sequence[int]) -> float:
        """See `Objective`."""

        def add(call: BlockCall, share: float, total: Tensor) -> None:
            total += share * self._error(call, weights)[0]

        total = torch.zeros((), device=next(iter(weights.values())).device)
        self._sum(batches, partial(add, total=total), [total])
        return float(total)

    def gradient(self, weights: Mapping[str, Tensor], batches: Sequence[int]) -> Weights:
        """See `Objective`."""
        gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}

        def add(call: BlockCall, share: float) -> None:
            error, scale = self._error(call, weights, enable_grad=True)
            if not error.requires_grad:  # no token of this batch is routed to a trained expert
                return
            with torch.enable_grad():
                scaled = error * scale
            parts = torch.autograd.grad(scaled, list(weights.values()), allow_unused=True)
            for gradient, part in zip(gradients.values(), parts, strict=True):
                if part is not None:  # an expert without tokens in this batch
                    gradient.add_(part, alpha=share / scale)

        self._sum(batches, add, list(gradients.values()))
        return gradients

    def _sum(
        self,
        batches: Sequence[int],
        add: Callable[[BlockCall, float], None],
        sums: Sequence[Tensor],
    ) -> None:
        """Call ``add`` for this rank's batches with their share of the tokens; sum over ranks."""
        tokens = sum(self._tokens[number] for number in batches)
        error = None
        try:
            for number in batches:
                if number in self._calls:
                    add(self._calls[number], self._tokens[number] / tokens)
        except Exception as raised:  # reported to the other ranks in the same collective
            error = raised
        failed = torch.full_like(sums[0].reshape(-1)[:1], float(error is not None))
        self._communicator.all_reduce_sum_([failed, *sums])
        if bool(failed) or error is not None:
            self._communicator.all_reduce_min(0, error)

    def _error(
        self, call: BlockCall, weights: Mapping[str, Tensor], enable_grad: bool = False
    ) -> tuple[Tensor, float]:
        """Return the mean relative squared error of one call, and a scale for its gradient."""
        modes = TorchModes()
        call.modes.restore()
        try:
            with torch.set_grad_enabled(enable_grad), call.loaded():
                rounded = {f"block.{k}": w.to(self._dtypes[k]) for k, w in weights.items()}

                def forward(*args: object, **kwargs: object) -> object:
                    return functional_call(self._forward, rounded, args, kwargs)

                output = first_tensor(call_on_copies(forward, call.args, call.kwargs))
                assert output is not None
                with torch.autocast(output.device.type, enabled=False):
                    return _relative_error(output, call.target, call.valid)
        finally:
            modes.restore()
            torch.clear_autocast_cache()  # it holds half-precision copies of these weights

    def _count_tokens(self) -> dict[int, int]:
        """Map the global indices of all batches to their numbers of tokens."""
        communicator = self._communicator
        size = communicator.data_world_size
        last = max((number // size for number in self._calls), default=-1)
        rows = communicator.all_reduce_max(last + 1)
        counts = torch.zeros(rows * size, dtype=torch.float64)
        for number, call in self._calls.items():
            counts[number] = call.num_tokens
        communicator.all_reduce_sum_([counts])
        return {i: int(count) for i, count in enumerate(counts.tolist()) if count}


class _Forward(nn.Module):
    """Calls the forward of a block without its hooks: those of FSDP expect a run of their own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.block.forward(*args, **kwargs)


def _relative_error(output: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, float]:
    """Return the mean over tokens of ``‖output − target‖² / ‖target‖²``, and a scale.

    The scale is a power of two, by which the error is multiplied before its gradient is computed:
    in float16 the gradient of a mean over many tokens would underflow.
    """
    difference = (output.float() - target.float()).square().sum(-1)
    energy = target.float().square().sum(-1)
    mean = energy.mean()
    # a token that the block zeroes has no scale of its own
    relative = difference / energy.clamp_min(1e-6 * mean).clamp_min(TINY)
    kept = aligned(valid, relative.shape)
    if kept is not None:
        relative = relative[kept]
    scale = relative.numel() * math.sqrt(float(mean))
    is_usable = math.isfinite(scale) and scale > 0
    return relative.mean(), 2.0 ** round(math.log2(scale)) if is_usable else 1.0


@torch.no_grad()
def _copy_(module: nn.Module, attribute: str, value: Tensor) -> None:
    """Write a full tensor into a parameter, or into this rank's shard of it."""
    parameter = getattr(module, attribute)
    local_tensor(parameter).copy_(shard_like(value, parameter))
