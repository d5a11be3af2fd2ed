from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import Perplexity

from symprune_lightning import CausalLMModule
from symprune_lightning import module as module_file
from symprune_lightning.module import IGNORE, TokenPerplexity
from tests.models import batches, build


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(2, 9)),
    ignored=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_equals_torchmetrics_where_that_is_exact(shape, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(0, shape[2], shape[:2], generator=generator)
    target[:, :ignored] = IGNORE
    if (target == IGNORE).all():
        target[0, 0] = 1
    ours, theirs = TokenPerplexity(ignore_index=IGNORE), Perplexity(ignore_index=IGNORE)
    ours.update(logits, target)
    theirs.update(logits, target)
    torch.testing.assert_close(ours.compute().float(), theirs.compute(), rtol=1e-4, atol=0)


def test_chunks_do_not_change_the_value(monkeypatch):
    logits, target = torch.randn(2, 50, 16), torch.randint(0, 16, (2, 50))
    values = []
    for chunk in (2**25, 64, 1):
        monkeypatch.setattr(module_file, "CHUNK", chunk)
        metric = TokenPerplexity(ignore_index=IGNORE)
        metric.update(logits, target)
        values.append(metric.compute().item())
    assert values[0] == pytest.approx(values[1], rel=1e-6) == pytest.approx(values[2], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_and_totals(dtype):
    """Logits that overflow a softmax in float16, and a probability that underflows float32."""
    logits = torch.tensor([[[0.0, 200.0], [0.0, 4.0]]], dtype=dtype)
    target = torch.tensor([[0, 1]])
    metric = TokenPerplexity(ignore_index=IGNORE).to(dtype)
    metric.update(logits, target)
    nats = torch.nn.functional.cross_entropy(logits[0].double(), target[0])
    assert metric.compute().log().item() == pytest.approx(nats.item(), rel=1e-6)


def test_training_step_equals_the_models_own_loss():
    model = build("llama")
    ids = batches()[0]["input_ids"]
    loss = CausalLMModule(model).training_step({"input_ids": ids}, 0)
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_padding_and_labels_are_not_predicted():
    model = build("llama")
    module = CausalLMModule(model)
    ids = batches(length=8)[0]["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    plain = module.training_step({"input_ids": ids}, 0)
    torch.testing.assert_close(
        module.training_step({"input_ids": padded, "attention_mask": mask}, 0), plain
    )
    labels = padded.masked_fill(mask == 0, IGNORE)
    torch.testing.assert_close(
        module.training_step({"input_ids": padded, "labels": labels}, 0), plain
    )


def test_model_is_loaded_once_and_only_when_configured(tmp_path):
    build("llama").save_pretrained(tmp_path)
    module = CausalLMModule(tmp_path, dtype="bfloat16")
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = module.prunable_model
    module.configure_model()
    model = module.prunable_model
    assert model.dtype == torch.bfloat16
    module.configure_model()
    assert module.prunable_model is model


def test_hyper_parameters_are_plain(tmp_path):
    assert CausalLMModule(str(tmp_path)).hparams["pretrained"] == str(tmp_path)
    assert "pretrained" not in CausalLMModule(build("llama")).hparams
