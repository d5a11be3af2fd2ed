"""A checkpoint pruned block by block equals the model pruned in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, OPTForCausalLM

from symprune_lightning import (
    BlockReconstruction,
    PruneResult,
    PruningError,
    PruningHooks,
    PruningWarning,
    StreamedCheckpoint,
    load_masks,
    prune_model,
)
from symprune_lightning.checkpoints.manifest import build_manifest, read_manifest
from tests.models import LANGUAGE, batches, build, llama, opt

METHODS: dict[str, dict[str, Any]] = {
    "ria": {"score": "ria"},
    "exactswap": {"score": "wanda", "refine": "exactswap"},
    "2:4": {"score": "wanda", "pattern": "2:4"},
    "owl": {"score": "wanda", "allocation": "owl"},
    "update": {"score": "ria", "update": "obsupdate"},
    "sparsegpt": {"solver": "sparsegpt"},
    "block": {"score": "ria", "calibration_order": "block", "group": "block"},
    "dense": {"score": "ria", "calibration_order": "dense"},
    "reconstruct": {
        "calibration_order": "block",
        "reconstruct": BlockReconstruction(epochs=1, learning_rate=1e-2),
    },
}


def stream(folder: Path, method: dict[str, Any], data: list[Any], **options: Any) -> PruneResult:
    """Prune ``dense`` to ``sparse`` block by block."""
    with StreamedCheckpoint(folder / "dense", folder / "sparse") as checkpoint:
        model = checkpoint.model
        result = prune_model(model, data, placement=checkpoint, **method, **options)
        assert all(p.is_meta for block in checkpoint.blocks for p in block.parameters())
        checkpoint.save(build_manifest(result, model=str(folder / "dense"), settings={}))
    return result


def assert_equals_pruning_in_memory(
    folder: Path, method: dict[str, Any], data: list[Any]
) -> PruneResult:
    """Prune the checkpoint in both ways, and compare weights, masks and reports."""
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    expected = prune_model(model, data, **method)
    result = stream(folder, method, data)
    assert [x.name for x in result.layers] == [x.name for x in expected.layers]
    assert [x.swaps for x in result.layers] == [x.swaps for x in expected.layers]
    assert result.sparsity == expected.sparsity
    for masks in (result.masks, load_masks(folder / "sparse")):
        assert masks.keys() == expected.masks.keys()
        assert all(torch.equal(masks[layer], mask) for layer, mask in expected.masks.items())
    assert read_manifest(folder / "sparse")["sparsity"] == expected.sparsity
    loaded = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
        assert loaded.state_dict()[name].dtype == weight.dtype
    return expected


@pytest.mark.parametrize("method", METHODS)
def test_methods(tmp_path, method):
    build("llama").save_pretrained(tmp_path / "dense")
    assert_equals_pruning_in_memory(tmp_path, METHODS[method], batches())


@pytest.mark.parametrize("name", LANGUAGE)
def test_architectures(tmp_path, name):
    build(name).save_pretrained(tmp_path / "dense")
    assert_equals_pruning_in_memory(tmp_path, METHODS["ria"], batches(name))


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_half_precision(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    assert_equals_pruning_in_memory(tmp_path, METHODS["ria"], batches())


def test_the_index_lists_every_file(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    stream(tmp_path, METHODS["ria"], batches())
    index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "sparse" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    files = {path.name for path in (tmp_path / "sparse").glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert len(files) == 5  # two blocks, embeddings, the last norm, the output projection


IGNORED = {
    "the first block": ["re:.*lm_head", r"re:.*layers\.0\..*"],
    "the last block": ["re:.*lm_head", r"re:.*layers\.1\..*"],
    "some of each block": ["re:.*lm_head", "re:.*mlp.*"],
    "nothing": [],
}


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("order", ["layer", "block", "dense"])
def test_ignored_layers(tmp_path, ignored, order):
    build("llama").save_pretrained(tmp_path / "dense")
    method = {"ignore": IGNORED[ignored], "calibration_order": order}
    assert_equals_pruning_in_memory(tmp_path, method, batches())


@pytest.mark.parametrize(
    "only", [["re:.*mlp.*"], [r"re:.*layers\.1\..*"], ["model.layers.0.self_attn.q_proj"]]
)
@pytest.mark.parametrize("order", ["layer", "block"])
def test_only_some_layers(tmp_path, only, order):
    build("llama").save_pretrained(tmp_path / "dense")
    method = {"only": only, "calibration_order": order}
    expected = assert_equals_pruning_in_memory(tmp_path, method, batches())
    assert 0 < len(expected.layers) < 14


def test_ignored_layers_are_written_dense(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    stream(tmp_path, {"ignore": IGNORED["the first block"]}, batches())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").model.layers
    assert (loaded[0].mlp.up_proj.weight != 0).all()
    assert (loaded[1].mlp.up_proj.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("pruned", [True, False])
def test_an_untied_output_projection(tmp_path, pruned):
    """The largest tensor of a model is not loaded unless it is pruned."""
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    loaded = []

    def forward(model, batch):
        loaded.append(not model.lm_head.weight.is_meta)
        return model(**batch)

    stream(tmp_path, {"only": ["re:.*", "lm_head"]} if pruned else {}, batches(), forward=forward)
    assert loaded == [pruned] * len(batches())
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").lm_head.weight
    assert ("lm_head" in load_masks(tmp_path / "sparse")) == pruned
    if pruned:
        assert (head == 0).float().mean() == 0.5
    else:
        assert torch.equal(head, model.lm_head.weight)


def test_linear_layers_before_the_blocks(tmp_path):
    opt(embedding=8).save_pretrained(tmp_path / "dense")
    method = {"ignore": ["re:.*project_(in|out)"]}
    assert_equals_pruning_in_memory(tmp_path, method, batches())


def test_a_layer_that_no_batch_reaches(tmp_path):
    """Batches then run to the end, where the output projection is not in memory."""
    build("llama").save_pretrained(tmp_path / "dense")

    def forward(model, batch):
        model.model(**batch, output_hidden_states=True)
        model.lm_head(model.model.embed_tokens(batch["input_ids"]))
        raise AssertionError("continued after the output projection")

    with StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse") as checkpoint:
        checkpoint.model.model.register_module("never", torch.nn.Linear(4, 4, device="meta"))
        with pytest.warns(PruningWarning, match="never"):
            result = prune_model(checkpoint.model, batches(), placement=checkpoint, forward=forward)
        checkpoint.save({})
    assert result.unreached == ["model.never"]


class Stop(PruningHooks):
    """Fails after some layers."""

    def __init__(self, layers: int) -> None:
        self.remaining = layers

    def on_layer_pruned(self, report, mask):
        self.remaining -= 1
        if self.remaining == 0:
            raise RuntimeError("stopped")


class Scored(PruningHooks):
    """Collects the names of layers that are scored."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_layer_scored(self, layer, scores, mask):
        self.names.append(layer)


