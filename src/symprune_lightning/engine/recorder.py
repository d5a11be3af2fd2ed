"""Collects the statistics of layers while batches flow through a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from symprune_lightning.engine.layers import Layer
from symprune_lightning.functional.statistics import (
    Moments,
    Need,
    Statistics,
    at_least_float32,
)

PANEL = 192
"""Rows of a Gram matrix that are computed together; fewer would skip more of what is symmetric."""


class _Sums(Metric, ABC):
    """Float64 totals over tokens that are summed over ranks; ``sums`` names them."""

    full_state_update = False
    sums: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        for name in self.sums:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> tuple[Tensor, ...]:
        """The totals over everything added, on every rank."""
        return tuple(getattr(self, name) for name in self.sums)

    @property
    @abstractmethod
    def value(self) -> Moments | Tensor:
        """The statistic itself."""


class InputMoments(_Sums):
    """Running [`Moments`][symprune_lightning.functional.statistics.Moments].

    Example:
        >>> metric = InputMoments()
        >>> metric.update(torch.tensor([[[1.0], [3.0]]]))
        >>> metric.value.mean.tolist()
        [2.0]
    """

    sums = ("tokens", "total", "total_square")
    tokens: Tensor
    total: Tensor
    total_square: Tensor

    def update(self, x: Tensor) -> None:
        """Add activations of shape ``(..., tokens, channels)``."""
        moments = Moments.of(x)
        self.tokens = self.tokens + moments.tokens
        self.total = self.total + moments.total
        self.total_square = self.total_square + moments.total_square

    @property
    def value(self) -> Moments:
        """The moments over everything added."""
        tokens, total, total_square = self.compute()
        # torchmetrics squeezes what has one element, and a layer may have one input
        return Moments(tokens, total.reshape(-1), total_square.reshape(-1))


class SequenceVariance(_Sums):
    """Token-weighted mean of the population variance inside each sequence."""

    sums = ("tokens", "total")
    tokens: Tensor
    total: Tensor

    def update(self, x: Tensor) -> None:
        """Add sequences of shape ``(..., tokens, channels)``."""
        tokens, channels = x.shape[-2:]
        variance = x.double().var(-2, correction=0).reshape(-1, channels)
        self.tokens = self.tokens + tokens * len(variance)
        self.total = self.total + tokens * variance.sum(0)

    @property
    def value(self) -> Tensor:
        """Shape ``(channels,)``, float64."""
        tokens, total = self.compute()
        return total.reshape(-1) / tokens


class GramMatrix(_Sums):
    """Running ``G = E[x xᵀ]``; costs tokens · channels² and channels² of memory."""

    sums = ("tokens", "total")
    tokens: Tensor
    total: Tensor

    def update(self, x: Tensor) -> None:
        """Add activations of shape ``(..., tokens, channels)``."""
        flat = at_least_float32(x.reshape(-1, x.shape[-1]))
        channels = flat.shape[1]
        upper = torch.zeros(channels, channels, dtype=torch.float64, device=x.device)
        for start in range(0, channels, PANEL):  # the lower triangle is the same
            panel = flat[:, start : start + PANEL]
            upper[start : start + PANEL, start:] = panel.T @ flat[:, start:]
        self.tokens = self.tokens + len(flat)
        self.total = self.total + upper

    @property
    def value(self) -> Tensor:
        """Shape ``(channels, channels)``, float64."""
        tokens, total = self.compute()
        size = math.isqrt(total.numel())
        upper = total.reshape(size, size).triu()
        return (upper + upper.triu(1).T) / tokens


class LastInput:
    """The input that a batch measured last, to recognise it when another layer shares it."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._version = 0
        self.source = ""

    def is_(self, x: Tensor) -> bool:
        """Whether ``x`` is that very tensor, not written to since."""
        return self._x is x and self._version == _version(x)

    def set(self, x: Tensor, source: str) -> None:
        """Remember ``x`` as measured for the layer ``source``."""
        self._x, self._version, self.source = x, _version(x), source


class Recorder:
    """Statistics by layer; an input shared by several layers (q, k and v) is measured once.

    Args:
        needs: What to collect, the union of what the methods declare.
    """

    def __init__(self, needs: Iterable[Need]) -> None:
        inputs: dict[Need, type[_Sums]] = {
            "input": InputMoments,
            "sequence_variance": SequenceVariance,
            "gram": GramMatrix,
        }
        needs = set(needs)
        self._kinds = {need: kind for need, kind in inputs.items() if need in needs}
        self._measures_output = "output" in needs
        self._metrics: dict[str, dict[Need, _Sums]] = {}
        self._outputs: dict[str, InputMoments] = {}
        self._sources: defaultdict[str, set[str]] = defaultdict(set)
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
        tokens = x if valid is None else _real(x, valid)
        if not tokens.numel():
            return  # an expert that no token was sent to has not been reached
        if not last.is_(x):
            if layer.name not in self._metrics:
                self._metrics[layer.name] = {k: m().to(x.device) for k, m in self._kinds.items()}
            for metric in self._metrics[layer.name].values():
                metric.update(tokens)
            last.set(x, layer.name)
        self._sources[layer.name].add(last.source)
        if self._measures_output:
            output = self._outputs.setdefault(layer.name, InputMoments().to(x.device))
            weight = layer.read()
            output.update(tokens.to(weight.dtype) @ weight.T)

    def seen(self, layer: str) -> bool:
        """Whether any batch has reached the layer."""
        return layer in self._sources

    def statistics(self, layer: str) -> Statistics:
        """What was measured of a layer so far, summed over ranks.

        Raises:
            ValueError: The layer's input holds NaN or infinite values.
        """
        measured: dict[str, Any] = {need: self._merged(layer, need).value for need in self._kinds}
        if self._measures_output:
            measured["output"] = self._outputs[layer].value
        statistics = Statistics(layer=layer, **measured)
        moments = statistics.input
        if moments is not None and not moments.total_square.isfinite().all():
            channel = int((~moments.total_square.isfinite()).nonzero()[0])
            raise ValueError(
                f"the input of layer {layer} holds NaN or infinite values (channel {channel}); "
                f"check the model's precision (float16 overflows: try bfloat16 or float32) and "
                f"the calibration data"
            )
        return statistics

    def finish(self, layers: Iterable[str]) -> None:
        """Say that layers are pruned: what only these need is dropped at the next call.

        Not at once, since the layer that comes next may share their input.
        """
        needed = {s for n, sources in self._sources.items() if n not in self._done for s in sources}
        self._metrics = {k: v for k, v in self._metrics.items() if k in needed}
        self._outputs = {k: v for k, v in self._outputs.items() if k not in self._done}
        self._done.update(layers)

    def _merged(self, layer: str, need: Need) -> _Sums:
        """The metric that holds a layer's input; almost always one, shared or the layer's own."""
        first, *others = sorted(self._sources[layer])
        metric = self._metrics[first][need]
        if others:
            # only a model that shares an input in some batches and not in others comes here
            metric = deepcopy(metric)
            for other in others:
                metric.merge_state(self._metrics[other][need])
        return metric


def _real(x: Tensor, valid: Tensor) -> Tensor:
    """The tokens that are no padding, also where a model has laid all sequences end to end."""
    if valid.numel() != math.prod(x.shape[:-1]):
        return x
    return x.reshape(-1, x.shape[-1])[valid.flatten()]


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
