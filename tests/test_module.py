from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import Perplexity

from symprune_lightning import CausalLMModule, TransformersModule
from symprune_lightning import module as module_file
from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX
from symprune_lightning.module import TokenPerplexity
from tests.models import batches, build


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(2, 9)),
    ignored=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_perplexity_matches_torchmetrics_in_float32(shape, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(0, shape[2], shape[:2], generator=generator)
    target[:, :ignored] = IGNORE_INDEX
    if (target == IGNORE_INDEX).all():
        target[0, 0] = 1
    metric = TokenPerplexity(ignore_index=IGNORE_INDEX)
    reference = Perplexity(ignore_index=IGNORE_INDEX)
    metric.update(logits, target)
    reference.update(logits, target)
    torch.testing.assert_close(metric.compute().float(), reference.compute(), rtol=1e-4, atol=0)


def test_perplexity_does_not_depend_on_the_chunk_size(monkeypatch):
    logits, target = torch.randn(2, 50, 16), torch.randint(0, 16, (2, 50))
    values = []
    for max_logits in (2**25, 64, 1):
        monkeypatch.setattr(module_file, "MAX_LOGITS", max_logits)
        metric = TokenPerplexity(ignore_index=IGNORE_INDEX)
        metric.update(logits, target)
        values.append(metric.compute().item())
    assert values[0] == pytest.approx(values[1], rel=1e-6) == pytest.approx(values[2], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_perplexity_of_half_precision_logits(dtype):
    """A softmax would overflow in float16 and underflow in float32."""
    logits = torch.tensor([[[0.0, 200.0], [0.0, 4.0]]], dtype=dtype)
    target = torch.tensor([[0, 1]])
    metric = TokenPerplexity(ignore_index=IGNORE_INDEX).to(dtype)
    metric.update(logits, target)
    loss = torch.nn.functional.cross_entropy(logits[0].double(), target[0])
    assert metric.compute().log().item() == pytest.approx(loss.item(), rel=1e-6)


def test_training_loss_matches_transformers():
    model = build("llama")
    ids = batches()[0]["input_ids"]
    loss = CausalLMModule(model).training_step({"input_ids": ids}, 0)
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_loss_ignores_padding_and_masked_labels():
    model = build("llama")
    module = CausalLMModule(model)
    ids = batches(length=8)[0]["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    expected = module.training_step({"input_ids": ids}, 0)
    torch.testing.assert_close(
        module.training_step({"input_ids": padded, "attention_mask": mask}, 0), expected
    )
    labels = padded.masked_fill(mask == 0, IGNORE_INDEX)
    torch.testing.assert_close(
        module.training_step({"input_ids": padded, "labels": labels}, 0), expected
    )


def test_configure_model_loads_the_model_once(tmp_path):
    build("llama").save_pretrained(tmp_path)
    module = CausalLMModule(tmp_path, dtype="bfloat16")
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = module.prunable_model
    module.configure_model()
    model = module.prunable_model
    assert model.dtype == torch.bfloat16
    module.configure_model()
    assert module.prunable_model is model


def test_hyperparameters_exclude_a_loaded_model(tmp_path):
    assert CausalLMModule(str(tmp_path)).hparams["pretrained"] == str(tmp_path)
    assert "pretrained" not in CausalLMModule(build("llama")).hparams


def test_padding_on_the_left_is_not_evaluated():
    """Neither padding nor the first token, which padding would predict."""
    module = CausalLMModule(build("llama"))
    tokens = torch.randint(3, 60, (1, 5), generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(1, 4, dtype=torch.long)
    real = torch.ones_like(tokens)
    left = {
        "input_ids": torch.cat([padding, tokens], 1),
        "attention_mask": torch.cat([padding, real], 1),
    }
    right = {
        "input_ids": torch.cat([tokens, padding], 1),
        "attention_mask": torch.cat([real, padding], 1),
    }
    losses = [module.training_step(b, 0) for b in ({"input_ids": tokens}, right, left)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0], atol=1e-3, rtol=0)  # positions are shifted


def test_a_training_batch_without_a_counted_label_has_no_loss():
    for module in (CausalLMModule(build("llama")), TransformersModule(build("llama"))):
        batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.full((1, 3), -100)}
        loss = module.training_step(batch, 0)
        loss.backward()
        assert loss == 0
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert gradients
        assert all((gradient == 0).all() for gradient in gradients)
