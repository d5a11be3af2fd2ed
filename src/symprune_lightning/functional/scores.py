"""Scores: the importance of each weight. Weights with higher scores are kept.

A score is a frozen dataclass that maps a weight ``W`` of shape ``(out_features, in_features)`` and
the layer's [`Statistics`][symprune_lightning.functional.statistics.Statistics] to a tensor of the
same shape. It declares the statistics that it requires in ``needs``. A new score is one subclass,
in this package or any other, and can be selected by its class name.

Longer than 300 lines to keep all scores side by side.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from symprune_lightning.functional.statistics import Need, Statistics


class Score(ABC):
    """Base class of all scores."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """Statistics that the engine collects for this score."""

    same_within_rows: ClassVar[str | None] = None
    """Name of a score that differs from this one only by a factor per row, if there is one: where
    weights of one row compete, both give the same mask."""

    by_rows: ClassVar[bool] = False
    """Whether the scores of a row depend on that row and the statistics only. Large layers are then
    scored a few rows at a time, which takes less memory and time. A subclass that overrides
    ``__call__`` has to declare it again."""

    reference_url: ClassVar[str] = ""
    """Address of the paper, empty without one."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in vars(cls) and "by_rows" not in vars(cls):
            cls.by_rows = False

    @abstractmethod
    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Score every weight.

        Args:
            weight: ``W``, ``(out_features, in_features)``, float32 or float64; some of its rows if
                ``by_rows`` is True. Not modified.
            statistics: Statistics of the layer, with everything in ``needs``, and ``column_sum``
                if ``by_rows`` is True.

        Returns:
            ``S``, same shape and dtype, finite and at least 0.
        """


@dataclass(frozen=True)
class Magnitude(Score):
    """``S = |W|``: Han et al., arXiv 1506.02626. Needs no data.

    Examples:
        >>> Magnitude()(torch.tensor([[-2.0, 1.0]]), Statistics()).tolist()
        [[2.0, 1.0]]
    """

    by_rows: ClassVar[bool] = True
    reference_url: ClassVar[str] = "https://arxiv.org/abs/1506.02626"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs()


@dataclass(frozen=True)
class Wanda(Score):
    """``S = |W| · ‖x_r‖``: Sun et al., arXiv 2306.11695, eq. 1.

    The norm is per token, unlike in the paper; the ranking within a layer is the same.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[1.0, 4.0]])))
        >>> Wanda()(torch.tensor([[2.0, -1.0]]), statistics).tolist()
        [[2.0, 4.0]]
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"input"})
    by_rows: ClassVar[bool] = True
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2306.11695"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs() * statistics.input_moments.norm.to(weight.dtype)


@dataclass(frozen=True)
class RI(Score):
    """``S = |W|/L1row_q + |W|/L1col_r``: relative importance, Zhang et al., ICLR 2024, eq. 3.

    Weights are compared relative to their row and column, which avoids pruning all weights of a
    channel. Needs no data.

    Examples:
        >>> RI()(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), Statistics()).tolist()
        [[1.5, 0.75], [0.0, 1.75]]
    """

    by_rows: ClassVar[bool] = True
    reference_url: ClassVar[str] = "https://openreview.net/forum?id=Tr0lPx9woF"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return relative_importance(weight, column_norm=statistics.column_sum)


@dataclass(frozen=True)
class RIA(Score):
    """``S = RI · ‖x_r‖^α``: relative importance and activations, Zhang et al., ICLR 2024, eq. 4.

    Attributes:
        alpha: Exponent of the input norm. 0.5, the paper's choice, reduces the influence of outlier
            channels; 0 is [`RI`][symprune_lightning.functional.scores.RI].

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(input=Moments.of(torch.tensor([[4.0, 1.0]])))
        >>> RIA()(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), statistics).tolist()
        [[3.0, 0.75], [0.0, 1.75]]
    """

    alpha: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"input"})
    by_rows: ClassVar[bool] = True
    reference_url: ClassVar[str] = "https://openreview.net/forum?id=Tr0lPx9woF"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        norm = statistics.input_moments.norm.to(weight.dtype)
        relative = relative_importance(weight, column_norm=statistics.column_sum)
        return relative * norm.pow(self.alpha)


