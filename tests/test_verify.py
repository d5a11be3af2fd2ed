"""A checkpoint is proved to be what its manifest says, and nothing else passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    StreamedCheckpoint,
    SymPrune,
    Trainer,
    load_masks,
    prune_model,
)
from symprune_lightning.export import MANIFEST, export_model
from symprune_lightning.masks import save_masks
from symprune_lightning.verify import VerificationError, report, verify
from tests.models import LANGUAGE, batches, build
from tests.texts import texts, tokenizer

DOWN = "model.layers.0.mlp.down_proj"


def write(folder: Path, evaluation: Any = None, **options: Any) -> Path:
    """A checkpoint written by a Trainer, with data that can be had again."""
    tokenizer().save_pretrained(folder / "dense")
    build("llama").save_pretrained(folder / "dense", **options)
    (folder / "texts.txt").write_text("\n\n".join(texts()))
    data = CalibrationDataModule(
        str(folder / "texts.txt"),
        str(folder / "dense"),
        sequences=4,
        sequence_length=16,
        evaluation=evaluation,
        evaluation_sequences=5,
        batch_size=2,
    )
    Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).prune(
        CausalLMModule(str(folder / "dense")),
        datamodule=data,
        callbacks=SymPrune("wanda"),
        output=str(folder / "out"),
    )
    return folder / "out"


def test_several_evaluation_sets(tmp_path, capsys):
    (tmp_path / "more.txt").write_text("\n\n".join(texts()[10:]))
    several = {name: str(tmp_path / f"{name}.txt") for name in ("texts", "more")}
    written = write(tmp_path, evaluation=several)
    assert outcome(written)["perplexity"] is True
    (tmp_path / "more.txt").write_text("\n\n".join(texts()[:10]))
    assert outcome(written)["perplexity"] is None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def folder(written, tmp_path):
    copy = tmp_path / "out"
    for file in written.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(written)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(written)).write_bytes(file.read_bytes())
    return copy


def outcome(folder: Path, **options: Any) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verify(str(folder), **options)}


def test_all_is_well(written, capsys):
    report(str(written))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[0] for line in lines] == ["ok"] * 7
    assert "14 layers are zero" in "\n".join(lines)
    assert lines[-1].startswith("    ok  perplexity: ")


def test_what_a_checkpoint_holds(written):
    assert sorted(str(f.relative_to(written)) for f in written.rglob("*") if f.is_file()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        MANIFEST,
        "symprune/masks.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    # the masks are no weights: a server that loads all safetensors of the folder meets none
    assert [f.name for f in written.glob("*.safetensors")] == ["model.safetensors"]
    manifest = json.loads((written / MANIFEST).read_text())
    card = (written / "README.md").read_text()
    assert "50.0 % of the weights" in card
    assert "| score | `{'name': 'Wanda'}` |" in card
    assert f"`{manifest['metrics']['pruned']['val_perplexity']:.4f}`" in card
    assert "no faster" in card


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def found(folder: Path, name: str, **options: Any) -> str:
    checks = verify(str(folder), **options)
    assert checks[-1].name == name, checks
    assert checks[-1].passed is False
    with pytest.raises(VerificationError, match=name):
        report(str(folder), **options)
    return checks[-1].found


def test_a_flipped_zero(folder):
    weights = load_file(folder / "model.safetensors")
    row, column = (weights[f"{DOWN}.weight"] == 0).nonzero()[7].tolist()
    weights[f"{DOWN}.weight"][row, column] = 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = found(folder, "zeros and sparsity")
    assert said == f"layer {DOWN}: 1 weights are not zero that its mask says are pruned"


def test_a_zero_too_many(folder):
    weights = load_file(folder / "model.safetensors")
    row, column = (weights[f"{DOWN}.weight"] != 0).nonzero()[7].tolist()
    weights[f"{DOWN}.weight"][row, column] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"layer {DOWN}: 1025 of 2048 weights are zero, but" in found(
        folder, "zeros and sparsity"
    )


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (
            lambda m: m["layers"][0].update(sparsity=0.4),
            "zeros and sparsity",
            "says a share of 0.4",
        ),
        (lambda m: m.update(sparsity=0.51), "zeros and sparsity", f"{MANIFEST} says 0.51"),
        (lambda m: m["layers"].pop(), "zeros and sparsity", "does not list"),
        (lambda m: m["layers"].clear(), "manifest", "lists no layers"),
        (lambda m: m.pop("layers"), "manifest", "can't be read"),
        (
            lambda m: m["metrics"]["pruned"].update(val_perplexity=3.0),
            "perplexity",
            "recorded is 3.0000",
        ),
    ],
)
def test_a_wrong_manifest(folder, change, name, said):
    edit(folder, change)
    assert said in found(folder, name)


def test_a_mask_that_is_gone(folder):
    masks = load_masks(folder)
    del masks[DOWN]
    save_masks(folder / "symprune" / "masks.safetensors", masks)
    assert f"lists {DOWN}, for which there is no mask" in found(folder, "zeros and sparsity")
    (folder / "symprune" / "masks.safetensors").unlink()
    assert "no masks at" in found(folder, "zeros and sparsity")


def test_a_file_cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    assert "model.safetensors is damaged or cut short" in found(folder, "files")
    (folder / "model.safetensors").unlink()
    assert "no safetensors" in found(folder, "files")


def test_a_quantization_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "has a quantization_config" in found(folder, "configuration")


def test_a_weight_that_is_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[f"{DOWN}.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"missing keys: {DOWN}.weight" in found(folder, "loads in transformers")


def test_no_checkpoint_at_all(tmp_path):
    assert f"no {MANIFEST} in" in found(tmp_path, "manifest")


def test_data_that_is_not_at_hand(folder, tmp_path):
    edit(folder, lambda m: m["data"].update(dataset=str(tmp_path / "gone.txt")))
    assert outcome(folder)["perplexity"] is None
    edit(folder, lambda m: m["data"].update(dataset={"iterable": "list"}))
    assert outcome(folder)["perplexity"] is None
    assert "perplexity" not in outcome(folder, perplexity=False)


def test_sharded_files_are_as_small_as_those_of_the_source(tmp_path):
    written = write(tmp_path, max_shard_size="30KB")
    sizes = [
        max(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (tmp_path / "dense", written)
    ]
    assert len(list(written.glob("*.safetensors"))) > 2
    assert sizes[1] <= sizes[0] + 1000  # the head of a file comes on top
    assert all(outcome(written).values())
    last = sorted(written.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert f"{last.name} is damaged" in found(written, "files")
    last.unlink()
    assert "disagree on" in found(written, "files")


@pytest.mark.parametrize("name", LANGUAGE)
def test_architectures_exported(name, tmp_path):
    model = build(name)
    with pytest.raises(ValueError, match="has zeros: prune it first"):
        export_model(model, tmp_path / "out")
    prune_model(model, batches(name))
    export_model(model, tmp_path / "out", settings={"note": "a|b"})
    checks = outcome(tmp_path / "out")
    assert checks.pop("perplexity") is None
    assert all(checks.values()), checks
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert r"| note | `a\|b` |" in (tmp_path / "out" / "README.md").read_text()


def test_streamed(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with StreamedCheckpoint(tmp_path / "dense", tmp_path / "out") as checkpoint:
        result = prune_model(checkpoint, batches())
        layers = [{"name": x.name, "sparsity": x.sparsity} for x in result.layers]
        checkpoint.finish({"sparsity": result.sparsity, "layers": layers})
    checks = outcome(tmp_path / "out")
    assert checks.pop("perplexity") is None
    assert all(checks.values()), checks


def test_the_license_of_the_base(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    card = "---\nlicense: apache-2.0\n---\n\n# A model\n"
    (tmp_path / "dense" / "README.md").write_text(card)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    prune_model(model, batches())
    export_model(model, tmp_path / "out")
    assert "license: apache-2.0\n" in (tmp_path / "out" / "README.md").read_text()
