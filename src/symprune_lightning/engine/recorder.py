"""Collects the statistics of layers while batches flow through a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from symprune_lightning.engine.layers import Layer
from symprune_lightning.engine.parallel import ALONE, Ranks, gathered, local
from symprune_lightning.functional.statistics import (
    Moments,
    Need,
    Statistics,
    at_least_float32,
)

PANEL = 192
"""Rows of a Gram matrix that are computed together; fewer would skip more of what is symmetric."""


class _Sums(ABC):
    """Float64 totals over tokens, so that merging is addition.

    Args:
        channels: Channels of what is measured.
        device: Where the totals are.
    """

    shapes: ClassVar[dict[str, int]]
    """How many dimensions, all of ``channels``, each total has."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.totals = {
            name: torch.zeros((channels,) * dims, dtype=torch.float64, device=device)
            for name, dims in self.shapes.items()
        }

    def __add__(self, other: Self) -> Self:
        both = type(self)(0)
        both.totals = {name: total + other.totals[name] for name, total in self.totals.items()}
        return both

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add activations of shape ``(..., tokens, channels)``."""

    @property
    @abstractmethod
    def value(self) -> Moments | Tensor:
        """The statistic itself, over everything added."""


class InputMoments(_Sums):
    """Running [`Moments`][symprune_lightning.functional.statistics.Moments].

    Examples:
        >>> sums = InputMoments(channels=1)
        >>> sums.update(torch.tensor([[[1.0], [3.0]]]))
        >>> sums.value.mean.tolist()
        [2.0]
    """

    shapes: ClassVar[dict[str, int]] = {"tokens": 0, "total": 1, "total_square": 1}

    def update(self, x: Tensor) -> None:
        """See `_Sums`."""
        moments = Moments.of(x)
        for name in self.totals:
            self.totals[name] += getattr(moments, name)

    @property
    def value(self) -> Moments:
        """The moments."""
        return Moments(**self.totals)


class SequenceVariance(_Sums):
    """Token-weighted mean of the population variance inside each sequence."""

    shapes: ClassVar[dict[str, int]] = {"tokens": 0, "total": 1}

    def update(self, x: Tensor) -> None:
        """See `_Sums`."""
        tokens, channels = x.shape[-2:]
        variance = x.double().var(-2, correction=0).reshape(-1, channels)
        self.totals["tokens"] += tokens * len(variance)
        self.totals["total"] += tokens * variance.sum(0)

    @property
    def value(self) -> Tensor:
        """Shape ``(channels,)``, float64."""
        return self.totals["total"] / self.totals["tokens"]


class GramMatrix(_Sums):
    """Running ``G = E[x xᵀ]``; costs tokens · channels² and channels² of memory."""

    shapes: ClassVar[dict[str, int]] = {"tokens": 0, "total": 2}

    def update(self, x: Tensor) -> None:
        """See `_Sums`."""
        flat = at_least_float32(x.reshape(-1, x.shape[-1]))
        self.totals["tokens"] += len(flat)
        for start in range(0, flat.shape[1], PANEL):  # the lower triangle is the same
            panel = flat[:, start : start + PANEL]
            self.totals["total"][start : start + PANEL, start:] += panel.T @ flat[:, start:]

    @property
    def value(self) -> Tensor:
        """Shape ``(channels, channels)``, float64."""
        upper = self.totals["total"].triu()
        return (upper + upper.triu(1).T) / self.totals["tokens"]


class LastInput:
    """The input that a batch measured last, to recognise it when another layer shares it."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._version = 0
        self.source = ""

    def is_(self, x: Tensor) -> bool:
        """Whether ``x`` is that very tensor, or a view of all of it, not written to since."""
        if self._x is None or self._version != _version(x):
            return False
        # it is kept alive, so no other tensor can be at the same place
        return _place(self._x) == _place(x)

    def set(self, x: Tensor, source: str) -> None:
        """Remember ``x`` as measured for the layer ``source``."""
        self._x, self._version, self.source = x, _version(x), source


