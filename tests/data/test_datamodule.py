from __future__ import annotations

import hashlib
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


def calibration_and_evaluation(data):
    data.setup()
    return rows(data.calibration_dataloader()), rows(data.val_dataloader())


def test_shapes_and_batch_sizes():
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES, batch_size=3)
    calibration, evaluation = calibration_and_evaluation(data)
    assert calibration.shape == (4, 16)
    assert evaluation.shape == (3, 16)
    assert [len(b["input_ids"]) for b in data.calibration_dataloader()] == [3, 1]
    assert torch.equal(rows(data.test_dataloader()), evaluation)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=12, max_size=30),
    sequences=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_splits_have_no_text_in_common(lengths, sequences, seed):
    """Each text repeats a token id of its own, so token ids identify texts."""
    token_ids = [[i] * length for i, length in enumerate(lengths)]
    token_ids += [[1000 + i] * 50 for i in range(4)]
    data = CalibrationDataModule(
        token_ids, sequences=sequences, sequence_length=8, evaluation_sequences=2, seed=seed
    )
    calibration, evaluation = calibration_and_evaluation(data)
    assert not set(calibration.flatten().tolist()) & set(evaluation.flatten().tolist())


def test_texts_end_with_eos_and_are_concatenated():
    data = CalibrationDataModule(
        (t for t in ["w0 w1", "w2", f"w3 w4 w5 w6 {'w7 ' * 80}"]),
        tokenizer(),
        sequences=1,
        sequence_length=5,
        evaluation_sequences=1,
    )
    calibration, evaluation = calibration_and_evaluation(data)
    assert calibration.tolist() == [[4, 5, 2, 6, 2]]
    assert evaluation.tolist() == [[7, 8, 9, 10, 11]]


def test_tokens_and_hashes_are_determined_by_the_seed():
    data = {
        seed: CalibrationDataModule(texts(), tokenizer(), **SIZES, seed=seed) for seed in (0, 1)
    }
    same = CalibrationDataModule(texts(), tokenizer(), **SIZES, seed=0)
    assert data[0].hashes == same.hashes
    assert data[0].hashes["calibration"] != data[1].hashes["calibration"]
    calibration, _ = calibration_and_evaluation(data[0])
    assert torch.equal(calibration, calibration_and_evaluation(same)[0])


def test_hash_is_sha256_of_int64_token_ids():
    data = CalibrationDataModule(
        [[1, 2], [1, 2]], sequences=1, sequence_length=2, evaluation_sequences=1
    )
    raw = (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert data.hashes["calibration"] == hashlib.sha256(raw).hexdigest()


def test_evaluation_texts_from_another_source():
    data = CalibrationDataModule([[1] * 64], evaluation=[[2] * 48], **SIZES)
    calibration, evaluation = calibration_and_evaluation(data)
    assert calibration.unique().tolist() == [1]
    assert evaluation.unique().tolist() == [2]


def test_named_evaluation_sets():
    evaluation = {"twos": [[2] * 48], "threes": [[3] * 48]}
    data = CalibrationDataModule([[1] * 64], evaluation=evaluation, **SIZES)
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


def test_further_texts_as_one_of_several_sets():
    texts = [[i, i + 1] for i in range(0, 400, 2)]
    both = CalibrationDataModule(texts, evaluation={"same": None, "other": [[2] * 48]}, **SIZES)
    alone = CalibrationDataModule(texts, **SIZES)
    assert both.hashes["evaluation/same"] == alone.hashes["evaluation"]
    assert both.hashes["calibration"] == alone.hashes["calibration"]
    assert both.settings["evaluation"]["sets"]["same"] is None
    with pytest.raises(ValueError, match="pass evaluation="):
        CalibrationDataModule("self", tokenizer(), evaluation={"same": None}, **SIZES)


@pytest.mark.parametrize("evaluation", [{}, {"": [[2] * 48]}])
def test_evaluation_sets_need_names(evaluation):
    with pytest.raises(ValueError, match="at least one entry and no empty names"):
        CalibrationDataModule([[1] * 64], evaluation=evaluation, **SIZES)


@pytest.mark.parametrize("file_format", ["txt", "jsonl", "parquet", "folder"])
def test_local_files(tmp_path, file_format):
    path = tmp_path / f"texts.{file_format}"
    if file_format == "txt":
        path.write_text("\n\n".join(texts()))
    elif file_format == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts()))
    else:
        path = tmp_path / "texts.parquet"
        datasets.Dataset.from_dict({"text": texts()}).to_parquet(str(path))
        path = tmp_path if file_format == "folder" else path
    data = CalibrationDataModule(str(path), tokenizer(), **SIZES)
    in_memory = CalibrationDataModule(texts(), tokenizer(), **SIZES)
    assert data.hashes == in_memory.hashes


