"""Stages, metrics and observers of pruning callbacks, under both Trainers."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException

from symprune_lightning import (
    CalibrationDataModule,
    CubicSchedule,
    MaskedFinetuning,
    PruneResult,
    PruningCallback,
    PruningHooks,
    PruningMethod,
    RunOptions,
    SymPrune,
    Trainer,
    prune_model,
    prune_with,
)
from symprune_lightning.callbacks.termination import StopOnSigterm
from symprune_lightning.errors import PruningWarning
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
from tests.texts import texts


def zeros(model):
    return {n: p == 0 for n, p in model.named_parameters() if p.dim() == 2}


def test_both_trainers_and_prune_model_give_the_same_masks():
    own, stock, plain = language_module(), language_module(), build("llama")
    quiet_trainer().validate(
        own, datamodule=text_data(), callbacks=[SymPrune(sparsity=0.5)], verbose=False
    )
    callback = SymPrune(sparsity=0.5)
    quiet_trainer(pl.Trainer, callbacks=[callback]).validate(
        stock, datamodule=text_data(), verbose=False
    )
    result = prune_model(plain, text_data().calibration_dataloader(), sparsity=0.5)
    a, b, c = zeros(own.model), zeros(stock.model), zeros(plain)
    assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], c[n]) for n in a)
    assert callback.result.masks == result.masks, "names are those of the checkpoint"


@pytest.mark.parametrize("trainer_class", [Trainer, pl.Trainer])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_fit_after_validate_in_the_same_process(trainer_class, inference_mode):
    model = language_module()
    trainer = quiet_trainer(trainer_class, max_steps=3, inference_mode=inference_mode)
    callback = SymPrune(refine="r2dsnot")
    if trainer_class is Trainer:
        trainer.validate(model, datamodule=text_data(), callbacks=callback, verbose=False)
    else:
        trainer.callbacks.append(callback)
        trainer.validate(model, datamodule=text_data(), verbose=False)
    before = model.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    assert (before == 0).sum() == before.numel() // 2
    is_attached = trainer_class is pl.Trainer
    with (
        pytest.warns(PruningWarning, match="not zero at the end") if is_attached else nullcontext()
    ):
        trainer.fit(model, text_data().calibration_dataloader(), text_data().val_dataloader())
    assert trainer.global_step == 3
    assert not torch.equal(model.model.model.layers[0].mlp.up_proj.weight, before)


# metrics


def test_metrics_before_and_after():
    callback, model, dense = SymPrune(sparsity=0.9), language_module(), language_module()
    (metrics,) = quiet_trainer().validate(
        model, datamodule=text_data(), callbacks=callback, verbose=False
    )
    (reference,) = quiet_trainer().validate(dense, datamodule=text_data(), verbose=False)
    assert callback.dense_metrics == reference
    assert callback.sparse_metrics == metrics
    assert metrics["val_perplexity"] != reference["val_perplexity"]
    assert metrics["val_loss"] == pytest.approx(
        torch.tensor(metrics["val_perplexity"]).log().item(), rel=1e-5
    )


def test_perplexity_is_that_of_the_pruned_model_over_all_tokens():
    model = language_module()
    (metrics,) = quiet_trainer().validate(
        model, datamodule=text_data(), callbacks=SymPrune(), verbose=False
    )
    ids = torch.cat([b["input_ids"] for b in text_data().val_dataloader()])
    loss = model.model(input_ids=ids, labels=ids).loss  # all sequences have the same length
    assert metrics["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_perplexity_of_several_named_sets():
    sets = {"low": [list(range(3, 19))] * 3, "high": [list(range(40, 56))] * 2}
    sizes = {"sequences": 2, "sequence_length": 16}
    texts = [list(range(20, 36))] * 2
    several = CalibrationDataModule(texts, evaluation=sets, evaluation_sequences=2, **sizes)
    callback, model = SymPrune(), language_module()
    metrics = quiet_trainer().validate(model, datamodule=several, callbacks=callback, verbose=False)
    single = {}
    for name, ids in sets.items():
        data = CalibrationDataModule(texts, evaluation=ids, evaluation_sequences=2, **sizes)
        (values,) = quiet_trainer().validate(model, datamodule=data, verbose=False)
        single[f"val_perplexity/{name}"] = values["val_perplexity"]
    for name, perplexity in single.items():
        assert callback.sparse_metrics[name] == pytest.approx(perplexity, rel=1e-6)
    mean = torch.tensor(list(single.values())).log().mean().exp()  # the sets have equal sizes
    assert callback.sparse_metrics["val_perplexity"] == pytest.approx(mean.item(), rel=1e-5)
    assert callback.dense_metrics.keys() == callback.sparse_metrics.keys()
    assert len(metrics) == 2
    loaders = list(several.test_dataloader().values())
    (first, _) = quiet_trainer().test(model, loaders, verbose=False)
    assert first["test_perplexity/1"] == pytest.approx(single["val_perplexity/high"], rel=1e-6)


def test_without_baseline_there_are_no_dense_metrics():
    callback = SymPrune(baseline=False)
    quiet_trainer().validate(
        language_module(), datamodule=text_data(), callbacks=callback, verbose=False
    )
    assert callback.dense_metrics == {}
    assert callback.sparse_metrics["val_perplexity"] > 0


# stages


def test_a_module_is_pruned_once_and_another_one_again():
    callback, first, second = SymPrune(), language_module(), language_module()
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(first, datamodule=text_data(), verbose=False)
    result = callback.result
    trainer.validate(first, datamodule=text_data(), verbose=False)
    assert callback.result is result
    trainer.validate(second, datamodule=text_data(), verbose=False)
    assert callback.result is not result


@pytest.mark.parametrize("when", ["fit_start", "fit_end"])
def test_pruning_in_fit(when):
    model, callback = Regression(), SymPrune(when=when, calibration=loader(), score="wanda")
    levels = []

    class Levels(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            levels.append(sparsity(pl_module))

        def on_sanity_check_end(self, trainer, pl_module):
            levels.append(sparsity(pl_module))

    callbacks = [callback, Levels(), *([MaskedFinetuning()] if when == "fit_start" else [])]
    quiet_trainer(max_steps=2).fit(model, loader(), loader(), callbacks=callbacks)
    assert levels[1] == (0.5 if when == "fit_start" else 0)
    assert callback.result.sparsity == 0.5
    assert callback.sparse_metrics == {}, "the pruned model was not evaluated"
    if when == "fit_end":
        assert levels == [0, 0, 0]
        assert sparsity(model) == 0.5


@pytest.mark.parametrize("when", ["validate", "test"])
def test_validation_inside_fit_does_not_prune(when):
    model = Regression()
    callback = SymPrune(when=when, calibration=loader())
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(model, loader(), loader())
    assert callback.result is None
    assert sparsity(model) == 0


def test_pruning_in_test_only():
    model, callback = Regression(), SymPrune(when="test", calibration=loader())
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(model, loader(), verbose=False)
    assert callback.result is None
    trainer.test(model, loader(), verbose=False)
    assert sparsity(model) == 0.5
    assert set(callback.dense_metrics) == {"val_loss"}


def test_dense_weights_that_are_loaded_again_are_pruned_again(tmp_path):
    model, callback = Regression(), SymPrune(calibration=loader())
    quiet_trainer(max_steps=1).fit(model, loader())
    trainer = quiet_trainer(callbacks=[callback])
    trainer.strategy.connect(model)
    torch.save(
        {"state_dict": model.state_dict(), "pytorch-lightning_version": pl.__version__},
        tmp_path / "dense.ckpt",
    )
    for _ in range(2):
        trainer.validate(model, loader(), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
        assert sparsity(model) == 0.5
    dense = dict(callback.dense_metrics)
    quiet_trainer(max_steps=2).fit(model, loader())
    assert not callback.has_pruned(model)
    trainer.validate(model, loader(), verbose=False)
    assert sparsity(model) == 0.5
    assert callback.dense_metrics != dense


def test_a_callback_that_has_pruned_can_be_pickled():
    callback = SymPrune(calibration=list(loader()))
    quiet_trainer().validate(Regression(), loader(), callbacks=callback, verbose=False)
    copy = pickle.loads(pickle.dumps(callback))
    assert copy.result.sparsity == 0.5
    assert copy.result.masks == callback.result.masks


def attention_and_mlp() -> list[SymPrune]:
    options = {"when": "fit_start", "calibration": list(loader()), "score": "magnitude"}
    return [SymPrune(only=["net.0"], **options), SymPrune(only=["net.2"], **options)]


def test_the_states_of_two_callbacks_in_one_checkpoint(tmp_path):
    """Resuming prunes only the layers of the callback that had not pruned them before."""
    first, second = attention_and_mlp()
    assert first.state_key != second.state_key
    kept = MaskedFinetuning()
    model, trainer = Regression(), quiet_trainer(max_epochs=1, callbacks=[first, second, kept])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    state = {"pruned": True, "step": -1, "initial_sparsity": None}
    own = {c.state_key: state for c in (first, second)}
    assert {key: states[key] for key in own} == own

    resumed = attention_and_mlp()
    quiet_trainer(max_epochs=2, callbacks=[*resumed, MaskedFinetuning()]).fit(
        Regression(), loader(), ckpt_path=tmp_path / "both.ckpt"
    )
    assert [callback.result for callback in resumed] == [None, None]

    trainer = quiet_trainer(max_epochs=1, callbacks=[attention_and_mlp()[0], MaskedFinetuning()])
    trainer.fit(Regression(), loader())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = attention_and_mlp()
    quiet_trainer(max_epochs=2, callbacks=[*resumed, MaskedFinetuning()]).fit(
        Regression(), loader(), ckpt_path=tmp_path / "first.ckpt"
    )
    assert resumed[0].result is None
    assert resumed[1].result.masks.keys() == {"net.2"}


# subclasses and observers


class HalfOfEachLayer(PruningCallback):
    """A user's own callback."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.calls = []

    @property
    def settings(self):
        return {"name": "half"}

    def prune(self, model, batches, fraction, options):
        self.calls.append((model, fraction, options))
        return prune_with(model, batches, PruningMethod(sparsity=0.5 * fraction), options)


