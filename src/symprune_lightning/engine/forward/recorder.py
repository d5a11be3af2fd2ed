"""Collection of layer statistics while calibration batches run through the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from symprune_lightning.engine.distributed.communicator import SINGLE_PROCESS, Communicator
from symprune_lightning.engine.distributed.dtensor import full_tensor, local_tensor
from symprune_lightning.engine.forward.padding import aligned
from symprune_lightning.engine.forward.sums import INPUT_SUMS, InputMoments, RunningSum
from symprune_lightning.engine.layers.base import Layer, Tokens
from symprune_lightning.functional.statistics import Moments, Need, Statistics


class LastInput:
    """The last input that a batch measured, to recognise it when the next layer shares it."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._version = 0
        self._layer: Layer | None = None

    @property
    def source(self) -> str:
        """Name of the layer that the input was measured for."""
        assert self._layer is not None
        return self._layer.name

    def matches(self, x: Tensor, layer: Layer) -> bool:
        """Return whether ``x`` is the same tensor, or a full view of it, and unmodified since.

        The layers' ``input_key`` must agree too: equal inputs of two modules are not equal inputs
        of two matrices if the modules rearrange them differently.
        """
        if self._x is None or self._layer is None or self._version != _version(x):
            return False
        # comparing addresses is safe: self._x keeps its storage alive, so no other can be there
        same = _storage_key(self._x) == _storage_key(x)
        return same and self._layer.input_key == layer.input_key

    def set(self, x: Tensor, layer: Layer) -> None:
        """Remember ``x`` as measured for ``layer``."""
        self._x, self._version, self._layer = x, _version(x), layer