@dataclass(frozen=True)
class LpRIA(Score):
    """``S = |W|·(1/Lprow_q + 1/Lpcol_r)·‖x_r‖^α``: RIA with an Lp norm, arXiv 2501.18980.

    Table 1 of the paper gives the score without activations (``α = 0``); ``α > 0`` is the paper's
    transition from RI to RIA.

    Attributes:
        p: Order of the norm: 1 is [`RIA`][symprune_lightning.functional.scores.RIA]; 0 sets every
            norm to 1, which with ``α = 1`` ranks as Wanda; ``inf`` is the maximum magnitude.
        alpha: ``α``, exponent of the input norm. 0.5 as in RIA.

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
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2501.18980"

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

    One set of columns is drawn for all row sums and one set of rows for all column sums, seeded by
    the layer's name, so that a mask depends neither on the order of layers nor on the number of
    processes. Table 1 of the paper gives the score without activations (``α = 0``); ``α > 0`` is
    the paper's transition from RI to RIA.

    Attributes:
        tau: ``τ``, fraction of a row or column that is sampled, in ``(0, 1]``. 0.1 as in the paper.
        alpha: ``α``, exponent of the input norm. 0.5 as in RIA; with 0, no statistics are needed.
        equal_count: Sample ``τ·min(in, out)`` columns and rows, as the paper writes it, instead of
            ``τ·in`` columns and ``τ·out`` rows. Only the latter is RIA for ``τ = 1``.
        seed: Seed of the sample, combined with the layer's name.

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
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2501.18980"

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; it is a fraction, above 0 and at most 1")

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
        """Return the sorted indices of the sampled rows and columns."""
        # a generator of its own, since the global one depends on what ran before on this rank, and
        # a hash of the name, since `hash` of a string differs between processes
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

    ``‖y_q‖`` scales whole rows: with group ``"output"`` or N:M it has no effect, and the mask is
    that of [`Magnitude`][symprune_lightning.functional.scores.Magnitude]. Output statistics take a
    second product of inputs and weights.

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> statistics = Statistics(output=Moments.of(torch.tensor([[4.0, 1.0]])))
        >>> OutputWanda()(torch.tensor([[1.0, 2.0], [1.0, 3.0]]), statistics).tolist()
        [[4.0, 8.0], [1.0, 3.0]]
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"output"})
    same_within_rows: ClassVar[str | None] = "Magnitude"
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2501.18980"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        return weight.abs() * statistics.output_moments.norm.to(weight.dtype)[:, None]


@dataclass(frozen=True)
class SymWanda(Score):
    """``S = |W| · (‖x_r‖ + β·‖y_q‖)``: the symmetric score of arXiv 2501.18980.

    The paper does not define the output side. **Our interpretation**: the dense layer's own output
    ``y = x Wᵀ``, with ``‖y‖`` scaled to the mean of ``‖x‖``, so that ``β = 1`` gives both sides the
    same weight.

    Attributes:
        beta: ``β``, weight of the output side, at least 0; 0 is
            [`Wanda`][symprune_lightning.functional.scores.Wanda].

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
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2501.18980"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta is {self.beta}; the balance must be at least 0")

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        x, y = statistics.input_moments.norm, statistics.output_moments.norm
        scaled = y * (x.mean() / _clamped(y.mean()))
        return weight.abs() * (x + self.beta * scaled[:, None]).to(weight.dtype)


