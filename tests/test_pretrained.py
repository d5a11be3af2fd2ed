from __future__ import annotations

import pytest
import torch

from symprune_lightning.pretrained import load_model, load_tokenizer
from tests.models import build
from tests.texts import tokenizer


def test_local_folder(tmp_path):
    model = build("qwen3")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32")
    assert type(loaded) is type(model)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert load_tokenizer(str(tmp_path)).eos_token_id == tokenizer().eos_token_id


@pytest.mark.parametrize("path", ["./no/such/model", "/no/such/model", "no/such.gguf", "~/no"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_missing_model(load, path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*give a folder"):
        load(path)


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'float8'; use 'auto'"):
        load_model(str(tmp_path), dtype="float8")


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path))