def test_a_subclass_prunes_with_the_run_options_of_the_trainer(tmp_path):
    model, recorder = Regression(), HookRecorder()
    callback = HalfOfEachLayer(calibration=loader(), journal=tmp_path / "journal")
    quiet_trainer().validate(model, loader(), callbacks=[callback, recorder], verbose=False)
    ((target, fraction, options),) = callback.calls
    assert target is model
    assert fraction == 1
    assert isinstance(options, RunOptions)
    assert options.journal == tmp_path / "journal"
    observers = [hook for hook in options.hooks if not isinstance(hook, StopOnSigterm)]
    assert observers == [recorder]
    assert options.communicator.world_size == 1
    assert sparsity(model) == 0.5
    assert isinstance(callback.result, PruneResult)


def test_hooks_of_prune_model():
    recorder, model = HookRecorder(), build("llama")
    result = prune_model(
        model, text_data().calibration_dataloader(), refine="exactswap", hooks=[recorder]
    )
    by_layer = ["on_layer_scored", "on_layer_pruned"] * 14
    assert recorder.names == ["on_pruning_start", *by_layer, "on_pruning_end"]
    layers = [name for name, _ in model.named_modules() if name in result.masks]
    assert len(layers) == 14
    assert_records_the_run(recorder, layers, result)
    assert any(report.swaps for report in result.layers)


