"""Model cards describe the checkpoint with metadata that the Hub accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from symprune_lightning import export_model, prune_model
from symprune_lightning.checkpoints.card import model_card
from tests.models import batches, build

MANIFEST = {
    "model": "org/base",
    "sparsity": 0.5,
    "settings": {"score": {"name": "RIA", "alpha": 0.5}, "update": None, "refine": {}},
    "metrics": {"dense": {"val_loss": 1.0}, "pruned": {"val_loss": 1.25, "accuracy": 0.5}},
}


def test_the_card_lists_method_and_metrics():
    card = model_card(MANIFEST)
    assert "# base (pruned)" in card
    assert "50.0 % of the weights" in card
    assert "no faster" in card
    assert "| score | `RIA(alpha=0.5)` |" in card
    assert "| val_loss | `1.0000` | `1.2500` |" in card
    assert "| accuracy | `` | `0.5000` |" in card
    # settings that are not in use are left out
    assert "update" not in card
    assert "refine" not in card


def test_the_card_names_the_data_and_refiners():
    refiner = {"name": "R2DSnoT", "guard": "gram"}
    settings = {"score": {"name": "Wanda"}, "refine": {"re:.*": [refiner, {"name": "ExactSwap"}]}}
    source = {"path": "org/texts", "name": None, "split": "train"}
    data = {"dataset": source, "sequences": 8, "seed": 0, "evaluation": None}
    card = model_card({"settings": settings, "data": data, "architecture": "BertModel"})
    assert "# BertModel (pruned)" in card
    assert "| score | `Wanda` |" in card
    assert "| refine | `R2DSnoT(guard='gram'), ExactSwap` |" in card
    assert "| dataset | `path: org/texts, split: train` |" in card
    assert "| seed | `0` |" in card
    assert "evaluation" not in card


def test_the_metadata_can_be_parsed():
    data = ModelCard(model_card(MANIFEST)).data
    assert data.base_model == "org/base"
    assert data.library_name == "transformers"
    assert "pruned" in data.tags


def test_a_model_that_was_sparse_before_is_named():
    assert "50.0 % of the weights of these layers were zero before pruning" in model_card(
        {"sparsity": 0.6, "initial_sparsity": 0.5}
    )
    assert "before pruning" not in model_card({"sparsity": 0.6, "initial_sparsity": 0.001})


def test_an_empty_manifest():
    card = model_card({})
    assert "# Pruned model" in card
    assert "Some of the weights" in card
    assert "## " not in card


def test_pipes_do_not_break_the_table():
    card = model_card({"settings": {"note": "a|b"}})
    assert r"| note | `a\|b` |" in card


@pytest.mark.parametrize("model", ["", "./no/folder", "model.gguf", "no-organization", "a/b/c"])
def test_a_base_model_that_is_not_on_the_hub_is_not_named(model):
    assert "base_model" not in model_card({"model": model})


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n\n# A model\n", "apache-2.0"),
        ("---\ntags: [a]\n---\n", None),
        ("# A model without metadata\n", None),
        ("---\nlicense: [\n---\n", None),
    ],
)
def test_the_license_is_that_of_the_base_model(tmp_path: Path, readme, expected):
    build("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(readme)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    prune_model(model, batches())
    export_model(model, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == expected


@pytest.mark.parametrize("evaluation", [None, "wikitext2"])
def test_an_evaluation_on_the_calibration_source_is_named(evaluation):
    card = model_card({**MANIFEST, "data": {"dataset": "python-docs", "evaluation": evaluation}})
    assert ("are from one source" in card) == (evaluation is None)
    assert "are from one source" not in model_card(MANIFEST)
