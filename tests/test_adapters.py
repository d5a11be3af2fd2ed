"""Adapters are trained on a pruned model and merged with its zeros kept."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from symprune_lightning import CausalLMModule, MaskedFinetuning, merge_adapters, prune_model
from tests.callbacks.test_finetuning import data, revived, trainer
from tests.models import batches, build


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trained_and_merged(name):
    model = build(name)
    result = prune_model(model, batches(name), score="wanda")
    dense_output = model(**batches(name)[0]).logits
    targets = ["q_proj", "down_proj"] if name == "llama" else ["c_attn"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model.train(), config)
    module = CausalLMModule(adapted, learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    masked = MaskedFinetuning()
    trainer(max_steps=20).fit(module, datamodule=data(), callbacks=masked)
    assert len(masked.masks) == len(result.masks)
    assert not [layer for layer in masked.masks if "lora" in layer]
    moved = [n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    assert all("lora" in n for n in moved)

    adapted.eval()
    both = adapted(**batches(name)[0]).logits
    merged, lost = merge_adapters(adapted)
    assert type(merged) is type(model)
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    assert revived(merged, result.masks) == 0
    assert sorted(lost) == sorted(n for n in result.masks if n.endswith(tuple(targets)))
    # at 50 % an adapter that knows nothing of the mask loses about a half
    assert all(0.2 < share < 0.8 for share in lost.values())
    # what is left of it still goes in the adapter's direction
    output = merged(**batches(name)[0]).logits
    assert (output - both).norm() < (dense_output - both).norm()


def test_says_what_is_wrong():
    with pytest.raises(TypeError, match="LlamaForCausalLM is no model of peft"):
        merge_adapters(build("llama"))
    config = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="no adapter is on a layer with zeros"):
        merge_adapters(get_peft_model(build("llama"), config))
