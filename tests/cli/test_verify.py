"""``symprune verify`` accepts what was written, and detects any change."""

from __future__ import annotations

import importlib.metadata
import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from safetensors.torch import load_file, save_file

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    StreamedCheckpoint,
    SymPrune,
    Trainer,
    export_model,
    load_masks,
    prune_model,
    save_masks,
)
from symprune_lightning.checkpoints.manifest import MANIFEST, build_manifest
from symprune_lightning.cli.verify import print_checks, verify
from symprune_lightning.errors import VerificationError
from tests.cli.commands import small
from tests.models import LANGUAGE, VOCABULARY, batches, build
from tests.texts import WORDS, texts, tokenizer

DOWN = "model.layers.0.mlp.down_proj"


def write(folder: Path, evaluation: Any = None, **options: Any) -> Path:
    """Write a checkpoint with a Trainer, from data in files."""
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
    several = {name: str(tmp_path / f"{name}.txt") for name in ("some", "more")}
    for seed, path in enumerate(several.values()):
        Path(path).write_text(random_texts(seed))
    written = write(tmp_path, evaluation=several)
    assert outcomes(written)["perplexity"] is True
    Path(several["more"]).write_text(random_texts(2))
    assert outcomes(written)["perplexity"] is None


def random_texts(seed: int) -> str:
    generator = random.Random(seed)
    return "\n\n".join(" ".join(generator.choices(WORDS[4:], k=30)) for _ in range(40))


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


def outcomes(folder: Path, **options: Any) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verify(str(folder), **options)}


def test_a_checkpoint_passes(written, capsys):
    print_checks(str(written))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[0] for line in lines] == ["ok"] * 7
    assert "14 layers are zero" in "\n".join(lines)
    assert lines[-1].startswith("    ok  perplexity: ")


def test_contents_of_a_checkpoint(written):
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
    # inference servers load all safetensors of the top folder as weights
    assert [f.name for f in written.glob("*.safetensors")] == ["model.safetensors"]
    manifest = json.loads((written / MANIFEST).read_text())
    card = (written / "README.md").read_text()
    assert "50.0 % of the weights" in card
    assert "| score | `Wanda` |" in card
    assert f"`{manifest['metrics']['pruned']['val_perplexity']:.4f}`" in card
    assert "no faster" in card


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def failure(folder: Path, name: str, **options: Any) -> str:
    checks = verify(str(folder), **options)
    assert checks[-1].name == name, checks
    assert checks[-1].passed is False
    with pytest.raises(VerificationError, match=name):
        print_checks(str(folder), **options)
    return checks[-1].message


def test_a_revived_weight(folder):
    weights = load_file(folder / "model.safetensors")
    row, column = (weights[f"{DOWN}.weight"] == 0).nonzero()[7].tolist()
    weights[f"{DOWN}.weight"][row, column] = 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = failure(folder, "zeros and sparsity")
    assert message == f"layer {DOWN}: 1 weights are not zero although its mask prunes them"