@pytest.mark.parametrize("recorder_first", [True, False])
def test_hooks_of_the_stock_trainer(recorder_first):
    callback, recorder, model = SymPrune(refine="exactswap"), HookRecorder(), language_module()
    callbacks = [recorder, callback] if recorder_first else [callback, recorder]
    quiet_trainer(pl.Trainer, callbacks=callbacks).validate(
        model, datamodule=text_data(), verbose=False
    )
    by_layer = ["on_layer_scored", "on_layer_pruned"] * 14
    evaluation = ["on_validation_epoch_start", "on_validation_end"]
    assert recorder.names == ["on_pruning_start", *by_layer, "on_pruning_end", *evaluation]
    layers = [name for name, _ in model.model.named_modules() if name in callback.result.masks]
    assert_records_the_run(recorder, layers, callback.result)


class Aborts(pl.Callback):
    """Ends an evaluation in its second batch."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            raise RuntimeError("aborted")


def test_an_aborted_evaluation_has_no_effect_on_the_next():
    module, data = language_module(), text_data(evaluation={"a": None, "b": texts(80)[40:]})
    expected = quiet_trainer().validate(language_module(), data, verbose=False)
    with pytest.raises(RuntimeError, match="aborted"):
        quiet_trainer(callbacks=[Aborts()]).validate(module, data, verbose=False)
    assert quiet_trainer().validate(module, data, verbose=False) == expected


def test_a_compiled_module_is_evaluated_and_pruned_once():
    module, callback = language_module(), SymPrune("wanda")
    compiled = torch.compile(module, backend="eager")
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(compiled, text_data(), verbose=False)
    dense = dict(callback.dense_metrics)
    assert callback.result.is_applied_to(module.prunable_model)
    assert callback.has_pruned(compiled)
    trainer.validate(compiled, text_data(), verbose=False)
    assert callback.dense_metrics == dense != callback.sparse_metrics


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_return_nothing_are_refused(strategy):
    trainer = quiet_trainer(strategy=strategy, devices=2, callbacks=[SymPrune(baseline=False)])
    with pytest.raises(Exception, match="return neither the weights nor the masks"):
        trainer.validate(Regression(), loader(), verbose=False)


def test_a_pruned_checkpoint_that_is_loaded_is_no_baseline(tmp_path):
    module, callback = language_module(), SymPrune("wanda")
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(module, text_data(), verbose=False)
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    dense = dict(callback.dense_metrics)
    trainer.validate(module, text_data(), ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    assert callback.dense_metrics == dense
    assert callback.sparse_metrics != dense


def test_a_signal_after_the_last_layer_ends_the_run():
    class Signals(pl.Callback, PruningHooks):
        def on_pruning_end(self, result):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = quiet_trainer(callbacks=[SymPrune("wanda", baseline=False), Signals()])
    with pytest.raises(SIGTERMException):
        trainer.validate(language_module(), text_data(), verbose=False)


@pytest.mark.parametrize("call", ["fit", "test", "predict"])
def test_a_call_in_which_another_stage_is_pruned_says_so(call, caplog):
    callback = SymPrune("magnitude", calibration=list(loader()))
    trainer = quiet_trainer(pl.Trainer, callbacks=[callback], max_steps=1)
    module = Regression()
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    getattr(trainer, call)(module, loader())
    says = f"prunes in Trainer.validate, and has pruned nothing in this call of Trainer.{call}"
    assert says in caplog.text
    trainer.validate(module, loader(), verbose=False)
    caplog.clear()
    getattr(trainer, call)(module, loader())
    assert says not in caplog.text


def test_a_schedule_refuses_an_iterator():
    with pytest.raises(ValueError, match="calibration is a generator, which can be read once"):
        SymPrune(when=CubicSchedule(end=6), calibration=(batch for batch in loader()))


def test_the_learning_rate_finder_does_not_warn_of_an_empty_loader():
    callback = SymPrune("magnitude", when="fit_start", calibration=list(loader()))
    trainer = quiet_trainer(pl.Trainer, callbacks=[callback, MaskedFinetuning()], max_epochs=1)
    module = Regression()
    module.lr = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruningWarning)
        Tuner(trainer).lr_find(module, loader(), num_training=3, update_attr=False)
    assert callback.result is None
    trainer.fit(module, loader())
    assert callback.result.sparsity == 0.5


def test_several_calibration_loaders():
    combined = CombinedLoader([loader(), loader()], "sequential")
    callback = SymPrune("wanda", calibration=combined)
    quiet_trainer(pl.Trainer, callbacks=[callback]).validate(Regression(), loader(), verbose=False)
    expected = prune_model(Regression().net, [*loader(), *loader()], score="wanda")
    masks = {f"net.{name}": mask for name, mask in expected.masks.items()}
    assert callback.result.masks == masks
    assert callback.result.layers[0].tokens == 24
    several = SymPrune("wanda", calibration=CombinedLoader([loader(), loader()], "min_size"))
    with pytest.raises(ValueError, match="use mode='sequential'"):
        quiet_trainer(pl.Trainer, callbacks=[several]).validate(Regression(), loader())
