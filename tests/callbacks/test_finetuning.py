"""Training keeps the zeros, with any optimizer, and resumes from checkpoints."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    CubicSchedule,
    MaskedFinetuning,
    PackedMasks,
    SymPrune,
    Trainer,
    prune_model,
    save_masks,
)
from symprune_lightning.engine.distributed.dtensor import local_tensor
from symprune_lightning.engine.layers.find import find_layers
from symprune_lightning.errors import PruningWarning
from tests.groups import run_trainers
from tests.models import VOCABULARY, batches, build

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    # its steps are orthogonal matrices, which are not zero where the gradient is
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=1e-2),
}


class Tuned(CausalLMModule):
    """A language model with one of OPTIMIZERS."""

    optimizer = "AdamW"

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer](list(self.parameters()))


def module(optimizer: str = "AdamW", **options: Any) -> Tuned:
    tuned = Tuned(build("llama").train(), **options)
    tuned.optimizer = optimizer
    return tuned


def rows(count: int = 16, length: int = 16) -> list[list[int]]:
    """Texts that a model can learn: every token is followed by its successor."""
    return [[3 + (i + j) % (VOCABULARY - 3) for j in range(length)] for i in range(count)]


def data(**options: Any) -> CalibrationDataModule:
    sizes = {"sequences": 4, "evaluation_sequences": 4, "training_sequences": 8}
    return CalibrationDataModule(rows(), sequence_length=16, **{**sizes, **options})


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    bars = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{**quiet, **bars, **options})


def sparse() -> SymPrune:
    return SymPrune("wanda", sparsity=0.5, when="fit_start")


def full_weights(model: nn.Module, names: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {layer.name: layer.matrix() for layer in find_layers(model, names)}


def num_revived(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> int:
    """Number of weights that the masks prune but that are not zero."""
    weights = full_weights(model, masks)
    return sum(int(((weights[name] != 0) & ~mask).sum()) for name, mask in masks.items())


class Watch(pl.Callback):
    """Counts revived weights after every batch, and keeps the losses."""

    def __init__(self) -> None:
        self.revived = 0
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        masks = next(c for c in trainer.callbacks if isinstance(c, MaskedFinetuning)).masks
        assert masks
        self.revived += num_revived(pl_module.prunable_model, masks)
        self.losses.append(float(outputs["loss"]))


def largest_state(fitted: Trainer, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> float:
    """Largest absolute value of the optimizer state of a pruned weight."""
    largest = 0.0
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        for optimizer in fitted.optimizers:
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    state = local_tensor(value).abs().masked_fill(mask, 0)
                    largest = max(largest, float(state.max()))
    return largest


def test_200_steps_revive_no_weight():
    watch, masked = Watch(), MaskedFinetuning()
    fitted = trainer(max_steps=200)
    tuned = module()
    fitted.fit(tuned, datamodule=data(), callbacks=[watch, masked, sparse()])
    assert len(watch.losses) == 200
    assert watch.revived == 0
    assert sum(watch.losses[-8:]) < 0.5 * sum(watch.losses[:8])
    assert len(masked.masks) == 14
    assert all(float(mask.float().mean()) == 0.5 for mask in masked.masks.values())
    assert largest_state(fitted, tuned.prunable_model, masked.masks) == 0


def test_without_masked_finetuning_weights_are_revived():
    tuned, pruning = module(), sparse()
    with pytest.warns(PruningWarning, match=r"add MaskedFinetuning\(\)") as caught:
        trainer(max_steps=2).fit(tuned, datamodule=data(), callbacks=[pruning])
    messages = [str(warning.message) for warning in caught if warning.category is PruningWarning]
    assert "prunes a model that is then trained" in messages[0]
    assert "are not zero at the end of this fit" in messages[1]
    assert num_revived(tuned.prunable_model, pruning.result.masks) > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer(optimizer, options):
    watch, masked = Watch(), MaskedFinetuning()
    fitted = trainer(max_steps=6, **options)
    tuned = module(optimizer)
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32
    before = {n: p.detach().to(dtype, copy=True) for n, p in tuned.named_parameters()}
    fitted.fit(tuned, datamodule=data(), callbacks=[sparse(), masked, watch])
    assert watch.revived == 0
    assert largest_state(fitted, tuned.prunable_model, masked.masks) == 0
    changed = [
        (tuned.prunable_model.get_submodule(name).weight != before[f"model.{name}.weight"])[mask]
        for name, mask in masked.masks.items()
    ]
    assert torch.cat(changed).float().mean() > 0.5


def test_the_clipped_norm_is_that_of_kept_weights():
    norms = []

    class Norm(Tuned):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_):
            norms.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    tuned = Norm(build("llama").train())
    masked = MaskedFinetuning()
    trainer(max_steps=1, gradient_clip_val=1.0).fit(
        tuned, datamodule=data(), callbacks=[sparse(), masked]
    )
    parameters = [p for p in tuned.parameters() if p.grad is not None]
    masks = {tuned.prunable_model.get_submodule(n).weight: mask for n, mask in masked.masks.items()}
    checked = 0
    for parameter, gradient in zip(parameters, norms[0], strict=True):
        if parameter in masks:
            assert not gradient[~masks[parameter]].any()
            checked += 1
    assert checked == 14


class Manual(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.automatic_optimization = False

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = (self(batch) - batch).square().mean()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    def train_dataloader(self):
        return DataLoader(torch.randn(32, 8), batch_size=4)

    def calibration_dataloader(self):
        return [torch.randn(16, 8)]


@pytest.mark.parametrize("trainer_class", [Trainer, pl.Trainer])
def test_manual_optimization_in_a_module_of_the_users(trainer_class):
    model = Manual()
    masked = MaskedFinetuning()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pruning = SymPrune(sparsity=0.5, when="fit_start")
    fitted = trainer_class(max_epochs=2, accelerator="cpu", callbacks=[masked, pruning], **quiet)
    fitted.fit(model)
    assert num_revived(model, masked.masks) == 0
    assert {n: (m.shape, int(m.sum())) for n, m in masked.masks.items()} == {
        "net.0": ((16, 8), 64),
        "net.2": ((8, 16), 64),
    }


# sources of the masks


def pruned_module() -> tuple[Tuned, PackedMasks]:
    tuned = module()
    result = prune_model(tuned.prunable_model, batches(), score="wanda")
    tuned.prunable_model.train()
    return tuned, result.masks


@pytest.mark.parametrize("source", ["model", "zeros", "mapping", "packed", "file", "folder"])
def test_sources(source, tmp_path):
    tuned, masks = pruned_module()
    path = tmp_path / "symprune" / "masks.safetensors"
    save_masks(path, masks)
    sources = {
        "model": None,
        "zeros": "zeros",
        "mapping": dict(masks),
        "packed": masks,
        "file": str(path),
        "folder": tmp_path,
    }
    if source not in ("model", "zeros"):
        tuned = module()  # dense: the masks are applied
    masked = MaskedFinetuning(sources[source])
    trainer(max_steps=3).fit(tuned, datamodule=data(), callbacks=masked)
    assert isinstance(masked.masks, PackedMasks)
    assert masked.masks == masks
    assert num_revived(tuned.prunable_model, masks) == 0


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match=r"no layer with zeros to keep.*when='fit_start'"):
        trainer(max_steps=1).fit(module(), datamodule=data(), callbacks=MaskedFinetuning())


def test_masks_of_another_model_are_refused():
    for name, shape, message in [
        ("model.layers.7.self_attn.q_proj", (32, 32), "which LlamaForCausalLM does not have"),
        ("model.layers.0.self_attn.q_proj", (32, 30), r"is \(32, 30\), its weight \(32, 32\)"),
    ]:
        masked = MaskedFinetuning({name: torch.zeros(shape, dtype=torch.bool)})
        with pytest.raises(ValueError, match=message):
            trainer(max_steps=1).fit(module(), datamodule=data(), callbacks=masked)


def test_two_callbacks_that_prune():
    masked = MaskedFinetuning()
    attention = SymPrune(sparsity=0.5, only=["re:.*self_attn.*"], when="fit_start")
    rest = SymPrune(sparsity=0.25, only=["re:.*mlp.*"], when="fit_start")
    tuned = module()
    trainer(max_steps=5).fit(tuned, datamodule=data(), callbacks=[attention, masked, rest])
    assert len(masked.masks) == 14
    assert masked.masks == {**attention.result.masks, **rest.result.masks}
    assert num_revived(tuned.prunable_model, masked.masks) == 0


def test_masks_of_the_argument_and_of_a_callback_are_merged():
    """A weight is pruned if either of them prunes it."""
    name = "model.layers.0.self_attn.q_proj"
    given = torch.rand(32, 32) > 0.25
    masked, pruning, tuned = MaskedFinetuning({name: given}), sparse(), module()
    trainer(max_steps=3).fit(tuned, datamodule=data(), callbacks=[masked, pruning])
    own = pruning.result.masks
    assert not torch.equal(given & own[name], given)
    assert not torch.equal(given & own[name], own[name])
    assert masked.masks == {**own, name: given & own[name]}
    assert num_revived(tuned.prunable_model, masked.masks) == 0


# checkpoints


def fit(folder: Path, epochs: int, resume: Path | None = None, **options: Any) -> Any:
    """Prune, train for some epochs, and save."""
    tuned, watch, masked, pruning = module(), Watch(), MaskedFinetuning(), sparse()
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fitted = trainer(max_epochs=epochs, **options)
    fitted.fit(
        tuned, datamodule=data(), ckpt_path=resume, callbacks=[pruning, masked, watch, saved]
    )
    assert watch.revived == 0
    assert (pruning.result is None) == (resume is not None)
    return tuned, masked


def state_of(tuned: Tuned) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in tuned.named_parameters()}


def test_a_fit_that_resumes_within_an_epoch_keeps_the_zeros(tmp_path):
    """Lightning then calls no hook at the start of that epoch."""
    tuned, masked, pruning = module(), MaskedFinetuning(), sparse()
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(max_steps=3).fit(tuned, datamodule=data(), callbacks=[pruning, masked, saved])
    resumed, watch, again = module(), Watch(), MaskedFinetuning()
    trainer(max_steps=6).fit(
        resumed,
        datamodule=data(),
        ckpt_path=tmp_path / "step=3.ckpt",
        callbacks=[sparse(), again, watch],
    )
    assert watch.revived == 0
    assert again.masks == pruning.result.masks
    assert num_revived(resumed.prunable_model, pruning.result.masks) == 0


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path):
    whole, masks = fit(tmp_path / "whole", 4)
    fit(tmp_path / "half", 2)
    last = tmp_path / "half" / "epoch=1.ckpt"
    resumed, again = fit(tmp_path / "half", 4, resume=last)
    assert again.masks == masks.masks
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(resumed)[name], value), name
    ends = [
        torch.load(tmp_path / name / "epoch=3.ckpt", weights_only=True)
        for name in ("whole", "half")
    ]
    moments = [end["optimizer_states"][0]["state"] for end in ends]
    for key, value in moments[0].items():
        assert all(torch.equal(moments[1][key][k], v) for k, v in value.items())
    assert torch.load(last, weights_only=True)["callbacks"]["MaskedFinetuning"]["bits"]


def test_masks_of_a_resumed_fit_that_prunes_further_are_merged(tmp_path):
    """The checkpoint has masks of all layers; the resumed fit prunes some layers further."""
    _, before = fit(tmp_path, 1)
    resumed, masked, watch = module(), MaskedFinetuning(), Watch()
    further = SymPrune("wanda", sparsity=0.75, only=["re:.*self_attn.*"], when="fit_start")
    fitted = trainer(max_epochs=2)
    fitted.fit(
        resumed,
        datamodule=data(),
        ckpt_path=tmp_path / "epoch=0.ckpt",
        callbacks=[further, masked, watch],
    )
    assert len(further.result.masks) == 8
    assert len(masked.masks) == 14
    for name, mask in masked.masks.items():
        new = further.result.masks.get(name)
        assert torch.equal(mask, before.masks[name] if new is None else before.masks[name] & new)
        assert float(mask.float().mean()) == (0.5 if new is None else 0.25)
    assert len(watch.losses) == 8
    assert watch.revived == 0
    assert num_revived(resumed.prunable_model, masked.masks) == 0
    assert largest_state(fitted, resumed.prunable_model, masked.masks) == 0


def test_a_checkpoint_without_masks(tmp_path):
    tuned, masks = pruned_module()
    saved = ModelCheckpoint(tmp_path, filename="old")
    trainer(max_epochs=1).fit(tuned, datamodule=data(), callbacks=[saved, MaskedFinetuning()])
    old = torch.load(tmp_path / "old.ckpt", weights_only=True)
    del old["callbacks"]["MaskedFinetuning"]
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"old.ckpt has no masks.*masks='zeros'"):
        trainer(max_epochs=2).fit(
            module(),
            datamodule=data(),
            ckpt_path=tmp_path / "old.ckpt",
            callbacks=MaskedFinetuning(),
        )
    resumed, masked = module(), MaskedFinetuning("zeros")
    trainer(max_epochs=2).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / "old.ckpt", callbacks=masked
    )
    assert masked.masks == masks


def test_a_dense_checkpoint_is_pruned_and_stays_sparse(tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="dense")
    trainer(max_epochs=1).fit(module(), datamodule=data(), callbacks=saved)
    resumed, pruning, masked = module(), sparse(), MaskedFinetuning()
    trainer(max_epochs=2).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / "dense.ckpt", callbacks=[pruning, masked]
    )
    assert pruning.result is not None
    assert masked.masks == pruning.result.masks
    assert num_revived(resumed.prunable_model, masked.masks) == 0


# gradual pruning


def test_gradual_pruning():
    levels, pruned = [], []

    class Level(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights = [m.weight for m in pl_module.prunable_model.modules() if is_pruned(m)]
            zero = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
            levels.append(round(zero, 2))
            pruned.append({id(w): (w == 0) for w in weights})

    gradual = SymPrune("wanda", sparsity=0.8, when=CubicSchedule(start=2, end=10, every=4))
    masked, tuned = MaskedFinetuning(), module()
    fitted = trainer(max_steps=14, accumulate_grad_batches=2)
    fitted.fit(tuned, datamodule=data(), callbacks=[Level(), masked, gradual])
    schedule = [0.0] * 12 + [0.7] * 8 + [0.8] * 8
    assert levels == pytest.approx(schedule, abs=0.02)  # rows of 32 weights
    for before, after in pairwise(pruned):
        assert all((after[key] >= zero).all() for key, zero in before.items())
    # the zeros of earlier steps are not those of the model that was pruned
    assert gradual.result.initial_sparsity == 0
    assert num_revived(tuned.prunable_model, gradual.result.masks) == 0
    assert largest_state(fitted, tuned.prunable_model, masked.masks) == 0


def is_pruned(m: nn.Module) -> bool:
    return (isinstance(m, nn.Linear) and m.out_features != VOCABULARY) or (
        isinstance(m, nn.Linear) and m.in_features == 64
    )


def test_a_resumed_gradual_fit_equals_an_uninterrupted_one(tmp_path):
    def run(folder: Path, epochs: int, resume: Path | None = None) -> Tuned:
        tuned = module()
        gradual = SymPrune("wanda", sparsity=0.8, when=CubicSchedule(end=24, every=5))
        saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer(max_epochs=epochs).fit(
            tuned,
            datamodule=data(),
            ckpt_path=resume,
            callbacks=[gradual, MaskedFinetuning(), saved],
        )
        assert gradual.result.initial_sparsity == 0
        return tuned

    whole = run(tmp_path / "whole", 4)
    with pytest.warns(PruningWarning, match="the model has 95% of the final sparsity"):
        run(tmp_path / "half", 2)
    resumed = run(tmp_path / "half", 4, resume=tmp_path / "half" / "epoch=1.ckpt")
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(resumed)[name], value), name


# other features of Lightning


def test_with_checkpoints_early_stopping_and_a_logger(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", filename="best")
    stop = EarlyStopping("val_loss", patience=1)
    masked, tuned = MaskedFinetuning(), module()
    trainer(
        max_epochs=4,
        logger=CSVLogger(tmp_path),
        limit_val_batches=2,
        log_every_n_steps=1,
    ).fit(tuned, datamodule=data(), callbacks=[best, stop, sparse(), masked])
    loaded = Tuned.load_from_checkpoint(best.best_model_path, pretrained=build("llama"))
    assert num_revived(loaded.prunable_model, masked.masks) == 0
    assert "val_loss" in next(tmp_path.rglob("metrics.csv")).read_text()


@pytest.mark.parametrize("target", ["model", "module", "model in place"])
def test_compiled(target):
    tuned = module()
    if target == "model":
        tuned.model = torch.compile(tuned.model, backend="eager")
    elif target == "model in place":
        tuned.model.compile(backend="eager")
    fitted = torch.compile(tuned, backend="eager") if target == "module" else tuned
    masked, pruning = MaskedFinetuning(), sparse()
    trainer(max_steps=3).fit(fitted, datamodule=data(), callbacks=[pruning, masked])
    plain, expected = module(), sparse()
    trainer(max_steps=3).fit(plain, datamodule=data(), callbacks=[expected, MaskedFinetuning()])
    assert pruning.result.masks == expected.result.masks
    original = getattr(tuned.model, "_orig_mod", tuned.model)
    assert num_revived(original, masked.masks) == 0
    for name, value in plain.prunable_model.named_parameters():
        torch.testing.assert_close(original.get_parameter(name), value)


def test_fast_dev_run_uses_one_calibration_batch():
    pruning, masked = sparse(), MaskedFinetuning()
    trainer(fast_dev_run=True).fit(module(), datamodule=data(), callbacks=[pruning, masked])
    assert {layer.tokens for layer in pruning.result.layers} == {16}


class FailsInStep(Tuned):
    """Raises in the given training step, before it or after the first optimizer step."""

    failing_step = 0

    def training_step(self, batch, batch_idx):
        if self.global_step == self.failing_step:
            raise RuntimeError("failed on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("failing_step", [None, 0, 1])
def test_nothing_is_masked_after_a_fit(failing_step):
    """The optimizer can be used without the masks, also after a fit that fails."""
    tuned, masked = FailsInStep(build("llama").train()), MaskedFinetuning()
    tuned.failing_step = failing_step
    fitted = trainer(max_steps=2)
    error = pytest.raises(RuntimeError, match="failed on purpose")
    with nullcontext() if failing_step is None else error:
        fitted.fit(tuned, datamodule=data(), callbacks=[sparse(), masked])
    (optimizer,) = fitted.optimizers
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter != 0).all() for parameter in tuned.parameters())
    del masked.log, masked.log_dict  # Lightning's references to the module
    # it holds neither modules nor unpacked masks: 18,432 weights are 2,304 bytes of bits
    assert len(pickle.dumps(masked)) < 10_000
    callback = weakref.ref(masked)
    del masked, error  # the error refers to the frames of the fit
    gc.collect()
    assert callback() is None, "the optimizer has no hooks that refer to it"


# several processes

STRATEGIES = {"ddp": "ddp", "fsdp": (2, 1), "tensor": (1, 2)}


def train_in_group(rank: int, size: int, folder: Path, name: str) -> None:
    def strategy() -> Any:
        sizes = STRATEGIES[name]
        return sizes if isinstance(sizes, str) else ModelParallelStrategy(*sizes)

    def run(epochs: int, subfolder: str, resume: Path | None = None) -> None:
        torch.manual_seed(0)
        tuned = Tuned(str(folder / "dense"))
        watch, masked, pruning = Watch(), MaskedFinetuning(), sparse()
        saved = ModelCheckpoint(folder / name / subfolder, filename="{epoch}", save_top_k=-1)
        fitted = trainer(max_epochs=epochs, strategy=strategy(), devices=size)
        fitted.fit(
            tuned, datamodule=data(), ckpt_path=resume, callbacks=[pruning, masked, watch, saved]
        )
        assert watch.revived == 0
        assert len(masked.masks) == 14
        weights = full_weights(tuned.prunable_model, masked.masks)
        out = {"weights": weights, "losses": watch.losses, "masks": dict(masked.masks)}
        torch.save(out, folder / f"{name}-{subfolder}-{epochs}-{rank}.pt")

    run(25 if name == "tensor" else 50, "whole")  # tensor parallel: each rank runs all batches
    run(2, "half")
    last = folder / name / "half" / "epoch=1.ckpt"
    run(4, "half", resume=last)
    run(4, "again")


@pytest.mark.parametrize("name", STRATEGIES)
def test_200_steps_on_two_processes(tmp_path, name):
    build("llama").save_pretrained(tmp_path / "dense")
    run_trainers(train_in_group, 2, tmp_path, name)
    epochs = 25 if name == "tensor" else 50
    for rank in (0, 1):
        whole = torch.load(tmp_path / f"{name}-whole-{epochs}-{rank}.pt", weights_only=True)
        assert len(whole["losses"]) == 200
        assert sum(whole["losses"][-8:]) < 0.5 * sum(whole["losses"][:8])
        for layer, mask in whole["masks"].items():
            assert not whole["weights"][layer][~mask].any()
        resumed = torch.load(tmp_path / f"{name}-half-4-{rank}.pt", weights_only=True)
        again = torch.load(tmp_path / f"{name}-again-4-{rank}.pt", weights_only=True)
        for layer, weight in again["weights"].items():
            assert torch.equal(resumed["weights"][layer], weight), layer


class Adversarial(pl.LightningModule):
    """Two optimizers, so that ``global_step`` goes by twos."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(16, 16)
        self.discriminator = nn.Linear(16, 16)
        self.automatic_optimization = False

    def forward(self, x):
        return self.discriminator(self.generator(x))

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self(batch).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(x.parameters()) for x in (self.generator, self.discriminator)]


