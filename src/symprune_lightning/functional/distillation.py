"""Distillation towards the most probable next tokens of a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherTokens:
    """The most probable next tokens of a teacher at each position.

    Attributes:
        indices: Token ids, shape ``(..., k)``.
        log_probs: Their log-probabilities, same shape, over the full vocabulary.

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
        """Return the ``k`` most probable tokens of logits, shape ``(..., vocabulary)``."""
        values, indices = logits.topk(min(k, logits.shape[-1]), -1)
        log_probs = values.float() - logits.float().logsumexp(-1, keepdim=True)
        return cls(indices.to(torch.int32), log_probs)


def distillation_loss(
    logits: Tensor, teacher: TeacherTokens, valid: Tensor | None = None
) -> Tensor:
    """Return the mean over tokens of the divergence of a student from its teacher, in nats.

    ``KL(p ‖ q) = Σ_i p_i (log p_i − log q_i)``, over the teacher's k most probable tokens and one
    more event, that the next token is none of these. So the loss is zero exactly if the student has
    the teacher's probabilities for these tokens, and with k = vocabulary it is the full divergence.

    Args:
        logits: The student's logits, shape ``(batch, tokens, vocabulary)``.
        teacher: The teacher's tokens, shape ``(batch, tokens, k)``.
        valid: Bool, shape ``(batch, tokens)``: False where a position does not count. Default:
            ``None``, all count.

    Examples:
        >>> logits = torch.tensor([[[0.0, 2.0, 1.0]]])
        >>> teacher = TeacherTokens.of(logits, k=2)
        >>> round(distillation_loss(logits, teacher).item(), 4)
        0.0
        >>> round(distillation_loss(torch.zeros(1, 1, 3), teacher).item(), 4)
        0.2665
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
