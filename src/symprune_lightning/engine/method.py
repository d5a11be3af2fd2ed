"""What is done to which layer: settings by name and by layer, resolved and checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from symprune_lightning.engine.layers import Layer, by_layer, decoder_blocks
from symprune_lightning.engine.schedule import Schedule
from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.patterns import (
    NM,
    Group,
    Pattern,
    Unstructured,
    keep_highest,
    pattern_of,
)
from symprune_lightning.functional.permutation import channel_permutation
from symprune_lightning.functional.refiners import MaskRefiner
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.statistics import Need, Statistics
from symprune_lightning.functional.update import WeightUpdate

Sparsity = float | Mapping[str, float]
"""Fraction of zeros, for all layers or by layer name."""

Refiners = MaskRefiner | str | Sequence[MaskRefiner | str]
"""A refiner or its name, or several to be applied in turn."""

Refine = Refiners | Mapping[str, Refiners] | None
"""Refiners for all layers, or by layer name."""


class PruningWarning(UserWarning):
    """Something about a run that the masks do not show."""


@dataclass(frozen=True)
class Method:
    """Score, budget, refiners and update of every layer.

    Attributes:
        score: Importance of weights.
        patterns: Layer name to budget.
        refiners: Layer name to the refiners that its mask goes through.
        update: Changes kept weights, if given.
        blocks: Layer name to the index of its decoder block.
    """

    score: Score
    patterns: dict[str, Pattern]
    refiners: dict[str, list[MaskRefiner]]
    update: WeightUpdate | None
    blocks: dict[str, int]

    @property
    def needs(self) -> frozenset[Need]:
        """All statistics that have to be collected."""
        if self.update is not None and self.update.chooses_mask:
            return self.update.needs
        needs = self.score.needs.union(*(r.needs for c in self.refiners.values() for r in c))
        return needs if self.update is None else needs | self.update.needs

    def competitors(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Layers whose weights compete with one another, together; most layers stand alone."""
        groups: dict[object, list[Layer]] = {}
        for layer in layers:
            group = self.patterns[layer.name].group
            key: object = {"model": "model", "block": self.blocks[layer.name]}.get(group, layer)
            groups.setdefault(key, []).append(layer)
        return list(groups.values())

    def by_rows(self, layer: Layer) -> bool:
        """Whether a row's mask can be made without looking at the other rows."""
        pattern = self.patterns[layer.name]
        return pattern.group == "output" and not (isinstance(pattern, NM) and pattern.permute)

    def scores(
        self,
        layers: Sequence[Layer],
        weights: Sequence[Tensor],
        statistics: Sequence[Statistics],
        rows: Sequence[slice],
    ) -> list[Tensor]:
        """Scores of layers; −∞ where a weight is zero already, so that it is pruned first.

        Of the given rows only, where the others have no say in the mask.
        """
        scores = []
        for layer, weight, measured, part in zip(layers, weights, statistics, rows, strict=True):
            with naming(layer):
                wanted = part if self.by_rows(layer) else slice(None)
                score = self.score(weight, measured)[wanted]
                # extremes are found in a tenth of the time that isfinite takes
                if len(score) and not torch.stack(score.aminmax()).isfinite().all():
                    raise ValueError("some weights or scores are NaN or infinite")
                scores.append(score.masked_fill(weight[wanted] == 0, -torch.inf))
        return scores

    def first_masks(
        self, layers: Sequence[Layer], scores: Sequence[Tensor], rows: Sequence[slice]
    ) -> list[Tensor]:
        """Masks of some rows of layers that compete, before any refining. Zeros stay pruned.

        Args:
            layers: The layers.
            scores: What ``scores`` gave for these rows.
            rows: The rows.
        """
        pattern = self.patterns[layers[0].name]
        if self.by_rows(layers[0]):  # the scores are of these rows
            return [
                self.patterns[layer.name].mask(score) & (score > -torch.inf)
                for layer, score in zip(layers, scores, strict=True)
            ]
        if len(layers) == 1:
            masks = [pattern.mask(scores[0])]
        else:
            together = torch.cat([score.flatten() for score in scores])[None]
            kept = keep_highest(together, pattern.pruned(together.shape[1]))[0]
            parts = torch.split(kept, [score.numel() for score in scores])
            masks = [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]
        together_with = zip(masks, scores, rows, strict=True)
        return [(mask & (score > -torch.inf))[part] for mask, score, part in together_with]

    def order(self, layer: Layer, score: Tensor) -> Tensor | None:
        """Order of the inputs in which the layer is pruned, if its pattern looks for one."""
        pattern = self.patterns[layer.name]
        if isinstance(pattern, NM) and pattern.permute:
            return channel_permutation(score, pattern.n, pattern.m)
        return None


