"""Masks are stored as bits, inferred from zeros, and applied to dense models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from symprune_lightning import (
    PackedMasks,
    apply_masks,
    infer_masks,
    load_masks,
    prune_model,
    save_masks,
)
from symprune_lightning.errors import PruningWarning
from tests.models import LANGUAGE, batches, build, llama


@given(shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 70)), min_size=1, max_size=4))
def test_masks_are_loaded_as_they_were_saved(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("masks") / "deep" / "masks.safetensors"
    masks = {f"layer.{i}": torch.rand(shape) > 0.5 for i, shape in enumerate(shapes)}
    save_masks(path, masks)
    loaded = load_masks(path)
    assert isinstance(loaded, PackedMasks)
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())


def test_equal_masks_give_equal_files(tmp_path):
    masks = {f"layer.{i}": torch.rand(3, i + 1) > 0.5 for i in range(20)}
    for number in range(5):
        save_masks(tmp_path / f"{number}.safetensors", masks)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(5)}) == 1


def test_files_take_one_bit_per_weight(tmp_path):
    save_masks(tmp_path / "masks.safetensors", {"a": torch.rand(256, 1024) > 0.5})
    assert (tmp_path / "masks.safetensors").stat().st_size < 256 * 1024 / 8 + 400


@pytest.mark.parametrize("name", LANGUAGE)
def test_masks_applied_to_the_dense_model_give_the_pruned_one(name):
    pruned = build(name)
    result = prune_model(pruned, batches(name))
    inferred = infer_masks(pruned)
    assert inferred.keys() == result.masks.keys()
    assert all(torch.equal(inferred[layer], mask) for layer, mask in result.masks.items())
    dense = build(name)
    apply_masks(dense, result.masks)
    for key, value in pruned.state_dict().items():
        assert torch.equal(dense.state_dict()[key], value), key


def test_layers_without_zeros_or_with_only_zeros_have_no_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = 0
        model[1].weight.zero_()
    with pytest.warns(PruningWarning, match="1: all zero, so without a mask"):
        assert list(infer_masks(model)) == ["0"]


def test_masks_of_another_model_change_nothing():
    model = build("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = {"model.layers.0.self_attn.q_proj": torch.zeros(32, 32, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"there is a mask for layer nowhere.*another model"):
        apply_masks(model, {**masks, "nowhere": torch.ones(2, 2, dtype=torch.bool)})
    assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())


def test_files_without_masks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no masks at .*nowhere"):
        load_masks(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no masks at"):
        load_masks(tmp_path)
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors holds no masks"):
        load_masks(tmp_path / "model.safetensors")
    save_masks(tmp_path / "masks.safetensors", {"a": torch.ones(8, 8, dtype=torch.bool)})
    data = (tmp_path / "masks.safetensors").read_bytes()
    (tmp_path / "masks.safetensors").write_bytes(data[:-3])
    with pytest.raises(ValueError, match=r"masks.safetensors holds no masks that can be read"):
        load_masks(tmp_path / "masks.safetensors")


def test_masks_of_a_part_of_the_model():
    model = build("llama")
    masks = prune_model(build("llama"), batches()).masks
    project = torch.nn.ModuleDict({"inner": model})
    message = r"it has a layer inner.model.layers.0.* part 'inner', pass that module"
    with pytest.raises(ValueError, match=message):
        apply_masks(project, masks)
    apply_masks(project["inner"], masks)


def test_an_output_projection_that_was_pruned_by_name_keeps_its_mask():
    model = llama()
    result = prune_model(model, batches(), score="wanda", only=["lm_head", "re:.*_proj"])
    assert infer_masks(model) == result.masks


def test_rows_of_unused_tokens_are_no_mask():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[-3:] = 0
    assert "lm_head" not in infer_masks(model)


def test_a_computed_weight_without_zeros_is_no_mask():
    model = nn.Sequential(nn.Linear(16, 16), spectral_norm(nn.Linear(16, 16)))
    result = prune_model(model, [torch.randn(4, 16)], ignore=["1"])
    assert infer_masks(model) == result.masks
    prune.l1_unstructured(model[0], "weight", amount=0.1)
    with pytest.raises(ValueError, match="layer 0 computes its weight"):
        infer_masks(model)


def test_masks_that_are_not_bool(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"layer 0 is torch.float32, not bool: pass mask != 0"):
        apply_masks(model, {"0": torch.zeros(4, 4)})
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match=r"must be a bool matrix, got torch.float32"):
        save_masks(tmp_path / "masks.safetensors", {"0": torch.zeros(4, 4)})


def test_heads_that_cannot_be_pruned_have_no_mask():
    model = llama()
    result = prune_model(model, batches(), score="wanda")
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    assert infer_masks(model) == result.masks
    model.lm_head.to("meta")
    assert infer_masks(model) == result.masks


def test_a_column_of_zeros_in_a_head_is_no_mask():
    model = llama()
    result = prune_model(model, batches(), score="wanda")
    with torch.no_grad():
        model.lm_head.weight[:, 3] = 0
    assert infer_masks(model) == result.masks
