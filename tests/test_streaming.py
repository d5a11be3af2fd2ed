from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from symprune_lightning import PruningWarning, StreamedCheckpoint, prune_model
from symprune_lightning.engine.layers import LM_HEAD
from tests.models import LANGUAGE, batches, build, llama, opt

METHODS = {
    "ria": {"score": "ria"},
    "exactswap": {"score": "wanda", "refine": "exactswap"},
    "2:4": {"score": "wanda", "pattern": "2:4"},
    "owl": {"score": "wanda", "allocation": "owl"},
    "update": {"score": "ria", "update": "obsupdate"},
    "block": {"score": "ria", "schedule": "block", "group": "block"},
    "dense": {"score": "ria", "schedule": "dense"},
}


def stream(folder, method, data):
    ignore = method.get("ignore", LM_HEAD)
    with StreamedCheckpoint(folder / "dense", folder / "sparse", ignore=ignore) as checkpoint:
        result = prune_model(checkpoint, data, **method)
        assert all(p.is_meta for block in checkpoint.blocks for p in block.parameters())
        checkpoint.finish({"sparsity": result.sparsity})
    return result


def same_as_whole(folder, method, data):
    """Prune the checkpoint in both ways, and compare all weights."""
    whole = AutoModelForCausalLM.from_pretrained(folder / "dense")
    expected = prune_model(whole, data, **method)
    result = stream(folder, method, data)
    assert [x.swaps for x in result.layers] == [x.swaps for x in expected.layers]
    assert result.sparsity == expected.sparsity
    assert not result.masks
    loaded = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    assert loaded.state_dict().keys() == whole.state_dict().keys()
    for name, weight in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
        assert loaded.state_dict()[name].dtype == weight.dtype


@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_as_pruned_in_memory(tmp_path, method):
    build("llama").save_pretrained(tmp_path / "dense")
    same_as_whole(tmp_path, METHODS[method], batches())


@pytest.mark.parametrize("name", LANGUAGE)
def test_architectures(tmp_path, name):
    build(name).save_pretrained(tmp_path / "dense")
    same_as_whole(tmp_path, METHODS["ria"], batches(name))


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_half_precision(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    same_as_whole(tmp_path, METHODS["ria"], batches())


def test_the_output_reloads_shard_by_shard(tmp_path):
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
@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
def test_layers_that_are_ignored(tmp_path, ignored, schedule):
    build("llama").save_pretrained(tmp_path / "dense")
    same_as_whole(tmp_path, {"ignore": IGNORED[ignored], "schedule": schedule}, batches())


def test_layers_that_are_ignored_are_written_dense(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    stream(tmp_path, {"ignore": IGNORED["the first block"]}, batches())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").model.layers
    assert (loaded[0].mlp.up_proj.weight != 0).all()
    assert (loaded[1].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_linear_layers_before_the_blocks(tmp_path):
    opt(embedding=8).save_pretrained(tmp_path / "dense")
    same_as_whole(tmp_path, {"ignore": ["re:.*project_(in|out)"]}, batches())


def test_a_layer_that_no_batch_reaches(tmp_path):
    """Batches then go on to the end, where the output projection is not in memory."""
    build("llama").save_pretrained(tmp_path / "dense")

    def first_block(model, batch):
        model.model(**batch, output_hidden_states=True)
        model.lm_head(model.model.embed_tokens(batch["input_ids"]))
        raise AssertionError("went on behind the output projection")

    with StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse") as checkpoint:
        checkpoint.model.register_module("never", torch.nn.Linear(4, 4, device="meta"))
        with pytest.warns(PruningWarning, match="still dense: never"):
            prune_model(checkpoint, batches(), forward=first_block)
        checkpoint.finish({})


def test_an_error_leaves_nothing_behind(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="'nothing' matches none"):
        stream(tmp_path, {"only": ["nothing"]}, batches())
    checkpoint = StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse")
    with pytest.raises(RuntimeError, match=r"finish\(\) was not called after"), checkpoint:
        prune_model(checkpoint, batches())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_wrong_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        StreamedCheckpoint(tmp_path / "nowhere", tmp_path / "sparse")
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="only safetensors are streamed"):
        StreamedCheckpoint(tmp_path / "dense", tmp_path / "sparse")
    model.model.save_pretrained(tmp_path / "body")
    (tmp_path / "weights").unlink()
    model.config.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="name weights otherwise than LlamaForCausalLM"):
        StreamedCheckpoint(tmp_path / "body", tmp_path / "sparse")


def test_a_method_that_needs_no_data(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    same_as_whole(tmp_path, {"score": "magnitude"}, [])


def test_groups_that_need_all_weights(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="group 'model' needs all weights at once"):
        stream(tmp_path, {"group": "model", "schedule": "dense"}, batches())


def test_an_allocation_search_needs_the_whole_model(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="needs the whole model in memory"):
        stream(tmp_path, {"allocation": "search"}, batches())
