"""``symprune compare`` runs recipes on the same model and tokens."""

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

from symprune_lightning.cli.compare import compare
from tests.cli.commands import small

NAMES = ("wanda", "ria", "magnitude")


@pytest.fixture
def folder(project):
    for name in NAMES:
        write(project, name, {"score": name, "sparsity": 0.6})
    return project


def write(
    folder: Path, name: str, method: dict[str, object], *callbacks: str, **data: object
) -> Path:
    """Write a recipe for the tiny model."""
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
            "callbacks": [*callbacks],
        },
        "pruning": method,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def files(folder: Path, *names: str) -> list[Path]:
    return [folder / f"{name}.yaml" for name in names or NAMES]


def test_results_equal_those_of_separate_runs(folder):
    results = compare(files(folder), folder / "out")
    for result in results:
        separate = compare(files(folder, result.name), folder / f"separate-{result.name}")[0]
        assert (separate.perplexity, separate.dense) == (result.perplexity, result.dense)
        assert (separate.sparsity, separate.error) == (result.sparsity, result.error)
        assert result.sparsity == pytest.approx(0.6, abs=0.02)
        assert result.failure is None
        assert result.seconds > 0
    assert len({result.perplexity for result in results}) == 3
    rows = list(csv.DictReader((folder / "out" / "results.csv").open()))
    assert [row["name"] for row in rows] == list(NAMES)
    assert [float(row["perplexity"]) for row in rows] == [x.perplexity for x in results]
    assert (folder / "out" / "compare.png").stat().st_size > 10_000
    assert not list((folder / "out").glob(".*"))


def test_the_model_is_loaded_once(folder, monkeypatch):
    """The weights are deleted while the first recipe runs."""
    (folder / "delete_weights.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch import Callback\n"
        "from symprune_lightning import PruningHooks\n"
        "class DeleteWeights(Callback, PruningHooks):\n"
        "    def on_pruning_end(self, result):\n"
        f"        Path({str(folder / 'model' / 'model.safetensors')!r}).unlink()\n"
    )
    monkeypatch.syspath_prepend(folder)
    write(folder, "wanda", {"score": "wanda"}, "delete_weights.DeleteWeights")
    results = compare(files(folder), folder / "out")
    assert not (folder / "model" / "model.safetensors").exists()
    assert [result.failure for result in results] == [None] * 3


def test_a_recipe_that_fails_does_not_stop_the_others(folder, symprune, capsys):
    write(folder, "wrong", {"score": "ria", "sparsity": 0.6, "only": ["nowhere"]})
    recipes = files(folder, "wanda", "wrong", "ria")
    with pytest.raises(SystemExit, match="symprune: some recipes failed; wrong: ValueError: "):
        symprune("compare", *recipes, "--output", folder / "out")
    last_table = capsys.readouterr().out.rpartition("Recipes on the same model")[2]
    rows = [line.split("│")[1:4] for line in last_table.splitlines() if line.startswith("│")]
    assert len(rows) == 4
    assert rows.pop(0)[0].strip() == "dense"
    assert [cell.strip() for cell in rows[-1]] == ["wrong", "", "failed"]
    results = compare(recipes, folder / "out")
    assert [result.failure is None for result in results] == [True, False, True]
    assert "'nowhere' matches none of the" in results[1].failure
    separate = compare(files(folder, "ria"), folder / "separate")
    assert results[2].perplexity == separate[0].perplexity


def test_a_file_that_lists_recipes_and_common_options(folder):
    content = {"recipes": ["wanda.yaml", "ria.yaml"], "arguments": ["--pruning.sparsity=0.25"]}
    (folder / "all.yaml").write_text(yaml.safe_dump(content))
    results = compare([folder / "all.yaml"], folder / "out")
    assert [result.name for result in results] == ["wanda", "ria"]
    assert all(result.sparsity == pytest.approx(0.25, abs=0.02) for result in results)
    # options of the call come last
    results = compare([folder / "all.yaml"], folder / "other", ["--pruning.sparsity=0.5"])
    assert all(result.sparsity == 0.5 for result in results)


def test_recipes_by_name(folder, symprune, capsys):
    options = ["--output", folder / "out", *small(folder)]
    for file in files(folder):
        file.unlink()
    (folder / "all.yaml").write_text(yaml.safe_dump({"recipes": ["magnitude"]}))
    symprune("compare", "ria", folder / "all.yaml", *options)
    results = json.loads((folder / "out" / "results.json").read_text())
    assert list(results) == ["ria", "magnitude"]
    assert "Recipes on the same model and tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no file or recipe wander .*; the recipes are: best, "):
        symprune("compare", "wander", *options)


def test_recipes_that_cannot_be_compared(folder):
    write(folder, "shorter", {"score": "ria"}, sequence_length=8)
    with pytest.raises(ValueError, match="recipes wanda and shorter differ in data"):
        compare(files(folder, "wanda", "shorter"), folder / "out")
    options = ["--data.sequence_length=8"]
    results = compare(files(folder, "wanda", "shorter"), folder / "out", options)
    assert all(result.failure is None for result in results)
    with pytest.raises(ValueError, match="no recipes"):
        compare([], folder / "out")
    with pytest.raises(ValueError, match="same file name"):
        compare(files(folder, "wanda", "wanda"), folder / "out")
    with pytest.raises(ValueError, match="exactly one pruning callback"):
        compare(files(folder, "wanda"), folder / "out", ["--pruning=null"])


def test_distillation_cannot_be_compared(folder):
    path = write(folder, "distil", {"score": "ria"}, "symprune_lightning.Distillation")
    with pytest.raises(ValueError, match="compare does not train, so Distillation"):
        compare([path, *files(folder, "wanda")], folder / "out")


@pytest.mark.slow
def test_a_killed_comparison_is_resumed(folder):
    for name in NAMES:
        write(folder, name, {"score": name, "sparsity": 0.6, "refine": "exactswap"})
    write(folder, "magnitude", {"score": "magnitude", "sparsity": 0.6})
    command = [str(Path(sys.executable).parent / "symprune"), "compare"]
    command += [*map(str, files(folder)), "--output", str(folder / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    cache = folder / "out" / "results.json"
    while process.poll() is None and not cache.is_file():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = json.loads(cache.read_text())
    assert finished
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    results = json.loads(cache.read_text())
    assert set(results) == set(NAMES)
    assert all(results[name] == entry for name, entry in finished.items())
    fresh = compare(files(folder), folder / "fresh")
    assert {result.name: result.perplexity for result in fresh} == {
        name: entry["result"]["perplexity"] for name, entry in results.items()
    }
