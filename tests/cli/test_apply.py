"""``symprune apply`` makes the pruned checkpoint from the dense one and masks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from symprune_lightning import load_masks
from symprune_lightning.checkpoints.manifest import MANIFEST, read_manifest
from tests.cli.commands import small
from tests.models import gpt2


def test_masks_give_the_same_checkpoint(project, symprune, capsys):
    symprune("prune", "--config", "wanda", *small(project), "--output", project / "out")
    arguments = ["apply", "--model", project / "model"]
    for number, masks in enumerate((project / "out", project / "out/symprune/masks.safetensors")):
        output = project / f"applied-{number}"
        symprune(*arguments, "--masks", masks, "--output", output)
        assert f"checkpoint: {output}\n" in capsys.readouterr().out
        symprune("verify", output, "--skip_perplexity")
        for file in ("model.safetensors", "tokenizer.json"):
            assert (output / file).read_bytes() == (project / "out" / file).read_bytes()
        applied, expected = load_masks(output), load_masks(project / "out")
        assert applied.keys() == expected.keys()
        assert all(torch.equal(applied[layer], mask) for layer, mask in expected.items())
        manifest = read_manifest(output)
        assert manifest["settings"] == {"masks": str(masks)}
        assert manifest["sparsity"] == read_manifest(project / "out")["sparsity"]


def test_inputs_that_do_not_fit(project, symprune):
    output = project / "out"
    arguments = ["apply", "--model", project / "model", "--output", output, "--masks"]
    with pytest.raises(SystemExit, match="symprune: no masks at"):
        symprune(*arguments, project / "nowhere")
    symprune("prune", "--config", "magnitude", *small(project), "--output", project / "pruned")
    gpt2().save_pretrained(project / "other")
    arguments[2] = project / "other"
    with pytest.raises(SystemExit, match="do the masks belong to another model"):
        symprune(*arguments, project / "pruned")
    assert not output.exists()
    # the destination is checked before anything is loaded
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit, match=f"has no {MANIFEST}"):
        symprune(*arguments, project / "nowhere")


def test_packed_copies(project, symprune, capsys):
    output, packed, again = (str(project / name) for name in ("out", "packed", "again"))
    symprune("prune", "--config", "wanda", *small(project), "--output", output)
    symprune("pack", output, packed)
    assert f"packed copy: {packed}, " in capsys.readouterr().out
    symprune("unpack", packed, again)
    assert f"checkpoint: {again}" in capsys.readouterr().out
    weights = (load_file(f"{folder}/model.safetensors") for folder in (output, again))
    before, after = weights
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_masks_only(project, symprune, capsys):
    output, copy, again = (str(project / name) for name in ("out", "copy", "again"))
    symprune("prune", "--config", "wanda", *small(project), "--output", output)
    symprune("pack", output, copy, "--masks_only")
    symprune("apply", "--masks", copy, "--output", again)
    assert f"checkpoint: {again}, every tensor as in" in capsys.readouterr().out
    for file in ("model.safetensors", "README.md", "sparsity_manifest.json"):
        assert (project / "again" / file).read_bytes() == (project / "out" / file).read_bytes()
    with pytest.raises(SystemExit, match="has its own dtypes: leave out --dtype"):
        symprune("apply", "--masks", copy, "--output", again, "--dtype", "float16")
    with pytest.raises(SystemExit, match=r"does not name the dense model: pass --model"):
        symprune("apply", "--masks", output, "--output", project / "other")
    with pytest.raises(SystemExit, match="2"):
        symprune("pack", output, project / "other", "--base", project / "model")
    assert "--base and --trust_remote_code are for --masks_only" in capsys.readouterr().err
