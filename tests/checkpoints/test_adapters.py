"""LoRA adapters are trained on a pruned model and merged without reviving pruned weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    MaskedFinetuning,
    PruneResult,
    Trainer,
    merge_adapters,
    prune_model,
)
from tests.models import batches, build


def pruned(name: str = "llama") -> tuple[PreTrainedModel, PruneResult]:
    model = build(name)
    return model, prune_model(model, batches(name), score="wanda")


def adapter(*targets: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")


def randomize_(model: PeftModel, name: str) -> None:
    """Fill LoRA's ``B``, which is zero at first: the adapter would change nothing."""
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}" in key:
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_are_trained_and_merged(name):
    model, result = pruned(name)
    dense_output = model(**batches(name)[0]).logits
    targets = ["q_proj", "down_proj"] if name == "llama" else ["c_attn"]
    adapted = get_peft_model(model.train(), adapter(*targets))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    masked = MaskedFinetuning()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=20,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.randint(3, 64, (40, 16)).tolist()
    data = CalibrationDataModule(
        rows, sequence_length=16, sequences=4, evaluation_sequences=4, training_sequences=8
    )
    trainer.fit(CausalLMModule(adapted, learning_rate=1e-2), datamodule=data, callbacks=masked)
    assert len(masked.masks) == len(result.masks)
    assert not [layer for layer in masked.masks if "lora" in layer]
    changed = [n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert all("lora" in n for n in changed)

    adapted.eval()
    adapted_output = adapted(**batches(name)[0]).logits
    merged, lost = merge_adapters(adapted)
    assert type(merged) is type(model)
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    assert result.is_applied_to(merged)
    assert sorted(lost) == sorted(n for n in result.masks if n.endswith(tuple(targets)))
    # at 50 % sparsity an adapter that ignores the mask loses about a half
    assert all(0.2 < fraction < 0.8 for fraction in lost.values())
    # the part that was merged changes the output in the direction of the adapter
    output = merged(**batches(name)[0]).logits
    assert (output - adapted_output).norm() < (dense_output - adapted_output).norm()


def test_only_the_active_of_two_adapters_is_merged():
    """As in peft: ``merge_and_unload`` drops the adapters that are not active."""
    model, result = pruned()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted = get_peft_model(model, adapter("q_proj"), adapter_name="first")
    adapted.add_adapter("second", adapter("q_proj", "k_proj"))
    randomize_(adapted, "first")
    randomize_(adapted, "second")
    adapted.set_adapter("second")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    kept = result.masks["model.layers.0.self_attn.q_proj"]
    expected = weight + layer.get_delta_weight("second").detach() * kept
    merged, lost = merge_adapters(adapted)
    assert torch.allclose(merged.model.layers[0].self_attn.q_proj.weight, expected, atol=1e-6)
    assert result.is_applied_to(merged)
    assert {name.rpartition(".")[2] for name in lost} == {"q_proj", "k_proj"}


def test_two_active_adapters_are_merged_together():
    model, result = pruned()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted = get_peft_model(model, adapter("q_proj"), adapter_name="first")
    adapted.add_adapter("second", adapter("q_proj"))
    randomize_(adapted, "first")
    randomize_(adapted, "second")
    adapted.base_model.set_adapter(["first", "second"])
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    change = (layer.get_delta_weight("first") + layer.get_delta_weight("second")).detach()
    kept = result.masks["model.layers.0.self_attn.q_proj"]
    merged, lost = merge_adapters(adapted)
    merged_weight = merged.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(merged_weight, weight + change * kept, atol=1e-6)
    fraction = change[~kept].square().sum() / change.square().sum()
    assert lost["model.layers.0.self_attn.q_proj"] == pytest.approx(float(fraction), rel=1e-4)


def test_layers_without_zeros_are_merged_completely():
    model = build("llama")
    prune_model(model, batches(), only=["re:.*q_proj"])
    weight = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    adapted = get_peft_model(model, adapter("q_proj", "k_proj"))
    randomize_(adapted, "default")
    layer = adapted.base_model.model.model.layers[0].self_attn.k_proj
    expected = weight + layer.get_delta_weight("default").detach()
    merged, lost = merge_adapters(adapted)
    assert torch.allclose(merged.model.layers[0].self_attn.k_proj.weight, expected, atol=1e-6)
    assert {name.rpartition(".")[2] for name in lost} == {"q_proj"}


def test_models_that_cannot_be_merged():
    with pytest.raises(TypeError, match="LlamaForCausalLM is no PeftModel"):
        merge_adapters(build("llama"))
    with pytest.raises(ValueError, match="no adapter is on a layer with zeros"):
        merge_adapters(get_peft_model(build("llama"), adapter("q_proj")))
