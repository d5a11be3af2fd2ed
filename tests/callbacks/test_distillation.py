"""Recovery of a pruned model by distillation from the dense one."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    CubicSchedule,
    Distillation,
    MaskedFinetuning,
    PackedMasks,
    SymPrune,
    Trainer,
)
from symprune_lightning.callbacks.recovery import recovery_callbacks, recovery_checkpoint
from symprune_lightning.callbacks.report.callback import Report
from symprune_lightning.engine.layers.find import find_layers
from symprune_lightning.errors import JournalError, PruningWarning
from symprune_lightning.module import TEACHER_INDICES, TEACHER_LOG_PROBS
from tests.callbacks.test_finetuning import data, rows
from tests.groups import run_trainers
from tests.models import llama


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False}
    bars = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{**quiet, **bars, **options})


def teacher() -> torch.nn.Module:
    """A model with large weights: the predictions of a usual untrained one are nearly uniform."""
    torch.manual_seed(0)
    return llama(initializer_range=0.2).eval()


def module(**options: Any) -> CausalLMModule:
    settings = {"learning_rate": 3e-3, "lr_schedule": "cosine", **options}
    return CausalLMModule(teacher().train(), **settings)


def divergence(pruned: torch.nn.Module, dense: torch.nn.Module) -> float:
    """Mean divergence from the dense model on the training texts."""
    ids = torch.tensor(rows())
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (dense.eval(), pruned.eval()))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_prune_and_recover():
    tuned, pruned, dense = module(), module(), teacher()
    options: dict[str, Any] = {"datamodule": data(training_sequences=8)}
    settings: dict[str, Any] = {"score": "wanda", "sparsity": 0.6}
    trainer().prune(pruned, **options, callbacks=SymPrune(**settings))
    callbacks = [SymPrune(**settings), Distillation(top_k=16)]
    result = trainer(max_steps=40).prune(tuned, **options, callbacks=callbacks)
    assert result.is_applied_to(tuned.prunable_model)
    lost = divergence(pruned.prunable_model, dense)
    assert lost > 0.1
    assert divergence(tuned.prunable_model, dense) < 0.5 * lost
    # the last evaluation is the one that is reported
    (metrics,) = trainer().validate(tuned, datamodule=options["datamodule"], verbose=False)
    assert callbacks[0].sparse_metrics == pytest.approx(dict(metrics))
    assert callbacks[0].dense_metrics


def test_zeros_stay_and_kept_weights_change():
    tuned = module()
    callback = SymPrune("wanda", sparsity=0.5)
    result = trainer(max_steps=3).prune(
        tuned, datamodule=data(), callbacks=[callback, Distillation(top_k=8)]
    )
    dense = teacher()
    for layer in find_layers(tuned.prunable_model, result.masks):
        mask, before = result.masks[layer.name], dense.get_submodule(layer.name).weight
        assert not layer.parameter[~mask].any()
        assert (layer.parameter[mask] != before[mask]).any()


def test_stored_predictions_are_those_of_the_dense_model(tmp_path):
    tuned, source = module(), data(training_sequences=4)
    callbacks = [SymPrune("wanda"), Distillation(top_k=5, folder=str(tmp_path))]
    trainer(max_steps=1).prune(tuned, datamodule=source, callbacks=callbacks)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 4
    dense = teacher()
    expected = []
    for batch in source.train_dataloader():
        with torch.no_grad():
            values = dense(batch["input_ids"]).logits.log_softmax(-1).topk(5)
        expected += [*zip(values.values, values.indices, strict=True)]
    stored = [load_file(file) for file in files]
    for log_probs, indices in expected:
        assert any(
            torch.equal(x[TEACHER_INDICES].long(), indices)
            and torch.allclose(x[TEACHER_LOG_PROBS], log_probs, atol=1e-4)
            for x in stored
        )


def test_in_one_fit_of_lightnings_own_trainer():
    dense, tuned = teacher(), module()
    callbacks = [
        SymPrune("wanda", sparsity=0.6, when="fit_start"),
        MaskedFinetuning(),
        Distillation(top_k=16),
    ]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fit = pl.Trainer(
        max_steps=40, callbacks=callbacks, limit_val_batches=0, accelerator="cpu", **quiet
    )
    fit.fit(tuned, datamodule=data(batch_size=2))
    assert callbacks[0].result.is_applied_to(tuned.prunable_model)
    pruned = module()
    trainer().prune(pruned, datamodule=data(), callbacks=SymPrune("wanda", sparsity=0.6))
    lost = divergence(pruned.prunable_model, dense)
    assert divergence(tuned.prunable_model, dense) < 0.5 * lost


def test_another_model_has_its_own_predictions(tmp_path):
    """One callback for two models that are trained on the same texts."""
    callback = Distillation(top_k=8, folder=str(tmp_path))
    for seed in (0, 1):
        torch.manual_seed(seed)
        dense = llama(initializer_range=0.2).eval()
        tuned = CausalLMModule(copy.deepcopy(dense).train(), learning_rate=3e-3)
        trainer(max_steps=40).prune(
            tuned, datamodule=data(), callbacks=[SymPrune("wanda", sparsity=0.3), callback]
        )
        assert divergence(tuned.prunable_model, dense) < 0.5
    assert len(list(tmp_path.iterdir())) == 2


def test_gradual_pruning():
    dense, tuned = teacher(), module()
    prune = SymPrune("wanda", sparsity=0.5, when=CubicSchedule(start=4, end=20, every=4))
    trainer(max_steps=60).fit(
        tuned, datamodule=data(), callbacks=[Distillation(top_k=16), prune, MaskedFinetuning()]
    )
    assert prune.result.sparsity == pytest.approx(0.5, abs=0.02)
    pruned = module()
    trainer().prune(pruned, datamodule=data(), callbacks=SymPrune("wanda", sparsity=0.5))
    lost = divergence(pruned.prunable_model, dense)
    assert divergence(tuned.prunable_model, dense) < 0.5 * lost


def test_a_model_that_was_pruned_before_has_no_teacher():
    tuned = module()
    trainer().prune(tuned, datamodule=data(), callbacks=SymPrune("wanda"))
    with pytest.raises(ValueError, match="prune in the same run"):
        trainer(max_steps=2).fit(
            tuned, datamodule=data(), callbacks=[MaskedFinetuning(), Distillation()]
        )


def test_padding_and_shuffled_batches():
    """Sequences are recognised by their tokens, in any order and any batch."""
    ids = torch.tensor(rows(8))
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0

    class Padded(CalibrationDataModule):
        def train_dataloader(self) -> Any:
            def collate(items: Any) -> dict[str, torch.Tensor]:
                parts = [torch.stack(x) for x in zip(*items, strict=True)]
                return {"input_ids": parts[0], "attention_mask": parts[1]}

            return DataLoader(
                TensorDataset(ids, mask), batch_size=3, shuffle=True, collate_fn=collate
            )

    tuned = module()
    source = Padded(
        rows(), sequences=4, sequence_length=16, training_sequences=1, evaluation_sequences=4
    )
    prune = SymPrune("wanda", sparsity=0.6)
    trainer(max_epochs=20).prune(tuned, datamodule=source, callbacks=[prune, Distillation(top_k=8)])
    with torch.no_grad():  # only what is not padding was learned
        p, q = (
            m.eval()(ids, attention_mask=mask).logits.log_softmax(-1)
            for m in (teacher(), tuned.prunable_model)
        )
    losses = (p.exp() * (p - q)).sum(-1)
    assert losses[:, :12].mean() < 0.5 * losses[:, 12:].mean()


def test_a_sequence_that_the_dense_model_has_not_seen():
    class Changing(CalibrationDataModule):
        calls = 0

        def train_dataloader(self) -> Any:
            self.calls += 1
            return DataLoader([{"input_ids": torch.arange(16) + self.calls}])

    source = Changing(
        rows(), sequences=4, sequence_length=16, training_sequences=1, evaluation_sequences=4
    )
    with pytest.raises(ValueError, match="predictions for 1 of 1 sequences of training batch 0"):
        trainer(max_steps=1).prune(
            module(), datamodule=source, callbacks=[SymPrune("wanda"), Distillation()]
        )


def test_wrong_arguments():
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        Distillation(top_k=0)
    callbacks = [SymPrune("wanda"), Distillation()]
    used = trainer(max_steps=1)
    used.fit(module(), datamodule=data())
    with pytest.raises(ValueError, match="has taken 1 steps already"):
        used.prune(module(), datamodule=data(), callbacks=callbacks)
    for options, source, message in (
        ({}, data(), "max_steps or max_epochs, and neither is set"),
        ({"max_steps": 3}, data(training_sequences=0), "set training_sequences"),
        ({"max_steps": 3}, None, "pass datamodule="),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(**options).prune(module(), datamodule=source, callbacks=callbacks)
    with pytest.raises(ValueError, match="there are 2 Distillation callbacks"):
        trainer(max_steps=3).prune(
            module(), datamodule=data(), callbacks=[*callbacks, Distillation()]
        )


def test_an_ordinary_data_module():
    """One that makes its training data in setup("fit"), and changes batches in its hooks."""

    class Plain(pl.LightningDataModule):
        def setup(self, stage: str) -> None:
            if stage == "fit":
                self.rows = [{"input_ids": torch.tensor(row)} for row in rows(6)]

        def calibration_dataloader(self) -> Any:
            return DataLoader([{"input_ids": torch.tensor(row)} for row in rows(4)])

        def val_dataloader(self) -> Any:
            return self.calibration_dataloader()

        def train_dataloader(self) -> Any:
            return DataLoader(self.rows, batch_size=2, shuffle=True)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"input_ids": batch["input_ids"].flip(-1)}

    tuned = module()
    callbacks = [SymPrune("wanda", sparsity=0.5), Distillation(top_k=8)]
    with pytest.raises(ValueError, match="let the training loader yield the same sequences"):
        # the hook makes other sequences of those that the dense model has seen
        trainer(max_steps=3).prune(tuned, datamodule=Plain(), callbacks=callbacks)
    Plain.on_after_batch_transfer = pl.LightningDataModule.on_after_batch_transfer
    result = trainer(max_steps=3).prune(module(), datamodule=Plain(), callbacks=callbacks)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_loader_without_length_or_batches():
    options: dict[str, Any] = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 4}
    for loader, message in (
        (lambda self: ({"input_ids": torch.arange(16)} for _ in range(3)), "must have a length"),
        (lambda self: DataLoader([]), "the training loader is empty"),
    ):
        source = CalibrationDataModule(rows(), training_sequences=1, **options)
        source.train_dataloader = loader.__get__(source)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=message):
            trainer(max_steps=1).prune(
                module(), datamodule=source, callbacks=[SymPrune("wanda"), Distillation()]
            )


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    masks = PackedMasks()
    folder = tmp_path / "journal"
    settings = {"max_steps": 3, "module": {"learning_rate": "0.1"}}
    assert recovery_checkpoint(trainer(), folder, settings) is None
    (folder / "recovery").mkdir()
    (folder / "recovery" / "last.ckpt").write_text("")
    assert recovery_checkpoint(trainer(), folder, settings) == folder / "recovery" / "last.ckpt"
    changed = {**settings, "max_steps": 4}
    with pytest.raises(JournalError, match="max_steps was 3 and is now 4"):
        recovery_checkpoint(trainer(), folder, changed)
    assert len(recovery_callbacks(masks, folder)) == 2


def test_gradual_pruning_resumes_with_the_dense_teacher(tmp_path):
    """Also if the schedule prunes right after the resume, in either order of the callbacks."""
    for order in (1, -1):
        folder = tmp_path / str(order)

        def callbacks(folder: Path = folder, order: int = order) -> list[Any]:
            prune = SymPrune("wanda", sparsity=0.5, when=CubicSchedule(end=12, every=4))
            distil = Distillation(top_k=8, folder=str(folder / "teacher"))
            saved = ModelCheckpoint(folder, every_n_train_steps=4, filename="{step}", save_top_k=-1)
            return [*[prune, distil][::order], MaskedFinetuning(), saved]

        with pytest.warns(PruningWarning, match="fit ended at step 8, before the end of Cubic"):
            trainer(max_steps=8).fit(module(), datamodule=data(), callbacks=callbacks())
        resumed = module()
        trainer(max_steps=20).fit(
            resumed, datamodule=data(), ckpt_path=folder / "step=8.ckpt", callbacks=callbacks()
        )
        assert len(list((folder / "teacher").iterdir())) == 1, "only the dense model is a teacher"


def test_streaming_is_refused(tmp_path):
    teacher().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="cannot be combined with streaming"):
        trainer(max_steps=3).prune(
            CausalLMModule(str(tmp_path / "dense")),
            datamodule=data(),
            output=str(tmp_path / "out"),
            stream=True,
            callbacks=[SymPrune("wanda"), Distillation()],
        )


def test_the_report_shows_the_recovered_model(tmp_path):
    teacher().save_pretrained(tmp_path / "dense")
    callback = SymPrune("wanda", sparsity=0.6)
    trainer(max_steps=5).prune(
        CausalLMModule(str(tmp_path / "dense"), learning_rate=3e-3),
        datamodule=data(),
        output=str(tmp_path / "out"),
        callbacks=[callback, Distillation(top_k=8), Report(prompts=[])],
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{callback.sparse_metrics['val_perplexity']:.2f}" in page
    assert (tmp_path / "out" / "symprune" / "scores.png").exists()
    manifest = json.loads((tmp_path / "out" / "sparsity_manifest.json").read_text())
    assert manifest["metrics"]["pruned"] == callback.sparse_metrics
    expected = {"top_k": 8, "steps": 5, "optimizer": "AdamW", "learning_rate": 3e-3}
    assert manifest["distillation"] == expected


SCRIPT = """
import sys
from pathlib import Path
from symprune_lightning import BlockReconstruction, CausalLMModule, Distillation, SymPrune
from symprune_lightning.callbacks import distillation, recovery
from tests.callbacks.test_distillation import data, trainer
from tests.killing import dying_at
import symprune_lightning.engine.journal as journal
import lightning.pytorch as pl

