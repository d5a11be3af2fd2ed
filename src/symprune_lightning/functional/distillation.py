"""Distillation towards the most probable next tokens of a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherTokens:
    """The most probable next tokens of a teacher at each position.

    Attributes:
        indices: Token ids, int32, shape ``(..., k)``.
        log_probs: Log-probabilities over the full vocabulary, float32, shape ``(..., k)``.

    Examples:
        >>> teacher = TeacherTokens.of(torch.tensor([[0.0, 2.0, 1.0]]), k=2)
        >>> teacher.indices.tolist()
        [[1, 2]]
        >>> round(teacher.log_probs.exp().sum().item(), 2)
        0.91
    """

    indices: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TeacherTokens:
        """Return the ``k`` most probable tokens of each position.

        Args:
            logits: Shape ``(..., vocabulary)``, any floating-point dtype.
            k: Number of tokens; at most the size of the vocabulary is used.
        """
        values, indices = logits.topk(min(k, logits.shape[-1]), -1)
        log_probs = values.float() - logits.float().logsumexp(-1, keepdim=True)
        return cls(indices.to(torch.int32), log_probs)


def distillation_loss(
    logits: Tensor, teacher: TeacherTokens, valid: Tensor | None = None
) -> Tensor:
    """Return the Kullback–Leibler divergence of a student from its teacher, averaged over tokens.

    ``KL(p ‖ q) = Σ_i p_i (log p_i − log q_i)`` over k + 1 events: the teacher's k most probable
    tokens, and all other tokens as one event. It is zero if and only if the student assigns the
    teacher's probabilities to these tokens; with k = vocabulary it is the full divergence.

    Args:
        logits: The student's logits, shape ``(batch, tokens, vocabulary)``.
        teacher: The teacher's tokens, shape ``(batch, tokens, k)``.
        valid: Bool mask, shape ``(batch, tokens)``; positions with ``False`` are ignored. Default:
            ``None``, which includes all positions.

    Returns:
        Scalar float32 tensor, in nats.

    Examples:
        >>> logits = torch.tensor([[[0.0, 2.0, 1.0]]])
        >>> teacher = TeacherTokens.of(logits, k=2)
        >>> round(distillation_loss(logits, teacher).item(), 4)
        0.0
        >>> round(distillation_loss(torch.zeros(1, 1, 3), teacher).item(), 4)
        0.2662
    """
    # shifted logits: the student's log-probabilities of the teacher's tokens, without a copy of
    # all of them
    log_norm = logits.float().logsumexp(-1, keepdim=True)
    student = logits.gather(-1, teacher.indices.long()).float() - log_norm
    probabilities = teacher.log_probs.exp()
    kept = (probabilities * (teacher.log_probs - student)).sum(-1)
    rest = (1 - probabilities.sum(-1)).clamp_min(0)
    student_rest = (1 - student.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps)
    divergence: Tensor = kept + torch.special.xlogy(rest, rest) - rest * student_rest.log()
    return divergence.mean() if valid is None else divergence[valid].mean()
