"""The processes that prune one model together: the only file that names torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from symprune_lightning.engine.residence import Residence
from symprune_lightning.functional.packing import pack, unpack

T = TypeVar("T")


class RankError(RuntimeError):
    """Another process of the group has failed; the message says which and why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that prune one model together.

    All of them call ``prune_model`` alike. Each runs its share of the batches; the statistics are
    summed over all, each process refines its share of every layer's rows, and the masks are
    exchanged, so that all end with the same.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
        share: Which share of the batches it runs, from 0.
        shares: How many shares there are; fewer than processes if some run the same one, as those
            do that hold parts of the same layers (tensor parallel).
        counts: Whether its statistics are counted: for one process of each share.
        device: Where what is exchanged has to be: ``"cpu"`` for gloo, the GPU for NCCL.
    """

    rank: int = 0
    size: int = 1
    share: int = 0
    shares: int = 1
    counts: bool = True
    device: str = "cpu"

    @classmethod
    def all(cls, share: int | None = None, shares: int | None = None) -> Ranks:
        """All processes of the default group; a share of the batches each, unless told.

        Args:
            share: Which share of the batches this process runs.
            shares: How many there are.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, size = dist.get_rank(), dist.get_world_size()
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        if share is None or shares is None:
            return cls(rank, size, rank, size, device=device)
        first = torch.full((shares,), size, dtype=torch.int64, device=device)
        first[share] = rank
        dist.all_reduce(first, dist.ReduceOp.MIN)
        return cls(rank, size, share, shares, counts=int(first[share]) == rank, device=device)

    def deal(self, batches: Iterable[T]) -> Iterable[T]:
        """This process's share of the batches: every one in turn, whole."""
        return batches if self.shares == 1 else islice(batches, self.share, None, self.shares)

    def rows(self, count: int) -> slice:
        """Which of a layer's rows this process refines."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def whole(self, count: int) -> slice:
        """All rows for the first process, none for the others: for work that can't be divided."""
        return slice(0, count if self.rank == 0 else 0)

    def sum_(self, totals: Sequence[Tensor]) -> None:
        """Replace float64 totals by their sums over all processes that count, in one exchange."""
        if self.size == 1 or not totals:
            return
        mine = torch.cat([total.flatten() for total in totals])
        together = self.added(mine if self.counts else torch.zeros_like(mine))
        parts = torch.split(together, [total.numel() for total in totals])
        for total, found in zip(totals, parts, strict=True):
            total.copy_(found.view_as(total))

    def union(self, mine: Iterable[int], count: int) -> list[int]:
        """The indices below ``count`` that any process has, in order."""
        if self.size == 1:
            return sorted(mine)
        flags = torch.zeros(count, dtype=torch.uint8, device=self.device)
        flags[list(mine)] = 1
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags.nonzero().flatten().tolist()

    def least(self, value: int, error: Exception | None = None) -> int:
        """The least value of any process.

        Raises:
            Exception: ``error``, if this process has failed.
            RankError: Another process has failed.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return value
        told = torch.tensor(-1 if error is not None else value, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        if int(told) < 0:
            self._raise_together(error)
        return int(told)

    def added(self, figures: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return figures
        moved = figures.to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved

    def join_masks(
        self,
        shape: Sequence[int],
        rows: slice,
        mask: Tensor | None,
        figures: Tensor | None,
        error: Exception | None,
    ) -> tuple[Tensor, Tensor]:
        """A whole mask, of which every process has some rows, and the sums of their figures.

        One exchange, in which masks travel as packed bits and each process has a place for its
        figures and for whether it failed.

        Args:
            shape: Of the whole mask.
            rows: Which of them this process has.
            mask: These rows; ``None`` if it has failed.
            figures: Float64 vector of five; ``None`` if it has failed.
            error: Why it has failed.

        Raises:
            Exception: See ``least``.
        """
        if self.size == 1:
            if error is not None:
                raise error
            assert mask is not None
            assert figures is not None
            return mask, figures
        told = torch.zeros(self.size, 6, dtype=torch.float64)
        bits = torch.zeros(shape[0], -(-shape[1] // 8), dtype=torch.uint8, device=self.device)
        told[self.rank, 5] = error is not None
        if mask is not None and figures is not None:
            told[self.rank, :5] = figures
            bits[rows] = pack(mask).to(self.device)
        head = told.view(torch.uint8).flatten().to(self.device)
        together = torch.cat([head, bits.flatten()])
        dist.all_reduce(together)
        head, data = torch.split(together, [len(head), bits.numel()])
        told = head.cpu().clone().view(torch.float64).view(self.size, 6)
        if told[:, 5].any():
            self._raise_together(error)
        assert mask is not None
        return unpack(data.view_as(bits).to(mask.device), shape[1]), told[:, :5].sum(0)

    def join_rows(self, part: Tensor, rows: slice, count: int) -> Tensor:
        """All rows of a matrix of which every process has some."""
        if self.size == 1:
            return part
        whole = torch.zeros(count, part.shape[1], dtype=part.dtype, device=self.device)
        whole[rows] = part.to(self.device)
        dist.all_reduce(whole)
        return whole.to(part.device)

    def check_same(self, weights: Sequence[Tensor]) -> None:
        """Make sure that all processes hold the same values.

        Raises:
            RuntimeError: They don't.
        """
        if self.size == 1:
            return
        hashes = [torch.hash_tensor(weight).view(torch.int64) for weight in weights]
        mine = torch.stack(hashes).to(self.device)
        least, most = mine.clone(), mine
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise RuntimeError(
                "the processes hold different weights after pruning: did they start from the same "
                "model, and are their devices of one kind?"
            )

    def told(self, text: str | None) -> str:
        """What the first process has to say, on all of them."""
        if self.size == 1:
            return text or ""
        return self._said(text, 0).decode()

    def given(self, tensor: Tensor) -> Tensor:
        """The first process's tensor; the others give one of its shape and dtype."""
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device).contiguous()
        dist.broadcast(moved, 0)
        return moved.to(tensor.device)

    def _raise_together(self, error: Exception | None) -> None:
        """Raise this process's own error, or say whose it is."""
        failed = self.union([] if error is None else [self.rank], self.size)
        text = None if error is None else f"{type(error).__name__}: {error}"
        message = self._said(text, failed[0]).decode(errors="replace")
        if error is not None:
            raise error
        raise RankError(f"process {failed[0]} of {self.size} failed: {message}")

    def _said(self, text: str | None, rank: int) -> bytes:
        """A text of one process, on all."""
        data = b"" if text is None else text.encode()
        length = torch.tensor(len(data), device=self.device)
        dist.broadcast(length, rank)
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == rank:
            buffer.copy_(torch.tensor(list(data), dtype=torch.uint8))
        dist.broadcast(buffer, rank)
        return bytes(buffer.tolist())


