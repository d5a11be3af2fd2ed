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

from symprune_lightning.engine.layers import LM_HEAD, Layer, by_layer, prunable_layers
from symprune_lightning.engine.recorder import Recorder
from symprune_lightning.engine.schedule import Forward, Schedule, SuspendedForward, check_schedule
from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.patterns import Group, Pattern, pattern_of
from symprune_lightning.functional.refiners import MaskRefiner
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.statistics import Statistics


class PruningError(RuntimeError):
    """Pruning stopped half-way: some layers are sparse already, the others still dense."""


class PruningWarning(UserWarning):
    """Something about a layer that the masks do not show."""


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: The layer's qualified name.
        shape: ``(out_features, in_features)``.
        sparsity: Realised fraction of zeros.
        error: Expected squared change of the output by the first mask, relative to the expected
            squared output (see ``Statistics.squared_error``); ``None`` without input statistics.
        error_refined: The same after refining; equals ``error`` without a refiner.
        swaps: Weights that the refiner exchanged.
        tokens: Calibration tokens that reached the layer.
        seconds: Time for scoring, masking and refining.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    error: float | None
    error_refined: float | None
    swaps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class PruneResult:
    """Masks and figures of a run.

    Attributes:
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept, on the CPU.
        layers: One report per pruned layer, in the order of pruning.
        unreached: Prunable layers that no calibration batch came to; they are still dense.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Realised fraction of zeros over all pruned layers."""
        zeros = sum(int((~mask).sum()) for mask in self.masks.values())
        return zeros / sum(mask.numel() for mask in self.masks.values())


Refiners = MaskRefiner | str | Sequence[MaskRefiner | str]
"""A refiner or its name, or several to be applied in turn."""

Refine = Refiners | Mapping[str, Refiners] | None
"""Refiners for all layers, or by layer name."""

Progress = Callable[[LayerReport, int, int], None]
"""Called after each layer with its report, how many layers are done, and how many there are."""


def prune_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    score: Score | str = "ria",
    sparsity: float = 0.5,
    pattern: Pattern | str | None = None,
    group: Group = "output",
    refine: Refine = None,
    schedule: Schedule = "layer",
    ignore: Sequence[str] = LM_HEAD,
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
        sparsity: Fraction of zeros in each group, in ``[0, 1)``.
        pattern: ``"2:4"`` or a ``Pattern``, in place of ``sparsity`` and ``group``.
        group: Which weights compete: of one ``"output"`` channel, of one ``"input"`` channel, or
            of the whole ``"layer"``.
        refine: Improves each mask before it is applied: a ``MaskRefiner``, its name, several in a
            list, or for some layers only, such as ``{"re:.*self_attn.*": "dsnot"}``.
        schedule: When a layer is pruned, see [`Schedule`]
            [symprune_lightning.engine.schedule.Schedule].
        ignore: Layers to leave dense: names, or regular expressions behind ``re:``.
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
    run = _Run(
        layers=prunable_layers(model, ignore),
        score=by_name(Score, score),  # type: ignore[type-abstract]
        pattern=pattern_of(pattern, sparsity=sparsity, group=group),
        refine=refine,
        progress=progress,
    )
    with torch.inference_mode(False), torch.no_grad(), run.saying_what_is_done():
        if run.recorder is None:
            run.prune(run.layers)
        else:
            with _evaluating(model):
                run.calibrate(model, batches, forward or call_model, schedule, run.recorder)
    return run.result


class _Run:
    """The method and what it has done so far."""

    def __init__(
        self,
        layers: list[Layer],
        score: Score,
        pattern: Pattern,
        refine: Refine,
        progress: Progress | None,
    ) -> None:
        self.layers = layers
        self.score = score
        self.pattern = pattern
        self.progress = progress
        self.result = PruneResult()
        for layer in layers:
            with _naming(layer):
                pattern.check(layer.shape)
        self.refiners = _refiners(refine, layers)
        self.span = pattern.span() if self.refiners else None
        needs = score.needs.union(*(r.needs for chain in self.refiners.values() for r in chain))
        # moments cost next to nothing, and tell activations that are not finite
        self.recorder = Recorder(needs | {"input"}) if needs else None

    def calibrate(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward,
        schedule: Schedule,
        recorder: Recorder,
    ) -> None:
        """Send the batches through the model, pruning on the way."""
        suspended = SuspendedForward(model, self.layers, recorder, self.prune, schedule)
        if suspended.run(batches, forward) == 0:
            raise ValueError("the calibration set is empty: pass at least one batch")
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
        """Score, mask, refine and zero layers whose statistics are complete."""
        for layer in layers:
            with _naming(layer), torch.autocast(layer.parameter.device.type, enabled=False):
                self._prune(layer)
        if self.recorder is not None:
            self.recorder.finish(layer.name for layer in layers)
        torch.clear_autocast_cache()  # it may hold copies of the dense weights

    def _prune(self, layer: Layer) -> None:
        start = time.perf_counter()
        statistics = Statistics()
        if self.recorder is not None:
            statistics = self.recorder.statistics(layer.name)
        weight = layer.read()
        zero = weight == 0
        score = self.score(weight, statistics)
        if not score.isfinite().all():
            raise ValueError("some weights or scores are NaN or infinite")
        first = self.pattern.mask(score.masked_fill_(zero, -torch.inf)) & ~zero
        mask = first
        for refiner in self.refiners.get(layer.name, ()):
            mask = refiner(weight, mask, statistics, self.span)
        report = LayerReport(
            name=layer.name,
            shape=(weight.shape[0], weight.shape[1]),
            sparsity=int((~mask).sum()) / mask.numel(),
            error=_relative_error(weight, first, statistics),
            error_refined=_relative_error(weight, mask, statistics),
            swaps=int((mask & ~first).sum()),
            tokens=0 if statistics.input is None else int(statistics.input.tokens),
            seconds=time.perf_counter() - start,
        )
        layer.apply_(mask)  # `weight` may be the parameter itself: no use of it beyond here
        self.result.masks[layer.name] = mask.cpu()
        self.result.layers.append(report)
        if self.progress is not None:
            self.progress(report, len(self.result.layers), len(self.layers))

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


def _refiners(refine: Refine, layers: Sequence[Layer]) -> dict[str, list[MaskRefiner]]:
    """Layer name to the refiners that its mask goes through."""
    if refine is None:
        return {}
    settings = refine if isinstance(refine, Mapping) else {"re:.*": refine}
    return {name: refiners_of(chain) for name, chain in by_layer(settings, layers).items()}


def refiners_of(refiners: Refiners) -> list[MaskRefiner]:
    """Refiners by name or as they are.

    Raises:
        ValueError: No refiner has the name.
    """
    listed = [refiners] if isinstance(refiners, MaskRefiner | str) else refiners
    return [by_name(MaskRefiner, refiner) for refiner in listed]  # type: ignore[type-abstract]


def call_model(model: nn.Module, batch: Any) -> object:
    """Mappings as keywords, tuples and lists as positional arguments, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _relative_error(weight: Tensor, mask: Tensor, statistics: Statistics) -> float | None:
    if statistics.input is None:
        return None
    lost = statistics.squared_error(weight.masked_fill(mask, 0)).sum()
    return float(lost / statistics.squared_error(weight).sum().clamp_min(1e-30))


def _warn_of(names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(f"{what}: {shown}", PruningWarning, stacklevel=4)


@contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """Put the layer's name before the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        if layer.name in str(error):
            raise
        raise ValueError(f"layer {layer.name}: {error}") from error


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
