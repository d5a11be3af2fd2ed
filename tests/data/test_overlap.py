"""Evaluation texts are not those of the other splits."""

from __future__ import annotations

import random

import pytest
import torch

from symprune_lightning import CalibrationDataModule, TextSource
from symprune_lightning.data.overlap import overlap
from symprune_lightning.errors import PruningWarning
from tests.texts import WORDS, texts, tokenizer

SIZES = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 3, "training_sequences": 2}


def test_the_same_texts_are_refused(tmp_path):
    message = r"100% of the tokens for evaluation are also used for calibration"
    with pytest.raises(ValueError, match=message):
        CalibrationDataModule(texts(), tokenizer(), evaluation=texts(), **SIZES).val_dataloader()
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts()))
    data = CalibrationDataModule(
        str(path), tokenizer(), evaluation={"own": TextSource(str(path))}, **SIZES
    )
    with pytest.raises(ValueError, match="tokens for evaluation/own are also used for calibration"):
        data.val_dataloader()


def test_the_same_texts_can_be_used_for_calibration_alone():
    data = CalibrationDataModule(texts(), tokenizer(), evaluation=texts(), **SIZES)
    assert len(data.calibration_dataloader()) == SIZES["sequences"]
    assert len(data.train_dataloader()) == SIZES["training_sequences"]


def test_texts_that_are_evaluated_at_another_position_are_refused():
    generator = random.Random(0)
    long = [generator.choice(WORDS[4:]) for _ in range(3000)]
    data = CalibrationDataModule(
        [" ".join(long)],
        tokenizer(),
        sequences=100,
        sequence_length=16,
        evaluation=[" ".join(long[777:])],
        evaluation_sequences=10,
    )
    with pytest.raises(ValueError, match="of the tokens for evaluation are also used"):
        data.val_dataloader()


def test_training_texts_are_not_evaluated():
    generator = random.Random(0)
    rows = [[generator.randrange(4, 64) for _ in range(80)] for _ in range(5)]
    first, *others = (rows[i] for i in order_of(5))
    data = CalibrationDataModule(
        rows,
        sequences=1,
        sequence_length=80,
        evaluation=iter(others),
        evaluation_sequences=4,
        training_sequences=4,
    )
    assert first not in others
    with pytest.raises(ValueError, match="of the tokens for evaluation are also used for training"):
        data.val_dataloader()


def order_of(count: int) -> list[int]:
    """Return the order in which texts are taken with seed 0."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    return order


def test_duplicates_within_a_dataset_are_refused():
    generator = random.Random(0)
    row = [generator.randrange(4, 64) for _ in range(80)]
    data = CalibrationDataModule([row] * 8, sequences=2, sequence_length=80, evaluation_sequences=2)
    with pytest.raises(ValueError, match="are also used for calibration"):
        data.val_dataloader()


def test_short_texts_in_another_order_are_refused():
    generator = random.Random(0)
    rows = [" ".join(generator.choices(WORDS[4:], k=50)) for _ in range(60)]
    for encoder in (tokenizer(), tokenizer(bos=True)):
        data = CalibrationDataModule(
            rows,
            encoder,
            sequences=90,
            sequence_length=32,
            evaluation=rows[::-1],
            evaluation_sequences=20,
        )
        with pytest.raises(ValueError, match="of the tokens for evaluation are also used"):
            data.val_dataloader()


def test_a_little_overlap_is_named():
    generator = random.Random(0)
    rows = [[generator.randrange(4, 64) for _ in range(400)] for _ in range(20)]
    others = [[generator.randrange(4, 64) for _ in range(400)] for _ in range(4)]
    evaluation = [rows[0], *others]
    data = CalibrationDataModule(
        rows,
        sequences=20,
        sequence_length=400,
        evaluation=(row for row in evaluation),
        evaluation_sequences=5,
    )
    with pytest.warns(PruningWarning, match="19% of the tokens for evaluation are also used for"):
        data.val_dataloader()


def test_overlap_is_the_share_of_runs():
    ids = torch.randint(0, 1000, (4, 100), generator=torch.Generator().manual_seed(0))
    others = torch.randint(0, 1000, (4, 100), generator=torch.Generator().manual_seed(1))
    assert overlap(ids, others) == 0
    others[0] = ids[2]
    assert overlap(ids, others) == pytest.approx((100 - 32 + 1) / (400 - 32 + 1))


def test_runs_without_text_do_not_count():
    unknown = torch.full((4, 100), 3)
    assert overlap(unknown, unknown) == 0