def test_an_additional_zero_after_training_is_no_error(folder):
    """In half precision an optimizer step can round a kept weight to zero."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors[f"{DOWN}.weight"]
    weight[tuple(weight.nonzero()[0])] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert outcomes(folder, perplexity=False)["zeros and sparsity"] is False
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["distillation"] = {"steps": 1}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert outcomes(folder, perplexity=False)["zeros and sparsity"] is True


def test_an_additional_zero(folder):
    weights = load_file(folder / "model.safetensors")
    row, column = (weights[f"{DOWN}.weight"] != 0).nonzero()[7].tolist()
    weights[f"{DOWN}.weight"][row, column] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"layer {DOWN}: 1025 of 2048 weights are zero, but" in failure(
        folder, "zeros and sparsity"
    )


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            lambda m: m["layers"][0].update(sparsity=0.4),
            "zeros and sparsity",
            "states a sparsity of 0.4",
        ),
        (lambda m: m.update(sparsity=0.51), "zeros and sparsity", f"{MANIFEST} states 0.51"),
        (lambda m: m["layers"].pop(), "zeros and sparsity", "does not list"),
        (lambda m: m["layers"].clear(), "manifest", "lists no layers"),
        (lambda m: m.pop("layers"), "manifest", "lists no layers"),
        (
            lambda m: m["metrics"]["pruned"].update(val_perplexity=3.0),
            "perplexity",
            "3.0000 is recorded",
        ),
    ],
)
def test_a_wrong_manifest(folder, change, name, message):
    edit(folder, change)
    assert message in failure(folder, name)


@pytest.mark.parametrize("version", [0, 2, None])
def test_a_manifest_of_another_format_version(folder, version):
    edit(folder, lambda m: m.update(format_version=version))
    message = failure(folder, "manifest")
    assert f"{MANIFEST} has format version {version}, this version of" in message
    writer = importlib.metadata.version("symprune-lightning")
    assert message.endswith(f"reads version 1: use the version that wrote it ({writer})")


def test_a_manifest_that_is_not_json(folder):
    (folder / MANIFEST).write_text("{")
    assert failure(folder, "manifest").startswith(f"{folder / MANIFEST} is not valid JSON: ")


def test_a_missing_mask(folder):
    masks = {name: mask for name, mask in load_masks(folder).items() if name != DOWN}
    save_masks(folder / "symprune" / "masks.safetensors", masks)
    assert f"lists {DOWN}, for which there is no mask" in failure(folder, "zeros and sparsity")
    (folder / "symprune" / "masks.safetensors").unlink()
    assert "no masks at" in failure(folder, "zeros and sparsity")


def test_a_truncated_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    assert "model.safetensors is damaged or truncated" in failure(folder, "files")
    (folder / "model.safetensors").unlink()
    assert "no safetensors" in failure(folder, "files")


def test_a_quantization_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "has a quantization_config" in failure(folder, "configuration")


def test_a_missing_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[f"{DOWN}.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"missing keys: {DOWN}.weight" in failure(folder, "loads in transformers")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert f"no {MANIFEST} in" in failure(tmp_path, "manifest")


def test_unavailable_data(folder, tmp_path):
    edit(folder, lambda m: m["data"].update(dataset=str(tmp_path / "gone.txt")))
    assert outcomes(folder)["perplexity"] is None
    edit(folder, lambda m: m["data"].update(dataset={"iterable": "list"}))
    assert outcomes(folder)["perplexity"] is None
    assert "perplexity" not in outcomes(folder, perplexity=False)


def test_shards_are_no_larger_than_those_of_the_source(tmp_path):
    written = write(tmp_path, max_shard_size="30KB")
    sizes = [
        max(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (tmp_path / "dense", written)
    ]
    assert len(list(written.glob("*.safetensors"))) > 2
    assert sizes[1] <= sizes[0] + 1000  # plus the header of a file
    assert all(outcomes(written).values())
    last = sorted(written.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    assert f"{last.name} is damaged" in failure(written, "files")
    last.unlink()
    assert "disagree on" in failure(written, "files")


@pytest.mark.parametrize("name", LANGUAGE)
def test_exported_models_pass(name, tmp_path):
    model = build(name)
    prune_model(model, batches(name))
    export_model(model, tmp_path / "out")
    checks = outcomes(tmp_path / "out")
    assert checks.pop("perplexity") is None
    assert all(checks.values()), checks


def bert() -> tf.BertConfig:
    return tf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


def t5() -> tf.PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return tf.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "tied"),
    [
        (lambda: build("vit"), "none in this model"),
        (lambda: tf.BertModel(bert()), "none in this model"),
        (lambda: tf.BertForSequenceClassification(bert()), "none in this model"),
        (lambda: tf.BertForMaskedLM(bert()), "cls.predictions.decoder.weight"),
        (t5, "decoder.embed_tokens.weight, encoder.embed_tokens.weight, lm_head.weight"),
    ],
    ids=["image-classification", "encoder", "text-classification", "masked-lm", "seq2seq"],
)
def test_models_that_are_not_causal_pass(make, tied, tmp_path):
    model = make().eval()
    inputs = batches("vit" if model.main_input_name == "pixel_values" else "llama")
    metrics = {}
    if isinstance(model, tf.T5ForConditionalGeneration):
        inputs = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in inputs]
        metrics = {"val_perplexity": 5.0}
    prune_model(model, inputs)
    export_model(model, tmp_path / "out", metrics=metrics)
    checks = {check.name: check for check in verify(str(tmp_path / "out"))}
    reason = "it is not that of a causal" if metrics else "no perplexity is recorded"
    assert checks.pop("perplexity").message.startswith(f"not checked: {reason}")
    assert all(check.passed for check in checks.values()), checks
    assert tied in checks["tied weights"].message


def test_a_tied_weight_with_its_own_values(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    checks = {check.name: check for check in verify(str(folder))}
    message = "lm_head.weight is no longer tied to model.embed_tokens.weight"
    assert checks["tied weights"].message == message
    assert checks["tied weights"].passed is False


def test_streamed_checkpoints_pass(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    with StreamedCheckpoint(tmp_path / "dense", tmp_path / "out") as checkpoint:
        result = prune_model(checkpoint.model, batches(), placement=checkpoint)
        checkpoint.save(build_manifest(result, model=str(tmp_path / "dense"), settings={}))
    checks = outcomes(tmp_path / "out")
    assert checks.pop("perplexity") is None
    assert all(checks.values()), checks


def test_the_command(project, symprune, capsys):
    symprune("prune", "--config", "wanda", *small(project), "--output", project / "out")
    capsys.readouterr()
    symprune("verify", project / "out")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok"] * 7
    symprune("verify", project / "out", "--skip_perplexity")
    assert "perplexity" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"symprune: .*does not match its manifest: manifest"):
        symprune("verify", project / "model")
    assert "FAILED  manifest: no sparsity_manifest.json in" in capsys.readouterr().out


def test_there_is_no_folder(symprune, tmp_path):
    with pytest.raises(SystemExit, match="symprune: there is no folder"):
        symprune("verify", tmp_path / "nowhere")
