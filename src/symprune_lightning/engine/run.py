"""One run: what has been pruned so far, and the pruning of layers whose statistics are complete."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from symprune_lightning.engine.journal import Journal, Record
from symprune_lightning.engine.layers import Layer
from symprune_lightning.engine.method import Method, PruningWarning, naming
from symprune_lightning.engine.parallel import Ranks, is_sharded
from symprune_lightning.engine.recorder import Recorder
from symprune_lightning.engine.residence import Residence
from symprune_lightning.engine.result import (
    LayerReport,
    OnScores,
    Progress,
    PruneResult,
    PruningError,
)
from symprune_lightning.engine.schedule import Forward, Schedule, SuspendedForward
from symprune_lightning.functional.statistics import Statistics

EMPTY = "the calibration set is empty: pass at least one batch"


@dataclass(frozen=True)
class _Part:
    """What this process has worked out of one layer.

    Attributes:
        rows: The rows that are its share.
        mask: Their mask, with the inputs in ``order``.
        updated: Their new weights, if there is an update.
        order: Order of the inputs in which the layer was pruned, ``None`` for its own.
        figures: Sums over its rows: squared output, squared errors (first, refined, updated),
            swaps.
        seconds: Time it took.
    """

    rows: slice
    mask: Tensor
    updated: Tensor | None
    order: Tensor | None
    figures: Tensor
    seconds: float


class Run:
    """What has been done so far, and the doing of it.

    Args:
        layers: The layers to prune.
        method: How.
        ranks: The processes that prune together.
        residence: Where the weights are, if they are not in memory all the time.
        offload: Where the hidden states of waiting batches are, if not beside the weights.
        journal: What an earlier run has finished, and where to keep what this one does.
        on_scores: Called with the scores of every layer.
        progress: Called after every layer.
    """

    def __init__(
        self,
        layers: list[Layer],
        method: Method,
        ranks: Ranks,
        residence: Residence | None = None,
        offload: str | os.PathLike[str] | None = None,
        journal: Journal | None = None,
        on_scores: OnScores | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.layers = layers
        self.method = method
        self.ranks = ranks
        self.residence = residence
        self.offload = offload
        self.journal = journal
        self.on_scores = on_scores
        self.progress = progress
        self.result = PruneResult()
        # moments cost next to nothing, and tell activations that are not finite
        self.recorder = Recorder({*method.needs, "input"}, layers, ranks) if method.needs else None

    def run(
        self, model: nn.Module, batches: Iterable[Any], forward: Forward, schedule: Schedule
    ) -> None:
        """Send the batches through the model, pruning on the way; without, if none are needed."""
        if self.recorder is None:
            self._prune_without_data()
        else:
            self._prune_on_the_way(self.recorder, model, batches, forward, schedule)
        if self.journal is not None:
            self.journal.write()

    def _prune_on_the_way(
        self,
        recorder: Recorder,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward,
        schedule: Schedule,
    ) -> None:
        left, restore = self.layers, None
        if schedule != "dense":  # there the forward has to meet the dense weights
            left = [layer for layer in self.layers if not self._is_recorded([layer])]
            restore = self._restore_inside
        suspended = SuspendedForward(
            model,
            left,
            recorder,
            self.prune,
            schedule,
            self.ranks,
            self.residence,
            self.offload,
            restore,
        )
        if not suspended.run(batches, forward):
            raise ValueError(EMPTY)
        done = {layer.name for layer in self.result.layers}
        self.result.unreached.extend(x.name for x in self.layers if x.name not in done)
        if not done:
            raise ValueError(
                f"no calibration batch came to any of the {len(self.layers)} prunable layers, such "
                f"as {self.layers[0].name}: is `forward` running the right model?"
            )
        _warn_of(self.result.unreached, "no calibration batch came to these layers, still dense")
        _warn_of(
            sorted(suspended.late),
            "a batch came to these layers after they had been pruned, and was not measured there "
            "(use schedule='dense' to measure every call)",
        )

    def _prune_without_data(self) -> None:
        """Prune all layers as they are, with no forward."""
        if self.residence is None:
            self.prune(self.layers)
            return
        with self.residence.opened():
            self.residence.visit(self.layers, self.prune)

    def prune(self, layers: Sequence[Layer]) -> None:
        """Prune layers whose statistics are complete."""
        for together in self.method.competitors(layers):
            if self._is_recorded(together):
                self._restore(together)
                continue
            if self.journal is not None:
                self.journal.begin(self.method.blocks[together[0].name])
            with torch.autocast(together[0].parameter.device.type, enabled=False):
                self._prune(together)
        if self.recorder is not None:
            self.recorder.finish(layer.name for layer in layers)
        torch.clear_autocast_cache()  # it may hold copies of the dense weights

    def _is_recorded(self, layers: Sequence[Layer]) -> bool:
        return self.journal is not None and all(self.journal.has(x.name) for x in layers)

    def _restore(self, layers: Iterable[Layer]) -> None:
        """Do to layers what an earlier run has recorded."""
        assert self.journal is not None
        for layer in layers:
            self._change(layer, self.journal.read(layer))

    def _restore_inside(self, modules: set[nn.Module]) -> None:
        """Do to the layers among these modules what an earlier run has recorded."""
        recorded = [x for x in self.layers if x.module in modules and self._is_recorded([x])]
        if recorded:
            self._restore(recorded)

    def check_same(self) -> None:
        """Make sure that all processes hold the same weights: see ``Ranks.check_same``."""
        whole = [x.parameter for x in self.layers if not is_sharded(x.parameter)]
        if whole and self.residence is None:
            self.ranks.check_same(whole)

    def _prune(self, layers: Sequence[Layer]) -> None:
        """Score, mask, refine, update and zero layers that compete with one another."""
        statistics = [self._statistics(layer) for layer in layers]
        weights = [layer.read() for layer in layers]
        parts: list[_Part] = []
        error = None
        try:
            parts = list(self._parts(layers, weights, statistics))
        except Exception as raised:  # told to the other processes, and raised by all
            error = raised
        # `weights` may be the parameters themselves: no use of them beyond here
        for i, layer in enumerate(layers):
            self._apply(layer, None if error else parts[i], error, statistics[i])

    def _parts(
        self, layers: Sequence[Layer], weights: Sequence[Tensor], statistics: Sequence[Statistics]
    ) -> Iterator[_Part]:
        """This process's share of the work on layers that compete with one another."""
        start = time.perf_counter()
        method = self.method
        orders: list[Tensor | None] = [None] * len(layers)
        rows = [self.ranks.rows(len(weight)) for weight in weights]
        if method.update is not None and method.update.chooses_mask:
            firsts = [torch.ones_like(w, dtype=torch.bool) for w in weights]
            if method.patterns[layers[0].name].group != "output":  # rows compete: one process
                rows = [self.ranks.whole(len(weight)) for weight in weights]
            firsts = [first[part] for first, part in zip(firsts, rows, strict=True)]
        else:
            scores = method.scores(layers, weights, statistics, rows)
            orders = [method.order(*pair) for pair in zip(layers, scores, strict=True)]
            scores = [s if o is None else s[:, o] for s, o in zip(scores, orders, strict=True)]
            firsts = method.first_masks(layers, scores, rows)
            if self.on_scores is not None:
                for layer, score, first, part in zip(layers, scores, firsts, rows, strict=True):
                    mine = score if len(score) == len(first) else score[part]
                    self.on_scores(layer.name, mine, first)
        for i, layer in enumerate(layers):
            with naming(layer):
                yield self._part(
                    layer, weights[i], firsts[i], statistics[i], orders[i], rows[i], start
                )
            start = time.perf_counter()

    def _part(
        self,
        layer: Layer,
        weight: Tensor,
        first: Tensor,
        statistics: Statistics,
        order: Tensor | None,
        rows: slice,
        start: float,
    ) -> _Part:
        """Refine and update some rows of a layer; ``first`` is their mask by score."""
        pattern, update = self.method.patterns[layer.name], self.method.update
        refiners = self.method.refiners.get(layer.name, [])
        if refiners:
            statistics = replace(statistics, column_sum=weight.abs().sum(0))
        weight = weight[rows]
        if order is not None:
            weight, statistics = weight[:, order], statistics.permuted(order)
        mask, updated = first, None
        for refiner in refiners if len(weight) else []:
            mask = refiner(weight, mask, statistics, pattern.span())
        if update is not None and len(weight):
            updated, mask = update(weight, mask, statistics, pattern)
            first = mask if update.chooses_mask else first
        elif update is not None:
            updated = weight
        figures = _figures(weight, first, mask, updated, statistics)
        return _Part(rows, mask, updated, order, figures, time.perf_counter() - start)

    def _apply(
        self, layer: Layer, part: _Part | None, error: Exception | None, statistics: Statistics
    ) -> None:
        """Join the parts of all processes, change the weight, report and record."""
        rows, columns = layer.shape
        mask, figures = self.ranks.join_masks(
            (rows, columns),
            slice(0) if part is None else part.rows,
            None if part is None else part.mask,
            None if part is None else part.figures,
            error,
        )
        assert part is not None
        updated = part.updated
        if updated is not None:
            updated = self.ranks.join_rows(updated, part.rows, rows)
        if part.order is not None:
            back = part.order.argsort()
            mask = mask[:, back]
            updated = None if updated is None else updated[:, back]
        output, *errors, swaps = figures.tolist()
        measured = [None if statistics.input is None else e / max(output, 1e-30) for e in errors]
        report = LayerReport(
            name=layer.name,
            shape=(rows, columns),
            asked=self.method.patterns[layer.name].sparsity,
            sparsity=int((~mask).sum()) / mask.numel(),
            error=measured[0],
            error_refined=measured[1],
            error_updated=None if updated is None else measured[2],
            swaps=round(swaps),
            tokens=0 if statistics.input is None else int(statistics.input.tokens),
            seconds=part.seconds,
        )
        record = Record(report, mask, updated, part.order)
        self._change(layer, record)
        if self.journal is not None:
            self.journal.add(layer, record)

    def _change(self, layer: Layer, record: Record) -> None:
        """Change the weight, and report."""
        mask, weight = record.mask, record.weight
        change = partial(layer.apply_, mask) if weight is None else partial(layer.write_, weight)
        change()
        if self.residence is not None:
            self.residence.changed(layer.module, change)
        if self.residence is None or self.residence.readable:
            self.result.masks[layer.name] = mask.cpu()
        if record.order is not None:
            self.result.permutations[layer.name] = record.order.cpu()
        self.result.layers.append(record.report)
        if self.progress is not None:
            self.progress(record.report, len(self.result.layers), len(self.layers))

    def _statistics(self, layer: Layer) -> Statistics:
        if self.recorder is None:
            return Statistics(layer=layer.name)
        return self.recorder.statistics(layer.name)

    @contextmanager
    def saying_what_is_done(self) -> Iterator[None]:
        """Turn an error in mid-run into one that says that the model is half-pruned."""
        try:
            yield
        except Exception as error:
            done, total = len(self.result.layers), len(self.layers)
            if done == 0:
                raise
            again = "before using it"
            if self.journal is not None:
                again = f"and start the same run again: {self.journal.folder} has what is finished"
            raise PruningError(
                f"pruning stopped after {done} of {total} layers: {error}. The model in memory is "
                f"part sparse, part dense; load it again {again}"
            ) from error


def _figures(
    weight: Tensor, first: Tensor, mask: Tensor, updated: Tensor | None, statistics: Statistics
) -> Tensor:
    """Sums over rows: squared output, squared errors (first, refined, updated), swaps; float64."""
    swaps = int((mask & ~first).sum())
    errors = [0.0] * 4
    if statistics.input is not None:
        # a product, since masked_fill takes five times as long on a CPU
        deltas = [weight, weight * ~first]
        if mask is not first:
            deltas.append(weight * ~mask)
        sums = [float(statistics.squared_error(delta).sum()) for delta in deltas]
        errors[:3] = [*sums, sums[-1]][:3]
        if updated is not None:
            errors[3] = float(statistics.squared_error(weight - updated).sum())
    return torch.tensor([*errors, swaps], dtype=torch.float64)


def _warn_of(names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(f"{what}: {shown}", PruningWarning, stacklevel=4)
