from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from symprune_lightning.checkpoints import pretrained
from symprune_lightning.checkpoints.pretrained import (
    load_model,
    load_tokenizer,
    local_folder,
    model_class,
    resolve_source,
)
from symprune_lightning.errors import PruningWarning
from tests.models import build
from tests.texts import tokenizer

CUSTOM_CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class CustomConfig(LlamaConfig):
    model_type = "custom"


class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


def test_local_folder_is_loaded(tmp_path):
    model = build("qwen3")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32")
    assert type(loaded) is type(model)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert load_tokenizer(str(tmp_path)).eos_token_id == tokenizer().eos_token_id


@pytest.mark.parametrize("path", ["./no/such/model", "/no/such/model", "no/such.gguf", "~/no"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer, resolve_source])
def test_missing_path(load, path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*expected a folder"):
        load(path)


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match=r"dtype must be 'auto', .* but got 'float8'"):
        load_model(str(tmp_path), dtype="float8")


def test_pickled_weights_are_refused(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path))


def test_custom_code_runs_only_with_trust_remote_code(tmp_path, monkeypatch):
    # transformers copies the code to this folder and imports it from there
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    folder, marker = tmp_path / "model", tmp_path / "executed"
    build("llama").save_pretrained(folder)
    (folder / "modeling_custom.py").write_text(CUSTOM_CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "custom"
    config["auto_map"] = {
        "AutoConfig": "modeling_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_model(str(folder))
    assert not marker.exists()
    model = load_model(str(folder), trust_remote_code=True)
    assert marker.exists()
    assert type(model).__name__ == "CustomForCausalLM"


@pytest.mark.parametrize(
    ("config", "trusted", "untrusted"),
    [
        ({"architectures": ["LlamaModel"]}, "LlamaModel", "LlamaModel"),
        ({}, "AutoModelForCausalLM", "AutoModelForCausalLM"),
        ({"architectures": ["Trainer"]}, "AutoModelForCausalLM", "AutoModelForCausalLM"),
        (
            # not the class of transformers, whose model type is another one
            {"architectures": ["LlamaModel"], "model_type": "custom"},
            "AutoModelForCausalLM",
            "AutoModelForCausalLM",
        ),
        (
            {
                "architectures": ["CustomForSpeech"],
                "auto_map": {
                    "AutoConfig": "custom.CustomConfig",
                    "AutoModel": "custom.CustomModel",
                    "AutoModelForCausalLM": "custom.CustomForCausalLM",
                    "AutoModelForSpeechSeq2Seq": "org/repository--custom.CustomForSpeech",
                },
            },
            "AutoModelForSpeechSeq2Seq",
            "AutoModelForCausalLM",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "custom.Custom"}},
            "AutoModel",
            "LlamaForCausalLM",
        ),
    ],
)
def test_class_of_a_checkpoint(config, trusted, untrusted, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert model_class(str(tmp_path), trust_remote_code=True).__name__ == trusted
    assert model_class(str(tmp_path)).__name__ == untrusted


@pytest.mark.parametrize("name", ["vit", "opt"])
def test_a_model_is_loaded_by_its_own_class(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert all(torch.equal(model.state_dict()[n], x) for n, x in loaded.state_dict().items())


def test_an_adapter_is_loaded_with_its_base_model(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    names = dict(load_model(str(tmp_path / "adapter")).named_parameters())
    assert any("lora_A" in name for name in names)


def test_resolve_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").touch()
    assert resolve_source("~/model") == tmp_path / "model"
    assert resolve_source(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve_source("model") == Path("model")
    assert resolve_source("org/model") == "org/model"


def test_local_folder_of_paths_and_cached_hub_models(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--model" / "snapshots" / "1a2b3c"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("1a2b3c")
    assert local_folder("org/model") == snapshot
    assert local_folder(str(snapshot)) == snapshot
    for missing in ("", "org/other", "./no/such/model", "not a hub name"):
        assert local_folder(missing) is None


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_that_cannot_be_reached(load, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    message = r"org/no-model is no folder here and not in the cache, and http://127.0.0.1:9 cannot"
    with pytest.raises(OSError, match=message):
        load("org/no-model")


def test_gguf_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"symprune-lightning\[gguf\]"):
        load_model(str(tmp_path / "model.gguf"))


def test_a_folder_without_a_tokenizer(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} has no tokenizer that can be read: save it"):
        load_tokenizer(str(tmp_path))


def test_truncated_weights(tmp_path):
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OSError, match=rf"the weights of {tmp_path} are damaged or truncated"):
        load_model(str(tmp_path))


def test_a_missing_pooler_is_named(tmp_path):
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.warns(PruningWarning, match=r"lacks pooler.dense.bias, .*: BertModel has random"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_missing_weights_of_blocks_and_embeddings_are_refused(tmp_path, name):
    build("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path} lacks 1 of the weights of .*{name}"):
        load_model(str(tmp_path))
