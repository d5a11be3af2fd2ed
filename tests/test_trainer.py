"""Callbacks for one call, the checkpoints of ``prune``, and pruning a streamed checkpoint."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from symprune_lightning import (
    CausalLMModule,
    PruningWarning,
    Report,
    SymPrune,
    ZeroShot,
    load_masks,
)
from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.engine.files import hidden_sibling
from tests.callbacks.examples import (
    HookRecorder,
    Regression,
    assert_records_the_run,
    language_module,
    loader,
    quiet_trainer,
    sparsity,
    text_data,
)
from tests.models import build

EVALUATION = ["on_validation_epoch_start", "on_validation_end"]
PRUNING = ["on_pruning_start", *["on_layer_scored", "on_layer_pruned"] * 14, "on_pruning_end"]


class StageRecorder(pl.Callback):
    def __init__(self):
        self.stages = []

    def on_validation_start(self, trainer, pl_module):
        self.stages.append("validate")

    def on_test_start(self, trainer, pl_module):
        self.stages.append("test")

    def on_fit_start(self, trainer, pl_module):
        self.stages.append("fit")


def test_callbacks_of_a_call_are_used_for_that_call():
    recorder, permanent = StageRecorder(), StageRecorder()
    trainer = quiet_trainer(
        callbacks=[permanent], max_steps=1, num_sanity_val_steps=0, limit_val_batches=1
    )
    before = list(trainer.callbacks)
    trainer.validate(Regression(), loader(), callbacks=recorder, verbose=False)
    trainer.test(Regression(), loader(), callbacks=[recorder], verbose=False)
    trainer.fit(Regression(), loader(), callbacks=[recorder])
    trainer.validate(Regression(), loader(), verbose=False)
    assert recorder.stages == ["validate", "test", "fit"]
    assert permanent.stages == ["validate", "test", "fit", "validate"]
    assert trainer.callbacks == before


def test_callbacks_are_restored_after_an_error():
    trainer = quiet_trainer()
    before = list(trainer.callbacks)
    with pytest.raises(ValueError, match="no calibration data"):
        trainer.validate(Regression(), loader(), callbacks=SymPrune(), verbose=False)
    assert trainer.callbacks == before


class SparsityAtCheckpoint(Checkpoint):
    """Records the sparsity of the module when checkpoints write the last file."""

    def on_train_end(self, trainer, pl_module):
        self.sparsity = sparsity(pl_module)


@pytest.mark.parametrize("order", [1, -1])
def test_checkpoints_come_after_pruning_whatever_the_order(order):
    checkpoint, callback = SparsityAtCheckpoint(), SymPrune(when="fit_end", calibration=loader())
    callbacks = [checkpoint, callback][::order]
    quiet_trainer(max_steps=1).fit(Regression(), loader(), callbacks=callbacks)
    assert checkpoint.sparsity == 0.5


# hooks


def test_hooks_of_validate():
    callback, recorder, model = SymPrune(refine="exactswap"), HookRecorder(), language_module()
    trainer = quiet_trainer(callbacks=[recorder])
    trainer.validate(model, datamodule=text_data(), callbacks=callback, verbose=False)
    dense = [*EVALUATION, "on_dense_evaluation_end"]
    assert recorder.names == [*dense, *PRUNING, *EVALUATION]
    assert recorder.arguments("on_dense_evaluation_end") == [(callback.dense_metrics,)]
    layers = [name for name, _ in model.model.named_modules() if name in callback.result.masks]
    assert_records_the_run(recorder, layers, callback.result)


def test_an_earlier_checkpoint_is_named_before_it_is_replaced(tmp_path, caplog):
    for run in (1, 2):
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch"):
            quiet_trainer().prune(
                language_module(),
                datamodule=text_data(),
                output=str(tmp_path / "out"),
                callbacks=SymPrune(),
            )
        named = f"the checkpoint {tmp_path / 'out'} is replaced when the run is complete"
        assert (named in caplog.text) == (run == 2)


def test_hooks_of_prune(tmp_path):
    callback, recorder, model = SymPrune(refine="exactswap"), HookRecorder(), language_module()
    result = quiet_trainer().prune(
        model,
        datamodule=text_data(),
        output=str(tmp_path / "out"),
        callbacks=[callback, recorder],
    )
    dense = [*EVALUATION, "on_dense_evaluation_end"]
    assert recorder.names == [*dense, *PRUNING, *EVALUATION, "on_checkpoint_saved"]
    layers = [name for name, _ in model.model.named_modules() if name in result.masks]
    assert_records_the_run(recorder, layers, result)
    ((path, manifest),) = recorder.arguments("on_checkpoint_saved")
    assert path == tmp_path / "out"
    assert json.loads(json.dumps(manifest)) == read_manifest(path)
    assert manifest["metrics"]["dense"] == recorder.arguments("on_dense_evaluation_end")[0][0]


def test_hooks_without_a_baseline_or_an_output():
    recorder = HookRecorder()
    callbacks = [SymPrune(baseline=False), recorder]
    quiet_trainer().prune(language_module(), datamodule=text_data(), callbacks=callbacks)
    assert recorder.names == [*PRUNING, *EVALUATION]


# checkpoints of prune


def test_prune_writes_a_checkpoint_that_transformers_loads(tmp_path):
    model, callback = language_module(), SymPrune(refine="r2dsnot")
    dense = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    result = quiet_trainer().prune(
        model, datamodule=text_data(), output=str(tmp_path / "out"), callbacks=callback
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, model.model.get_parameter(name))
    for layer, mask in result.masks.items():
        assert torch.equal(loaded.get_submodule(layer).weight != 0, mask)
    assert torch.equal(loaded.model.embed_tokens.weight, dense["model.embed_tokens.weight"])
    assert torch.equal(loaded.lm_head.weight, dense["lm_head.weight"])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 64
    assert load_masks(tmp_path / "out") == result.masks


def test_manifest(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "dense")
    module, callback = CausalLMModule(str(tmp_path / "dense")), SymPrune(sparsity=0.25)
    data = text_data()
    result = quiet_trainer().prune(
        module, datamodule=data, output=str(tmp_path / "out"), callbacks=callback
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest["model"] == str(tmp_path / "dense")
    assert manifest["settings"]["score"] == {"name": "RIA", "alpha": 0.5}
    assert manifest["data"]["sha256"] == data.hashes
    assert manifest["data"]["seed"] == 0
    assert manifest["sparsity"] == result.sparsity == 0.25
    assert [x["name"] for x in manifest["layers"]] == list(result.masks)
    assert manifest["metrics"]["dense"] == callback.dense_metrics
    assert manifest["metrics"]["pruned"]["val_perplexity"] > 0
    assert {"torch", "transformers", "lightning", "python"} <= set(manifest["versions"])
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in saved, "tied weights are stored once"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_prune_needs_one_pruning_callback():
    for callbacks, count in [
        ([], 0),
        ([SymPrune(), SymPrune()], 2),
        ([SymPrune(when="test")], 0),
    ]:
        with pytest.raises(ValueError, match=f"there are {count}"):
            quiet_trainer().prune(language_module(), datamodule=text_data(), callbacks=callbacks)


def test_output_is_checked_before_anything_runs(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    model, recorder = language_module(), HookRecorder()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        quiet_trainer().prune(
            model,
            datamodule=text_data(),
            output=str(tmp_path),
            callbacks=[SymPrune(), recorder],
        )
    assert recorder.calls == []
    assert (model.model.model.layers[0].mlp.up_proj.weight != 0).all()


def test_output_needs_a_transformers_model(tmp_path):
    with pytest.raises(TypeError, match="writes transformers models, and Regression is not one"):
        quiet_trainer().prune(
            Regression(),
            loader(),
            output=str(tmp_path / "out"),
            callbacks=SymPrune(calibration=loader()),
        )
    assert not (tmp_path / "out").exists()


# streamed checkpoints


@pytest.fixture
def dense(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def stream(dense, output, *callbacks, **options):
    return quiet_trainer(**options).prune(
        CausalLMModule(dense),
        datamodule=text_data(),
        output=str(output),
        stream=True,
        callbacks=list(callbacks),
    )


def test_hooks_of_a_streamed_run(dense, tmp_path):
    callback, recorder = SymPrune(refine="exactswap"), HookRecorder()
    result = stream(dense, tmp_path / "sparse", callback, recorder)
    assert recorder.names == ["on_stream_start", *PRUNING, "on_checkpoint_saved"]
    assert_records_the_run(recorder, list(result.masks), result)
    ((path, manifest),) = recorder.arguments("on_checkpoint_saved")
    assert path == tmp_path / "sparse"
    assert json.loads(json.dumps(manifest)) == read_manifest(path)
    assert manifest["settings"] == json.loads(json.dumps(callback.settings))


def test_a_streamed_run_equals_one_in_memory(dense, tmp_path):
    options = {"score": "wanda", "refine": "exactswap"}
    callback, in_memory = SymPrune(**options), SymPrune(**options)
    result = stream(dense, tmp_path / "sparse", callback)
    quiet_trainer().prune(
        CausalLMModule(dense),
        datamodule=text_data(),
        output=str(tmp_path / "expected"),
        callbacks=in_memory,
    )
    assert callback.result is result
    assert callback.seconds > 0
    assert len(result.masks) == 14
    assert result.masks == in_memory.result.masks
    assert load_masks(tmp_path / "sparse") == load_masks(tmp_path / "expected") == result.masks
    sparse, expected = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("sparse", "expected")
    )
    for name, weight in expected.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], weight), name
    manifests = [read_manifest(tmp_path / name) for name in ("sparse", "expected")]
    for key in ("model", "settings", "data", "sparsity"):
        assert manifests[0][key] == manifests[1][key], key
    assert manifests[0]["metrics"] == {"dense": {}, "pruned": {}}
    assert not hidden_sibling(tmp_path / "sparse", "journal").exists()


def test_the_dtype_of_a_module_has_no_effect_on_a_streamed_run(dense, tmp_path):
    module = CausalLMModule(dense, dtype="bfloat16")
    with pytest.warns(PruningWarning, match="dtype='bfloat16' of the module has no effect"):
        quiet_trainer().prune(
            module,
            datamodule=text_data(),
            output=str(tmp_path / "out"),
            stream=True,
            callbacks=SymPrune(),
        )


def test_a_module_can_be_evaluated_after_a_streamed_run(dense, tmp_path):
    module, data, trainer = CausalLMModule(dense), text_data(), quiet_trainer()
    before = list(trainer.callbacks)
    trainer.prune(
        module, datamodule=data, output=str(tmp_path / "out"), stream=True, callbacks=SymPrune()
    )
    assert module.model is None, "the weights are in the output only"
    assert trainer.callbacks == before
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    (expected,) = quiet_trainer().validate(
        CausalLMModule(dense), datamodule=text_data(), verbose=False
    )
    assert metrics == expected


@pytest.mark.parametrize("order", [1, -1])
def test_the_report_of_a_streamed_run(dense, tmp_path, order):
    callbacks = [Report(), SymPrune(refine="exactswap")][::order]
    stream(dense, tmp_path / "sparse", *callbacks)
    page = (tmp_path / "sparse" / "report.html").read_text()
    images = {path.stem for path in (tmp_path / "sparse" / "symprune").glob("*.png")}
    assert images == {"error", "swaps", "scores", "masks", "time"}
    assert page.count("data:image/png;base64,") == len(images)
    for report in read_manifest(tmp_path / "sparse")["layers"]:
        assert report["name"] in page
    assert "Generated text" not in page


def test_fast_dev_run_limits_the_batches_of_a_streamed_run(dense, tmp_path):
    callback = SymPrune()
    stream(dense, tmp_path / "all", callback)
    assert {report.tokens for report in callback.result.layers} == {6 * 16}
    stream(dense, tmp_path / "two", callback, fast_dev_run=2)
    assert {report.tokens for report in callback.result.layers} == {2 * 2 * 16}


def test_calibration_argument_of_a_streamed_run(dense, tmp_path):
    callback = SymPrune(calibration=[{"input_ids": torch.arange(3, 13)[None]}])
    stream(dense, tmp_path / "sparse", callback)
    assert {report.tokens for report in callback.result.layers} == {10}


class FirstTokens(CausalLMModule):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {name: x[:, :5] for name, x in batch.items()}


@pytest.mark.parametrize(("module_class", "tokens"), [(FirstTokens, 5), (CausalLMModule, 16)])
@pytest.mark.parametrize("used", [False, True])
def test_batches_of_a_streamed_run_pass_the_hooks_of_its_module(
    dense, tmp_path, module_class, tokens, used
):
    """Not those of a module that the Trainer ran before."""
    callback, trainer, data = SymPrune(), quiet_trainer(), text_data()
    if used:
        other = FirstTokens if module_class is CausalLMModule else CausalLMModule
        trainer.validate(other(dense), datamodule=data, verbose=False)
    trainer.prune(
        module_class(dense),
        datamodule=data,
        output=str(tmp_path / "out"),
        stream=True,
        callbacks=callback,
    )
    assert {report.tokens for report in callback.result.layers} == {6 * tokens}


def test_zero_shot_tasks_of_a_streamed_run_are_refused(dense, tmp_path):
    message = "ZeroShot needs the full model in memory, but a streamed checkpoint is not evaluated"
    with pytest.raises(ValueError, match=message):
        stream(dense, tmp_path / "sparse", SymPrune(), ZeroShot(["arc_easy"]))
    assert not (tmp_path / "sparse").exists()


def test_streaming_on_several_processes_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match="stream=True runs on one process: use devices=1"):
        stream(dense, tmp_path / "sparse", SymPrune(), devices=2, strategy="ddp")
    assert not (tmp_path / "sparse").exists()


def test_arguments_that_streaming_needs(dense, tmp_path):
    options = {"stream": True, "callbacks": SymPrune()}
    for arguments in ({"output": str(tmp_path / "out")}, {"datamodule": text_data()}):
        with pytest.raises(ValueError, match="needs an output folder and a CalibrationDataModule"):
            quiet_trainer().prune(CausalLMModule(dense), **arguments, **options)
    with pytest.raises(ValueError, match="needs a CausalLMModule that is not loaded yet"):
        quiet_trainer().prune(
            language_module(), datamodule=text_data(), output=str(tmp_path / "out"), **options
        )