@dataclass(frozen=True)
class GradientWanda(Score):
    """``S = |W| · ‖x_r‖ · ‖g_q‖``: the two-sided score with gradients on the output side.

    ``‖g_q‖ = sqrt(E[(∂L/∂y_q)²])`` is measured by one backward pass of the dense model, so that the
    output side counts by its effect on the loss. ``S²/2`` estimates the increase of the loss per
    token if the weight is removed: the diagonal of the Fisher information in its Kronecker-factored
    form. Ours; the symmetric score of arXiv 2501.18980 leaves the output side open.

    Use it with group ``"layer"``, where rows compete: ``‖g_q‖`` is constant in a row, so within
    rows the order is that of [`Wanda`][symprune_lightning.functional.scores.Wanda].

    Examples:
        >>> from symprune_lightning.functional.statistics import Moments
        >>> x = Moments.of(torch.tensor([[1.0, 3.0]]))
        >>> gradient = torch.tensor([4.0, 1.0], dtype=torch.float64)
        >>> statistics = Statistics(input=x, output_gradient=gradient)
        >>> GradientWanda()(torch.ones(2, 2), statistics).tolist()
        [[2.0, 6.0], [1.0, 3.0]]
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"input", "output_gradient"})
    same_within_rows: ClassVar[str | None] = "Wanda"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        x = statistics.input_moments.norm.to(weight.dtype)
        gradient = statistics.output_sensitivity.sqrt().to(weight.dtype)
        return weight.abs() * x * gradient[:, None]


@dataclass(frozen=True)
class Symmetric(Score):
    """``S = |W| · sqrt(L2row_q² + L2col_r²)``: both sides from the weights, arXiv 2501.18980.

    The symmetric score with ``X = Y = Wᵀ``. Needs no data.

    Attributes:
        form: ``"rss"``, the root of the sum of squares that the paper's Table 1 gives, or ``"sum"``
            for ``L2row_q + L2col_r``.

    Raises:
        ValueError: The form is unknown.

    Examples:
        >>> Symmetric()(torch.tensor([[3.0, 4.0]]), Statistics())
        tensor([[17.4929, 25.6125]])
        >>> Symmetric(form="sum")(torch.tensor([[3.0, 4.0]]), Statistics()).tolist()
        [[24.0, 36.0]]
    """

    form: Literal["rss", "sum"] = "rss"
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2501.18980"

    def __post_init__(self) -> None:
        if self.form not in ("rss", "sum"):
            raise ValueError(f"form is {self.form!r}; choose 'rss' or 'sum'")

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        row, column = weight.norm(dim=1, keepdim=True), weight.norm(dim=0, keepdim=True)
        norm = row + column if self.form == "sum" else torch.hypot(row, column)
        return weight.abs() * norm


@dataclass(frozen=True)
class Diagonal(Score):
    """``S = |W| · (a_r/L1col_r + b_q/L1row_q)`` with fixed vectors, arXiv 2501.18980.

    The symmetric score with ``X = diag(a_r/L1col_r)`` and ``Y = diag(b_q/L1row_q)``: the input side
    depends on the input channel only, and the output side on the output channel only. Since the
    vectors have the lengths of one layer's channels, it suits models whose layers all have the same
    shape. Needs no data.

    Attributes:
        a: One value per input channel; ``None`` for ones. With ones on both sides the score is
            [`RI`][symprune_lightning.functional.scores.RI].
        b: One value per output channel; ``None`` for ones.

    Raises:
        ValueError: When called on a weight with another number of channels.

    Examples:
        >>> score = Diagonal(a=(2.0, 2.0))
        >>> score(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), Statistics()).tolist()
        [[2.5, 1.0], [0.0, 2.5]]
    """

    a: tuple[float, ...] | None = None
    b: tuple[float, ...] | None = None
    reference_url: ClassVar[str] = "https://arxiv.org/abs/2501.18980"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """See `Score`."""
        magnitude = weight.abs()
        rows, columns = weight.shape
        a, b = _vector(self.a, columns, "a", weight), _vector(self.b, rows, "b", weight)
        per_row = _clamped(magnitude.sum(1, keepdim=True))
        per_column = _clamped(magnitude.sum(0, keepdim=True))
        return magnitude / per_column * a + magnitude / per_row * b[:, None]


def relative_importance(
    weight: Tensor, p: float = 1.0, column_norm: Tensor | None = None
) -> Tensor:
    """Return ``|W|/Lprow_q + |W|/Lpcol_r``; 0 in a row or column of zeros.

    Args:
        weight: ``W``, ``(out_features, in_features)``, or a subset of its rows if ``column_norm``
            is given.
        p: Order of the norm; 0 sets all norms to 1.
        column_norm: Norm of each column of the whole layer, ``(in_features,)``.

    Returns:
        Same shape and dtype as `weight`.
    """
    magnitude = weight.abs()
    columns = _clamped(_norm(magnitude, p, 0) if column_norm is None else column_norm)
    # no weight exceeds the norm of its row, which is not compared with that of other rows: a score
    # by rows may not depend on which rows are given
    rows = _norm(magnitude, p, 1).clamp_min(torch.finfo(weight.dtype).tiny)
    return magnitude / rows + magnitude / columns


def _norm(magnitude: Tensor, p: float, dim: int) -> Tensor:
    if p == 0:
        return torch.ones((), dtype=magnitude.dtype, device=magnitude.device)
    if p == 1:
        return magnitude.sum(dim, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(magnitude, p, dim, keepdim=True)
    return norm


def _clamped(divisor: Tensor) -> Tensor:
    """Bound a divisor away from zero so that dividing by it is finite."""
    smallest = divisor.max() * torch.finfo(divisor.dtype).eps
    return divisor.clamp_min(smallest).clamp_min(torch.finfo(divisor.dtype).tiny)


def _vector(values: tuple[float, ...] | None, length: int, name: str, like: Tensor) -> Tensor:
    if values is None:
        return like.new_ones(length)
    if len(values) != length:
        raise ValueError(f"Diagonal's {name} has {len(values)} values for {length} channels")
    return like.new_tensor(values)
