"""The column sweep of SparseGPT, shared by `OBSUpdate` and `SparseGPT`.

Frantar & Alistarh, arXiv 2301.00774. Optimal brain surgeon (OBS) compensates the removal of one
weight by changing all others with the inverse Hessian, here the Gram matrix of the inputs. Going
through the columns in order, with the columns to the left frozen, makes one Cholesky factor serve
all rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from symprune_lightning.functional.statistics import Statistics

BLOCK = 128
"""Columns whose updates are accumulated before they are applied to the columns to their right."""

MaskChooser = Callable[[Tensor, int, int], Tensor]
"""Maps the current weights of columns ``start`` to ``stop`` to their mask, True = kept."""


def inverse_factor(statistics: Statistics, damping: float, dtype: torch.dtype) -> Tensor:
    """Return the upper Cholesky factor of ``(G + λ·mean(diag G)·I)⁻¹``.

    Args:
        statistics: Statistics of the layer, with the Gram matrix ``G``.
        damping: ``λ``, raised tenfold, with a warning, until the matrix can be factored.
        dtype: Data type of the factor.

    Returns:
        Upper triangular matrix, ``(in_features, in_features)``.

    Raises:
        ValueError: No damping up to 10⁴ is enough; the Gram matrix is not finite.
    """
    gram = statistics.gram_matrix.to(dtype)
    scale = gram.diagonal().mean().clamp_min(torch.finfo(dtype).tiny)
    identity = torch.eye(len(gram), dtype=dtype, device=gram.device)
    current = damping
    while current <= 1e4:
        lower, failed = torch.linalg.cholesky_ex(gram + current * scale * identity)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            # the inverse of an ill-conditioned matrix may lose definiteness to rounding
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            assert isinstance(factor, Tensor)
            if current > damping:
                warnings.warn(
                    f"layer {statistics.layer}: the Gram matrix can't be factored with damping "
                    f"{damping:g}; {current:g} was used (more calibration tokens may help)",
                    stacklevel=3,
                )
            return factor
        current = max(current * 10, 1e-6)
    raise ValueError(
        f"the Gram matrix of layer {statistics.layer} can't be factored with any damping up to 1e4"
    )


def sweep(
    weight: Tensor, factor: Tensor, choose: MaskChooser, every: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Zero the pruned weights column by column, compensating each error in later columns.

    Args:
        weight: Dense ``W``, ``(rows, in_features)``. Not modified. Weights that are 0 stay 0.
        factor: Result of `inverse_factor`.
        choose: Called before each group of `every` columns is swept.
        every: Number of columns whose masks are chosen together.

    Returns:
        New weights and their mask, True = kept, both ``(rows, in_features)``.
    """
    weight, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    zero = weight == 0
    columns = weight.shape[1]
    # A block holds whole groups: `choose` must see weights that include all earlier updates, and
    # those from earlier blocks are applied only when a block ends.
    size = BLOCK - BLOCK % every if every < BLOCK else every
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        block, inner = weight[:, start:stop], factor[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            if i % every == 0:
                end = min(i + every, stop - start)
                mask[:, start + i : start + end] = choose(block[:, i:end], start + i, start + end)
            # A weight that was 0 in the dense model but received updates is pruned again, so the
            # updates are an error to compensate as well.
            kept = mask[:, start + i] & ~zero[:, start + i]
            errors[:, i] = block[:, i].masked_fill(kept, 0) / inner[i, i]
            block[:, i + 1 :] -= errors[:, i, None] * inner[i, i + 1 :]
        # one matrix product per block instead of one rank-one update of all columns per column
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    mask &= ~zero
    return weight.masked_fill_(~mask, 0), mask