@pytest.mark.parametrize("order", ["layer", "block"])
def test_a_resumed_run_writes_the_layers_it_did_not_prune_again(tmp_path, order):
    """Layers of a finished block, and a finished layer outside the blocks, ``project_in``."""
    config = opt(embedding=8).config
    config.num_hidden_layers = 3
    OPTForCausalLM(config).save_pretrained(tmp_path / "dense")
    method = {"ignore": ["lm_head", "re:.*project_out"], "calibration_order": order}
    expected = assert_equals_pruning_in_memory(tmp_path, method, batches())
    files = {f.relative_to(tmp_path / "sparse") for f in (tmp_path / "sparse").rglob("*")}
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").state_dict()
    options = {"journal": tmp_path / "journal"}
    with pytest.raises(PruningError, match="stopped after 17 of 19 layers"):
        stream(tmp_path, method, batches(), hooks=[Stop(17)], **options)
    scored = Scored()
    result = stream(tmp_path, method, batches(), hooks=[scored], **options)
    assert "model.decoder.project_in" in result.masks
    assert not [name for name in scored.names if "project_in" in name or "layers.0." in name]
    assert {f.relative_to(tmp_path / "sparse") for f in (tmp_path / "sparse").rglob("*")} == files
    masks = load_masks(tmp_path / "sparse")
    assert masks.keys() == expected.masks.keys()
    assert all(torch.equal(masks[layer], mask) for layer, mask in expected.masks.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").state_dict()
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name


def test_after_an_error_nothing_is_left(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="'nothing' matches none"):
        stream(tmp_path, {"only": ["nothing"]}, batches())
    checkpoint = StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse")
    with pytest.raises(RuntimeError, match=r"save\(\) was not called after"), checkpoint:
        prune_model(checkpoint.model, batches(), placement=checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_sources_that_cannot_be_streamed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model at .*nowhere"):
        StreamedCheckpoint(tmp_path / "nowhere", tmp_path / "sparse")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(FileNotFoundError, match="only folders can be streamed"):
        StreamedCheckpoint(tmp_path / "model.gguf", tmp_path / "sparse")
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="only weights in safetensors are read"):
        StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse")
    model.model.save_pretrained(tmp_path / "body")
    (tmp_path / "weights").unlink()
    model.config.save_pretrained(tmp_path / "body")
    message = "has no tensor model.embed_tokens.weight, the name under which transformers saves it"
    with pytest.raises(ValueError, match=message):
        StreamedCheckpoint(tmp_path / "body", tmp_path / "sparse")


def test_a_layer_of_zeros_has_no_mask(tmp_path):
    model = build("llama")
    torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(tmp_path / "dense")
    with StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse") as checkpoint:
        with pytest.warns(PruningWarning, match="are all zero, and were left alone"):
            result = prune_model(checkpoint.model, batches(), score="wanda", placement=checkpoint)
        checkpoint.save({"sparsity": result.sparsity})
    assert result.all_zero == ["model.layers.0.mlp.down_proj"]
    assert load_masks(tmp_path / "sparse").keys() == result.masks.keys()


def test_a_quantised_checkpoint_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(ValueError, match=r"is quantised .*; prune the model before quantising it"):
        StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_method_without_data(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    assert_equals_pruning_in_memory(tmp_path, {"score": "magnitude"}, [])


def test_methods_that_need_the_full_model(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="group 'model' compares all weights at once"):
        stream(tmp_path, {"group": "model", "calibration_order": "dense"}, batches())
    with pytest.raises(ValueError, match="needs the full model in memory"):
        stream(tmp_path, {"allocation": "search"}, batches())
    assert not (tmp_path / "sparse").exists()
