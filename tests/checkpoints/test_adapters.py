"""LoRA adapters are trained on a pruned model and merged without reviving pruned weights."""

from __future__ import annotations

import peft
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


def test_adapters_of_embeddings_and_of_tokens_are_merged():
    model, result = pruned()
    before = model.model.embed_tokens.weight.detach().clone()
    adapted = get_peft_model(model, adapter("embed_tokens", "q_proj"))
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.1)
    change = adapted.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
    merged, lost = merge_adapters(adapted)
    assert change.norm() > 1
    assert torch.allclose(merged.model.embed_tokens.weight, before + change, atol=1e-6)
    assert result.is_applied_to(merged)
    assert {name.rpartition(".")[2] for name in lost} == {"q_proj"}

    model, result = pruned()
    config = LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    ids = batches("llama")[0]["input_ids"].clone()
    embeddings = adapted.base_model.model.model.embed_tokens(ids).detach()
    before = build("llama").model.embed_tokens(ids).detach()
    assert not torch.equal(embeddings, before)
    merged, _ = merge_adapters(adapted)
    assert torch.allclose(merged.model.embed_tokens(ids), embeddings, atol=1e-6)
    assert result.is_applied_to(merged)


def test_adapters_of_convolutions_are_merged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    images = torch.randn(2, 8, 8, 8)
    result = prune_model(model, [images], score="wanda")
    weight = model[0].weight.detach().clone()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    randomize_(adapted, "default")
    change = adapted.base_model.model[0].get_delta_weight("default").detach()
    merged, lost = merge_adapters(adapted)
    assert result.is_applied_to(merged)
    assert set(lost) == {"0", "2"}
    assert torch.allclose(merged[0].weight, weight + change * (weight != 0), atol=1e-6)


def test_adapters_of_packed_experts_are_merged():
    model, result = pruned("mixtral")
    name = next(name for name in result.masks if "gate_up_proj" in name)
    parameter = name.rpartition(".")[0]
    weight = model.get_parameter(parameter).detach().clone()
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    adapted = get_peft_model(model, config)
    for key, tensor in adapted.named_parameters():
        if "lora_" in key:
            nn.init.normal_(tensor, std=0.1)
    merged, lost = merge_adapters(adapted)
    assert name in lost
    assert result.is_applied_to(merged)
    changed = merged.get_parameter(parameter) != weight
    assert torch.equal(changed, weight != 0)


def test_adapters_that_cannot_be_merged_are_named():
    model, _ = pruned()
    config = peft.PolyConfig(r=2, n_tasks=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj, a .*poly.* cannot be merged"
    ):
        merge_adapters(adapted)


@pytest.mark.parametrize("replaced", ["up_proj", "mlp"])
def test_a_trained_copy_of_a_pruned_layer_keeps_its_zeros(replaced):
    model, result = pruned()
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=[replaced], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    (trained,) = [
        parameter
        for key, parameter in adapted.named_parameters()
        if "layers.0" in key and "up_proj" in key and "modules_to_save" in key
    ]
    merged, _ = merge_adapters(adapted)
    assert result.is_applied_to(merged)
    mask = result.masks["model.layers.0.mlp.up_proj"]
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight[mask], trained[mask])


def test_an_untrained_adapter_is_merged_without_a_loss():
    model, result = pruned()
    merged, lost = merge_adapters(get_peft_model(model, adapter("q_proj")))
    assert set(lost.values()) == {0.0}
    assert result.is_applied_to(merged)


def test_prompts_cannot_be_merged():
    model, _ = pruned()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="changes no weights, as a prompt does not"):
        merge_adapters(get_peft_model(model, config))


def test_models_that_cannot_be_merged():
    with pytest.raises(TypeError, match="LlamaForCausalLM is no PeftModel"):
        merge_adapters(build("llama"))
    with pytest.raises(ValueError, match="no adapter is on a layer with zeros"):
        merge_adapters(get_peft_model(build("llama"), adapter("q_proj")))
