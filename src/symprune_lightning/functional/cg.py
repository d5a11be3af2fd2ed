"""Conjugate gradients for the kept weights of a layer, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_cg(
    weight: Tensor, start: Tensor, mask: Tensor, gram: Tensor, steps: int, tolerance: float
) -> Tensor:
    """Minimise the error ``(W − V)_q G (W − V)_qᵀ`` of each row over its kept weights ``V_q``.

    Conjugate gradients on ``V G = W G`` restricted to the mask: residuals and directions are
    masked, so every iterate has the mask's zeros. Each row has its own step sizes. The error falls
    with every step, also for a singular ``G``, where the iterates stay in the span of the data.

    Args:
        weight: Dense ``W``, ``(rows, columns)``.
        start: First iterate, same shape, zero where pruned. Not modified.
        mask: Bool, same shape, True = kept.
        gram: ``G``, ``(columns, columns)``, in the dtype of `weight`.
        steps: Maximum number of steps; each is one product with ``G``.
        tolerance: A row is finished once its residual is below this times its first one.

    Returns:
        The last iterate.
    """
    # in units of each input's norm, as a Jacobi preconditioner: inputs differ by orders of
    # magnitude, on which the number of steps would depend
    scale = gram.diagonal().sqrt()
    scale = scale.clamp_min(scale.max() * torch.finfo(gram.dtype).eps).clamp_min(
        torch.finfo(gram.dtype).tiny
    )
    gram = gram / scale[:, None] / scale
    kept = mask.to(weight.dtype)
    solution = start * scale
    residual = ((weight * scale - solution) @ gram) * kept
    direction = residual.clone()
    norm = residual.square().sum(1, keepdim=True)
    limit = norm * tolerance**2
    for _ in range(steps):
        product = direction @ gram
        curvature = (direction * product).sum(1, keepdim=True)
        active = (norm > limit) & (curvature > 0)
        if not active.any():
            break
        step = torch.where(active, norm / curvature, 0)
        solution += step * direction
        residual -= step * product * kept
        next_norm = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(active, next_norm / norm, 0) * direction
        norm = next_norm
    return solution / scale