def test_python_docs_need_no_download():
    others = [[5 + i] * 16 for i in range(8)]
    data = CalibrationDataModule("python-docs", tokenizer(), evaluation=others, **SIZES)
    calibration, _ = calibration_and_evaluation(data)
    assert calibration.shape == (4, 16)


def test_settings_are_json_serializable_and_describe_the_source():
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES)
    assert json.loads(json.dumps(data.settings)) == data.settings
    assert data.settings["dataset"] == {"iterable": "list"}
    assert data.settings["sha256"] == data.hashes


def test_not_enough_text():
    with pytest.raises(
        ValueError, match=r"calibration are too short: 4 seq.* need 64 .*only 6 are available"
    ):
        CalibrationDataModule(["w0 w1", "w2 w3"], tokenizer(), **SIZES).setup()
    with pytest.raises(ValueError, match="texts for evaluation are too short"):
        CalibrationDataModule([[1] * 64, [1] * 40], **SIZES).setup()


def test_texts_require_a_tokenizer():
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        CalibrationDataModule(texts(), **SIZES).setup()


@pytest.mark.parametrize("size", ["sequences", "sequence_length", "batch_size"])
def test_sizes_must_be_positive(size):
    with pytest.raises(ValueError, match=f"{size} must be at least 1, but got 0"):
        CalibrationDataModule(texts(), **{size: 0})


def test_training_split():
    token_ids = [[i] * 64 for i in range(3)]
    data = CalibrationDataModule(token_ids, **SIZES, training_sequences=2)
    training = rows(data.train_dataloader())
    assert training.shape == (2, 16)
    calibration, evaluation = calibration_and_evaluation(data)
    assert not torch.isin(training, torch.cat([calibration, evaluation])).any()
    with pytest.raises(ValueError, match="training_sequences must not be negative, but got -1"):
        CalibrationDataModule(texts(), training_sequences=-1)
    with pytest.raises(ValueError, match="there is no training split"):
        CalibrationDataModule(texts(), **SIZES).train_dataloader()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no text file at"):
        CalibrationDataModule(str(tmp_path / "none.txt"), tokenizer(), **SIZES).setup()


def test_missing_column(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"body": "w0"}) + "\n")
    data = CalibrationDataModule(str(path), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are: body"):
        data.setup()
    data = CalibrationDataModule(TextSource(str(path), column="body"), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match="too short"):
        data.setup()


def test_path_dataset_and_array_as_source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts()))
    hashes = CalibrationDataModule(texts(), tokenizer(), **SIZES).hashes
    assert CalibrationDataModule(path, tokenizer(), **SIZES).hashes == hashes
    dataset = datasets.Dataset.from_dict({"text": texts()})
    assert CalibrationDataModule(dataset, tokenizer(), **SIZES).hashes == hashes
    ids = torch.arange(1000).reshape(20, 50).numpy()
    calibration, _ = calibration_and_evaluation(CalibrationDataModule(ids, **SIZES))
    assert calibration.shape == (4, 16)


def test_split_of_a_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts()))
    data = CalibrationDataModule(TextSource(str(path), split="train[:2]"), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match="only 62 are available"):
        data.setup()
