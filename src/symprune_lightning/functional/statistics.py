"""Statistics of a layer's activations: sums over tokens, so that merging is addition.

Everything a score or a refiner may know about the data is here. All values are **per token**
(means over tokens), so nothing downstream depends on how many tokens there were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Need = Literal["input", "sequence_variance"]
"""What a score or refiner may ask to be collected."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of channels over tokens.

    Attributes:
        tokens: Number of tokens, a float64 scalar.
        total: Sum over tokens of each channel, float64, shape ``(channels,)``.
        total_square: Sum over tokens of each channel's square, float64, shape ``(channels,)``.

    Example:
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
        """The moments of activations ``x`` of shape ``(..., tokens, channels)``.

        Sums of one call are taken in float32 at least and returned as float64.
        """
        flat = at_least_float32(x.flatten(0, -2))
        return cls(
            tokens=torch.tensor(flat.shape[0], dtype=torch.float64, device=x.device),
            total=flat.sum(0).double(),
            total_square=flat.square().sum(0).double(),
        )

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.tokens + other.tokens,
            self.total + other.total,
            self.total_square + other.total_square,
        )

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
    """What was measured of one layer; a field is ``None`` when nothing asked for it.

    Attributes:
        input: Moments of the layer's input, over ``in_features`` channels.
        sequence_variance: Token-weighted mean of each sequence's own population variance, shape
            ``(in_features,)``. Only DSnoT's reference mode uses it.
    """

    input: Moments | None = None
    sequence_variance: Tensor | None = None

    @property
    def input_moments(self) -> Moments:
        """``input``, or an error that says what is missing.

        Raises:
            ValueError: The input moments were not collected.
        """
        if self.input is None:
            raise ValueError(
                "this method needs the moments of the layer's input: "
                "declare needs = frozenset({'input'}) or pass Statistics(input=Moments.of(x))"
            )
        return self.input

    def squared_error(self, delta: Tensor) -> Tensor:
        """Expected squared change of each output when the weights change by ``delta``.

        ``(delta_q · mean)² + delta_q² · var``: exact when channels are uncorrelated. The first
        term is the mean error that DSnoT lowers, the second is what Wanda's score adds up.

        Args:
            delta: Change of the weight, ``(out_features, in_features)``.

        Returns:
            Shape ``(out_features,)``, in squared units of the layer's output, per token.
        """
        moments = self.input_moments
        mean, variance = moments.mean.to(delta.dtype), moments.variance.to(delta.dtype)
        return (delta @ mean).square() + delta.square() @ variance


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` unless it is in half precision, which is raised to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
