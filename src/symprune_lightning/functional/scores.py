"""Scores: how important each weight is. Higher is kept.

A score is a frozen dataclass that maps a weight ``W`` of shape ``(out_features, in_features)`` and
the layer's [`Statistics`][symprune_lightning.functional.statistics.Statistics] to a tensor of the
same shape. It declares in ``needs`` what has to be collected. A new score is one subclass, here or
in your own package; its name then works as a string too.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from symprune_lightning.functional.statistics import Need, Statistics


class Score(ABC):
    """Base class of all scores."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """The statistics that the engine has to collect for this score."""

    scales_rows_only: ClassVar[bool] = False
    """Whether what the score knows beyond ``|W|`` is the same for a whole row."""

    @abstractmethod
    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Score every weight.

        Args:
            weight: ``W``, shape ``(out_features, in_features)``, float32 or float64.
            statistics: What was measured of the layer, with everything in ``needs``.

        Returns:
            ``S``, same shape and dtype; a weight with a higher score is kept longer.
        """


@dataclass(frozen=True)
class Magnitude(Score):
    """``S = |W|``. Needs no data.

    Examples:
        >>> Magnitude()(torch.tensor([[-2.0, 1.0]]), Statistics()).tolist()
        [[2.0, 1.0]]
    """

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs()


@dataclass(frozen=True)
class Wanda(Score):
    """``S = |W| · ‖x_r‖``: Sun et al., arXiv 2306.11695, eq. 1.

    The norm is per token, which the paper's is not; the order within a layer is the same.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[1.0, 4.0]])))
        >>> Wanda()(torch.tensor([[2.0, -1.0]]), statistics).tolist()
        [[2.0, 4.0]]
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"input"})

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs() * statistics.input_moments.norm.to(weight.dtype)


@dataclass(frozen=True)
class RI(Score):
    """``S = |W|/L1row_q + |W|/L1col_r``: relative importance, Zhang et al., ICLR 2024, eq. 3.

    A weight counts relative to its row and to its column, so that no channel is emptied. Needs no
    data.

    Examples:
        >>> RI()(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), Statistics()).tolist()
        [[1.5, 0.75], [0.0, 1.75]]
    """

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return relative_importance(weight)


@dataclass(frozen=True)
class RIA(Score):
    """``S = RI · ‖x_r‖^α``: relative importance and activations, Zhang et al., ICLR 2024, eq. 4.

    Attributes:
        alpha: Exponent of the input norm. 0.5, the paper's choice, tempers outlier channels; 0 is
            [`RI`][symprune_lightning.functional.scores.RI].

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[4.0, 1.0]])))
        >>> RIA()(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), statistics).tolist()
        [[3.0, 0.75], [0.0, 1.75]]
    """

    alpha: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"input"})

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        norm = statistics.input_moments.norm.to(weight.dtype)
        return relative_importance(weight) * norm.pow(self.alpha)


@dataclass(frozen=True)
class LpRIA(Score):
    """``S = |W|·(1/Lprow_q + 1/Lpcol_r)·‖x_r‖^α``: RIA with another norm, arXiv 2501.18980.

    Attributes:
        p: The norm: 1 is [`RIA`][symprune_lightning.functional.scores.RIA]; 0 takes every norm as
            1, which with α = 1 ranks as Wanda; ``inf`` is the largest magnitude.
        alpha: Exponent of the input norm.

    Raises:
        ValueError: ``p`` is negative.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[4.0, 1.0]])))
        >>> LpRIA(p=float("inf"))(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), statistics).tolist()[0]
        [4.0, 1.3333333730697632]
    """

    p: float = 2.0
    alpha: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"input"})

    def __post_init__(self) -> None:
        if self.p < 0:
            raise ValueError(f"p is {self.p}; a norm needs p at least 0 (inf is allowed)")

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        norm = statistics.input_moments.norm.to(weight.dtype)
        return relative_importance(weight, self.p) * norm.pow(self.alpha)


@dataclass(frozen=True)
class StochRIA(Score):
    """RIA with row and column sums over a random sample: stochRIA, arXiv 2501.18980.

    One set of columns is drawn for the row sums and one set of rows for the column sums, seeded
    by the layer's name, so that a mask depends neither on the order of layers nor on processes.

    Attributes:
        tau: ``τ``, the share of a row or column that is sampled, in ``(0, 1]``. 0.1 as the paper.
        alpha: Exponent of the input norm; 0 is the form of the paper's Table 1.
        equal_count: Sample ``τ·min(in, out)`` of both, as the paper writes it, in place of
            ``τ·in`` columns and ``τ·out`` rows, with which ``τ = 1`` is RIA.
        seed: Another one draws another sample.

    Raises:
        ValueError: ``tau`` is out of range.

    Examples:
        >>> weight = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
        >>> StochRIA(tau=1.0, alpha=0.0)(weight, Statistics()).tolist()
        [[1.5, 0.75], [0.0, 1.75]]
    """

    tau: float = 0.1
    alpha: float = 0.5
    equal_count: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; it is a share and must be above 0 and at most 1")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """See `Score`."""
        return frozenset({"input"} if self.alpha else ())

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        rows, columns = self._sample(weight.shape, statistics.layer)
        magnitude = weight.abs()
        per_row = _clamped(magnitude[:, columns].sum(1, keepdim=True))
        per_column = _clamped(magnitude[rows].sum(0, keepdim=True))
        score = magnitude / per_row + magnitude / per_column
        if not self.alpha:
            return score
        return score * statistics.input_moments.norm.to(weight.dtype).pow(self.alpha)

    def _sample(self, shape: torch.Size, layer: str) -> tuple[Tensor, Tensor]:
        """Sorted indices of the sampled rows and columns."""
        digest = hashlib.sha256(f"{self.seed}:{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        base = (min(shape), min(shape)) if self.equal_count else shape
        rows, columns = (
            torch.randperm(size, generator=generator)[: max(1, int(count * self.tau))].sort().values
            for size, count in zip(shape, base, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class OutputWanda(Score):
    """``S = |W| · ‖y_q‖``: the output side alone (OWanda, arXiv 2501.18980), ``y = x Wᵀ``.

    ``‖y_q‖`` scales whole rows: with group ``"output"`` or N:M it decides nothing, and the mask is
    that of `Magnitude`. Costs a second product of inputs and weights.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(output=Moments.of(torch.tensor([[4.0, 1.0]])))
        >>> OutputWanda()(torch.tensor([[1.0, 2.0], [1.0, 3.0]]), statistics).tolist()
        [[4.0, 8.0], [1.0, 3.0]]
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"output"})
    scales_rows_only: ClassVar[bool] = True

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs() * statistics.output_moments.norm.to(weight.dtype)[:, None]


