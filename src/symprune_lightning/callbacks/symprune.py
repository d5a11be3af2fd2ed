"""The callback that prunes by score, pattern and refiner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from symprune_lightning.callbacks.gradual import Gradual
from symprune_lightning.callbacks.pruning import PruningCallback, RunOptions, When
from symprune_lightning.engine.layers import LM_HEAD
from symprune_lightning.engine.method import Refine, check_group, refiners_of
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.engine.residence import Residence
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.engine.schedule import Schedule, check_schedule
from symprune_lightning.functional.allocation import Allocation
from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.patterns import Group, Pattern, pattern_of
from symprune_lightning.functional.refiners import MaskRefiner
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.update import WeightUpdate

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SymPrune(PruningCallback):
    """Prunes by a score, a pattern and a refiner, in one pass over the calibration data.

    Args:
        score: Importance of each weight: a ``Score``, or its name such as ``"wanda"``.
        sparsity: Fraction of zeros in each group, in ``[0, 1)``; or by layer name:
            ``{"re:.*down_proj": 0.4, "re:.*": 0.5}``.
        pattern: ``"2:4"`` or a ``Pattern``, in place of ``sparsity`` and ``group``.
        group: Which weights compete: of one ``"output"`` channel, one ``"input"`` channel, the
            whole ``"layer"``, a decoder ``"block"``, or the ``"model"``.
        refine: A ``MaskRefiner``, its name (``"dsnot"``, ``"r2dsnot"``, ``"exactswap"``), several
            in a list, or for some layers only: ``{"re:.*self_attn.*": "dsnot"}``.
        update: A ``WeightUpdate`` or its name (``"obsupdate"``, ``"sparsegpt"``): changes the kept
            weights to make up for the pruned ones.
        allocation: An ``Allocation`` or its name (``"progression"``, ``"owl"``): divides the
            sparsity among layers.
        schedule: ``"layer"`` (one forward), ``"block"`` (two, as the reference implementations do)
            or ``"dense"``.
        ignore: Layers to leave dense: names, or regular expressions behind ``re:``. ``None`` spares
            the output projection ``lm_head``, a list of yours replaces that.
        only: Layers to prune, in the same way; ``None`` for all.
        when: See [`PruningCallback`][symprune_lightning.callbacks.PruningCallback].
        calibration: See `PruningCallback`.
        baseline: See `PruningCallback`.
        journal: See `PruningCallback`.

    Raises:
        ValueError: An argument is wrong.

    Examples:
        >>> SymPrune(score="wanda", sparsity=0.6).settings["score"]
        {'name': 'Wanda'}
    """

    def __init__(
        self,
        score: Score | str = "ria",
        *,
        sparsity: float | dict[str, float] = 0.5,
        pattern: Pattern | str | None = None,
        group: Group = "output",
        refine: MaskRefiner
        | str
        | list[MaskRefiner | str]
        | dict[str, MaskRefiner | str | list[MaskRefiner | str]]
        | None = None,
        update: WeightUpdate | str | None = None,
        allocation: Allocation | str | None = None,
        schedule: Schedule = "layer",
        ignore: list[str] | None = None,
        only: list[str] | None = None,
        when: When = "validate",
        calibration: Iterable[Any] | None = None,
        baseline: bool = True,
        journal: str | None = None,
    ) -> None:
        super().__init__(when=when, calibration=calibration, baseline=baseline, journal=journal)
        check_schedule(schedule)
        for level in sparsity.values() if isinstance(sparsity, dict) else [sparsity]:
            pattern_of(pattern, sparsity=level, group=group)  # says at once what is wrong
        if pattern is None:
            check_group(group, schedule)
        elif isinstance(when, Gradual):
            raise ValueError("a pattern has no sparsity to grow: give sparsity in place of pattern")
        self.score = by_name(Score, score)  # type: ignore[type-abstract]
        self.sparsity = sparsity
        self.pattern = None if pattern is None else pattern_of(pattern)
        self.group = group
        self.refine: Refine = None
        if isinstance(refine, dict):
            self.refine = {name: refiners_of(chain) for name, chain in refine.items()}
        elif refine is not None:
            self.refine = refiners_of(refine)
        self.update = None if update is None else by_name(WeightUpdate, update)  # type: ignore[type-abstract]
        self.allocation = None if allocation is None else by_name(Allocation, allocation)  # type: ignore[type-abstract]
        self.schedule = schedule
        self.ignore = list(LM_HEAD) if ignore is None else ignore
        self.only = only

    @property
    def settings(self) -> dict[str, Any]:
        """The method in plain values, as the manifest records it."""
        budget = ("sparsity", "group") if self.pattern is None else ("pattern",)
        rest = ("refine", "update", "allocation", "schedule", "ignore", "only", "when")
        return {name: _plain(getattr(self, name)) for name in ("score", *budget, *rest)}

    def prune(
        self,
        model: nn.Module | Residence,
        batches: Iterable[Any],
        share: float,
        **run: Unpack[RunOptions],
    ) -> PruneResult:
        """See `PruningCallback`."""
        levels = self.sparsity
        scaled = (
            {name: level * share for name, level in levels.items()}
            if isinstance(levels, dict)
            else levels * share
        )
        return prune_model(
            model,
            batches,
            score=self.score,
            sparsity=scaled,
            pattern=self.pattern,
            group=self.group,
            refine=self.refine,
            update=self.update,
            allocation=self.allocation,
            schedule=self.schedule,
            ignore=self.ignore,
            only=self.only,
            **run,
        )


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__, **asdict(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
