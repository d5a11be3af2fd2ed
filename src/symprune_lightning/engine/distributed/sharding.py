"""Models sharded by FSDP2 and tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from symprune_lightning.engine.distributed.dtensor import is_dtensor
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.changes import LayerChange, apply_changes
from symprune_lightning.engine.placement import WeightPlacement


class ShardedPlacement(WeightPlacement):
    """Placement of a model sharded by FSDP2 (``fully_shard``): one block is unsharded at a time.

    Unsharding is a collective that FSDP issues whenever a batch enters a block. Batches suspend
    inside the block and their number may differ between ranks, so those collectives would not
    match. Here all ranks unshard a block once, together, before any batch enters it.

    Args:
        model: The module that is called, the root of ``fully_shard``.
    """

    def __init__(self, model: nn.Module) -> None:
        # not by _fsdp_modules: type checkers infer from here that these are modules too
        self._sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
        candidates = [m for m in self._sharded if m is not model]
        nested = {m for block in candidates for m in block.modules() if m is not block}
        super().__init__(model, [m for m in candidates if m not in nested])
        inside = {m for block in self.blocks for m in block.modules()}
        self._roots = [m for m in self._sharded if m not in inside]
        self._outside = set(model.modules()) - inside
        self._block_changes: list[Callable[[], None]] = []
        self._outside_changes: list[Callable[[], None]] = []
        self._was_called = False

    def open(self, layers: Sequence[Layer]) -> None:
        """Unshard the parameters outside the blocks."""
        for root in self._roots:
            # FSDP does this in the first forward, and would find stand-ins in place of parameters
            root._get_fsdp_state()._lazy_init()
        self._hook = self.model.register_forward_pre_hook(self._note_call)
        for module in self._sharded:
            # FSDP would reshard when the first batch leaves, under the batches still suspended
            module.set_reshard_after_forward(False, recurse=False)
        for module in self._roots:
            module.unshard()

    def load_block(self, block: nn.Module) -> None:
        """Unshard a block."""
        for module in _fsdp_modules(block):
            module.unshard()

    def record_change(self, module: nn.Module, change: Callable[[], None]) -> None:
        """Record a change of unsharded weights, to be replayed on the shards.

        ``unshard`` copies the shards into a buffer, and ``reshard`` drops that buffer with all
        changes made to it. Each change is therefore a call that reads the parameter again when it
        runs: the first time the parameter is the unsharded tensor, after ``reshard`` the shard.
        """
        if module in self._outside:
            self._outside_changes.append(change)
        elif self.current_block is not None and module in set(self.current_block.modules()):
            self._block_changes.append(change)

    def unload_block(self, block: nn.Module) -> None:
        """Reshard a block and replay the changes of its weights on the shards."""
        for module in _fsdp_modules(block):
            module.reshard()
        _replay(self._block_changes)

    def close(self, *, complete: bool) -> None:
        """Reshard everything and return control of resharding to FSDP."""
        self._hook.remove()
        if isinstance(self.model, FSDPModule) and self._was_called:
            # batches that ended in mid-forward leave FSDP's per-iteration state behind
            self.model.reset_iter_state()
        for module in self._sharded:
            module.reshard()
            # FSDP's default: only the root stays unsharded after its forward
            module.set_reshard_after_forward(module is not self.model, recurse=False)
        if complete:
            _replay(self._outside_changes)

    def _note_call(self, *_: object) -> None:
        self._was_called = True


def placement_of(model: nn.Module) -> WeightPlacement:
    """Return the placement of a model: sharded if FSDP2 was applied to it, else in memory."""
    return ShardedPlacement(model) if _fsdp_modules(model) else WeightPlacement(model)


def is_tensor_parallel(model: nn.Module, layers: Sequence[Layer]) -> bool:
    """Return whether ranks hold parts of a layer other than the shards of FSDP2.

    FSDP2 splits each weight once; a weight that is split twice, or without FSDP2, is tensor
    parallel.
    """
    allowed = 1 if _fsdp_modules(model) else 0
    weights = (layer.parameter for layer in layers)
    sharded = (weight for weight in weights if isinstance(weight, DTensor))
    return any(sum(not p.is_replicate() for p in w.placements) > allowed for w in sharded)


def has_nested_fsdp(block: nn.Module) -> bool:
    """Return whether FSDP2 was applied to a module inside of a block."""
    return any(_fsdp_modules(child) for child in block.children())


def shard_model_(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    plan: Mapping[str, str],
    num_key_value_heads: int,
) -> None:
    """Apply tensor parallelism by a plan, then FSDP2 to every block and to the root.

    Args:
        model: The module that is called.
        blocks: Its decoder blocks.
        mesh: With dimensions ``"data_parallel"`` and ``"tensor_parallel"``, as Lightning's
            ``ModelParallelStrategy`` makes it.
        plan: Layer names, with ``*`` for a number, to ``"colwise"`` or ``"rowwise"``; layers with
            another style are replicated.
        num_key_value_heads: Key-value heads, which tensor parallelism splits.

    Raises:
        ValueError: The tensor-parallel size is above 1 and the plan splits no layer, or does not
            split the heads evenly.
    """
    tensor_mesh, data_mesh = mesh["tensor_parallel"], mesh["data_parallel"]
    if tensor_mesh.size() > 1:
        styles = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
        layer_styles = {name: styles[style] for name, style in plan.items() if style in styles}
        if not layer_styles:
            raise ValueError(
                f"{type(model).__name__} has no tensor-parallel plan: use tensor_parallel_size=1, "
                f"or call parallelize_module in your own configure_model"
            )
        if num_key_value_heads % tensor_mesh.size():
            raise ValueError(
                f"{type(model).__name__} has {num_key_value_heads} key-value heads, which is not "
                f"divisible by tensor_parallel_size={tensor_mesh.size()}"
            )
        parallelize_module(model, tensor_mesh, layer_styles)
    if data_mesh.size() > 1:
        for block in blocks:
            fully_shard(block, mesh=data_mesh)
        fully_shard(model, mesh=data_mesh)


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather the weights of a sharded model on the CPU of rank 0.

    All ranks must call this; the others get an empty dictionary. Return ``None`` if no parameter
    is sharded.
    """
    if not any(is_dtensor(parameter) for parameter in model.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


def _replay(changes: list[Callable[[], None]]) -> None:
    apply_changes([change for change in changes if isinstance(change, LayerChange)])
    for change in changes:
        if not isinstance(change, LayerChange):  # of reconstruction, which follows pruning
            change()
    changes.clear()


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
