"""Manifests record a run, and those of other format versions are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from symprune_lightning import CalibrationDataModule, prune_model
from symprune_lightning.checkpoints.manifest import (
    MANIFEST,
    build_manifest,
    read_manifest,
    write_manifest,
)
from tests.models import batches, build


def write(folder: Path, **changes: object) -> None:
    """Write a valid manifest with some entries replaced, or removed if they are ``...``."""
    manifest = {"format_version": 1, "layers": [{"name": "0", "sparsity": 0.5}]} | changes
    kept = {key: value for key, value in manifest.items() if value is not ...}
    (folder / MANIFEST).write_text(json.dumps(kept))


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    data = CalibrationDataModule(
        [[i * j % 64 for i in range(16)] for j in range(1, 9)],
        sequences=2,
        sequence_length=16,
        evaluation_sequences=2,
    )
    model = build("llama")
    result = prune_model(model, data.calibration_dataloader(), allocation="progression")
    manifest = build_manifest(
        result,
        model="org/model",
        settings={"score": {"name": "RIA"}},
        datamodule=data,
        dense={"val_perplexity": 2.0},
        pruned={"val_perplexity": 3.0},
    )
    write_manifest(tmp_path, manifest)
    read = read_manifest(tmp_path)
    assert read == json.loads(json.dumps(manifest))
    assert read["format_version"] == 1
    assert read["model"] == "org/model"
    assert read["data"]["sha256"] == data.hashes
    assert read["metrics"] == {
        "dense": {"val_perplexity": 2.0},
        "pruned": {"val_perplexity": 3.0},
    }
    assert [layer["name"] for layer in read["layers"]] == list(result.masks)
    assert read["layers"][0]["shape"] == list(result.layers[0].shape)
    assert read["unreached_layers"] == []
    assert "org/model" in (tmp_path / "README.md").read_text()


def test_the_trials_of_a_search_are_recorded():
    result = prune_model(build("llama"), batches(), allocation="search")
    trials = build_manifest(result, model="", settings={})["trials"]
    assert len(trials) == len(result.trials) > 1
    assert trials[0] == {
        "allocation": repr(result.trials[0].allocation),
        "error": result.trials[0].error,
    }


@pytest.mark.parametrize("version", [0, 2, None, "1", ...])
def test_other_format_versions_are_refused(tmp_path, version):
    write(tmp_path, format_version=version, versions={"symprune-lightning": "0.0.3"})
    with pytest.raises(ValueError, match=r"reads version 1: use the version .* \(0\.0\.3\)"):
        read_manifest(tmp_path)


def test_files_that_are_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path)
    write(tmp_path, layers=[])
    with pytest.raises(ValueError, match=f"{MANIFEST} lists no layers"):
        read_manifest(tmp_path)
    for content in ("[]", "null"):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=f"{MANIFEST} is not a manifest"):
            read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format_version": 1, "layers"')
    with pytest.raises(ValueError, match=rf"{MANIFEST} is not valid JSON: "):
        read_manifest(tmp_path)
