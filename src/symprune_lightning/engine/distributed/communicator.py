"""Collectives among the ranks that prune one model together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from symprune_lightning.errors import RankError
from symprune_lightning.functional.packing import pack, unpack

T = TypeVar("T")


@dataclass(frozen=True)
class Communicator:
    """The ranks that prune one model together, and the collectives they use.

    Every rank calls ``prune_model`` with the same arguments. Each runs its own calibration
    batches; statistics are summed over all ranks, each rank refines a slice of every layer's rows,
    and the slices are gathered, so that all ranks end with the same masks.

    Attributes:
        rank: Rank of this process.
        world_size: Number of processes.
        data_rank: Index of this process among those that run different batches.
        data_world_size: Number of disjoint sets of batches. Less than ``world_size`` under tensor
            parallelism, where the ranks that hold shards of one layer run the same batches.
        contributes: Whether this rank's statistics are summed: true on one rank for each
            ``data_rank``, so that no batch is counted twice.
        device: Device of the exchanged tensors: ``"cpu"`` for gloo, ``"cuda"`` for NCCL.

    Examples:
        >>> Communicator().world_size
        1
    """

    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    data_world_size: int = 1
    contributes: bool = True
    device: str = "cpu"

    @classmethod
    def from_default_group(
        cls, data_rank: int | None = None, data_world_size: int | None = None
    ) -> Communicator:
        """Return the communicator of the default process group.

        Without an initialised group this is a single process.

        Args:
            data_rank: Index of this process's set of batches; by default its rank.
            data_world_size: Number of such sets; by default the world size.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, size = dist.get_rank(), dist.get_world_size()
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        if data_rank is None or data_world_size is None:
            return cls(rank, size, rank, size, device=device)
        # of the ranks with the same batches, the lowest contributes
        lowest = torch.full((data_world_size,), size, dtype=torch.int64, device=device)
        lowest[data_rank] = rank
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        contributes = int(lowest[data_rank]) == rank
        return cls(rank, size, data_rank, data_world_size, contributes, device)

    def shard(self, batches: Iterable[T]) -> Iterable[T]:
        """Return this rank's batches: round-robin, never splitting a batch."""
        if self.data_world_size == 1:
            return batches
        return islice(batches, self.data_rank, None, self.data_world_size)

    def row_slice(self, num_rows: int) -> slice:
        """Return the rows of a layer that this rank refines."""
        start = num_rows * self.rank // self.world_size
        return slice(start, num_rows * (self.rank + 1) // self.world_size)

    def rows_on_rank_zero(self, num_rows: int) -> slice:
        """Return all rows on rank 0 and none elsewhere, for work that cannot be divided."""
        return slice(0, num_rows if self.rank == 0 else 0)

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        self.all_reduce_min(0)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all ranks, on this communicator's device."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def all_reduce_sum_(self, totals: Sequence[Tensor]) -> None:
        """Replace totals, all of one dtype, by their sums over contributing ranks; a collective."""
        if self.world_size == 1 or not totals:
            return
        flat = torch.cat([total.flatten() for total in totals])
        summed = self.all_reduce_sum(flat if self.contributes else torch.zeros_like(flat))
        sums = torch.split(summed, [total.numel() for total in totals])
        for total, reduced in zip(totals, sums, strict=True):
            total.copy_(reduced.view_as(total))

    def all_reduce_min(self, value: int, error: Exception | None = None) -> int:
        """Return the minimum over all ranks, or raise on all ranks if one of them failed.

        Args:
            value: This rank's value, at least 0.
            error: The exception that this rank raised, if any.

        Raises:
            Exception: ``error`` itself, on the rank that raised it.
            RankError: Another rank failed.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return value
        # -1 is below every value: failure and minimum travel in the same collective
        minimum = torch.tensor(-1 if error is not None else value, device=self.device)
        dist.all_reduce(minimum, dist.ReduceOp.MIN)
        if int(minimum) < 0:
            self._raise_on_all_ranks(error)
        return int(minimum)

    def on_rank_zero(self, function: Callable[[], str | None]) -> str:
        """Call a function on rank 0 alone, and return its text on all ranks.

        The others wait, up to the process group's timeout.

        Raises:
            Exception: The function's own, on rank 0.
            RankError: The function failed on rank 0, on all other ranks.
        """
        text, error = "", None
        if self.rank == 0:
            try:
                text = function() or ""
            except Exception as raised:  # reported to the other ranks; every rank raises
                error = raised
        self.all_reduce_min(0, error)
        return self.broadcast_text(text)

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum of a non-negative value over all ranks."""
        if self.world_size == 1:
            return value
        maximum = torch.tensor(value, device=self.device)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return int(maximum)

    def union_of_indices(self, indices: Iterable[int], count: int) -> list[int]:
        """Return the indices below ``count`` that any rank holds, sorted."""
        if self.world_size == 1:
            return sorted(indices)
        held = sorted(indices)
        # first the range, which is almost always a single index: a flag for each of many thousand
        # indices would be exchanged as many thousand times
        bounds = torch.tensor(
            [held[-1], count - 1 - held[0]] if held else [-1, -1], device=self.device
        )
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        last, first = int(bounds[0]), count - 1 - int(bounds[1])
        if last <= first:
            return [last] if last == first else []
        flags = torch.zeros(last + 1 - first, dtype=torch.uint8, device=self.device)
        flags[[index - first for index in held]] = 1
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [first + index for index in flags.nonzero().flatten().tolist()]

    def gather_masks(
        self,
        shape: Sequence[int],
        rows: slice,
        mask: Tensor | None,
        sums: Tensor,
        error: Exception | None,
    ) -> tuple[Tensor, Tensor]:
        """Assemble a mask of which every rank holds some rows, and add up the ranks' sums.

        One collective: masks travel as packed bits, and each rank has a slot for its sums and for
        whether it failed.

        Args:
            shape: Shape of the full mask, ``(out_features, in_features)``.
            rows: The rows that this rank holds.
            mask: These rows, bool; ``None`` if this rank failed.
            sums: Float64 vector to be summed over ranks, of the same length on all of them.
            error: The exception that this rank raised, if any.

        Returns:
            The full mask on ``mask``'s device, and the summed vector.

        Raises:
            Exception: See ``all_reduce_min``.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            assert mask is not None
            return mask, sums
        slots = torch.zeros(self.world_size, len(sums) + 1, dtype=torch.float64)
        bits = torch.zeros(shape[0], -(-shape[1] // 8), dtype=torch.uint8, device=self.device)
        slots[self.rank, -1] = error is not None
        if mask is not None:
            slots[self.rank, :-1] = sums
            bits[rows] = pack(mask).to(self.device)
        # every byte is written by one rank and zero on the others, so a sum of bytes joins them
        header = slots.view(torch.uint8).flatten().to(self.device)
        payload = torch.cat([header, bits.flatten()])
        dist.all_reduce(payload)
        header, data = torch.split(payload, [len(header), bits.numel()])
        slots = header.cpu().clone().view(torch.float64).view_as(slots)
        if slots[:, -1].any():
            self._raise_on_all_ranks(error)
        assert mask is not None
        return unpack(data.view_as(bits).to(mask.device), shape[1]), slots[:, :-1].sum(0)

    def gather_rows(self, values: Tensor, rows: slice, num_rows: int) -> Tensor:
        """Assemble a matrix of which every rank holds some rows."""
        if self.world_size == 1:
            return values
        full = torch.zeros(num_rows, values.shape[1], dtype=values.dtype, device=self.device)
        full[rows] = values.to(self.device)
        dist.all_reduce(full)
        return full.to(values.device)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast a tensor from rank 0; other ranks pass one of the same shape and dtype."""
        if self.world_size == 1:
            return tensor
        buffer = tensor.to(self.device).contiguous()
        dist.broadcast(buffer, 0)
        return buffer.to(tensor.device)

    def broadcast_text(self, text: str | None, src: int = 0) -> str:
        """Broadcast a string from rank ``src``."""
        if self.world_size == 1:
            return text or ""
        # as bytes in a tensor: broadcast_object_list would pickle
        data = b"" if text is None else text.encode()
        length = torch.tensor(len(data), device=self.device)
        dist.broadcast(length, src)
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == src:
            buffer.copy_(torch.tensor(list(data), dtype=torch.uint8))
        dist.broadcast(buffer, src)
        return bytes(buffer.tolist()).decode(errors="replace")

    def assert_identical_weights(self, weights: Sequence[Tensor]) -> None:
        """Check that all ranks hold the same weights, by their hashes.

        Raises:
            RuntimeError: They differ.
        """
        if self.world_size == 1:
            return
        hashes = [torch.hash_tensor(weight).view(torch.int64) for weight in weights]
        lowest = torch.stack(hashes).to(self.device)
        highest = lowest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        if not torch.equal(lowest, highest):
            raise RuntimeError(
                "the ranks hold different weights after pruning: load the same model on every "
                "rank, and use devices of the same type"
            )

    def _raise_on_all_ranks(self, error: Exception | None) -> Any:
        """Raise this rank's own error, or a ``RankError`` that names the rank that failed."""
        failed = self.union_of_indices([] if error is None else [self.rank], self.world_size)
        text = None if error is None else f"{type(error).__name__}: {error}"
        message = self.broadcast_text(text, failed[0])
        if error is not None:
            raise error
        raise RankError(f"rank {failed[0]} of {self.world_size} failed: {message}")


SINGLE_PROCESS = Communicator()
"""The communicator of a run on one process."""
