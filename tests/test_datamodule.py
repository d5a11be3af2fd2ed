from __future__ import annotations

import json

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symprune_lightning import CalibrationDataModule, TextSource
from tests.texts import texts, tokenizer

SIZES = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 3}


def rows(loader):
    return torch.cat([batch["input_ids"] for batch in loader])


def parts(data):
    data.setup()
    return rows(data.calibration_dataloader()), rows(data.val_dataloader())


def test_shapes_and_batches():
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES, batch_size=3)
    calibration, evaluation = parts(data)
    assert calibration.shape == (4, 16)
    assert evaluation.shape == (3, 16)
    assert [len(b["input_ids"]) for b in data.calibration_dataloader()] == [3, 1]
    assert torch.equal(rows(data.test_dataloader()), evaluation)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=12, max_size=30),
    sequences=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_no_text_is_in_both_parts(lengths, sequences, seed):
    """Every text has a token id of its own, so that ids tell texts."""
    own = [[i] * length for i, length in enumerate(lengths)]
    own += [[1000 + i] * 50 for i in range(4)]
    data = CalibrationDataModule(
        own, sequences=sequences, sequence_length=8, evaluation_sequences=2, seed=seed
    )
    calibration, evaluation = parts(data)
    assert not set(calibration.flatten().tolist()) & set(evaluation.flatten().tolist())


def test_texts_are_ended_and_laid_end_to_end():
    data = CalibrationDataModule(
        (t for t in ["w0 w1", "w2", "w3 w4 w5 w6"]),
        tokenizer(),
        sequences=1,
        sequence_length=5,
        evaluation_sequences=1,
    )
    calibration, evaluation = parts(data)
    assert calibration.tolist() == [[4, 5, 2, 6, 2]]
    assert evaluation.tolist() == [[7, 8, 9, 10, 2]]


def test_seed_decides_the_tokens_and_the_hash():
    make = {
        seed: CalibrationDataModule(texts(), tokenizer(), **SIZES, seed=seed) for seed in (0, 1)
    }
    again = CalibrationDataModule(texts(), tokenizer(), **SIZES, seed=0)
    assert make[0].hashes == again.hashes
    assert make[0].hashes["calibration"] != make[1].hashes["calibration"]
    assert torch.equal(parts(make[0])[0], parts(again)[0])


def test_hash_is_of_the_token_ids():
    import hashlib

    data = CalibrationDataModule(
        [[1, 2], [1, 2]], sequences=1, sequence_length=2, evaluation_sequences=1
    )
    raw = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert data.hashes["calibration"] == hashlib.sha256(raw).hexdigest()


def test_evaluation_from_another_source():
    data = CalibrationDataModule([[1] * 64], evaluation=[[2] * 48], **SIZES)
    calibration, evaluation = parts(data)
    assert calibration.unique().tolist() == [1]
    assert evaluation.unique().tolist() == [2]


def test_several_evaluation_sets_have_names():
    several = {"twos": [[2] * 48], "threes": [[3] * 48]}
    data = CalibrationDataModule([[1] * 64], evaluation=several, **SIZES)
    loaders = data.val_dataloader()
    assert {name: rows(loader).unique().tolist() for name, loader in loaders.items()} == {
        "twos": [2],
        "threes": [3],
    }
    assert set(data.hashes) == {"calibration", "evaluation/twos", "evaluation/threes"}
    in_memory = {"iterable": "list"}
    assert data.settings["evaluation"] == {"sets": {"twos": in_memory, "threes": in_memory}}
    with pytest.raises(ValueError, match="texts for evaluation/twos are too short"):
        CalibrationDataModule([[1] * 64], evaluation={"twos": [[2]]}, **SIZES).setup()
    for wrong in ({}, {"": [[2] * 48]}):
        with pytest.raises(ValueError, match="give it one text at least, each with a name"):
            CalibrationDataModule([[1] * 64], evaluation=wrong, **SIZES)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_local_files(tmp_path, kind):
    path = tmp_path / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(texts()))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts()))
    else:
        path = tmp_path / "texts.parquet"
        datasets.Dataset.from_dict({"text": texts()}).to_parquet(str(path))
        path = tmp_path if kind == "folder" else path
    data = CalibrationDataModule(str(path), tokenizer(), **SIZES)
    listed = CalibrationDataModule(texts(), tokenizer(), **SIZES)
    assert data.hashes == listed.hashes


def test_python_docs_are_always_there():
    data = CalibrationDataModule("python-docs", tokenizer(), **SIZES)
    assert parts(data)[0].shape == (4, 16)


def test_settings_are_plain_and_name_the_source():
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES)
    assert json.loads(json.dumps(data.settings)) == data.settings
    assert data.settings["dataset"] == {"iterable": "list"}
    assert data.settings["sha256"] == data.hashes


def test_too_short_texts():
    with pytest.raises(
        ValueError, match=r"calibration are too short: 4 seq.* need 64 .*only 6 are"
    ):
        CalibrationDataModule(["w0 w1", "w2 w3"], tokenizer(), **SIZES).setup()
    with pytest.raises(ValueError, match="texts for evaluation are too short"):
        CalibrationDataModule([[1] * 64, [1] * 40], **SIZES).setup()


def test_texts_without_tokenizer():
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        CalibrationDataModule(texts(), **SIZES).setup()


@pytest.mark.parametrize("size", ["sequences", "sequence_length", "batch_size"])
def test_sizes_are_positive(size):
    with pytest.raises(ValueError, match=f"{size} is 0; it must be at least 1"):
        CalibrationDataModule(texts(), **{size: 0})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text file at"):
        CalibrationDataModule(str(tmp_path / "none.txt"), tokenizer(), **SIZES).setup()


def test_missing_column(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"body": "w0"}) + "\n")
    data = CalibrationDataModule(str(path), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match=r"no column 'text'; it has: body"):
        data.setup()
    data = CalibrationDataModule(TextSource(str(path), column="body"), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match="too short"):
        data.setup()


def test_paths_and_data_sets_and_arrays(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts()))
    listed = CalibrationDataModule(texts(), tokenizer(), **SIZES).hashes
    assert CalibrationDataModule(path, tokenizer(), **SIZES).hashes == listed
    found = datasets.Dataset.from_dict({"text": texts()})
    assert CalibrationDataModule(found, tokenizer(), **SIZES).hashes == listed
    ids = torch.arange(1000).reshape(20, 50).numpy()
    assert parts(CalibrationDataModule(ids, **SIZES))[0].shape == (4, 16)


def test_split_of_a_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts()))
    data = CalibrationDataModule(TextSource(str(path), split="train[:2]"), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match="only 62 are there"):
        data.setup()