class Recorder:
    """Statistics by layer; an input shared by several layers (q, k and v) is measured once.

    Sums are kept under the name of the layer that an input was measured for, its *source*. Other
    layers that receive the same tensor only record the name of the source. A layer almost always
    has one source, its own or a shared one; several if a model shares an input in some batches
    and not in others, and then the sums of all sources together are its statistics.

    Args:
        needs: Statistics to collect, the union over all methods.
        layers: The layers that may be measured.
        communicator: The ranks over which sums are taken. All of them must request the statistics
            of the same layers in the same order.
    """

    def __init__(
        self,
        needs: Iterable[Need],
        layers: Sequence[Layer],
        communicator: Communicator = SINGLE_PROCESS,
    ) -> None:
        needs = set(needs)
        self._sum_types = {need: cls for need, cls in INPUT_SUMS.items() if need in needs}
        self._measures_output = "output" in needs
        self._communicator = communicator
        self._layers = {layer.name: layer for layer in layers}
        self._names = [layer.name for layer in layers]
        self._index = {name: i for i, name in enumerate(self._names)}
        # source -> sums of this rank
        self._local_sums: dict[str, dict[Need, RunningSum]] = {}
        # layer -> sums of its output on this rank; outputs are never shared
        self._output_sums: dict[str, InputMoments] = {}
        # layer -> sources on this rank, and over all ranks once those have agreed
        self._local_sources: defaultdict[str, set[str]] = defaultdict(set)
        self._global_sources: dict[str, tuple[str, ...]] = {}
        # sources of a layer -> statistics over these sources and all ranks
        self._reduced: dict[tuple[str, ...], dict[Need, Moments | Tensor]] = {}
        self._used_since_release: set[tuple[str, ...]] = set()
        # source -> layers of this rank that are not freed
        self._users: defaultdict[str, set[str]] = defaultdict(set)
        self._released: list[str] = []

    def observe(self, layer: Layer, x: Tensor, last: LastInput, valid: Tensor | None) -> None:
        """Add a layer's input.

        Args:
            layer: The layer, still dense.
            x: Its input, ``(..., tokens, in_features)``.
            last: The input that the same batch measured last.
            valid: Bool, one per token of ``x``: False where it is padding. Ignored where ``x``
                holds another number of tokens.
        """
        # statistics are float32 at least, whatever precision the user's autocast selects
        with torch.autocast(x.device.type, enabled=False):
            self._observe(layer, x, last, valid)

    def _observe(self, layer: Layer, x: Tensor, last: LastInput, valid: Tensor | None) -> None:
        if not x.numel():
            return  # an expert that received no tokens has not been reached
        is_known = last.matches(local_tensor(x), layer)
        if is_known and not self._measures_output:
            self._add_source(layer, last.source)
            return
        tokens = drop_padding(full_tensor(x), valid)
        if not tokens.numel():
            return
        if not is_known:
            sums = self._local_sums.setdefault(layer.name, self._zeros(layer, tokens.device))
            for running_sum in sums.values():
                running_sum.update(tokens)
            last.set(local_tensor(x), layer)
        self._add_source(layer, last.source)
        if self._measures_output:
            weight = layer.matrix()
            if layer.name not in self._output_sums:
                self._output_sums[layer.name] = InputMoments(len(weight), tokens.device)
            self._output_sums[layer.name].update(tokens.to(weight.dtype) @ weight.T)

    def _add_source(self, layer: Layer, source: str) -> None:
        self._local_sources[layer.name].add(source)
        self._users[source].add(layer.name)

    def was_reached(self, layer: str) -> bool:
        """Return whether any batch of any rank has reached the layer; a collective."""
        return bool(self._sources(layer))

    def statistics(self, name: str) -> Statistics:
        """Return the statistics of a layer, summed over ranks; a collective.

        Raises:
            ValueError: The layer's input holds NaN or infinite values.
        """
        layer = self._layers[name]
        values: dict[str, Any] = dict(self._reduced_statistics(layer).items())
        if self._measures_output:
            output = InputMoments(layer.shape[0], layer.parameter.device)
            output += self._output_sums.get(name, output)
            self._communicator.all_reduce_sum_(list(output.totals.values()))
            values["output"] = output.value
        statistics = Statistics(layer=name, **values)
        moments = statistics.input
        if moments is not None and not moments.total_square.isfinite().all():
            channel = int((~moments.total_square.isfinite()).nonzero()[0])
            raise ValueError(
                f"the input of layer {name} holds NaN or infinite values (channel {channel}); "
                f"check the model's precision (float16 overflows: try bfloat16 or float32) and "
                f"the calibration data"
            )
        return statistics

    def release(self, layers: Iterable[str]) -> None:
        """Mark layers as pruned; statistics used only by them are freed on the next call.

        Not at once, since the next layer may share their input.
        """
        for name in self._released:
            self._output_sums.pop(name, None)
            for source in self._local_sources.pop(name, ()):
                self._users[source].discard(name)
                if not self._users[source]:
                    self._local_sums.pop(source, None)
                    del self._users[source]
        self._released = list(layers)
        # reduced statistics are freed by use, not by need: a rule that is the same on all ranks,
        # while users depend on which layers this rank's batches reached
        self._reduced = {key: self._reduced[key] for key in self._used_since_release}
        self._used_since_release.clear()

    def _sources(self, layer: str) -> tuple[str, ...]:
        """Return the sources of a layer over all ranks; the ranks agree once for each layer."""
        if layer not in self._global_sources:
            indices = {self._index[source] for source in self._local_sources.get(layer, ())}
            union = self._communicator.union_of_indices(indices, len(self._names))
            self._global_sources[layer] = tuple(self._names[i] for i in union)
        return self._global_sources[layer]

    def _zeros(self, layer: Layer, device: torch.device) -> dict[Need, RunningSum]:
        return {need: cls(layer.shape[1], device) for need, cls in self._sum_types.items()}

    def _reduced_statistics(self, layer: Layer) -> dict[Need, Moments | Tensor]:
        """Return the statistics over a layer's sources and all ranks; reduced once per input."""
        key = self._sources(layer.name)
        if key not in self._reduced:
            sums = self._zeros(layer, layer.parameter.device)
            for source in key:
                for need, local in self._local_sums.get(source, {}).items():
                    sums[need] += local
            totals = [total for s in sums.values() for total in s.totals.values()]
            self._communicator.all_reduce_sum_(totals)
            self._reduced[key] = {need: s.value for need, s in sums.items()}
        self._used_since_release.add(key)
        return self._reduced[key]


def valid_rows(valid: Tensor | None, layer: Layer, tokens: Tokens | None) -> Tensor | None:
    """Return which rows of a layer's input are real tokens; ``None`` for all, or if not known.

    Args:
        valid: Bool, one per token of the batch: False where it is padding.
        layer: The layer.
        tokens: See `Visit`.
    """
    if valid is None or not layer.is_routed:
        return valid
    indices = None if tokens is None else tokens(valid.numel())
    return None if indices is None else valid.flatten()[indices]


def drop_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the real tokens; all of them where it is not known which are real."""
    kept = aligned(valid, x.shape[:-1])
    return x if kept is None else x[kept]


def _version(x: Tensor) -> int:
    # tensors made in inference mode have no version counter
    return 0 if x.is_inference() else x._version


def _storage_key(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.dtype, x.shape, x.stride()
