"""``prune_model``: any ``nn.Module`` in, the same module with zeros out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from symprune_lightning.engine.layers import LM_HEAD, Layer, prunable_layers
from symprune_lightning.engine.method import (
    Method,
    PruningWarning,
    Refine,
    Sparsity,
    naming,
    resolve_method,
    with_sparsity,
)
from symprune_lightning.engine.recorder import Recorder
from symprune_lightning.engine.schedule import (
    Forward,
    Schedule,
    SuspendedForward,
    check_schedule,
)
from symprune_lightning.functional.allocation import Allocation, Share
from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.patterns import Group, Pattern
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.statistics import Statistics
from symprune_lightning.functional.update import WeightUpdate

EMPTY = "the calibration set is empty: pass at least one batch"


class PruningError(RuntimeError):
    """Pruning stopped half-way: some layers are sparse already, the others still dense."""


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: The layer's qualified name.
        shape: ``(out_features, in_features)``.
        asked: Fraction of zeros asked for.
        sparsity: Realised fraction of zeros.
        error: Expected squared change of the output by the first mask, relative to the expected
            squared output (see ``Statistics.squared_error``); ``None`` without input statistics.
        error_refined: The same after refining; equals ``error`` without a refiner.
        error_updated: The same after the weight update; ``None`` without one.
        swaps: Weights that the refiner exchanged.
        tokens: Calibration tokens that reached the layer.
        seconds: Time for scoring, masking and refining.
    """

    name: str
    shape: tuple[int, int]
    asked: float
    sparsity: float
    error: float | None
    error_refined: float | None
    error_updated: float | None
    swaps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class PruneResult:
    """Masks and figures of a run.

    Attributes:
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept, on the CPU.
        layers: One report per pruned layer, in the order of pruning.
        permutations: Layer name to the order of its inputs in which its mask is N:M, for patterns
            that permute: ``mask[:, order]``.
        unreached: Prunable layers that no calibration batch came to; they are still dense.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    permutations: dict[str, Tensor] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)

    def holds_in(self, model: nn.Module) -> bool:
        """Whether the model's weights are zero wherever the masks are."""
        for name, mask in self.masks.items():
            weight = Layer(name, model.get_submodule(name)).read()
            if bool((weight.masked_fill(mask.to(weight.device), 0) != 0).any()):
                return False
        return True

    @property
    def sparsity(self) -> float:
        """Realised fraction of zeros over all pruned layers."""
        zeros = sum(int((~mask).sum()) for mask in self.masks.values())
        return zeros / sum(mask.numel() for mask in self.masks.values())


Progress = Callable[[LayerReport, int, int], None]
"""Called after each layer with its report, how many layers are done, and how many there are."""