def resolve_method(
    model: nn.Module,
    layers: Sequence[Layer],
    *,
    score: Score | str,
    sparsity: Sparsity,
    pattern: Pattern | str | None,
    group: Group,
    refine: Refine,
    update: WeightUpdate | str | None,
    schedule: Schedule,
) -> Method:
    """Resolve names, spread settings over layers, and refuse what can't work together.

    Raises:
        ValueError: An argument is wrong, or two don't go together.
    """
    method = Method(
        score=by_name(Score, score),  # type: ignore[type-abstract]
        patterns=_patterns(layers, pattern, sparsity, group),
        refiners=_refiners(refine, layers),
        update=None if update is None else by_name(WeightUpdate, update),  # type: ignore[type-abstract]
        blocks=block_indices(model, layers),
    )
    for layer in layers:
        with naming(layer):
            method.patterns[layer.name].check(layer.shape)
            if layer.name in method.refiners:
                method.patterns[layer.name].span()
    _check_together(method, schedule)
    return method


def check_group(group: Group, schedule: Schedule) -> None:
    """Raise ``ValueError`` if the schedule never has all scores of a group at once."""
    known = {"block": ("block", "dense"), "model": ("dense",)}.get(group, (schedule,))
    if schedule not in known:
        raise ValueError(
            f"group {group!r} needs all scores of a {group} at once: use schedule={known[0]!r}"
        )


def with_sparsity(method: Method, sparsity: Mapping[str, float]) -> Method:
    """The same method with other levels by layer.

    Raises:
        ValueError: A pattern has no level to choose, or layers compete with one another.
    """
    patterns: dict[str, Pattern] = {}
    for name, pattern in method.patterns.items():
        if not isinstance(pattern, Unstructured) or pattern.group in ("block", "model"):
            raise ValueError(
                f"an allocation chooses each layer's sparsity, which {pattern} does not leave "
                f"open; use group 'output', 'input' or 'layer'"
            )
        patterns[name] = replace(pattern, sparsity=sparsity[name])
    return replace(method, patterns=patterns)


def refiners_of(refiners: Refiners) -> list[MaskRefiner]:
    """Refiners by name or as they are.

    Raises:
        ValueError: No refiner has the name.
    """
    listed = [refiners] if isinstance(refiners, MaskRefiner | str) else refiners
    return [by_name(MaskRefiner, refiner) for refiner in listed]  # type: ignore[type-abstract]


def block_indices(model: nn.Module, layers: Sequence[Layer]) -> dict[str, int]:
    """Layer name to index of its decoder block; a layer outside has that of the one before."""
    blocks = list(decoder_blocks(model, layers))
    inside = {module: i for i, block in enumerate(blocks) for module in block.modules()}
    indices: dict[str, int] = {}
    current = 0
    for layer in layers:
        current = inside.get(layer.module, current)
        indices[layer.name] = current
    return indices


@contextmanager
def naming(layer: Layer) -> Iterator[None]:
    """Put the layer's name before the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        if layer.name in str(error):
            raise
        raise ValueError(f"layer {layer.name}: {error}") from error


def _patterns(
    layers: Sequence[Layer], pattern: Pattern | str | None, sparsity: Sparsity, group: Group
) -> dict[str, Pattern]:
    if pattern is not None or not isinstance(sparsity, Mapping):
        level = 0.0 if isinstance(sparsity, Mapping) else sparsity
        one = pattern_of(pattern, sparsity=level, group=group)
        return {layer.name: one for layer in layers}
    levels = by_layer(sparsity, layers)
    without = [layer.name for layer in layers if layer.name not in levels]
    if without:
        raise ValueError(
            f"no entry of sparsity matches {len(without)} layers, such as {without[0]}; end with "
            f"'re:.*' for the rest, or name them in `ignore`"
        )
    if group in ("block", "model"):
        raise ValueError(f"sparsity by layer does not go with group {group!r}")
    return {name: Unstructured(level, group) for name, level in levels.items()}


def _refiners(refine: Refine, layers: Sequence[Layer]) -> dict[str, list[MaskRefiner]]:
    if refine is None:
        return {}
    settings = refine if isinstance(refine, Mapping) else {"re:.*": refine}
    return {name: refiners_of(chain) for name, chain in by_layer(settings, layers).items()}


def _check_together(method: Method, schedule: Schedule) -> None:
    pattern = next(iter(method.patterns.values()))
    check_group(pattern.group, schedule)
    if method.update is not None and method.update.chooses_mask:
        if method.refiners:
            raise ValueError(f"{method.update} chooses its own mask: refine=None goes with it")
        if isinstance(pattern, NM) and pattern.permute:
            raise ValueError(f"{method.update} has no score to permute channels by: permute=False")
        if pattern.group in ("block", "model"):
            raise ValueError(
                f"{method.update} works layer by layer: group {pattern.group!r} does not"
            )
    elif method.score.scales_rows_only and pattern.group == "output":
        warnings.warn(
            f"{method.score} scales whole rows, which decides nothing where only weights of one "
            f"row compete: the mask is that of Magnitude; use group='layer'",
            PruningWarning,
            stacklevel=4,
        )