@pytest.mark.parametrize("options", [{"end": 9, "every": 3}, {"end": 7, "every": 7}, {"end": 40}])
def test_gradual_pruning_with_two_optimizers(options):
    """The final sparsity is reached, also if no step has exactly the number of the schedule."""
    model, x = Adversarial(), DataLoader(torch.randn(160, 16), batch_size=8)
    gradual = SymPrune("wanda", when=CubicSchedule(**options), calibration=x)
    trainer(max_epochs=1).fit(model, x, callbacks=[gradual, MaskedFinetuning()])
    for layer in (model.generator, model.discriminator):
        assert float((layer.weight == 0).float().mean()) == 0.5


def test_a_gradual_fit_that_is_resumed_beyond_its_end(tmp_path):
    """The checkpoint is from a fit without a schedule, and has more steps than the schedule."""
    tuned = module()
    first = trainer(max_steps=8)
    first.fit(tuned, datamodule=data())
    first.save_checkpoint(tmp_path / "dense.ckpt")
    gradual, resumed = SymPrune("wanda", when=CubicSchedule(end=4)), module()
    trainer(max_steps=10).fit(
        resumed,
        datamodule=data(),
        ckpt_path=tmp_path / "dense.ckpt",
        callbacks=[gradual, MaskedFinetuning(masks="zeros")],
    )
    assert gradual.result.sparsity == 0.5
    assert gradual.result.is_applied_to(resumed.prunable_model)


