"""The callback that prunes by score, pattern and refiner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import nn

from symprune_lightning.callbacks.pruning import PruningCallback, When
from symprune_lightning.callbacks.schedule import CubicSchedule
from symprune_lightning.engine.method import (
    DEFAULT_SPARSITY,
    Experts,
    PruningMethod,
    Unreached,
)
from symprune_lightning.engine.prune import RunOptions, prune_with
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.functional.allocation import AllocationMethod
from symprune_lightning.functional.patterns import Group, Pattern
from symprune_lightning.functional.reconstruction import BlockReconstruction
from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.solvers import LayerSolver
from symprune_lightning.functional.statistics import CalibrationOrder
from symprune_lightning.functional.update import WeightUpdate


class SymPrune(PruningCallback):
    """Prunes by a score, a pattern and a refiner, in one pass over the calibration data.

    Args:
        score: Importance of each weight: a ``Score``, or its name such as ``"wanda"``.
        sparsity: Fraction of zeros in each group, in ``[0, 1)``; or by layer name:
            ``{"re:.*down_proj": 0.4, "re:.*": 0.5}``.
        pattern: ``"2:4"`` or a ``Pattern``, in place of ``sparsity`` and ``group``.
        group: Which weights compete: those of one ``"output"`` channel, of one ``"input"``
            channel, of the ``"layer"``, of a decoder ``"block"``, or of the ``"model"``.
        refine: A ``MaskRefiner``, its name (``"dsnot"``, ``"r2dsnot"``, ``"exactswap"``), a list of
            them, or a mapping by layer: ``{"re:.*self_attn.*": "dsnot"}``.
        update: A ``WeightUpdate`` or its name (``"obsupdate"``): changes the kept weights to
            compensate for the pruned ones.
        solver: A ``LayerSolver`` or its name (``"sparsegpt"``): chooses mask and weights together,
            in place of score, refiners and update.
        allocation: An ``Allocation``, a ``Search``, or a name (``"progression"``, ``"owl"``):
            divides the sparsity among layers.
        reconstruct: Trains the kept weights of each decoder block, after it is pruned, to reproduce
            the dense output: a ``BlockReconstruction``, or ``True`` for its defaults. Requires
            ``calibration_order="block"`` and at least two batches.
        calibration_order: ``"layer"`` (layer-sequential, one forward), ``"block"``
            (block-sequential, two forwards, as the reference implementations) or ``"dense"`` (not
            sequential).
        gradient_batches: Number of batches for sensitivities (``GradientWanda``, ``Sensitivity``),
            which take a forward and a backward pass of the dense model; ``None`` for all.
        experts: Tokens that the experts of a mixture of experts are measured on: ``"routed"`` for
            those that the router sends to each, ``"all"`` for all tokens of its block (each expert
            is called with all of them once more; the routed ones give the output).
        unreached: Layers that no calibration token reached are left ``"dense"``, or pruned by
            ``"magnitude"``. Both are named in the result.
        ignore: Layers to leave dense: names, or regular expressions prefixed with ``re:``. Heads,
            routers, output projections and adapters are left dense in any case, unless ``only`` has
            their exact names.
        only: Layers to prune, in the same form; ``None`` for all.
        when: See [`PruningCallback`][symprune_lightning.PruningCallback].
        calibration: See `PruningCallback`.
        baseline: See `PruningCallback`.
        journal: See `PruningCallback`.

    Attributes:
        method: All settings that decide which weights are pruned.

    Raises:
        ValueError: An argument is invalid, or two arguments cannot be combined.

    Examples:
        >>> SymPrune(score="wanda", sparsity=0.6).settings["score"]
        {'name': 'Wanda'}
    """

    def __init__(
        self,
        score: Score | str = "ria",
        *,
        sparsity: float | dict[str, float] = DEFAULT_SPARSITY,
        pattern: Pattern | str | None = None,
        group: Group = "output",
        refine: MaskRefiner
        | str
        | list[MaskRefiner | str]
        | dict[str, MaskRefiner | str | list[MaskRefiner | str]]
        | None = None,
        update: WeightUpdate | str | None = None,
        solver: LayerSolver | str | None = None,
        allocation: AllocationMethod | str | None = None,
        reconstruct: BlockReconstruction | bool | None = None,
        calibration_order: CalibrationOrder = "layer",
        gradient_batches: int | None = None,
        experts: Experts = "routed",
        unreached: Unreached = "dense",
        ignore: list[str] | str | None = None,
        only: list[str] | str | None = None,
        when: When = "validate",
        calibration: Iterable[Any] | None = None,
        baseline: bool = True,
        journal: str | None = None,
    ) -> None:
        super().__init__(when=when, calibration=calibration, baseline=baseline, journal=journal)
        if pattern is not None and isinstance(when, CubicSchedule):
            raise ValueError(
                "a pattern has a fixed sparsity, which CubicSchedule cannot change: use sparsity="
            )
        self.method = PruningMethod.resolve(
            score=score,
            sparsity=sparsity,
            pattern=pattern,
            group=group,
            refine=refine,
            update=update,
            solver=solver,
            allocation=allocation,
            reconstruct=reconstruct,
            calibration_order=calibration_order,
            gradient_batches=gradient_batches,
            experts=experts,
            unreached=unreached,
            ignore=ignore or [],
            only=only,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The method as JSON values, as recorded in the manifest.

        Settings that another one replaces are left out.
        """
        replaced = {"pattern"} if self.method.pattern is None else {"sparsity", "group"}
        if self.method.solver is not None:
            replaced |= {"score", "refine", "update"}
        settings = {
            name: _as_json(value)
            for name, value in vars(self.method).items()
            if name not in replaced
        }
        return {**settings, "when": _as_json(self.when)}

    def prune(
        self, model: nn.Module, batches: Iterable[Any], fraction: float, options: RunOptions
    ) -> PruneResult:
        """See `PruningCallback`."""
        return prune_with(model, batches, self.method.scaled(fraction), options)


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__, **asdict(value)}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
