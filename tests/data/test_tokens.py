"""Windows begin as the model was trained; rows that are no documents."""

from __future__ import annotations

import warnings

import datasets
import pytest
import torch

from symprune_lightning import CalibrationDataModule, TextSource
from symprune_lightning.errors import PruningWarning
from tests.texts import texts, tokenizer

SIZES = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 3, "training_sequences": 2}
BOS = 1


def starts(data: CalibrationDataModule) -> set[int]:
    """Return the first tokens of the windows of all splits."""
    data.setup()
    loaders = data.calibration_dataloader(), data.val_dataloader(), data.train_dataloader()
    return {int(row[0]) for loader in loaders for b in loader for row in b["input_ids"]}


def test_windows_begin_as_the_tokenizer_begins_a_text():
    with_bos = CalibrationDataModule(texts(), tokenizer(bos=True), **SIZES)
    assert starts(with_bos) == {BOS}
    for i, batch in enumerate(with_bos.calibration_dataloader()):
        assert batch["input_ids"].shape == (1, 16)
        assert BOS not in batch["input_ids"][0, 1:]
        # no token of the text is lost to the special token
        if i == 0:
            first = batch["input_ids"][0, 1:]
    plain = CalibrationDataModule(texts(), tokenizer(), **{**SIZES, "sequence_length": 15})
    plain.setup()
    assert torch.equal(next(iter(plain.calibration_dataloader()))["input_ids"][0], first)
    assert BOS not in starts(plain)


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_start_of_windows_can_be_changed(add_bos):
    data = CalibrationDataModule(texts(), tokenizer(bos=True), add_bos=add_bos, **SIZES)
    assert (starts(data) == {BOS}) == add_bos
    assert data.settings["add_bos"] == add_bos
    with pytest.raises(ValueError, match="has no beginning-of-sequence token"):
        CalibrationDataModule(texts(), tokenizer(), add_bos=True, **SIZES).setup()


def test_token_ids_are_taken_as_they_are():
    rows = [[5 + i] * 16 for i in range(20)]
    assert BOS not in starts(CalibrationDataModule(rows, tokenizer(bos=True), **SIZES))


def write(tmp_path, rows):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": rows}).to_parquet(path)
    return str(path)


def test_lines_of_documents_are_refused_and_can_be_joined(tmp_path):
    lines = [" = Title = ", "", *texts(3, 12), "", ""] * 20
    path = write(tmp_path, lines)
    sizes = {"sequences": 2, "sequence_length": 16, "evaluation_sequences": 2}
    others = [[5 + i] * 16 for i in range(20)]
    with pytest.raises(ValueError, match=r"are empty, so its rows are lines .*joiner='\\n\\n'"):
        CalibrationDataModule(path, tokenizer(), evaluation=others, **sizes).setup()
    source = TextSource(path, joiner="\n\n")
    data = CalibrationDataModule(source, tokenizer(), evaluation=others, **sizes)
    data.setup()
    ids = torch.cat([b["input_ids"] for b in data.calibration_dataloader()]).flatten()
    assert tokenizer().eos_token_id not in ids
    joined = tokenizer()("\n\n".join(lines))["input_ids"]
    assert ids.tolist() == joined[:32]
    # without other texts, the splits are successive parts of the joined text
    data = CalibrationDataModule(source, tokenizer(), **{**sizes, "sequences": 1})
    data.setup()
    ids = torch.cat([b["input_ids"] for b in data.val_dataloader()]).flatten()
    assert ids.tolist() == joined[16:48]


def test_rows_without_text_are_skipped_and_named(tmp_path):
    rows = [None if i == 7 else text for i, text in enumerate(texts())]
    with pytest.warns(PruningWarning, match=r"1 of \d+ rows of .* were skipped, such as row 7"):
        CalibrationDataModule(
            write(tmp_path, rows), tokenizer(), **{**SIZES, "sequences": 60}
        ).setup()


def test_short_texts_are_named():
    with pytest.warns(PruningWarning, match="have 4 tokens on average, and each is ended"):
        CalibrationDataModule(texts(80, 4), tokenizer(), **SIZES).setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CalibrationDataModule(texts(), tokenizer(), **SIZES).setup()