def test_a_fit_without_steps_says_that_nothing_was_pruned():
    with pytest.warns(PruningWarning, match="pruned nothing in this fit: no batch was run"):
        trainer(limit_train_batches=0, max_epochs=1).fit(
            module(), datamodule=data(), callbacks=[sparse(), MaskedFinetuning()]
        )


# weights that other callbacks replace


class Stash(pl.Callback):
    """Puts back the weights of the beginning after training, as a user's callback may."""

    def on_train_start(self, trainer, pl_module):
        self.weights = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            for parameter, value in zip(pl_module.parameters(), self.weights, strict=True):
                parameter.copy_(value)


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "SWA": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    "Stash": Stash,
}


@pytest.mark.parametrize("when", ["fit_start", CubicSchedule(end=10, every=2)])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_the_weights_keep_the_masks(tmp_path, name, order, when):
    tuned, masked = module(), MaskedFinetuning()
    pruning = SymPrune("wanda", when=when)
    saved = ModelCheckpoint(tmp_path, filename="last", save_top_k=-1, every_n_epochs=3)
    callbacks = [pruning, masked, AVERAGES[name]()][::order]
    trainer(max_epochs=3, enable_checkpointing=True).fit(
        tuned, datamodule=data(), callbacks=[*callbacks, saved]
    )
    assert len(masked.masks) == 14
    assert num_revived(tuned.prunable_model, masked.masks) == 0
    assert pruning.result.sparsity == 0.5
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    reloaded = module()
    reloaded.load_state_dict(state)
    assert num_revived(reloaded.prunable_model, masked.masks) == 0


