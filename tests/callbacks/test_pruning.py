from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from symprune_lightning import (
    RIA,
    CalibrationDataModule,
    CausalLMModule,
    DSnoT,
    SymPrune,
    Trainer,
    prune_model,
)
from tests.models import build
from tests.texts import texts, tokenizer


def quiet(kind=Trainer, **options):
    return kind(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data(**options):
    sizes = {"sequences": 6, "sequence_length": 16, "evaluation_sequences": 5, "batch_size": 2}
    return CalibrationDataModule(texts(), tokenizer(), **{**sizes, **options})


def module():
    return CausalLMModule(build("llama"), learning_rate=1e-2)


def zeros(model):
    return {n: p == 0 for n, p in model.named_parameters() if p.dim() == 2}


class Plain(pl.LightningModule):
    """Somebody's own module: no calibration_step, batches are (x, y) or x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch).square().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    return DataLoader(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)


def sparsity(plain):
    return float((plain.net[0].weight == 0).float().mean())


def test_stock_and_own_trainer_and_prune_model_give_the_same_masks():
    ours, stock, plain = module(), module(), build("llama")
    quiet().validate(ours, datamodule=data(), callbacks=[SymPrune(sparsity=0.5)], verbose=False)
    callback = SymPrune(sparsity=0.5)
    quiet(pl.Trainer, callbacks=[callback]).validate(stock, datamodule=data(), verbose=False)
    result = prune_model(plain, data().calibration_dataloader(), sparsity=0.5)
    a, b, c = zeros(ours.model), zeros(stock.model), zeros(plain)
    assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], c[n]) for n in a)
    assert set(callback.result.masks) == set(result.masks), "names as in the checkpoint"


@pytest.mark.parametrize("kind", [Trainer, pl.Trainer])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_fit_after_validate_in_the_same_process(kind, inference_mode):
    model, trainer = module(), quiet(kind, max_steps=3, inference_mode=inference_mode)
    prune = SymPrune(refine="r2dsnot")
    if kind is Trainer:
        trainer.validate(model, datamodule=data(), callbacks=prune, verbose=False)
    else:
        trainer.callbacks.append(prune)
        trainer.validate(model, datamodule=data(), verbose=False)
    before = model.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    assert (before == 0).sum() == before.numel() // 2
    trainer.fit(model, data().calibration_dataloader(), data().val_dataloader())
    assert trainer.global_step == 3
    assert not torch.equal(model.model.model.layers[0].mlp.up_proj.weight, before)


def test_metrics_before_and_after():
    prune, model, dense = SymPrune(sparsity=0.9), module(), module()
    (metrics,) = quiet().validate(model, datamodule=data(), callbacks=prune, verbose=False)
    (reference,) = quiet().validate(dense, datamodule=data(), verbose=False)
    assert prune.dense_metrics == reference
    assert prune.sparse_metrics == metrics
    assert metrics["val_perplexity"] != reference["val_perplexity"]
    assert metrics["val_loss"] == pytest.approx(
        torch.tensor(metrics["val_perplexity"]).log().item(), rel=1e-5
    )


def test_perplexity_is_that_of_the_pruned_model_over_all_tokens():
    prune, model = SymPrune(), module()
    (metrics,) = quiet().validate(model, datamodule=data(), callbacks=prune, verbose=False)
    ids = torch.cat([b["input_ids"] for b in data().val_dataloader()])
    loss = model.model(input_ids=ids, labels=ids).loss  # all sequences have one length
    assert metrics["val_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_perplexity_of_several_named_sets():
    sets = {"low": [list(range(3, 19))] * 3, "high": [list(range(40, 56))] * 2}
    sizes = {"sequences": 2, "sequence_length": 16}
    several = CalibrationDataModule(sets["low"], evaluation=sets, evaluation_sequences=2, **sizes)
    prune, model = SymPrune(), module()
    metrics = quiet().validate(model, datamodule=several, callbacks=prune, verbose=False)
    alone = {}
    for name, ids in sets.items():
        one = CalibrationDataModule(ids, evaluation=ids, evaluation_sequences=2, **sizes)
        (found,) = quiet().validate(model, datamodule=one, verbose=False)
        alone[f"val_perplexity/{name}"] = found["val_perplexity"]
    for name, perplexity in alone.items():
        assert prune.sparse_metrics[name] == pytest.approx(perplexity, rel=1e-6)
    both = torch.tensor(list(alone.values())).log().mean().exp()  # of as many tokens each
    assert prune.sparse_metrics["val_perplexity"] == pytest.approx(both.item(), rel=1e-5)
    assert prune.dense_metrics.keys() == prune.sparse_metrics.keys()
    assert len(metrics) == 2
    lists = quiet().test(model, list(several.test_dataloader().values()), verbose=False)
    assert lists[0]["test_perplexity/1"] == pytest.approx(alone["val_perplexity/high"], rel=1e-6)


def test_without_baseline_there_are_no_dense_metrics():
    prune = SymPrune(baseline=False)
    quiet().validate(module(), datamodule=data(), callbacks=prune, verbose=False)
    assert prune.dense_metrics == {}
    assert prune.sparse_metrics["val_perplexity"] > 0


def test_a_module_is_pruned_once_and_another_one_again():
    prune, first, second = SymPrune(), module(), module()
    trainer = quiet(callbacks=[prune])
    trainer.validate(first, datamodule=data(), verbose=False)
    result = prune.result
    trainer.validate(first, datamodule=data(), verbose=False)
    assert prune.result is result
    trainer.validate(second, datamodule=data(), verbose=False)
    assert prune.result is not result


@pytest.mark.parametrize("when", ["fit_start", "fit_end"])
def test_pruning_in_fit(when):
    model, prune = Plain(), SymPrune(when=when, calibration=loader(), score="wanda")
    seen = []

    class Watching(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(sparsity(pl_module))

        def on_sanity_check_end(self, trainer, pl_module):
            seen.append(sparsity(pl_module))

    watching = Watching()
    quiet(max_steps=2).fit(model, loader(), loader(), callbacks=[prune, watching])
    assert seen[1] == (0.5 if when == "fit_start" else 0)
    assert prune.result.sparsity == 0.5
    assert prune.sparse_metrics == {}, "nothing was evaluated since"
    if when == "fit_end":
        assert seen == [0, 0, 0]
        assert sparsity(model) == 0.5


@pytest.mark.parametrize("when", ["validate", "test"])
def test_fit_with_its_validations_does_not_prune(when):
    model = Plain()
    prune = SymPrune(when=when, calibration=loader())
    quiet(max_epochs=1, callbacks=[prune]).fit(model, loader(), loader())
    assert prune.result is None
    assert sparsity(model) == 0


def test_pruning_in_test_only():
    model, prune = Plain(), SymPrune(when="test", calibration=loader())
    trainer = quiet(callbacks=[prune])
    trainer.validate(model, loader(), verbose=False)
    assert prune.result is None
    trainer.test(model, loader(), verbose=False)
    assert sparsity(model) == 0.5
    assert set(prune.dense_metrics) == {"val_loss"}


def test_own_module_with_a_calibration_step():
    class Own(Plain):
        def calibration_step(self, batch):
            x, _ = batch
            return self.net(x)

    pairs = [(x, x[:, 0]) for x in loader()]
    model, prune = Own(), SymPrune(calibration=pairs)
    quiet().validate(model, loader(), callbacks=prune, verbose=False)
    assert sparsity(model) == 0.5
    assert set(prune.result.masks) == {"net.0", "net.2"}


def test_calibration_dataloader_of_the_module():
    class Own(Plain):
        def calibration_dataloader(self):
            return loader()

    model = Own()
    quiet().validate(model, loader(), callbacks=SymPrune(), verbose=False)
    assert sparsity(model) == 0.5


def test_no_calibration_data():
    with pytest.raises(ValueError, match=r"SymPrune has no calibration data: pass calibration="):
        quiet().validate(Plain(), loader(), callbacks=SymPrune(), verbose=False)


def test_calibration_runs_at_the_trainers_precision():
    seen = []

    class Own(Plain):
        def calibration_step(self, batch):
            y = self.net(batch)
            seen.append(y.dtype)
            return y

    # the last layer only runs for the batch that looks out for repeated layers
    model = Own()
    prune = SymPrune(calibration=loader())
    quiet(precision="bf16-mixed").validate(model, loader(), callbacks=prune, verbose=False)
    assert seen == [torch.bfloat16]
    assert model.net[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "later"}, "when is 'later'; choose one of"),
        ({"sparsity": 1.5}, "fraction of weights to prune"),
        ({"score": "nothing"}, "no Score is called"),
        ({"refine": "nothing"}, "no MaskRefiner is called"),
        ({"schedule": "nothing"}, "schedule is 'nothing'; choose one of"),
        ({"pattern": "2/4"}, "write it as 'N:M'"),
        ({"group": "model"}, "use schedule='dense'"),
        ({"refine": {"re:.*": "dsnott"}}, "no MaskRefiner is called 'dsnott'"),
    ],
)
def test_wrong_arguments_are_said_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        SymPrune(**options)


def test_settings_are_plain():
    prune = SymPrune(RIA(alpha=1.0), refine={"re:.*": DSnoT(cycles=3)}, sparsity=0.25)
    assert prune.settings["score"] == {"name": "RIA", "alpha": 1.0}
    assert (prune.settings["sparsity"], prune.settings["group"]) == (0.25, "output")
    assert "pattern" not in prune.settings
    assert prune.settings["refine"]["re:.*"][0]["cycles"] == 3
    other = SymPrune(pattern="2:4", refine="exactswap", update="obsupdate").settings
    assert other["pattern"] == {"name": "NM", "n": 2, "m": 4, "permute": False}
    assert other["refine"] == [{"name": "ExactSwap", "cycles": 50}]
    assert other["update"]["name"] == "OBSUpdate"
    assert "sparsity" not in other


def test_dense_weights_that_come_back_are_pruned_again(tmp_path):
    model, prune = Plain(), SymPrune(calibration=loader())
    quiet(max_steps=1).fit(model, loader())
    trainer = quiet(callbacks=[prune])
    trainer.strategy.connect(model)
    torch.save(
        {"state_dict": model.state_dict(), "pytorch-lightning_version": pl.__version__},
        tmp_path / "dense.ckpt",
    )
    for _ in range(2):
        trainer.validate(model, loader(), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
        assert sparsity(model) == 0.5
    dense = dict(prune.dense_metrics)
    quiet(max_steps=2).fit(model, loader())
    assert not prune.has_pruned(model)
    trainer.validate(model, loader(), verbose=False)
    assert sparsity(model) == 0.5
    assert prune.dense_metrics != dense


def test_batches_are_converted_and_transferred_as_lightning_does():
    class Own(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch["x"]

    batches = DataLoader([{"x": x} for x in torch.randn(12, 8)], batch_size=4)
    model, prune = Own(), SymPrune(calibration=batches)
    quiet(precision="64-true").validate(model, batches, callbacks=prune, verbose=False)
    assert sparsity(model) == 0.5
    assert torch.get_default_dtype() == torch.float32


def test_batch_that_forward_does_not_take():
    pairs = [(x, x) for x in loader()]
    with pytest.raises(TypeError, match=r"give the module a method calibration_step\(batch\)"):
        quiet().validate(Plain(), loader(), callbacks=SymPrune(calibration=pairs), verbose=False)


def test_magnitude_needs_no_calibration_data():
    model = Plain()
    quiet().validate(model, loader(), callbacks=SymPrune("magnitude"), verbose=False)
    assert sparsity(model) == 0.5


def test_a_callback_that_has_pruned_can_be_pickled():
    import pickle

    prune = SymPrune(calibration=list(loader()))
    quiet().validate(Plain(), loader(), callbacks=prune, verbose=False)
    assert pickle.loads(pickle.dumps(prune)).result.sparsity == 0.5


def test_settings_of_somebodys_own_score_are_text():
    from symprune_lightning import Score

    class Own(Score):
        def __call__(self, weight, statistics):
            return weight.abs()

        def __repr__(self):
            return "Own()"

    assert SymPrune(Own()).settings["score"] == "Own()"
