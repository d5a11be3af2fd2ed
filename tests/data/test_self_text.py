"""Text that the model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    Distillation,
    SelfText,
    SymPrune,
    Trainer,
)
from symprune_lightning.cli.verify import verify
from symprune_lightning.data.self_text import sample_sequences
from tests.groups import run_trainers
from tests.models import LANGUAGE, VOCABULARY, build, llama
from tests.texts import tokenizer, write_project

EVALUATION = [list(range(3, 35))] * 4


def data(dataset: Any = "self", **options: Any) -> CalibrationDataModule:
    sizes = {"sequences": 4, "sequence_length": 12, "evaluation_sequences": 2}
    return CalibrationDataModule(dataset, evaluation=EVALUATION, **{**sizes, **options})


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False}
    bars = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{**quiet, **bars, **options})


def sample(model: Any, source: SelfText = SelfText(), **options: Any) -> torch.Tensor:  # noqa: B008
    sizes = {"count": 5, "length": 9, "seed": 0}
    return sample_sequences(model, None, source, **{**sizes, **options})


@pytest.mark.parametrize("name", LANGUAGE)
def test_architectures(name):
    model = build(name).train()
    if name == "gpt2":
        with pytest.raises(ValueError, match="no beginning-of-sequence token"):
            sample(model)  # the default of the configuration is outside this vocabulary
        model.config.bos_token_id = 1
    ids = sample(model)
    assert ids.shape == (5, 9)
    assert (ids[:, 0] == model.config.bos_token_id).all()
    assert int(ids.max()) < model.config.vocab_size
    assert len({tuple(row.tolist()) for row in ids}) == 5
    assert model.training


def test_tokens_follow_the_distribution_of_the_model():
    """Frequencies of the second token, against the probabilities after the first one."""
    torch.manual_seed(0)
    model = llama(initializer_range=0.3).eval()
    ids = sample(model, count=4000, length=2)
    with torch.no_grad():
        expected = model(ids[:1, :1]).logits[0, 0].softmax(-1)
    counts = torch.bincount(ids[:, 1], minlength=VOCABULARY) / len(ids)
    # the standard error of a frequency is below 0.008
    assert (counts - expected).abs().max() < 0.04
    assert expected.max() > 0.1, "not uniform, or the test shows nothing"


def test_later_tokens_are_conditioned_on_all_earlier_ones():
    """With a temperature near zero, each token is the most probable one of a plain forward."""
    torch.manual_seed(0)
    model = llama(initializer_range=0.3).eval()
    ids = sample(model, SelfText(temperature=1e-4), count=2)
    with torch.no_grad():
        greedy = model(ids).logits[:, :-1].argmax(-1)
    assert torch.equal(ids[:, 1:], greedy)


def test_the_seed_decides_and_the_global_generator_is_untouched():
    model = build("llama")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = sample(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample(model), first)
    assert not torch.equal(sample(model, seed=1), first)


def test_prefixes_are_used_in_turn():
    source = SelfText(prefixes=("w3 w4", "w9 w1 w7"))
    words = tokenizer()
    ids = sample_sequences(build("llama"), words, source, count=5, length=9, seed=0)
    starts = [tuple(words(prefix)["input_ids"]) for prefix in source.prefixes]
    used = [sum(tuple(row[: len(start)].tolist()) == start for row in ids) for start in starts]
    assert used == [3, 2]
    with pytest.raises(ValueError, match="must be shorter than sequence_length, which is 2"):
        sample_sequences(build("llama"), words, source, count=5, length=2, seed=0)


def test_calibration_on_the_dense_models_own_text():
    module, source = CausalLMModule(build("llama")), data()
    callback = SymPrune("wanda")
    trainer().validate(module, datamodule=source, callbacks=callback, verbose=False)
    assert callback.result.layers[0].tokens == 4 * 12
    batches = [batch["input_ids"] for batch in source.calibration_dataloader()]
    expected = sample(build("llama"), count=4, length=12)
    assert torch.equal(torch.cat(batches), expected)
    assert source.settings["dataset"] == {"self": {"temperature": 1.0, "prefixes": ()}}
    assert set(source.hashes) == {"calibration", "evaluation"}


def test_training_text_differs_from_the_calibration_text():
    module, source = CausalLMModule(build("llama")), data(training_sequences=3)
    result = trainer(max_steps=2).prune(
        module, datamodule=source, callbacks=[SymPrune("wanda"), Distillation(top_k=4)]
    )
    assert result.is_applied_to(module.prunable_model)
    training = torch.cat([batch["input_ids"] for batch in source.train_dataloader()])
    calibration = torch.cat([batch["input_ids"] for batch in source.calibration_dataloader()])
    assert training.shape == (3, 12)
    assert not (training[:, None] == calibration).all(-1).any()


def test_every_model_calibrates_on_its_own_text():
    source, seen = data(), []
    for seed in (0, 1):
        trainer().validate(
            CausalLMModule(build("llama", seed)),
            datamodule=source,
            callbacks=SymPrune("wanda"),
            verbose=False,
        )
        seen.append(source.hashes)
    assert seen[0]["calibration"] != seen[1]["calibration"]
    assert seen[0]["evaluation"] == seen[1]["evaluation"]


def test_a_checkpoint_can_be_verified(tmp_path):
    write_project(tmp_path)
    source = CalibrationDataModule(
        "self",
        str(tmp_path / "model"),
        evaluation=str(tmp_path / "texts.txt"),
        sequences=2,
        sequence_length=16,
        evaluation_sequences=2,
    )
    trainer().prune(
        CausalLMModule(str(tmp_path / "model")),
        datamodule=source,
        output=str(tmp_path / "out"),
        callbacks=SymPrune("wanda"),
    )
    checks = {check.name: check for check in verify(str(tmp_path / "out"))}
    assert checks["perplexity"].passed, checks["perplexity"]


def sample_on_ranks(rank: int, size: int, folder: Path, strategy: Any) -> None:
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    source = data()
    trainer(strategy=strategy, devices=size).validate(
        CausalLMModule(str(folder / "dense")),
        datamodule=source,
        callbacks=SymPrune("wanda"),
        verbose=False,
    )
    torch.save(source._splits["calibration"].ids, folder / f"{rank}.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_sample_the_same_text_as_one_process(tmp_path, strategy):
    build("llama").save_pretrained(tmp_path / "dense")
    run_trainers(sample_on_ranks, 2, tmp_path, strategy)
    expected = sample(build("llama"), count=4, length=12)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="pass evaluation="):
        CalibrationDataModule("self")
    with pytest.raises(ValueError, match=r"temperature is 0; it must be positive"):
        SelfText(temperature=0)
    with pytest.raises(ValueError, match="which must be a transformers model in memory"):
        data().calibration_dataloader()
    build("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="and without streaming"):
        trainer().prune(
            CausalLMModule(str(tmp_path / "dense")),
            datamodule=data(),
            output=str(tmp_path / "out"),
            stream=True,
            callbacks=SymPrune("wanda"),
        )
    model = build("llama")
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match=r"pass SelfText\(prefixes="):
        sample(model)