ALONE = Ranks()
"""One process."""


class ShardedBlocks(Residence):
    """A model sharded by FSDP2 (``fully_shard``): blocks are gathered one at a time.

    Gathering is a collective, and FSDP does it whenever a batch comes to a block. Here it is done
    when all processes are there instead, once for all batches, since these suspend inside the block
    and may be more on one process than on another.

    Args:
        model: The module that is called, to which ``fully_shard`` was applied last.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
        outermost = [m for m in self._sharded if m is not model]
        inside = {m for block in outermost for m in block.modules() if m is not block}
        super().__init__(model, [m for m in outermost if m not in inside])
        within = {m for block in self.blocks for m in block.modules()}
        self._rest = [m for m in self._sharded if m not in within]
        self._outside = set(model.modules()) - within
        self._changes: list[Callable[[], None]] = []
        self._changes_outside: list[Callable[[], None]] = []
        self._called = False

    def open(self) -> None:
        """Gather what lies outside the blocks."""
        self._hook = self.model.register_forward_pre_hook(self._note)
        for module in self._sharded:
            module.set_reshard_after_forward(False, recurse=False)
        for module in self._rest:
            module.unshard()

    def enter(self, block: nn.Module) -> None:
        """Gather a block."""
        for module in _fsdp_modules(block):
            module.unshard()

    def changed(self, module: nn.Module, change: Callable[[], None]) -> None:
        """Keep a change of gathered weights for the shards."""
        if module in self._outside:
            self._changes_outside.append(change)
        elif self.inside is not None and module in set(self.inside.modules()):
            self._changes.append(change)

    def leave(self, block: nn.Module) -> None:
        """Let a block go, and change its shards as the gathered weights were changed."""
        for module in _fsdp_modules(block):
            module.reshard()
        _repeat(self._changes)

    def close(self, *, complete: bool) -> None:
        """Let everything go, and have FSDP gather by itself again."""
        self._hook.remove()
        if isinstance(self.model, FSDPModule) and self._called:
            self.model.reset_iter_state()  # batches may have left in mid-forward
        for module in self._sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not self.model, recurse=False)
        if complete:
            _repeat(self._changes_outside)

    def _note(self, *_: object) -> None:
        self._called = True


def _repeat(changes: list[Callable[[], None]]) -> None:
    for change in changes:
        change()
    changes.clear()


def shard_(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    plan: Mapping[str, str],
    heads: int,
) -> None:
    """Lay a model out over a mesh: tensor parallel by its plan, then FSDP2 block by block.

    Args:
        model: The module that is called.
        blocks: Its decoder blocks.
        mesh: With dimensions ``"data_parallel"`` and ``"tensor_parallel"``, as Lightning's
            ``ModelParallelStrategy`` makes it.
        plan: Layer names, with ``*`` for a number, to ``"colwise"`` or ``"rowwise"``; layers with
            anything else are not divided.
        heads: Key-value heads, which tensor parallel divides.

    Raises:
        ValueError: Tensor parallel is asked for, and the plan divides nothing or not evenly.
    """
    tensor, data = mesh["tensor_parallel"], mesh["data_parallel"]
    if tensor.size() > 1:
        styles = {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel()}
        divided = {name: styles[style] for name, style in plan.items() if style in styles}
        if not divided:
            raise ValueError(
                f"{type(model).__name__} has no plan for tensor parallel: use "
                f"tensor_parallel_size=1, or parallelize it in a configure_model of your own"
            )
        if heads % tensor.size():
            raise ValueError(
                f"{type(model).__name__} has {heads} key-value heads, which "
                f"tensor_parallel_size={tensor.size()} does not divide"
            )
        parallelize_module(model, tensor, divided)
    if data.size() > 1:
        for block in blocks:
            fully_shard(block, mesh=data)
        fully_shard(model, mesh=data)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights of a sharded model on the CPU of the first process; ``None`` if none is sharded.

    All processes must call this. The others get an empty dictionary.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


def residence_of(model: nn.Module) -> Residence | None:
    """Where the weights of a model are, if it is sharded by FSDP2."""
    return ShardedBlocks(model) if _fsdp_modules(model) else None


def _fsdp_modules(block: nn.Module) -> list[FSDPModule]:
    return [module for module in block.modules() if isinstance(module, FSDPModule)]


def is_sharded(weight: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold a part only."""
    return isinstance(weight, DTensor)


def gathered(x: Tensor) -> Tensor:
    """The whole of a tensor; processes that hold parts of it must all call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """The part of ``value``, which every process has whole, that this one holds of ``like``."""
    if not isinstance(like, DTensor):
        return value
    placed = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()