folder, calls = Path(sys.argv[1]), int(sys.argv[2])
recovery.CHECKPOINT_STEPS = 2
wrap = dying_at(calls)
distillation.save_file = wrap(distillation.save_file)
journal.save_file = wrap(journal.save_file)
pl.Trainer.save_checkpoint = wrap(pl.Trainer.save_checkpoint)
prune = SymPrune(
    "wanda", sparsity=0.6, calibration_order="block",
    reconstruct=BlockReconstruction(epochs=1, learning_rate=1e-2),
)
class Count(pl.Callback):
    steps = 0
    def on_train_batch_end(self, *_):
        self.steps += 1
count = Count()
trainer(max_steps=6).prune(
    CausalLMModule(str(folder / "dense"), learning_rate=3e-3), datamodule=data(),
    output=str(folder / "out"), callbacks=[prune, Distillation(top_k=8), count],
)
print("steps", count.steps)
"""


@pytest.mark.parametrize("calls", [3, 9, 12])
def test_resumes_at_every_stage(tmp_path, calls):
    """Killed while predictions are stored, while blocks are pruned, and while it is trained."""
    teacher().save_pretrained(tmp_path / "dense")

    def run(kill_at: int) -> tuple[int, str]:
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path), str(kill_at)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.strip()

    assert run(0) == (0, "steps 6")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out").rename(tmp_path / "expected")
    assert run(calls)[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.journal").is_dir()
    # the third case was killed while the second checkpoint was written, after four steps
    assert run(0) == (0, "steps 4" if calls == 12 else "steps 6")
    assert not (tmp_path / ".out.journal").exists()
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    manifests = [
        json.loads((tmp_path / run / "sparsity_manifest.json").read_text())
        for run in ("expected", "out")
    ]
    for manifest in manifests:
        assert manifest["distillation"]["steps"] == 6
    assert manifests[0]["blocks"][0]["errors"] == manifests[1]["blocks"][0]["errors"]
    for name, weight in expected.items():
        if calls < 11:
            assert torch.equal(resumed[name], weight), name
        else:  # Lightning starts the loader from its beginning when it resumes within an epoch
            assert torch.equal(resumed[name] == 0, weight == 0), name


def recover_on_ranks(rank: int, size: int, folder: Path, strategy: str) -> None:
    parallel: Any = strategy
    if strategy == "fsdp":
        parallel = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    tuned = CausalLMModule(str(folder / "dense"), learning_rate=3e-3)
    callback = SymPrune("wanda", sparsity=0.6)
    result = trainer(max_steps=20, strategy=parallel, devices=size).prune(
        tuned,
        datamodule=data(training_sequences=7),
        output=str(folder / "out"),
        callbacks=[callback, Distillation(top_k=8)],
    )
    assert result.is_applied_to(tuned.prunable_model)
    (folder / f"{rank}.json").write_text(json.dumps(callback.sparse_metrics))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_two_ranks(tmp_path, strategy):
    teacher().save_pretrained(tmp_path / "dense")
    run_trainers(recover_on_ranks, 2, tmp_path, strategy)
    metrics = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert metrics[0] == pytest.approx(metrics[1])
    recovered = type(teacher()).from_pretrained(tmp_path / "out")
    pruned = module()
    trainer().prune(pruned, datamodule=data(), callbacks=SymPrune("wanda", sparsity=0.6))
    dense = teacher()
    assert divergence(recovered, dense) < divergence(pruned.prunable_model, dense)
    zeros = [(layer.weight == 0).float().mean() for layer in linears(recovered)]
    assert min(zeros) > 0.59


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return [module for name, module in found if name != "lm_head"]
