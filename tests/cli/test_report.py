"""``symprune report`` prints the figures of checkpoints side by side."""

from __future__ import annotations

import pytest

from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.cli.report import figures
from tests.cli.commands import small


def test_checkpoints_side_by_side(project, symprune, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    folders = [str(project / name) for name in ("wanda", "exact")]
    symprune("prune", "--config", "wanda", *small(project), "--output", folders[0])
    exact = ["--config", "ria-exactswap", "--sparsity", "0.75", "--update", "maskedcg"]
    symprune("prune", *exact, *small(project), "--output", folders[1])
    capsys.readouterr()
    symprune("report", *folders)
    printed = capsys.readouterr().out
    for folder in folders:
        manifest = read_manifest(project / folder)
        shown = figures(manifest)
        assert shown["sparsity"] == f"{manifest['sparsity']:.4f}"
        assert float(shown["val_perplexity, dense"]) > 1
        for figure, value in shown.items():
            (row,) = (x for x in printed.splitlines() if x.startswith(f"{figure} "))
            assert value in row
    errors = [layer["error_updated"] for layer in read_manifest(project / "exact")["layers"]]
    assert shown["error of the layers, mean"] == f"{sum(errors) / len(errors):.4f}"
    assert "method: score Wanda" in printed
    assert "update MaskedCG" in printed


def test_a_folder_that_is_no_pruned_checkpoint(project, symprune):
    with pytest.raises(SystemExit, match=r"model has no sparsity_manifest\.json: pass folders of"):
        symprune("report", project / "model")
