"""Products with a parameter, as the code of a model writes them.

What is a layer's input in a call of a function of torch: of ``linear``, ``matmul``, ``bmm``,
``grouped_mm``, ``einsum``, and of the attention of ``nn.MultiheadAttention``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from symprune_lightning.engine.layers.base import identity


@dataclass(frozen=True)
class Use:
    """One multiplication by a matrix.

    Attributes:
        index: Index of the matrix in the parameter.
        x: Its input, ``(..., tokens, in_features)``.
        output: Selects the matrix's output ``(..., tokens, out_features)`` from the result.
        rows: Rows of the grouped product that ``x`` is; ``None`` for other products.
    """

    index: int
    x: Tensor
    output: Callable[[Tensor], Tensor]
    rows: slice | None = None


class Operand(ABC):
    """A parameter, or a view of one, as an operand of a product.

    Attributes:
        index: The matrix of a stack; ``None`` for all of them, or for a single matrix.
    """

    index: int | None

    @property
    @abstractmethod
    def tensor(self) -> Tensor:
        """The tensor."""

    @property
    @abstractmethod
    def is_matrix(self) -> bool:
        """True for the matrix of one layer, False for a stack."""

    @property
    @abstractmethod
    def is_input_first(self) -> bool:
        """True if matrices are laid out ``(in, out)``."""

    @property
    @abstractmethod
    def only(self) -> int | None:
        """The matrix whose use is observed; ``None`` for all."""

    @abstractmethod
    def visit(self, use: Use) -> None:
        """Notify the watchers of a matrix of its input."""


def _linear(x: Any, weight: Any, *_: object) -> Iterator[Use]:
    if isinstance(weight, Operand) and weight.is_matrix and not weight.is_input_first:
        yield Use(weight.index or 0, x, identity)


def _matmul(left: Any, right: Any, *_: object) -> Iterator[Use]:
    if isinstance(right, Operand) and not right.is_matrix:
        yield from _bmm(left, right)
    elif isinstance(right, Operand) and right.is_input_first:
        yield Use(right.index or 0, left, identity)
    elif isinstance(left, Operand) and left.is_matrix and not left.is_input_first:
        yield Use(left.index or 0, right.mT, lambda y: y.mT)


def _bmm(x: Any, weight: Any, *_: object) -> Iterator[Use]:
    if isinstance(weight, Operand) and not weight.is_matrix and weight.is_input_first:
        for index in range(len(x)):
            yield Use(index, x[index], partial(_select, key=index))


def _grouped_mm(x: Any, weight: Any, offs: Tensor | None = None, *_: object) -> Iterator[Use]:
    if (
        offs is not None
        and isinstance(weight, Operand)
        and not weight.is_matrix
        and weight.is_input_first
    ):
        ends = [0, *offs.tolist()]
        indices = range(len(ends) - 1) if weight.only is None else [weight.only]
        for index in indices:
            rows = slice(ends[index], ends[index + 1])
            yield Use(index, x[rows], partial(_select, key=rows), rows)


def _select(y: Tensor, key: int | slice) -> Tensor:
    return y[key]


def _einsum(equation: Any, *operands: Any) -> Iterator[Use]:
    """Find products of activations with a parameter whose dimensions are split, as in XLNet.

    The parameter ``(in, a, b)`` or ``(out, a, b)`` is one matrix; the dimensions that are summed
    over say which of the two it is.
    """
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return
    terms, result = equation.replace(" ", "").split("->")
    left, right = terms.split(",")
    x, weight = operands
    if not isinstance(weight, Operand) or not weight.is_matrix:
        return
    summed = [c for c in right if c not in result]
    # the input dimensions have to be the last of the activations, in the parameter's order
    if not left.endswith("".join(summed)):
        return
    is_input_first = right.startswith("".join(summed))
    if is_input_first != weight.is_input_first:
        return
    outputs = [c for c in right if c in result]
    if result.endswith("".join(outputs)):
        yield Use(
            0,
            x.flatten(x.dim() - len(summed)),
            lambda y: y.flatten(y.dim() - len(outputs)),
        )


PRODUCTS: dict[str, tuple[Callable[..., Iterator[Use]], tuple[str, ...]]] = {
    "linear": (_linear, ("input", "weight")),
    "matmul": (_matmul, ("input", "other")),
    "__matmul__": (_matmul, ()),
    "mm": (_matmul, ("input", "mat2")),
    "bmm": (_bmm, ("input", "mat2")),
    "grouped_mm": (_grouped_mm, ("mat_a", "mat_b", "offs")),
    "_grouped_mm": (_grouped_mm, ("self", "mat2", "offs")),
    "grouped_mm_fallback": (_grouped_mm, ("input", "weight", "offs")),
    "einsum": (_einsum, ()),
}
"""Function name to the function that finds uses among its operands, and their names as keywords. A
product that is not listed, or along the outputs of a matrix, is no use: layers without one are
reported as not reached."""


def find_uses(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Use]:
    """Return the uses of matrices in a call of a function of torch."""
    return list(PRODUCTS[name][0](*_operands(name, args, kwargs))) if name in PRODUCTS else []


def _operands(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the operands of a product, positional or not."""
    keywords = PRODUCTS[name][1][len(args) :]
    return [*args, *(kwargs[key] for key in keywords if key in kwargs)]


def call(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a function of torch on tensors.

    A grouped product is computed group by group where its kernel refuses the operands: kernels have
    no float64 and require aligned rows, which the model's own implementation may not.
    """
    if name not in PRODUCTS or PRODUCTS[name][0] is not _grouped_mm:
        return func(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        x, weight, offs = _operands(name, args, kwargs)[:3]
        ends = [0, *offs.tolist()]
        parts = [x[start:end] @ weight[i] for i, (start, end) in enumerate(pairwise(ends))]
        return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], weight.shape[-1])])


ATTENTION_ARGUMENTS = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight"),
    *("in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p"),
    *("out_proj_weight", "out_proj_bias"),
)
"""Positional arguments of ``multi_head_attention_forward``."""


def attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the attention of ``nn.MultiheadAttention``, whose projections are not calls.

    The function multiplies internally. It runs with the identity in place of the output projection,
    which gives the projection's input exactly.
    """
    given = dict(zip(ATTENTION_ARGUMENTS, args, strict=False)) | dict(kwargs)
    rest = args[len(ATTENTION_ARGUMENTS) :]
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]
    inputs = [k for k, v in given.items() if isinstance(v, Operand) and k != "out_proj_weight"]
    for key in inputs:
        # an input projection: its matrix multiplies queries, keys and values
        given[key] = _visit_projection(given, key)
    if not isinstance(weight, Operand):
        return func(*[given.pop(name) for name in ATTENTION_ARGUMENTS], *rest, **given)
    plain = weight.tensor
    given["out_proj_weight"] = torch.eye(len(plain), dtype=plain.dtype, device=plain.device)
    given["out_proj_bias"] = None
    attended, averages = func(*[given.pop(name) for name in ATTENTION_ARGUMENTS], *rest, **given)
    return F.linear(attended, weight, bias), averages  # type: ignore[arg-type]


def _visit_projection(given: Mapping[str, Any], key: str) -> Tensor:
    """Visit the layers of an input projection of attention, and return its tensor."""
    operand: Operand = given[key]
    sources = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
    inputs = [given[sources[key]]] if key in sources else [given[k] for k in sources.values()]
    for index, x in enumerate(inputs):
        operand.visit(Use(index, x, identity))
    return operand.tensor
