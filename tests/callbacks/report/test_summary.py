"""The sentences of a report."""

from __future__ import annotations

import re

import pytest

from symprune_lightning.callbacks.report.summary import advice, asked, outcome, ratios_of


def manifest(dense=10.0, pruned=20.0, settings=None, **entries):
    metrics = {"dense": {"val_perplexity": dense}, "pruned": {"val_perplexity": pruned}}
    return {"metrics": metrics, "settings": settings or {}, **entries}


@pytest.mark.parametrize(
    ("dataset", "source"),
    [
        ({"iterable": "list"}, "texts in memory"),
        ({"self": {"temperature": 1.0, "prefixes": []}}, "samples of the model"),
        ("org/iterable-self", "org/iterable-self"),
        ({"path": "a.jsonl", "column": "body"}, "a.jsonl (column body)"),
    ],
)
def test_the_source_of_calibration_texts(dataset, source):
    sentence = asked({"data": {"dataset": dataset, "sequences": 2, "sequence_length": 8}})
    assert sentence == f"calibrated on {source} (2 × 8 tokens)"


def test_a_good_model_needs_nothing():
    assert not advice(manifest(pruned=10.5))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["refine", "update", "allocation", "reconstruct", "Distillation"]),
        ({"refine": {"re:.*": []}}, ["update", "allocation", "reconstruct", "Distillation"]),
        ({"solver": {"name": "ADMM"}}, ["allocation", "reconstruct", "Distillation"]),
        (
            {"pattern": {"name": "NM"}, "refine": 1, "update": 1},
            ["reconstruct", "Distillation"],
        ),
    ],
)
def test_what_the_method_lacks(settings, expected):
    given = advice(manifest(settings=settings))
    settings_or_words = [re.search(r"\((\w+): |^(\w+),", sentence) for sentence in given]
    assert [match[1] or match[2] for match in settings_or_words if match] == expected


def test_what_was_done_is_not_advised():
    done = manifest(settings={"solver": 1, "allocation": 1}, blocks=[1], distillation={"steps": 1})
    assert not advice(done)


def test_texts_of_another_kind():
    metrics = {
        "dense": {"val_perplexity": 10, "val_perplexity/a": 9, "val_perplexity/b": 11},
        "pruned": {"val_perplexity": 15, "val_perplexity/a": 9.5, "val_perplexity/b": 22},
    }
    run = manifest(settings={"solver": 1, "allocation": 1}, blocks=[1], distillation={"steps": 1})
    run["metrics"] = metrics
    assert ratios_of(run).keys() == {"val_perplexity/a", "val_perplexity/b"}
    (sentence,) = advice(run)
    assert "loses more on one kind of text" in sentence
    assert len(list(outcome(run))) == 2


def test_what_the_figures_do_not_show():
    layers = [
        {"name": "a", "tokens": 3, "shape": [8, 4]},
        {"name": "b", "tokens": 9, "shape": [2, 4]},
    ]
    run = manifest(
        pruned=10.0, coverage={"fraction": 0.5}, layers=layers, data={"evaluation": None}
    )
    source, coverage, tokens = advice(run)
    assert "from one source" in source
    assert coverage.startswith("Only 50 % of the weights")
    assert tokens.startswith("1 of 2 layers were measured on fewer tokens than they have inputs")


def test_a_model_that_was_sparse_before():
    *_, sentence = outcome({"sparsity": 0.5, "initial_sparsity": 0.5})
    assert sentence.startswith("50.0 % of the weights of these layers were zero before pruning")
    assert sentence.endswith("no further weight was pruned.")


def test_nothing_was_evaluated():
    (sentence,) = outcome({"metrics": {"dense": {}, "pruned": {"val_perplexity": 3.0}}})
    assert "was not measured" in sentence
    assert not advice({})