def test_weights_that_are_replaced_after_all_hooks_are_reported():
    class Late(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            for parameter in pl_module.parameters():
                parameter.data.add_(1)

    with pytest.warns(PruningWarning, match="callbacks that replace the weights"):
        trainer(max_steps=2).fit(
            module(),
            datamodule=data(),
            callbacks=[sparse(), MaskedFinetuning(), Late()],
        )


def test_a_dense_teacher_of_another_callback_stays_dense():
    class Teacher(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.teacher = module()

    teacher = Teacher()
    trainer(max_steps=2).fit(
        module(), datamodule=data(), callbacks=[teacher, sparse(), MaskedFinetuning()]
    )
    assert (teacher.teacher.prunable_model.model.layers[0].mlp.up_proj.weight != 0).all()


def test_one_callback_in_two_fits(tmp_path):
    """The second fit does not resume from a checkpoint, and so prunes."""
    again = module()
    first = trainer(max_steps=2, callbacks=[sparse(), MaskedFinetuning()])
    first.fit(module(), datamodule=data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    callback = sparse()
    trainer(max_steps=3).fit(
        module(),
        datamodule=data(),
        ckpt_path=tmp_path / "first.ckpt",
        callbacks=[callback, MaskedFinetuning()],
    )
    assert callback.result is None
    trainer(max_steps=2).fit(again, datamodule=data(), callbacks=[callback, MaskedFinetuning()])
    assert callback.result.is_applied_to(again.prunable_model)


def test_a_fit_that_is_resumed_at_its_end_says_nothing(tmp_path):
    first = trainer(max_steps=2, callbacks=[sparse(), MaskedFinetuning()])
    first.fit(module(), datamodule=data())
    first.save_checkpoint(tmp_path / "first.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruningWarning)
        trainer(max_steps=2, callbacks=[sparse(), MaskedFinetuning()]).fit(
            module(), datamodule=data(), ckpt_path=tmp_path / "first.ckpt"
        )


@pytest.mark.parametrize("order", [1, -1])
def test_averages_of_an_earlier_fit_are_pruned_with_the_module(tmp_path, order):
    """Lightning evaluates and saves them in place of the module."""
    tuned, pruning = module(), SymPrune("wanda", when="fit_end")
    fitted = trainer(max_steps=4, limit_val_batches=None)
    fitted.fit(tuned, datamodule=data(), callbacks=[EMAWeightAveraging(), pruning][::order])
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    reloaded = module()
    reloaded.load_state_dict(state)
    assert num_revived(reloaded.prunable_model, pruning.result.masks) == 0
    assert num_revived(tuned.prunable_model, pruning.result.masks) == 0


def test_an_evaluation_after_a_fit_with_averages_is_that_of_the_pruned_model():
    tuned, pruning = module(), SymPrune("wanda", sparsity=0.8)
    callbacks = [EMAWeightAveraging(), pruning]
    fitted = trainer(max_steps=4, limit_val_batches=None, callbacks=callbacks)
    fitted.fit(tuned, datamodule=data())
    (measured,) = fitted.validate(tuned, datamodule=data(), verbose=False)
    (expected,) = trainer(limit_val_batches=None).validate(tuned, datamodule=data(), verbose=False)
    assert measured == expected
    assert pruning.sparse_metrics == expected


def test_a_fit_after_the_evaluation_of_a_checkpoint(tmp_path):
    dense = trainer(max_steps=1)
    dense.fit(module(), datamodule=data())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    tuned = module()
    both = trainer(
        max_steps=2, limit_val_batches=None, callbacks=[SymPrune("wanda"), MaskedFinetuning()]
    )
    both.validate(tuned, datamodule=data(), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    both.fit(tuned, datamodule=data())
    masked = next(c for c in both.callbacks if isinstance(c, MaskedFinetuning))
    assert len(masked.masks) == 14
    assert num_revived(tuned.prunable_model, masked.masks) == 0


def test_masks_of_another_fit_are_not_kept():
    pruning, masked = sparse(), MaskedFinetuning()
    for seed in range(2):
        tuned = Tuned(build("llama", seed).train())
        trainer(max_steps=1).fit(
            tuned,
            datamodule=data(),
            callbacks=[LearningRateFinder(num_training_steps=3), pruning, masked],
        )
        assert num_revived(tuned.prunable_model, masked.masks) == 0
        for name, mask in masked.masks.items():
            assert float(mask.float().mean()) == 0.5, name


def test_a_gradual_fit_that_is_interrupted_before_it_prunes(tmp_path):
    def gradual() -> list[Any]:
        return [SymPrune("wanda", when=CubicSchedule(start=4, end=8)), MaskedFinetuning()]

    first = trainer(max_steps=2)
    with pytest.warns(PruningWarning, match="the fit ended"):
        first.fit(module(), datamodule=data(), callbacks=gradual())
    first.save_checkpoint(tmp_path / "early.ckpt")
    resumed = module()
    callbacks = gradual()
    trainer(max_steps=10).fit(
        resumed, datamodule=data(), ckpt_path=tmp_path / "early.ckpt", callbacks=callbacks
    )
    assert callbacks[0].result.is_applied_to(resumed.prunable_model)
