"""The suspended forward: batches wait at the layer that is about to be pruned.

Each batch runs the model's own forward in a greenlet of its own. At every *wait point* (a layer or
a decoder block) the input is recorded and control returns to the scheduler. When every batch waits
or has ended, the statistics of the first wait point are complete: it is pruned, and its batches
resume through the sparse weights. Nothing is traced and no forward is copied, so any architecture
works, whatever its arguments, masks and caches.

Memory: about one hidden state per batch; for wait points inside a block, the block's activations.

Longer than 300 lines since the scheduler and the hooks that switch to it share their state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from symprune_lightning.engine.distributed.dtensor import is_dtensor
from symprune_lightning.engine.forward.attributes import ForwardAttributes
from symprune_lightning.engine.forward.batch import (
    SuspendedBatch,
    current_batch,
    exit_forward,
    replay_finished_blocks,
)
from symprune_lightning.engine.forward.block import BlockCall, call_on_copies, hidden_states
from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.forward.offload import OffloadedTensor
from symprune_lightning.engine.forward.padding import valid_tokens
from symprune_lightning.engine.forward.recorder import Recorder, valid_rows
from symprune_lightning.engine.forward.targets import BlockTargets
from symprune_lightning.engine.layers.base import Layer, Tokens, group_by_module, watch_layers
from symprune_lightning.engine.layers.order import execution_order
from symprune_lightning.engine.layers.select import decoder_blocks, excluded_layers
from symprune_lightning.functional.statistics import CalibrationOrder


@dataclass(frozen=True)
class BlockEntry:
    """The wait point in front of a block whose weights are loaded next."""

    block: nn.Module


WaitPoint = Layer | nn.Module | BlockEntry


@dataclass(frozen=True)
class BlockTraining:
    """Training of blocks after they are pruned, with order ``"block"``.

    Attributes:
        train: Called with a pruned block and this rank's calls of it.
        targets: Records these calls.
    """

    train: Callable[[nn.Module, Sequence[BlockCall]], None]
    targets: BlockTargets


NUM_TRACED = 4
"""Batches that are run once more where the order of execution is not known."""


def _module_of(point: WaitPoint) -> nn.Module:
    if isinstance(point, BlockEntry):
        return point.block
    return point.module if isinstance(point, Layer) else point


class SuspendedForward:
    """Runs batches through a model and prunes each layer when its statistics are complete.

    With several ranks, each runs its own batches and all ranks visit the wait points in the same
    order, including a rank whose batches never reach one of them.

    Args:
        calibration: Model and batches.
        layers: The layers to prune, in the order that breaks ties between waiting batches.
        recorder: Collects the statistics.
        prune: Called with layers whose statistics are complete. Changes their weights.
        order: The calibration order.
        skip: Called in place of ``prune`` with layers that no batch has reached, while their
            weights are loaded.
        restore: Called with modules whose weights have just been loaded, before batches use them.
        restored: Layers that ``restore`` changes and that are not among ``layers``.
        training: Trains the blocks after they are pruned.

    Attributes:
        called_after_pruning: Names of layers that a batch called again after they were pruned;
            these calls were not measured.
    """

    def __init__(
        self,
        calibration: Calibration,
        layers: Sequence[Layer],
        recorder: Recorder,
        prune: Callable[[Sequence[Layer]], None],
        order: CalibrationOrder = "layer",
        skip: Callable[[Sequence[Layer]], None] | None = None,
        restore: Callable[[set[nn.Module]], None] | None = None,
        restored: Sequence[Layer] = (),
        training: BlockTraining | None = None,
    ) -> None:
        self.calibration = calibration
        self.layers = list(layers)
        self.recorder = recorder
        self.prune = prune
        self.order = order
        self.skip = skip or (lambda layers: None)
        self.restore = restore or (lambda modules: None)
        self.restored = list(restored)
        self.training = training
        self.placement = calibration.placement
        self.called_after_pruning: set[str] = set()
        self._layers_at = self._assign_layers()
        self._wait_points = self._sort_wait_points()
        self._index: dict[Hashable, int] = {p: i for i, p in enumerate(self._wait_points)}
        self._pending = set(self._wait_points)
        # tracing calls the model once more, which a model that is loaded block by block cannot do
        is_sharded = any(is_dtensor(layer.parameter) for layer in self.layers)
        self._is_traced = is_sharded or not self.placement.always_loaded
        self._inside_blocks = {m for block in self.placement.blocks for m in block.modules()}
        self._traceable: list[SuspendedBatch] = []
        self._shared: dict[Layer, Layer] = {}
        self._attributes = ForwardAttributes(
            calibration.model, with_buffers=self.placement.always_loaded
        )

    def run(self) -> None:
        """Run all batches and prune.

        Raises:
            ValueError: No rank has a batch.
        """
        suspended: list[SuspendedBatch] = []
        # a placement loads and writes the layers that are pruned here or were before
        with self.placement.session([*self.layers, *self.restored]):
            self.restore(self.placement.initially_loaded)
            with self._hooks():
                try:
                    count, error = self._start(suspended)
                    while (wait_point := self._next(suspended, error)) is not None:
                        error = self._advance(wait_point, suspended)
                finally:
                    for batch in suspended:
                        batch.end()
            self._leave_block()
            if self.order == "dense":
                self.placement.for_each_block(self.layers, self._complete)
        self.calibration.check_not_empty(count)

    def _start(self, suspended: list[SuspendedBatch]) -> tuple[int, Exception | None]:
        """Start every batch; a batch that reaches no wait point finishes immediately."""
        count = 0
        communicator = self.calibration.communicator
        try:
            for data in self.calibration.batches:
                forward = partial(self.calibration.forward, self.calibration.model, data)
                number = communicator.data_rank + count * communicator.data_world_size
                valid = valid_tokens(data, self.calibration.model)
                batch = SuspendedBatch(forward, valid, number, self._attributes)
                if count < NUM_TRACED and not self._is_traced:
                    self._traceable.append(SuspendedBatch(forward, None, number, self._attributes))
                batch.is_measuring = self.order == "dense"
                suspended.append(batch)
                batch.resume()
                if batch.dead:
                    suspended.pop()
                count += 1
        except Exception as error:  # reported to the other ranks at the next wait point
            return count, error
        return count, None

    def _next(self, suspended: list[SuspendedBatch], error: Exception | None) -> WaitPoint | None:
        """Return the first wait point with batches of any rank; ``None`` if there is none."""
        suspended[:] = [batch for batch in suspended if not batch.dead]
        communicator, end = self.calibration.communicator, len(self._wait_points)
        # `is not None`: the truth of a module may be its length, which a compiled block has not
        points = [batch.wait_point for batch in suspended if batch.wait_point is not None]
        indices = [self._index[point] for point in points]
        first = communicator.all_reduce_min(min(indices, default=end), error)
        if not self._is_traced and communicator.all_reduce_max(max(indices, default=0)) > first:
            # Batches wait at several points (experts in a ModuleList, of which each batch uses
            # some). The order in which the model registers them may not be that of execution, and
            # a layer that runs last must not be pruned before the others have reached it.
            self._trace()
            return self._next(suspended, None)
        return None if first == end else self._wait_points[first]

    def _trace(self) -> None:
        """Sort the wait points by the order in which a few batches use the layers."""
        self._is_traced = True
        modules = list(self.calibration.model.modules())
        numbers = {module: i for i, module in enumerate(modules)}
        traces: list[list[int]] = []
        error = None
        try:
            for batch in self._traceable:
                batch.trace = []
                batch.resume()
                traces.append([numbers[module] for module in batch.trace])
        except Exception as raised:  # reported to the other ranks
            error = raised
        finally:
            self._traceable.clear()
        communicator = self.calibration.communicator
        communicator.all_reduce_min(0, error)
        # all ranks use the order that rank 0 has seen
        shared = json.loads(communicator.broadcast_text(json.dumps(traces)))
        position = execution_order(
            self.calibration.model, [[modules[i] for i in trace] for trace in shared]
        )
        self._wait_points.sort(key=lambda point: position[_module_of(point)])
        self._index = {point: i for i, point in enumerate(self._wait_points)}

    def _advance(
        self, wait_point: WaitPoint, suspended: Sequence[SuspendedBatch]
    ) -> Exception | None:
        """Prune what is complete at a wait point, then resume its batches."""
        waiting = [batch for batch in suspended if batch.wait_point == wait_point]
        if isinstance(wait_point, BlockEntry):
            self._leave_block()
            self.placement.load_only(wait_point.block)
            if not self.placement.always_loaded:
                self.restore(set(wait_point.block.modules()))
        elif self.order != "dense":
            self._complete(self._layers_at[wait_point])
            if self.training is not None and isinstance(wait_point, nn.Module):
                calls = [batch.block_call for batch in waiting if batch.block_call is not None]
                self.training.train(wait_point, calls)
                del calls  # the hidden states of all batches, which are freed as each resumes
        self._pending.discard(wait_point)
        for batch in waiting:
            batch.block_call = None
        try:
            for batch in waiting:
                # After the last prunable layer the rest of the forward (final norm, output
                # projection) measures nothing. One batch runs on to the next excluded layer, to
                # detect a pruned layer that the model calls a second time.
                batch.is_exiting = not self._pending
                if self._pending or batch is waiting[0]:
                    batch.resume()
                else:
                    batch.end()
        except Exception as error:  # reported to the other ranks at the next wait point
            return error
        return None

    def _leave_block(self) -> None:
        """Skip the layers of the current block that no batch has waited at."""
        block = self.placement.current_block
        if block is None or self.placement.always_loaded or self.order != "layer":
            return
        inside = set(block.modules())
        remaining = [x for x in self.layers if x in self._pending and x.module in inside]
        self._pending.difference_update(remaining)
        self._complete(remaining)

    def _complete(self, layers: Sequence[Layer]) -> None:
        """Prune layers whose statistics are complete."""
        reached = {x.name for x in layers if self.recorder.was_reached(x.name)}
        self.prune([layer for layer in layers if layer.name in reached])
        self.skip([layer for layer in layers if layer.name not in reached])

    def _assign_layers(self) -> dict[Layer | nn.Module, list[Layer]]:
        """Map each wait point to the layers that are pruned there, in model order."""
        if self.order == "dense" and not self.placement.blocks:
            return {}  # no layer is pruned during the forward
        block_of: dict[nn.Module, nn.Module] = {}
        if self.order == "block":
            for block in decoder_blocks(self.calibration.model, self.layers):
                block_of.update(dict.fromkeys(block.modules(), block))
        layers_at: dict[Layer | nn.Module, list[Layer]] = {}
        for layer in self.layers:
            layers_at.setdefault(block_of.get(layer.module, layer), []).append(layer)
        return layers_at

    def _sort_wait_points(self) -> list[WaitPoint]:
        """Return all wait points in model order; the entry of a block precedes its contents."""
        position = {module: i for i, module in enumerate(self.calibration.model.modules())}

        points: list[WaitPoint] = [BlockEntry(block) for block in self.placement.blocks]
        points += self._layers_at
        # the sort is stable, so the entry of a block stays in front of the block itself
        return sorted(points, key=lambda point: position[_module_of(point)])

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Watch all layers, and hook the blocks that batches wait at or in front of."""
        excluded = excluded_layers(self.calibration.model, self.layers)
        blocks = [point for point in self._layers_at if isinstance(point, nn.Module)]
        with ExitStack() as stack:
            stack.enter_context(watch_layers(self.layers, self._visit))
            stack.enter_context(watch_layers(excluded, self._visit_excluded))
            self._shared = self._find_shared(excluded)
            # Prepended: these must run before the hooks of FSDP, which expect that a call is not
            # interrupted. The entry of a block is registered last and so runs first.
            hooks = [(block, self._wait_at_block) for block in blocks]
            hooks += [(block, self._wait_at_entry) for block in self.placement.blocks]
            if self.calibration.measures_all_tokens:
                self._measure_all_tokens(stack)
            for module, hook in hooks:
                handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            if self.training is not None:
                stack.enter_context(self.training.targets.watch(blocks))
            for block in self.placement.blocks:
                stack.enter_context(replay_finished_blocks(block))
            yield

    def _measure_all_tokens(self, stack: ExitStack) -> None:
        """Call experts with all tokens while one of their layers is measured."""

        def is_needed(layers: Sequence[Layer]) -> bool:
            batch = current_batch()
            if batch is None or batch.is_computing_target or batch.trace is not None:
                return False
            return batch.is_measuring or any(layer in self._pending for layer in layers)

        for module, layers in group_by_module(self.layers).items():
            kind = layers[0].kind
            stack.enter_context(kind.measure_all_tokens(module, partial(is_needed, layers)))

    def _visit(self, layer: Layer, x: Tensor, tokens: Tokens | None = None) -> None:
        """Record the input of a layer, and wait until it is pruned."""
        batch = current_batch()
        if batch is None or batch.is_computing_target:
            return
        if batch.trace is not None:
            batch.trace.append(layer.module)
            return
        if batch.is_measuring or layer in self._pending:
            valid = valid_rows(batch.valid, layer, tokens)
            self.recorder.observe(layer, x, batch.last_input, valid)
        if layer in self._pending:
            batch.wait_at(layer)
        elif layer in self._layers_at:
            self.called_after_pruning.add(layer.name)

    def _find_shared(self, excluded: Sequence[Layer]) -> dict[Layer, Layer]:
        """Map excluded layers to the pruned layers whose matrix they share."""
        pruned = {layer.matrix_key: layer for layer in self.layers}
        keys = {layer: layer.matrix_key for layer in excluded}
        return {layer: pruned[key] for layer, key in keys.items() if key in pruned}

    def _visit_excluded(self, layer: Layer, x: Tensor, tokens: Tokens | None = None) -> None:
        """End a forward that has nothing left to measure."""
        batch = current_batch()
        # weights on the meta device at this point are the output projection of a streamed model,
        # which is not loaded since no layer follows it
        if batch is None or batch.trace is not None:
            return
        if layer in self._shared:  # another use of a weight that is pruned
            self._visit(self._shared[layer], x, tokens)
            return
        # not inside a block: FSDP would believe that the block's forward is still running
        is_outside = layer.module not in self._inside_blocks
        if layer.parameter.is_meta or (batch.is_exiting and is_outside):
            exit_forward()

    def _wait_at_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Measure a block while it is dense, and wait until it is pruned."""
        batch = current_batch()
        # while these flags are set, the block is called by the lines below
        if batch is None or batch.is_measuring or batch.is_computing_target:
            return
        if batch.trace is not None:
            batch.trace.append(block)
            return
        if block not in self._pending:
            names = [layer.name for layer in self._layers_at[block]]
            self.called_after_pruning.update(names)
            return
        # the inputs of the block's layers are measured in this call
        batch.is_measuring = True
        # without the block's hooks: those of transformers, which collect hidden states, and those
        # of the user would see every call twice
        with self._attributes.isolated():
            output = call_on_copies(block.forward, args, kwargs)
        batch.is_measuring = False
        if self.training is not None:
            self.training.targets.record(batch, block, args, kwargs, output)
        del output  # it would stay in memory while the batch waits
        self._wait_offloaded(batch, block, args, kwargs)

    def _wait_at_entry(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Wait until a block is loaded."""
        batch = current_batch()
        entry = BlockEntry(block)
        if batch is None or batch.trace is not None or block is self.placement.current_block:
            return
        if entry not in self._pending:
            raise ValueError(
                f"a {type(block).__name__} is called twice in one forward pass, which is not "
                f"supported for a model that is sharded or streamed block by block"
            )
        self._wait_offloaded(batch, entry, args, kwargs)
        if self.order != "block":
            # Batches are suspended inside the block. FSDP keeps one state per block, which the
            # first batch that leaves it would reset under the others; so its hooks must not see
            # these calls: the block runs here, before them, and its forward returns the output.
            batch.finished_block = block, block.forward(*args, **kwargs)

    def _wait_offloaded(
        self,
        batch: SuspendedBatch,
        wait_point: WaitPoint,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Wait, with the hidden states offloaded meanwhile if that is requested."""
        target = self.calibration.offload
        if target is None:
            batch.wait_at(wait_point)
            return
        tensors = [hidden_states(args, kwargs), batch.dense_states]
        if batch.block_call is not None:
            tensors.append(batch.block_call.target)
        # by identity: the target of a block may be the dense model's hidden states
        distinct = {id(x): x for x in tensors if x is not None}
        offloaded = [OffloadedTensor(x, target) for x in distinct.values()]
        if batch.block_call is not None:
            batch.block_call.offloaded = offloaded
        try:
            batch.wait_at(wait_point)
        finally:
            for tensor in offloaded:
                tensor.restore()