def prune_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    score: Score | str = "ria",
    sparsity: Sparsity = 0.5,
    pattern: Pattern | str | None = None,
    group: Group = "output",
    refine: Refine = None,
    update: WeightUpdate | str | None = None,
    allocation: Allocation | str | None = None,
    schedule: Schedule = "layer",
    ignore: Sequence[str] = LM_HEAD,
    only: Sequence[str] | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model in place, in one pass over the calibration batches.

    Args:
        model: Any module with ``Linear`` (or transformers ``Conv1D``) layers, on any device and in
            any floating-point dtype. Runs in eval mode; its mode is restored.
        batches: Calibration data, an iterable of what the model takes: mappings are passed as
            keywords, tuples and lists as positional arguments, anything else as it is. Padding
            that a 2-D ``attention_mask`` marks is not measured. Not looked at by methods that need
            no data.
        score: Importance of each weight: a ``Score``, or its name.
        sparsity: Fraction of zeros in each group, in ``[0, 1)``; or by layer, first match first:
            ``{"re:.*down_proj": 0.4, "re:.*": 0.5}``.
        pattern: ``"2:4"`` or a ``Pattern``, in place of ``sparsity`` and ``group``.
        group: Which weights compete: of one ``"output"`` channel, of one ``"input"`` channel, of
            the whole ``"layer"``, of a decoder ``"block"`` (schedule block or dense), or of the
            ``"model"`` (schedule dense; holds all scores at once).
        refine: Improves each mask before it is applied: a ``MaskRefiner``, its name, several in a
            list, or for some layers only, such as ``{"re:.*self_attn.*": "dsnot"}``.
        update: Changes the kept weights to make up for the pruned ones: a ``WeightUpdate``, or its
            name. Without one kept weights keep their values.
        allocation: Divides the sparsity among layers: an ``Allocation``, or its name. Without one
            all layers have the same.
        schedule: When a layer is pruned, see [`Schedule`]
            [symprune_lightning.engine.schedule.Schedule].
        ignore: Layers to leave dense: names, or regular expressions behind ``re:``. Replaces the
            default, which spares the output projection ``lm_head``.
        only: Layers to prune, in the same way; ``None`` for all.
        forward: Called as ``forward(model, batch)`` in place of the rule above.
        progress: Called after every layer.

    Returns:
        Masks and a report by layer. The model's weights are already zeroed.

    Raises:
        ValueError: An argument is wrong, there are no batches, or activations are not finite. The
            model is unchanged.
        PruningError: The same, or an error of the model's own (the cause), after some layers had
            been pruned. The message says how many: load the model again.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> result = prune_model(model, [torch.randn(16, 8)], score="wanda", sparsity=0.5)
        >>> (model[0].weight == 0).sum(dim=1).tolist()
        [4, 4, 4, 4]
        >>> result.sparsity
        0.5
    """
    check_schedule(schedule)
    if isinstance(batches, Tensor):
        raise ValueError("batches is one tensor; pass an iterable of batches, such as [tensor]")
    layers = prunable_layers(model, ignore, only)
    method = resolve_method(
        model,
        layers,
        score=score,
        sparsity=sparsity,
        pattern=pattern,
        group=group,
        refine=refine,
        update=update,
        schedule=schedule,
    )
    forward = forward or call_model
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model):
        if allocation is not None:
            if isinstance(sparsity, Mapping):
                raise ValueError("sparsity by layer does not go with an allocation: give one level")
            with_sparsity(method, dict.fromkeys(method.patterns, sparsity))  # refuses what can't
            batches = list(batches)
            divide = by_name(Allocation, allocation)  # type: ignore[type-abstract]
            levels = _allocated(model, layers, batches, forward, method, divide, sparsity)
            method = with_sparsity(method, levels)
        run = _Run(layers, method, progress)
        with run.saying_what_is_done():
            run.run(model, batches, forward, schedule)
    return run.result


def _allocated(
    model: nn.Module,
    layers: list[Layer],
    batches: Iterable[Any],
    forward: Forward,
    method: Method,
    allocation: Allocation,
    sparsity: float,
) -> dict[str, float]:
    """Sparsity of each layer, from one plain forward if the allocation wants statistics."""
    recorder = Recorder(allocation.needs)
    if allocation.needs:
        measured = SuspendedForward(model, layers, recorder, lambda _: None, "dense")
        if measured.run(batches, forward) == 0:
            raise ValueError(EMPTY)
        layers = [layer for layer in layers if recorder.seen(layer.name)]
    last = max(method.blocks.values())
    shares = [
        Share(
            name=layer.name,
            weights=layer.parameter.numel(),
            block=method.blocks[layer.name],
            depth=method.blocks[layer.name] / max(last, 1),
            weight=layer.read(),
            statistics=recorder.statistics(layer.name) if allocation.needs else Statistics(),
        )
        for layer in layers
    ]
    return dict.fromkeys(method.patterns, sparsity) | allocation(shares, sparsity)


class _Run:
    """What has been done so far, and the doing of it."""

    def __init__(self, layers: list[Layer], method: Method, progress: Progress | None) -> None:
        self.layers = layers
        self.method = method
        self.progress = progress
        self.result = PruneResult()
        # moments cost next to nothing, and tell activations that are not finite
        self.recorder = Recorder(method.needs | {"input"}) if method.needs else None

    def run(
        self, model: nn.Module, batches: Iterable[Any], forward: Forward, schedule: Schedule
    ) -> None:
        """Send the batches through the model, pruning on the way; without, if none are needed."""
        if self.recorder is None:
            self.prune(self.layers)
            return
        suspended = SuspendedForward(model, self.layers, self.recorder, self.prune, schedule)
        if suspended.run(batches, forward) == 0:
            raise ValueError(EMPTY)
        self.result.unreached.extend(
            layer.name for layer in self.layers if layer.name not in self.result.masks
        )
        if not self.result.masks:
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

    def prune(self, layers: Sequence[Layer]) -> None:
        """Prune layers whose statistics are complete."""
        for together in self.method.competitors(layers):
            with torch.autocast(together[0].parameter.device.type, enabled=False):
                self._prune(together)
        if self.recorder is not None:
            self.recorder.finish(layer.name for layer in layers)
        torch.clear_autocast_cache()  # it may hold copies of the dense weights

    def _prune(self, layers: Sequence[Layer]) -> None:
        """Score, mask, refine, update and zero layers that compete with one another."""
        start = time.perf_counter()
        statistics = [self._statistics(layer) for layer in layers]
        weights = [layer.read() for layer in layers]
        orders: list[Tensor | None] = [None] * len(layers)
        if self.method.update is not None and self.method.update.chooses_mask:
            masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        else:
            scores = self.method.scores(layers, weights, statistics)
            orders = [self.method.order(*pair) for pair in zip(layers, scores, strict=True)]
            scores = [s if o is None else s[:, o] for s, o in zip(scores, orders, strict=True)]
            masks = self.method.first_masks(layers, scores)
        for one in zip(layers, weights, masks, statistics, orders, strict=True):
            with naming(one[0]):
                self._finish(*one, start)
            start = time.perf_counter()

    def _finish(
        self,
        layer: Layer,
        weight: Tensor,
        first: Tensor,
        statistics: Statistics,
        order: Tensor | None,
        start: float,
    ) -> None:
        """Refine, update and zero one layer; ``first`` has its inputs in the given order."""
        pattern, update = self.method.patterns[layer.name], self.method.update
        if order is not None:
            weight, statistics = weight[:, order], statistics.permuted(order)
        mask, updated = first, None
        for refiner in self.method.refiners.get(layer.name, ()):
            mask = refiner(weight, mask, statistics, pattern.span())
        if update is not None:
            updated, mask = update(weight, mask, statistics, pattern)
            first = mask if update.chooses_mask else first
        deltas = [weight.masked_fill(first, 0)]
        if mask is not first:
            deltas.append(weight.masked_fill(mask, 0))
        if updated is not None:
            deltas.append(weight - updated)
        errors = _relative_errors(weight, deltas, statistics)
        report = LayerReport(
            name=layer.name,
            shape=(weight.shape[0], weight.shape[1]),
            asked=pattern.sparsity,
            sparsity=int((~mask).sum()) / mask.numel(),
            error=errors[0],
            error_refined=errors[0 if mask is first else 1],
            error_updated=None if updated is None else errors[-1],
            swaps=int((mask & ~first).sum()),
            tokens=0 if statistics.input is None else int(statistics.input.tokens),
            seconds=time.perf_counter() - start,
        )
        # `weight` may be the parameter itself: no use of it beyond here
        if order is not None:
            back = order.argsort()
            mask = mask[:, back]
            updated = None if updated is None else updated[:, back]
            self.result.permutations[layer.name] = order.cpu()
        if updated is None:
            layer.apply_(mask)
        else:
            layer.write_(updated)
        self.result.masks[layer.name] = mask.cpu()
        self.result.layers.append(report)
        if self.progress is not None:
            self.progress(report, len(self.result.layers), len(self.layers))

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
            raise PruningError(
                f"pruning stopped after {done} of {total} layers: {error}. The model in memory is "
                f"part sparse, part dense; load it again before using it"
            ) from error


def call_model(model: nn.Module, batch: Any) -> object:
    """Mappings as keywords, tuples and lists as positional arguments, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _relative_errors(
    weight: Tensor, deltas: Sequence[Tensor], statistics: Statistics
) -> list[float] | list[None]:
    """Expected squared error of each change, relative to the output's expected square."""
    if statistics.input is None:
        return [None] * len(deltas)
    whole = statistics.squared_error(weight).sum().clamp_min(1e-30)
    return [float(statistics.squared_error(delta).sum() / whole) for delta in deltas]


def _warn_of(names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(f"{what}: {shown}", PruningWarning, stacklevel=4)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no KV cache, both restored at the end."""
    training = [module for module in model.modules() if module.training]
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if _caches(m)}
    caching = list(configs.values())
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for module in training:
            module.training = True


def _caches(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "use_cache", None) is True