@dataclass(frozen=True)
class SymWanda(Score):
    """``S = |W| · (‖x_r‖ + β·‖y_q‖)``: the symmetric score of arXiv 2501.18980.

    The paper leaves open what the output side is. **Our reading**: the dense layer's own output
    ``y = x Wᵀ``, with ``‖y‖`` scaled to the mean of ``‖x‖``, so that ``β = 1`` weighs both alike.

    Attributes:
        beta: ``β``, weight of the output side; 0 is Wanda.

    Raises:
        ValueError: ``beta`` is negative.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> x = Moments.of(torch.tensor([[1.0, 3.0]]))
        >>> statistics = Statistics(input=x, output=Moments.of(torch.tensor([[10.0, 30.0]])))
        >>> SymWanda()(torch.ones(2, 2), statistics).tolist()
        [[2.0, 4.0], [4.0, 6.0]]
    """

    beta: float = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"input", "output"})

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; the balance must be at least 0")

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        x, y = statistics.input_moments.norm, statistics.output_moments.norm
        scaled = y * (x.mean() / _clamped(y.mean()))
        return weight.abs() * (x + self.beta * scaled[:, None]).to(weight.dtype)


@dataclass(frozen=True)
class Symmetric(Score):
    """``S = |W| · (L2row_q + L2col_r)``: both sides from the weights, arXiv 2501.18980.

    Attributes:
        form: ``"sum"``, or ``"rss"`` for the root of the sum of squares.

    Raises:
        ValueError: The form is unknown.

    Examples:
        >>> Symmetric()(torch.tensor([[3.0, 4.0]]), Statistics()).tolist()
        [[24.0, 36.0]]
    """

    form: Literal["sum", "rss"] = "sum"

    def __post_init__(self) -> None:
        if self.form not in ("sum", "rss"):
            raise ValueError(f"form is {self.form!r}; choose 'sum' or 'rss'")

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        row, column = weight.norm(dim=1, keepdim=True), weight.norm(dim=0, keepdim=True)
        both = row + column if self.form == "sum" else torch.hypot(row, column)
        return weight.abs() * both


@dataclass(frozen=True)
class Diagonal(Score):
    """``S = |W| · (a_r/L1row_q + b_q/L1col_r)`` for given vectors, arXiv 2501.18980.

    Attributes:
        a: One value per input channel; ``None`` for ones. With ones on both sides it is `RI`.
        b: One value per output channel; ``None`` for ones.

    Raises:
        ValueError: When called on a weight whose sides have other lengths.

    Examples:
        >>> score = Diagonal(a=(2.0, 2.0))
        >>> score(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), Statistics()).tolist()
        [[2.0, 1.25], [0.0, 2.75]]
    """

    a: tuple[float, ...] | None = None
    b: tuple[float, ...] | None = None

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        magnitude = weight.abs()
        rows, columns = weight.shape
        a, b = _vector(self.a, columns, "a", weight), _vector(self.b, rows, "b", weight)
        per_row = _clamped(magnitude.sum(1, keepdim=True))
        per_column = _clamped(magnitude.sum(0, keepdim=True))
        return magnitude / per_row * a + magnitude / per_column * b[:, None]


def relative_importance(
    weight: Tensor, p: float = 1.0, column_norm: Tensor | None = None
) -> Tensor:
    """``|W|/Lprow_q + |W|/Lpcol_r``, shape ``(out_features, in_features)``; 0 in an empty row.

    Args:
        weight: ``W``, or some of its rows if ``column_norm`` is given.
        p: The norm; 0 takes it as 1.
        column_norm: Norm of each column of the whole layer, ``(in_features,)``.
    """
    magnitude = weight.abs()
    columns = _norm(magnitude, p, 0) if column_norm is None else _clamped(column_norm)
    return magnitude / _norm(magnitude, p, 1) + magnitude / columns


def _norm(magnitude: Tensor, p: float, dim: int) -> Tensor:
    if p == 0:
        return torch.ones((), dtype=magnitude.dtype, device=magnitude.device)
    if p == 1:
        return _clamped(magnitude.sum(dim, keepdim=True))
    return _clamped(torch.linalg.vector_norm(magnitude, p, dim, keepdim=True))


def _clamped(divisor: Tensor) -> Tensor:
    """``divisor`` away from zero, so far that dividing by it gives no infinity."""
    smallest = divisor.max() * torch.finfo(divisor.dtype).eps
    return divisor.clamp_min(smallest).clamp_min(torch.finfo(divisor.dtype).tiny)


def _vector(values: tuple[float, ...] | None, length: int, name: str, like: Tensor) -> Tensor:
    if values is None:
        return like.new_ones(length)
    if len(values) != length:
        raise ValueError(f"Diagonal's {name} has {len(values)} values for {length} channels")
    return like.new_tensor(values)
