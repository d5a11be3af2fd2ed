"""Recipes are compared on the same model and tokens, whatever happens to some of them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from symprune_lightning import CausalLMModule, PruningCallback
from symprune_lightning.compare import compare
from tests.texts import write_project

NAMES = ("wanda", "ria", "magnitude")


@pytest.fixture
def folder(tmp_path):
    write_project(tmp_path)
    for name in NAMES:
        write(tmp_path, name, {"score": name, "sparsity": 0.6})
    return tmp_path


def write(folder: Path, name: str, options: dict, **data: object) -> Path:
    recipe = {
        "model": {"pretrained": str(folder / "model")},
        "data": {
            "dataset": str(folder / "texts.txt"),
            "sequences": 4,
            "sequence_length": 16,
            "evaluation_sequences": 4,
            **data,
        },
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "symprune_lightning.SymPrune", "init_args": options}],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def files(folder: Path, *names: str) -> list[Path]:
    return [folder / f"{name}.yaml" for name in names or NAMES]


def test_rows_are_those_of_runs_of_their_own(folder, monkeypatch):
    loads = []
    configure = CausalLMModule.configure_model
    monkeypatch.setattr(
        CausalLMModule,
        "configure_model",
        lambda self: (loads.append(self) if self.model is None else None, configure(self))[1],
    )
    rows = compare(files(folder), folder / "out")
    assert len(loads) == 1
    for row in rows:
        alone = compare(files(folder, row.recipe), folder / f"alone-{row.recipe}")[0]
        assert (alone.perplexity, alone.dense) == (row.perplexity, row.dense)
        assert row.sparsity == pytest.approx(0.6, abs=0.02)
        assert row.error is None
        assert row.seconds > 0
    assert len({row.perplexity for row in rows}) == 3
    written = list(csv.DictReader((folder / "out" / "results.csv").open()))
    assert [row["recipe"] for row in written] == list(NAMES)
    assert [float(row["perplexity"]) for row in written] == [row.perplexity for row in rows]
    assert (folder / "out" / "compare.png").stat().st_size > 10_000
    assert not list((folder / "out").glob(".*"))


def test_one_that_fails_does_not_stop_the_others(folder):
    write(folder, "wrong", {"score": "ria", "sparsity": 0.6, "only": ["nowhere"]})
    rows = compare(files(folder, "wanda", "wrong", "ria"), folder / "out")
    assert [row.error is None for row in rows] == [True, False, True]
    assert "'nowhere' matches none of the" in rows[1].error
    alone = compare(files(folder, "ria"), folder / "alone")
    assert rows[2].perplexity == alone[0].perplexity


def test_what_is_done_is_not_done_again(folder, monkeypatch):
    before = compare(files(folder, "wanda"), folder / "out")
    pruned = []
    prune = PruningCallback._prune
    monkeypatch.setattr(
        PruningCallback, "_prune", lambda self, *x: (pruned.append(1), prune(self, *x))[1]
    )
    rows = compare(files(folder), folder / "out")
    assert rows[0] == before[0]
    assert len(pruned) == 2
    write(folder, "wanda", {"score": "wanda", "sparsity": 0.5})
    assert compare(files(folder), folder / "out")[0].perplexity != before[0].perplexity
    assert len(pruned) == 3


def test_a_file_that_lists_recipes_and_options_for_all(folder):
    (folder / "all.yaml").write_text(
        yaml.safe_dump(
            {
                "recipes": ["wanda.yaml", "ria.yaml"],
                "arguments": ["--trainer.callbacks.init_args.sparsity=0.25"],
            }
        )
    )
    rows = compare([folder / "all.yaml"], folder / "out")
    assert [row.recipe for row in rows] == ["wanda", "ria"]
    assert all(row.sparsity == pytest.approx(0.25, abs=0.02) for row in rows)


def test_recipes_that_cannot_be_compared(folder):
    write(folder, "longer", {"score": "ria"}, sequence_length=8)
    with pytest.raises(ValueError, match=r"wanda and longer have another data"):
        compare(files(folder, "wanda", "longer"), folder / "out")
    rows = compare(files(folder, "wanda", "longer"), folder / "out", ["--data.sequence_length=8"])
    assert all(row.error is None for row in rows)
    with pytest.raises(ValueError, match="no recipes"):
        compare([], folder / "out")
    with pytest.raises(ValueError, match="same file name"):
        compare(files(folder, "wanda", "wanda"), folder / "out")


@pytest.mark.slow
def test_killed_half_way_it_goes_on(folder):
    for name in NAMES:
        write(folder, name, {"score": name, "sparsity": 0.6, "refine": "exactswap"})
    write(folder, "magnitude", {"score": "magnitude", "sparsity": 0.6})
    command = [str(Path(sys.executable).parent / "symprune"), "compare"]
    command += [*map(str, files(folder)), "--output", str(folder / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    known = folder / "out" / "results.json"
    while process.poll() is None and not known.is_file():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = json.loads(known.read_text())
    assert done
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    rows = json.loads(known.read_text())
    assert set(rows) == set(NAMES)
    assert all(rows[name] == row for name, row in done.items())
    fresh = compare(files(folder), folder / "fresh")
    assert {row.recipe: row.perplexity for row in fresh} == {
        name: row["row"]["perplexity"] for name, row in rows.items()
    }
