from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from symprune_lightning import TeacherTokens, distillation_loss
from symprune_lightning.functional.schedule import warmup_cosine


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, 5, 11, generator=generator)


def test_all_tokens_give_the_full_divergence():
    teacher, student = logits(0), logits(1)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / 10
    # k above the vocabulary is allowed
    loss = distillation_loss(student, TeacherTokens.of(teacher, k=100))
    torch.testing.assert_close(loss, expected)


def test_the_other_tokens_count_as_one_event():
    teacher, student = logits(0), logits(1)
    p, q = teacher.softmax(-1), student.softmax(-1)
    top = p.topk(3).indices
    p_top, q_top = p.gather(-1, top), q.gather(-1, top)
    p_all = torch.cat([p_top, 1 - p_top.sum(-1, keepdim=True)], -1)
    q_all = torch.cat([q_top, 1 - q_top.sum(-1, keepdim=True)], -1)
    expected = (p_all * (p_all / q_all).log()).sum(-1).mean()
    loss = distillation_loss(student, TeacherTokens.of(teacher, k=3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_zero_for_equal_probabilities_and_positive_otherwise(k):
    teacher = TeacherTokens.of(logits(0), k)
    assert float(distillation_loss(logits(0) + 7, teacher)) == pytest.approx(0, abs=1e-5)
    assert float(distillation_loss(logits(1), teacher)) > 0.1


def test_padding_does_not_count():
    teacher, student = TeacherTokens.of(logits(0), 4), logits(1)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 2:] = False
    changed = student.clone()
    changed[1, 2:] = 0
    assert distillation_loss(changed, teacher, valid) == distillation_loss(student, teacher, valid)
    assert distillation_loss(changed, teacher) != distillation_loss(student, teacher)


def test_certain_predictions_have_finite_gradients():
    certain = torch.full((1, 1, 11), -1e4)
    certain[..., 3] = 0
    student = certain.clone().requires_grad_()
    loss = distillation_loss(student, TeacherTokens.of(certain, 4))
    (gradient,) = torch.autograd.grad(loss, [student])
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_half_precision_is_computed_in_float32():
    teacher = TeacherTokens.of(logits(0).bfloat16(), 4)
    assert teacher.log_probs.dtype == torch.float32
    assert distillation_loss(logits(1).bfloat16(), teacher).dtype == torch.float32


def test_schedule_rises_and_falls():
    factors = [warmup_cosine(step, 100) for step in range(100)]
    assert max(factors) == 1
    assert factors[:5] == sorted(factors[:5])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert warmup_cosine(0, 1) > 0
