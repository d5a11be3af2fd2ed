"""Statistics of a layer's activations: sums over tokens, so that merging is addition.

These are all that a method may use of the calibration data. All values are **per token** (means
over tokens), so that no score or threshold depends on the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor

from symprune_lightning.functional.tensors import at_least_float32, row_chunks

Need = Literal["input", "output", "sequence_variance", "gram", "output_gradient"]
"""A statistic that a method requires: a field of `Statistics` that the engine collects."""

CalibrationOrder = Literal["layer", "block", "dense"]
"""Order of calibration and pruning.

- ``"layer"``: layer-sequential calibration. One forward pass; each layer is pruned as soon as its
  inputs are complete, so it sees inputs from pruned layers.
- ``"block"``: block-sequential. Statistics are collected with the block dense, then the block runs
  again; two forward passes, as in the reference implementations.
- ``"dense"``: not sequential. All statistics are those of the dense model, from one forward pass.
"""


@dataclass(frozen=True)
class Moments:
    """First and second moments of channels over tokens.

    Attributes:
        tokens: Number of tokens, a float64 scalar.
        total: Sum over tokens of each channel, float64, shape ``(channels,)``.
        total_square: Sum over tokens of each channel's square, float64, shape ``(channels,)``.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
        >>> moments = Moments.of(x)
        >>> moments.mean.tolist(), moments.variance.tolist()
        ([2.0, 1.0], [1.0, 1.0])
        >>> both = Moments.of(x[:1]) + Moments.of(x[1:])
        >>> torch.equal(both.norm, moments.norm)
        True
    """

    tokens: Tensor
    total: Tensor
    total_square: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Compute the moments of activations.

        Sums over about 2²⁰ values are computed in float32 or wider, and added in float64.

        Args:
            x: Activations, ``(..., tokens, channels)``.
        """
        flat = x.reshape(-1, x.shape[-1])
        total = torch.zeros(flat.shape[1], dtype=torch.float64, device=x.device)
        total_square = torch.zeros_like(total)
        # without a float32 copy, or a square, of all activations
        for rows in row_chunks(flat):
            values = at_least_float32(rows)
            total += values.sum(0)
            total_square += values.square().sum(0)
        tokens = torch.tensor(flat.shape[0], dtype=torch.float64, device=x.device)
        return cls(tokens, total, total_square)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.tokens + other.tokens,
            self.total + other.total,
            self.total_square + other.total_square,
        )

    def permuted(self, order: Tensor) -> Moments:
        """Return the moments with channel ``order[i]`` at position ``i``."""
        return Moments(self.tokens, self.total[order], self.total_square[order])

    @cached_property
    def mean(self) -> Tensor:
        """``E[x_r]``, shape ``(channels,)``, float64."""
        return self.total / self.tokens

    @cached_property
    def norm(self) -> Tensor:
        """``‖x_r‖ = sqrt(E[x_r²])``, shape ``(channels,)``, float64."""
        return (self.total_square / self.tokens).sqrt()

    @cached_property
    def variance(self) -> Tensor:
        """``E[x_r²] − E[x_r]²``, shape ``(channels,)``, float64, never negative."""
        return (self.total_square / self.tokens - self.mean.square()).clamp_min(0)


@dataclass(frozen=True)
class Statistics:
    """Statistics of one layer; fields that no method needs are ``None``.

    Attributes:
        layer: Layer name, the seed of methods that draw random numbers.
        input: Moments of the layer's input, over ``in_features`` channels.
        output: Moments of the dense layer's output ``x Wᵀ``, over ``out_features`` channels.
        sequence_variance: Token-weighted mean of the population variance within each sequence,
            ``(in_features,)``. Only DSnoT's reference mode uses it.
        gram: ``G = E[x xᵀ]`` per token, ``(in_features, in_features)``, float64.
        output_gradient: ``F_q = E[(∂L/∂y_q)²]`` of the dense model's loss, per token, for each
            output channel, ``(out_features,)``, float64. Takes a backward pass.
        column_sum: ``L1col_r = Σ_q |W[q,r]|`` over all rows of the dense layer, ``(in_features,)``,
            for scores and refiners that receive a subset of its rows; ``None`` if they receive
            all.
    """

    layer: str = ""
    input: Moments | None = None
    output: Moments | None = None
    sequence_variance: Tensor | None = None
    gram: Tensor | None = None
    output_gradient: Tensor | None = None
    column_sum: Tensor | None = None

    @property
    def input_moments(self) -> Moments:
        """``input``; raises ``ValueError`` if it was not collected."""
        return _collected(self.input, "input", "Moments.of(x)")

    @property
    def output_moments(self) -> Moments:
        """``output``; raises ``ValueError`` if it was not collected."""
        return _collected(self.output, "output", "Moments.of(x @ weight.T)")

    @property
    def gram_matrix(self) -> Tensor:
        """``gram``; raises ``ValueError`` if it was not collected."""
        return _collected(self.gram, "gram", "x.T @ x / len(x)")

    @property
    def output_sensitivity(self) -> Tensor:
        """``output_gradient``; raises ``ValueError`` if it was not collected."""
        return _collected(self.output_gradient, "output_gradient", "gradient.square().mean(0)")

    @property
    def within_sequence_variance(self) -> Tensor:
        """``sequence_variance``; raises ``ValueError`` if it was not collected."""
        return _collected(
            self.sequence_variance, "sequence_variance", "x.var(1, correction=0).mean(0)"
        )

    def permuted(self, order: Tensor) -> Statistics:
        """Return the statistics of the layer with input ``order[i]`` at position ``i``."""
        variance, gram, total = self.sequence_variance, self.gram, self.column_sum
        return replace(
            self,
            input=None if self.input is None else self.input.permuted(order),
            sequence_variance=None if variance is None else variance[order],
            gram=None if gram is None else gram[order][:, order],
            column_sum=None if total is None else total[order],
        )

    def squared_error(self, delta: Tensor) -> Tensor:
        """Return the expected squared change of each output if the weights change by ``delta``.

        Exactly ``delta_q G delta_qᵀ`` if the Gram matrix was collected, otherwise
        ``(delta_q · mean)² + delta_q² · var``, which is exact for uncorrelated channels: the first
        term is the mean error that DSnoT lowers, the second the sum of squares of Wanda's scores
        (for channels of mean 0).

        Args:
            delta: Change of the weight, ``(out_features, in_features)``.

        Returns:
            Shape ``(out_features,)``, in squared units of the layer's output, per token.
        """
        if self.gram is not None:
            return ((delta @ self.gram.to(delta.dtype)) * delta).sum(1).clamp_min(0)
        moments = self.input_moments
        mean, variance = moments.mean.to(delta.dtype), moments.variance.to(delta.dtype)
        return (delta @ mean).square() + delta.square() @ variance


T = TypeVar("T")


def _collected(value: T | None, need: str, example: str) -> T:
    if value is None:
        raise ValueError(
            f"this method needs the statistic {need!r}, which was not collected: declare "
            f"needs = frozenset({{{need!r}}}), or pass Statistics({need}={example})"
        )
    return value