class Recorder:
    """Statistics by layer; an input shared by several layers (q, k and v) is measured once.

    Args:
        needs: What to collect, the union of what the methods declare.
        layers: The layers that may be measured.
        ranks: The processes over which sums are taken. They must all ask for the same layers'
            statistics in the same order.
    """

    def __init__(
        self, needs: Iterable[Need], layers: Sequence[Layer], ranks: Ranks = ALONE
    ) -> None:
        inputs: dict[Need, type[_Sums]] = {
            "input": InputMoments,
            "sequence_variance": SequenceVariance,
            "gram": GramMatrix,
        }
        needs = set(needs)
        self._kinds = {need: kind for need, kind in inputs.items() if need in needs}
        self._measures_output = "output" in needs
        self._ranks = ranks
        self._layers = {layer.name: layer for layer in layers}
        self._index = {layer.name: i for i, layer in enumerate(layers)}
        self._sums: dict[str, dict[Need, _Sums]] = {}
        self._outputs: dict[str, InputMoments] = {}
        self._sources: defaultdict[str, set[str]] = defaultdict(set)
        self._joined: dict[tuple[str, ...], dict[Need, _Sums]] = {}
        self._asked: set[tuple[str, ...]] = set()
        self._agreed: dict[str, tuple[str, ...]] = {}
        self._done: set[str] = set()

    def observe(self, layer: Layer, x: Tensor, last: LastInput, valid: Tensor | None) -> None:
        """Add a layer's input.

        Args:
            layer: The layer, still dense.
            x: Its input, ``(..., tokens, in_features)``.
            last: What the same batch measured last.
            valid: Bool, one per token of the batch: False where it is padding. Not used where
                ``x`` holds another number of tokens (those sent to an expert).
        """
        with torch.autocast(x.device.type, enabled=False):
            self._observe(layer, x, last, valid)

    def _observe(self, layer: Layer, x: Tensor, last: LastInput, valid: Tensor | None) -> None:
        if not x.numel():
            return  # an expert that no token was sent to has not been reached
        known = last.is_(local(x))
        if known and not self._measures_output:
            self._sources[layer.name].add(last.source)
            return
        tokens = gathered(x) if valid is None else _real(gathered(x), valid)
        if not tokens.numel():
            return
        if not known:
            sums = self._sums.setdefault(layer.name, self._zeros(layer, tokens.device))
            for each in sums.values():
                each.update(tokens)
            last.set(local(x), layer.name)
        self._sources[layer.name].add(last.source)
        if self._measures_output:
            weight = layer.read()
            if layer.name not in self._outputs:
                self._outputs[layer.name] = InputMoments(len(weight), tokens.device)
            self._outputs[layer.name].update(tokens.to(weight.dtype) @ weight.T)

    def seen(self, layer: str) -> bool:
        """Whether any batch of any process has reached the layer."""
        return bool(self._sources_anywhere(layer))

    def statistics(self, name: str) -> Statistics:
        """What was measured of a layer so far, summed over processes.

        Raises:
            ValueError: The layer's input holds NaN or infinite values.
        """
        layer = self._layers[name]
        measured: dict[str, Any] = {need: s.value for need, s in self._summed(layer).items()}
        if self._measures_output:
            output = InputMoments(layer.shape[0], layer.parameter.device)
            output += self._outputs.get(name, output)
            self._ranks.sum_(list(output.totals.values()))
            measured["output"] = output.value
        statistics = Statistics(layer=name, **measured)
        moments = statistics.input
        if moments is not None and not moments.total_square.isfinite().all():
            channel = int((~moments.total_square.isfinite()).nonzero()[0])
            raise ValueError(
                f"the input of layer {name} holds NaN or infinite values (channel {channel}); "
                f"check the model's precision (float16 overflows: try bfloat16 or float32) and "
                f"the calibration data"
            )
        return statistics

    def finish(self, layers: Iterable[str]) -> None:
        """Say that layers are pruned: what only these need is dropped at the next call.

        Not at once, since the layer that comes next may share their input.
        """
        needed = {s for n, sources in self._sources.items() if n not in self._done for s in sources}
        self._sums = {k: v for k, v in self._sums.items() if k in needed}
        # by a rule that is the same on all processes: what was not asked for since the last call
        self._joined = {key: self._joined[key] for key in self._asked}
        self._asked.clear()
        self._outputs = {k: v for k, v in self._outputs.items() if k not in self._done}
        self._done.update(layers)

    def _sources_anywhere(self, layer: str) -> tuple[str, ...]:
        """Where the layer's input was measured, on any process; found out once for each layer."""
        if layer not in self._agreed:
            mine = {self._index[source] for source in self._sources.get(layer, ())}
            names = list(self._layers)
            found = self._ranks.union(mine, len(names))
            self._agreed[layer] = tuple(names[i] for i in found)
        return self._agreed[layer]

    def _zeros(self, layer: Layer, device: torch.device) -> dict[Need, _Sums]:
        return {need: kind(layer.shape[1], device) for need, kind in self._kinds.items()}

    def _summed(self, layer: Layer) -> dict[Need, _Sums]:
        """The layer's sums over all its sources and all processes, made once for each input.

        There is almost always one source, the layer's own or one that it shares. More than one are
        there if a model shares an input in some batches and not in others.
        """
        key = self._sources_anywhere(layer.name)
        if key not in self._joined:
            joined = self._zeros(layer, layer.parameter.device)
            for source in key:
                for need, sums in self._sums.get(source, {}).items():
                    joined[need] += sums
            self._ranks.sum_([total for sums in joined.values() for total in sums.totals.values()])
            self._joined[key] = joined
        self._asked.add(key)
        return self._joined[key]


def _real(x: Tensor, valid: Tensor) -> Tensor:
    """The tokens that are no padding, also where a model has laid all sequences end to end."""
    if valid.numel() != math.prod(x.shape[:-1]):
        return x
    return x.reshape(-1, x.shape[-1])[valid.flatten()]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _place(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride()
