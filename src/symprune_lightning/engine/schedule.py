"""The suspended forward: batches wait at the layer that is about to be pruned.

Each batch runs the model's own forward in a greenlet of its own. A hook at every *station* (a layer
or a decoder block) records the input and hands control back here. When every batch waits or has
ended, the statistics of the station that comes first are complete: it is pruned, and its batches go
on through the sparse weights. Nothing is traced and no forward is copied, so any architecture
works, whatever its arguments, masks and caches.

Memory: about one hidden state per batch, and for stations inside a block what the block holds.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from symprune_lightning.engine.layers import Layer, decoder_blocks, spared_modules
from symprune_lightning.engine.parallel import ALONE, Ranks
from symprune_lightning.engine.parking import park
from symprune_lightning.engine.recorder import LastInput, Recorder
from symprune_lightning.engine.residence import Residence

Schedule = Literal["layer", "block", "dense"]
"""When a layer is pruned.

- ``"layer"``: as soon as its inputs are known; one forward, every layer sees sparse ones before it.
- ``"block"``: block by block; statistics are taken while the block is dense, then it runs again.
  Two forwards; equals the reference implementations.
- ``"dense"``: after one plain forward, from the statistics of the dense model.
"""

Forward = Callable[[nn.Module, Any], object]
"""How a batch is given to the model."""


def check_schedule(schedule: str) -> None:
    """Raise ``ValueError`` if there is no such schedule."""
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(get_args(Schedule))}")


@dataclass(frozen=True)
class _Entrance:
    """The station before a block that is not in memory yet."""

    block: nn.Module


Station = nn.Module | _Entrance


class _Batch(greenlet.greenlet):
    """One batch on its way through the model."""

    def __init__(self, run: Callable[[], object], valid: Tensor | None) -> None:
        super().__init__(run)
        self.gr_context = contextvars.copy_context()
        self.valid = valid
        self.last_input = LastInput()
        self.measuring = False
        self.leaving = False
        self.station: Station | None = None
        self.passed: tuple[nn.Module, object] | None = None
        """A block that it has been through already, with the output."""

    def wait_at(self, station: Station) -> None:
        """Hand control to the scheduler until the station is pruned."""
        self.station = station
        modes = _thread_modes()
        assert self.parent is not None
        self.parent.switch()
        _set_thread_modes(modes)
        self.station = None


class SuspendedForward:
    """Runs batches through a model and prunes each layer when its statistics are complete.

    Several processes do so together: each has batches of its own, and all move from station to
    station in step, also one whose batches never come there.

    Args:
        model: The model, in the state (mode, device) in which it is to be run.
        layers: The layers to prune, in the order that breaks ties between waiting batches.
        recorder: Collects the statistics.
        prune: Called with layers whose statistics are complete. Must set their weights.
        schedule: When that is.
        ranks: The processes that prune together.
        residence: Where weights are, if not in memory all the time.
        offload: Where the hidden states of batches are that wait before a block: see ``park``.
        restore: Called with modules whose weights have come into memory, before batches use them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        recorder: Recorder,
        prune: Callable[[Sequence[Layer]], None],
        schedule: Schedule = "layer",
        ranks: Ranks = ALONE,
        residence: Residence | None = None,
        offload: str | os.PathLike[str] | None = None,
        restore: Callable[[set[nn.Module]], None] | None = None,
    ) -> None:
        self.model = model
        self.restore = restore or (lambda modules: None)
        self.offload = offload
        self.layers = {layer.module: layer for layer in layers}
        self.recorder = recorder
        self.prune = prune
        self.schedule = schedule
        self.ranks = ranks
        self.residence = residence
        self.stations = self._stations()
        self.order: list[Station] = self._in_order()
        self.todo = dict.fromkeys(self.order)
        """The stations that are not done yet; an ordered set."""
        self.late: set[str] = set()
        """Layers that a batch came to after they had been pruned."""

    def run(self, batches: Iterable[Any], forward: Forward) -> bool:
        """Run all batches and prune.

        Returns:
            Whether there were any batches, on any process.
        """
        on_the_way: list[_Batch] = []
        with nullcontext() if self.residence is None else self.residence.opened():
            self.restore(self._in_memory())
            with self._hooks():
                try:
                    count, error = self._start(batches, forward, on_the_way)
                    while (station := self._next(on_the_way, error)) is not None:
                        error = self._advance(station, on_the_way)
                finally:
                    for batch in on_the_way:
                        _end(batch)
            if self.schedule == "dense":
                self._prune_all()
        return bool(self.ranks.union([0] if count else [], 1))

    def _start(
        self, batches: Iterable[Any], forward: Forward, on_the_way: list[_Batch]
    ) -> tuple[int, Exception | None]:
        """Send every batch to its first station; one that never waits is over at once."""
        count = 0
        try:
            for data in batches:
                batch = _Batch(partial(forward, self.model, data), _valid_tokens(data))
                batch.measuring = self.schedule == "dense"
                on_the_way.append(batch)
                _resume(batch)
                if batch.dead:
                    on_the_way.pop()
                count += 1
        except Exception as error:  # told to the other processes at the next station
            return count, error
        return count, None

    def _next(self, on_the_way: list[_Batch], error: Exception | None) -> Station | None:
        """The first station at which batches wait, on any process; ``None`` if none waits."""
        on_the_way[:] = [batch for batch in on_the_way if not batch.dead]
        waited_at = {batch.station for batch in on_the_way}
        here = (i for i, station in enumerate(self.order) if station in waited_at)
        index = self.ranks.least(next(here, len(self.order)), error)
        return None if index == len(self.order) else self.order[index]

    def _advance(self, station: Station, on_the_way: Sequence[_Batch]) -> Exception | None:
        """Do what is due at a station, and let the batches that wait there go on."""
        if isinstance(station, _Entrance):
            assert self.residence is not None
            self.residence.move_to(station.block)
            if not self.residence.readable:
                self.restore(set(station.block.modules()))
        elif self.schedule != "dense":
            self.prune([x for x in self.stations[station] if self.recorder.seen(x.name)])
        self.todo.pop(station, None)
        here = [batch for batch in on_the_way if batch.station == station]
        try:
            for batch in here:
                # behind the last station nothing is left to learn: no output projection; but one
                # batch goes on as far as that, in case the model comes to a pruned layer again
                batch.leaving = not self.todo
                if self.todo or batch is here[0]:
                    _resume(batch)
                else:
                    _end(batch)
        except Exception as error:  # told to the other processes at the next station
            return error
        return None

    def _in_memory(self) -> set[nn.Module]:
        """Modules whose weights are there before a batch has moved."""
        modules = set(self.model.modules())
        if self.residence is not None and not self.residence.readable:
            modules -= {m for block in self.residence.blocks for m in block.modules()}
        return modules

    def _prune_all(self) -> None:
        """Prune what was measured."""
        seen = [layer for layer in self.layers.values() if self.recorder.seen(layer.name)]
        if self.residence is None:
            self.prune(seen)
        else:
            self.residence.visit(seen, self.prune)

    def _stations(self) -> dict[nn.Module, list[Layer]]:
        """Where batches wait for layers to be pruned, with these layers, in model order."""
        if self.schedule == "dense" and self.residence is None:
            return {}  # nothing to wait for
        station_of = {module: module for module in self.layers}
        if self.schedule == "block":
            for block in decoder_blocks(self.model, list(self.layers.values())):
                station_of.update((m, block) for m in block.modules() if m in self.layers)
        stations: dict[nn.Module, list[Layer]] = {}
        for module, station in station_of.items():
            stations.setdefault(station, []).append(self.layers[module])
        return stations

    def _in_order(self) -> list[Station]:
        """All stations in model order; the entrance of a block comes before what is in it."""
        if self.residence is None:
            return list(self.stations)
        at = {module: i for i, module in enumerate(self.model.modules())}
        order: list[Station] = [_Entrance(block) for block in self.residence.blocks]
        order += self.stations
        # the sort is stable, and the entrances are first in the list
        return sorted(order, key=lambda x: at[x.block if isinstance(x, _Entrance) else x])

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        entered = self.residence.blocks if self.residence is not None else []
        hooks = [(module, self._measure, False) for module in self.layers]
        # blocks: before the hooks of FSDP, which expect that a call is not interrupted
        hooks += [(module, self._wait, module not in self.layers) for module in self.stations]
        hooks += [(module, self._wait_outside, True) for module in entered]
        spared = spared_modules(self.model, self.layers.values())
        hooks += [(module, self._leave, False) for module in spared]
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
            for module, hook, first in hooks
        ]
        forwards = {module: module.__dict__.get("forward") for module in entered}
        try:
            for module in entered:
                module.forward = partial(self._forward_once, module, module.forward)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in forwards.items():
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _measure(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = _current()
        if batch is not None and (batch.measuring or module in self.todo):
            x = args[0] if args else kwargs["input"]
            self.recorder.observe(self.layers[module], x, batch.last_input, batch.valid)

    def _wait_outside(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        batch = _current()
        entrance = _Entrance(module)
        assert self.residence is not None
        if batch is None or module is self.residence.inside:
            return
        if entrance not in self.todo:
            raise ValueError(
                f"the model comes to the same {type(module).__name__} twice, which is not "
                f"supported for a model that is sharded or read block by block"
            )
        self._wait_parked(batch, entrance, args, kwargs)
        if self.schedule != "block":
            # batches are suspended inside, of which the hooks of FSDP must not know
            batch.passed = module, module.forward(*args, **kwargs)

    @staticmethod
    def _forward_once(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> object:
        """The block's forward, or its output if the batch has been through it before the hooks."""
        batch = _current()
        if batch is not None and batch.passed is not None and batch.passed[0] is module:
            output, batch.passed = batch.passed[1], None
            return output
        return forward(*args, **kwargs)

    def _wait(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = _current()
        if batch is None or (batch.measuring and module not in self.layers):
            return
        if module not in self.todo:
            self.late.update(layer.name for layer in self.stations[module])
            return
        if module not in self.layers:
            batch.measuring = True
            # the dense block: only its layers' inputs count. It gets copies, since a block may
            # write to its input, and is run again
            copies = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            module(*copies[0], **copies[1])
            batch.measuring = False
            del copies
            self._wait_parked(batch, module, args, kwargs)
        else:
            batch.wait_at(module)

    def _wait_parked(
        self, batch: _Batch, station: Station, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Wait at a block, with the hidden states elsewhere if that is asked for."""
        x = args[0] if args else kwargs.get("hidden_states")
        if self.offload is None or not isinstance(x, Tensor):
            batch.wait_at(station)
            return
        back = park(x, self.offload)
        try:
            batch.wait_at(station)
        finally:
            back()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = _current()
        # what is not in memory now is the output projection of a streamed model: nothing follows it
        if batch is not None and (batch.leaving or _on_meta(module)):
            raise greenlet.GreenletExit


def _current() -> _Batch | None:
    """The batch that is running, or ``None`` if a hook is called from outside the run."""
    batch = greenlet.getcurrent()
    return batch if isinstance(batch, _Batch) else None


def _resume(batch: _Batch) -> None:
    """Let a batch run until it waits or ends; its error, if any, is raised here."""
    modes = _thread_modes()
    try:
        batch.switch()
    finally:
        _set_thread_modes(modes)


def _end(batch: _Batch) -> None:
    """Make a batch that waits inside the model leave it, through its ``finally`` clauses."""
    modes = _thread_modes()
    if not batch.dead:
        batch.throw()
    _set_thread_modes(modes)


def _thread_modes() -> tuple[Any, ...]:
    """Torch keeps these by thread or process: a batch must find them as it left them."""
    autocast = [
        (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.get_default_dtype(), autocast


def _set_thread_modes(modes: tuple[Any, ...]) -> None:
    grad, dtype, autocast = modes
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    for device, enabled, dtype in autocast:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _on_meta(module: nn.Module) -> bool:
    return any(weight.is_meta for weight in module.parameters(recurse=False))


def _valid_tokens(data: Any) -> Tensor | None:
    """Where a batch has real tokens, if its ``attention_mask`` says that some are padding."""
    mask = data.get("attention_mask") if isinstance(data, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all():
        return mask.bool()
    return None
