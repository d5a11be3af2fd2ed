"""The pruning method: all settings that decide which weights are pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal, Self, get_args

from symprune_lightning.errors import PruningWarning
from symprune_lightning.functional.allocation import Allocation, AllocationMethod, Search
from symprune_lightning.functional.patterns import (
    NM,
    Group,
    Pattern,
    Unstructured,
    resolve_pattern,
)
from symprune_lightning.functional.reconstruction import BlockReconstruction
from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.registry import checked_instance, leaves, lookup
from symprune_lightning.functional.scores import RIA, Score
from symprune_lightning.functional.solvers import LayerSolver
from symprune_lightning.functional.statistics import CalibrationOrder, Need
from symprune_lightning.functional.update import WeightUpdate

Sparsity = float | Mapping[str, float]
"""Fraction of zeros, for all layers or by layer name."""

Refiners = MaskRefiner | str | Sequence[MaskRefiner | str]
"""A refiner or its name, or a sequence of them that is applied in order."""

Refine = Refiners | Mapping[str, Refiners] | None
"""Refiners for all layers, or by layer name."""

Experts = Literal["routed", "all"]
"""Which tokens the experts of a mixture are measured on: those routed to each, or all."""

DEFAULT_SPARSITY = 0.5
"""Fraction of zeros without further settings."""

Unreached = Literal["dense", "magnitude"]
"""How layers that no calibration token reached are handled: left dense, or pruned by magnitude."""


@dataclass(frozen=True)
class PruningMethod:
    """All settings that decide which weights are pruned, and how the kept ones change.

    ``SymPrune`` and ``prune_model`` build one from their arguments, see ``resolve``.

    Attributes:
        score: Importance of each weight.
        sparsity: Fraction of zeros in each group, in ``[0, 1)``; or by layer name.
        pattern: Replaces ``sparsity`` and ``group`` if given; another sparsity is refused.
        group: Which weights compete.
        refine: Layer name or regular expression to the refiners that improve its mask, in order.
        update: Changes the kept weights to compensate for the pruned ones.
        solver: Chooses mask and weights together, in place of score, refiners and update.
        allocation: Divides the sparsity among layers.
        reconstruct: Trains the kept weights of each block after it is pruned.
        calibration_order: Which layers are already pruned when the inputs of a layer are measured.
        gradient_batches: Number of batches for sensitivities; ``None`` for all.
        experts: Which tokens the experts of a mixture are measured on.
        unreached: How layers that no calibration token reached are handled.
        ignore: Layers to leave dense.
        only: Layers to prune; ``None`` for all.

    Raises:
        ValueError: A setting is out of range, or two settings cannot be combined.

    Examples:
        >>> PruningMethod.resolve(score="wanda", sparsity=0.6).score
        Wanda()
    """

    score: Score = field(default_factory=RIA)
    sparsity: Sparsity = DEFAULT_SPARSITY
    pattern: Pattern | None = None
    group: Group = "output"
    refine: Mapping[str, Sequence[MaskRefiner]] = field(default_factory=dict)
    update: WeightUpdate | None = None
    solver: LayerSolver | None = None
    allocation: AllocationMethod | None = None
    reconstruct: BlockReconstruction | None = None
    calibration_order: CalibrationOrder = "layer"
    gradient_batches: int | None = None
    experts: Experts = "routed"
    unreached: Unreached = "dense"
    ignore: Sequence[str] = ()
    only: Sequence[str] | None = None

    @classmethod
    def resolve(
        cls,
        *,
        score: Score | str = "ria",
        refine: Refine = None,
        pattern: Pattern | str | None = None,
        update: WeightUpdate | str | None = None,
        solver: LayerSolver | str | None = None,
        allocation: AllocationMethod | str | None = None,
        reconstruct: BlockReconstruction | bool | None = None,
        **settings: Any,
    ) -> Self:
        """Build a method from names or instances.

        Args:
            score: A score or its name.
            refine: Refiners, for all layers or by layer name.
            pattern: A pattern or a string such as ``"2:4"``.
            update: A weight update or its name.
            solver: A solver or its name.
            allocation: An allocation or its name.
            reconstruct: The reconstruction; ``True`` for the default one.
            settings: The other attributes; ``ignore`` and ``only`` may be one string.
        """
        for name in ("ignore", "only"):
            if isinstance(settings.get(name), str):
                settings[name] = [settings[name]]
        solvers = {cls.__name__.lower() for cls in leaves(LayerSolver)}  # type: ignore[type-abstract]
        if isinstance(score, str) and score.lower() in solvers:
            raise ValueError(f"{score!r} is a solver, not a score: use solver={score!r}")
        return cls(
            score=lookup(Score, score),  # type: ignore[type-abstract]
            refine=_resolve_refine(refine),
            pattern=None if pattern is None else resolve_pattern(pattern),
            update=None if update is None else lookup(WeightUpdate, update),  # type: ignore[type-abstract]
            solver=None if solver is None else lookup(LayerSolver, solver),  # type: ignore[type-abstract]
            allocation=None if allocation is None else lookup(AllocationMethod, allocation),
            reconstruct=_resolve_reconstruct(reconstruct),
            **settings,
        )

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_types()
        if self.gradient_batches is not None and self.gradient_batches < 1:
            raise ValueError(f"gradient_batches is {self.gradient_batches}; it must be at least 1")
        by_layer = isinstance(self.sparsity, Mapping)
        levels = self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]
        for level in levels:
            Unstructured(level, self.group)  # raises if one of them is invalid
        if self.pattern is None and by_layer and self.group in ("block", "model"):
            raise ValueError(f"sparsity by layer cannot be combined with group {self.group!r}")
        if self.pattern is None and by_layer and self.allocation is not None:
            raise ValueError(
                "sparsity by layer cannot be combined with an allocation: give one sparsity"
            )
        self._check_group()
        if self.reconstruct is not None and self.calibration_order != "block":
            raise ValueError(
                f"reconstruct trains each block after all its layers are pruned, which "
                f"calibration_order={self.calibration_order!r} does not allow: use "
                f"calibration_order='block'"
            )
        if self.solver is not None:
            self._check_solver(self.solver)
        elif self.score.same_within_rows and self.budget(0.0).group == "output":
            warnings.warn(
                f"{self.score} differs only between rows, which has no effect if weights of "
                f"one row compete: the mask is that of {self.score.same_within_rows}; use "
                f"group='layer'",
                PruningWarning,
                stacklevel=4,
            )

    @property
    def needs(self) -> frozenset[Need]:
        """All statistics that are collected."""
        if self.solver is not None:
            return self.solver.needs
        refiners = (refiner for chain in self.refine.values() for refiner in chain)
        needs = self.score.needs.union(*(refiner.needs for refiner in refiners))
        return needs if self.update is None else needs | self.update.needs

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the output gradients of the dense model are measured."""
        allocation = self.allocation
        of_allocation = allocation.needs if isinstance(allocation, Allocation) else frozenset()
        if isinstance(allocation, Search):
            of_allocation = frozenset().union(*(a.needs for a in allocation.candidates))
        return "output_gradient" in self.needs | of_allocation

    def budget(self, sparsity: float) -> Pattern:
        """Return the pattern of a layer with this sparsity."""
        return self.pattern or Unstructured(sparsity, self.group)

    def scaled(self, fraction: float) -> PruningMethod:
        """Return the method with every sparsity multiplied by ``fraction``."""
        if self.pattern is not None:
            return self
        if isinstance(self.sparsity, Mapping):
            levels = {name: level * fraction for name, level in self.sparsity.items()}
            return replace(self, sparsity=levels)
        return replace(self, sparsity=self.sparsity * fraction)

    def _check_choices(self) -> None:
        choices = {
            "calibration_order": CalibrationOrder,
            "experts": Experts,
            "unreached": Unreached,
        }
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}"
                )

    def _check_types(self) -> None:
        """Refuse strings where lists or numbers are expected."""
        for name, entries in (("ignore", self.ignore), ("only", self.only)):
            if isinstance(entries, str):
                raise ValueError(f"{name} is the string {entries!r}; pass a list of names")
        levels = self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, Real):
                raise ValueError(
                    f"sparsity is {level!r}, a {type(level).__name__}; pass a number in [0, 1)"
                )

    def _check_group(self) -> None:
        pattern = self.pattern
        if pattern is not None and self.group not in ("output", pattern.group):
            raise ValueError(
                f"group={self.group!r} has no effect with {pattern}, whose weights compete within "
                f"{pattern.group!r}: leave one of them out"
            )
        if pattern is not None and self.sparsity not in (DEFAULT_SPARSITY, pattern.sparsity):
            raise ValueError(
                f"sparsity={self.sparsity} has no effect with {pattern}, which prunes "
                f"{pattern.sparsity:.0%} of the weights: pass one of them (where a recipe sets "
                f"sparsity, sparsity={DEFAULT_SPARSITY} takes it back)"
            )
        is_free = isinstance(self.budget(0.0), Unstructured)
        is_fixed = not is_free or self.budget(0.0).group in ("block", "model")
        if self.allocation is not None and is_fixed:
            raise ValueError(
                f"an allocation sets the sparsity of each layer, which {self.budget(0.5)} does not "
                f"allow: use allocation=None, or group 'output', 'input' or 'layer'"
            )
        orders: dict[str, tuple[CalibrationOrder, ...]]
        orders = {"block": ("block", "dense"), "model": ("dense",)}
        group = self.budget(0.0).group
        if self.calibration_order not in orders.get(group, (self.calibration_order,)):
            raise ValueError(
                f"group {group!r} compares all scores of a {group} at once: use "
                f"calibration_order={orders[group][0]!r}"
            )

    def _check_solver(self, solver: LayerSolver) -> None:
        if self.refine or self.update is not None:
            raise ValueError(
                f"{solver} chooses mask and weights itself: use refine=None and update=None"
            )
        if isinstance(self.pattern, NM) and self.pattern.permute:
            raise ValueError(f"{solver} has no score to permute channels by: use permute=False")
        if self.budget(0.0).group in ("block", "model"):
            raise ValueError(
                f"{solver} works layer by layer, which group {self.group!r} does not allow"
            )


def _resolve_reconstruct(
    reconstruct: BlockReconstruction | bool | None,
) -> BlockReconstruction | None:
    if reconstruct is None or isinstance(reconstruct, bool):
        return BlockReconstruction() if reconstruct else None
    return checked_instance(BlockReconstruction, reconstruct)


def _resolve_refine(refine: Refine) -> dict[str, list[MaskRefiner]]:
    if refine is None:
        return {}
    settings = refine if isinstance(refine, Mapping) else {"re:.*": refine}
    return {name: _resolve_refiners(refiners) for name, refiners in settings.items()}


def _resolve_refiners(refiners: Refiners) -> list[MaskRefiner]:
    if isinstance(refiners, str | type) or not isinstance(refiners, Iterable):
        return [lookup(MaskRefiner, refiners)]  # type: ignore[type-abstract]
    return [lookup(MaskRefiner, refiner) for refiner in refiners]  # type: ignore[type-abstract]
