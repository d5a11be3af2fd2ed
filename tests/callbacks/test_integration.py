"""Calibration data, precision and strategies of a Trainer, as pruning callbacks use them."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from symprune_lightning import MaskedFinetuning, SymPrune, Trainer
from tests.callbacks.examples import Regression, loader, quiet_trainer, sparsity


def test_a_module_with_a_calibration_step():
    class Own(Regression):
        def calibration_step(self, batch):
            x, _ = batch
            return self.net(x)

    pairs = [(x, x[:, 0]) for x in loader()]
    model, callback = Own(), SymPrune(calibration=pairs)
    quiet_trainer().validate(model, loader(), callbacks=callback, verbose=False)
    assert sparsity(model) == 0.5
    assert set(callback.result.masks) == {"net.0", "net.2"}


def test_the_calibration_loss_of_a_module_gives_the_gradients():
    """If the loss depends on one output row only, the sensitivity of all other rows is zero."""

    class Own(Regression):
        def calibration_loss(self, batch):
            hidden = self.net[0](batch)
            return hidden[:, 2].square().sum()

    def masks(module):
        callback = SymPrune("gradientwanda", group="layer", calibration=loader(), only=["net.0"])
        quiet_trainer().validate(module, loader(), callbacks=callback, verbose=False)
        return callback.result.masks["net.0"]

    kept = masks(Own())
    assert kept[2].all(), "the only row that the loss depends on"
    with pytest.raises(ValueError, match=r"define calibration_loss\(batch\)"):
        masks(type("Tuple", (Regression,), {"calibration_step": lambda self, x: (self.net(x),)})())


def test_calibration_dataloader_of_the_module():
    class Own(Regression):
        def calibration_dataloader(self):
            return loader()

    model = Own()
    quiet_trainer().validate(model, loader(), callbacks=SymPrune(), verbose=False)
    assert sparsity(model) == 0.5


def test_precedence_of_calibration_data():
    """The argument, then the data module, then the LightningModule."""

    def rows(count):
        return DataLoader(torch.randn(count, 8), batch_size=count)

    class Own(Regression):
        def calibration_dataloader(self):
            return rows(3)

    class Data(pl.LightningDataModule):
        def val_dataloader(self):
            return loader()

        def calibration_dataloader(self):
            return rows(5)

    def tokens(calibration, **data):
        callback = SymPrune(calibration=calibration)
        quiet_trainer().validate(Own(), callbacks=callback, verbose=False, **data)
        return {report.tokens for report in callback.result.layers}

    assert tokens(rows(7), datamodule=Data()) == {7}
    assert tokens(None, datamodule=Data()) == {5}
    assert tokens(None, dataloaders=loader()) == {3}


def test_no_calibration_data():
    with pytest.raises(ValueError, match=r"there is no calibration data: pass calibration="):
        quiet_trainer().validate(Regression(), loader(), callbacks=SymPrune(), verbose=False)


def test_magnitude_needs_no_calibration_data():
    model = Regression()
    quiet_trainer().validate(model, loader(), callbacks=SymPrune("magnitude"), verbose=False)
    assert sparsity(model) == 0.5


def test_a_distributed_sampler_in_the_calibration_loader_is_refused():
    rows = torch.randn(12, 8)
    batches = DataLoader(rows, sampler=DistributedSampler(rows, num_replicas=2, rank=0))
    model, callback = Regression(), SymPrune(calibration=batches)
    with pytest.raises(ValueError, match="the calibration loader has a DistributedSampler"):
        quiet_trainer().validate(model, loader(), callbacks=callback, verbose=False)
    assert sparsity(model) == 0


@pytest.mark.parametrize(("fast_dev_run", "batches"), [(True, 1), (2, 2)])
def test_fast_dev_run_limits_the_calibration_batches(fast_dev_run, batches):
    callback = SymPrune(calibration=loader())  # three batches of four rows
    trainer = quiet_trainer(fast_dev_run=fast_dev_run)
    trainer.validate(Regression(), loader(), callbacks=callback, verbose=False)
    assert {report.tokens for report in callback.result.layers} == {4 * batches}


def test_calibration_runs_in_the_precision_of_the_trainer():
    dtypes = []

    class Own(Regression):
        def calibration_step(self, batch):
            y = self.net(batch)
            dtypes.append(y.dtype)
            return y

    # the last layer only runs for the batch that checks for layers that are called again
    model, callback = Own(), SymPrune(calibration=loader())
    trainer = quiet_trainer(precision="bf16-mixed")
    trainer.validate(model, loader(), callbacks=callback, verbose=False)
    assert dtypes == [torch.bfloat16]
    assert model.net[0].weight.dtype == torch.float32


def test_batches_are_converted_and_transferred_as_in_lightnings_loops():
    class Own(Regression):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch["x"]

    batches = DataLoader([{"x": x} for x in torch.randn(12, 8)], batch_size=4)
    model, callback = Own(), SymPrune(calibration=batches)
    trainer = quiet_trainer(precision="64-true")
    trainer.validate(model, batches, callbacks=callback, verbose=False)
    assert sparsity(model) == 0.5
    assert torch.get_default_dtype() == torch.float32


def test_a_batch_that_forward_does_not_accept():
    pairs = [(x, x) for x in loader()]
    with pytest.raises(TypeError, match=r"define calibration_step\(batch\)"):
        quiet_trainer().validate(
            Regression(), loader(), callbacks=SymPrune(calibration=pairs), verbose=False
        )


@pytest.mark.parametrize("strategy_class", [FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("callback_class", [SymPrune, MaskedFinetuning])
def test_strategies_that_flatten_or_partition_weights_are_refused(
    strategy_class, callback_class, monkeypatch
):
    # their constructors need a GPU or a package; the refusal only looks at the class
    strategy = object.__new__(strategy_class)
    trainer = quiet_trainer()
    monkeypatch.setattr(Trainer, "strategy", strategy)
    message = f"{callback_class.__name__} does not support {strategy_class.__name__}"
    with pytest.raises(ValueError, match=message + r".*use strategy='ddp'"):
        callback_class().setup(trainer, Regression(), "fit")
