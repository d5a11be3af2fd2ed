"""Files, datasets and rows that users have."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from huggingface_hub import constants
from torch.utils.data import DataLoader

from symprune_lightning import CalibrationDataModule, TextSource
from symprune_lightning.data.protocols import C4, PROTOCOLS, PTB
from symprune_lightning.data.reader import TextReader
from symprune_lightning.data.sources import source_from_settings, source_settings
from tests.texts import texts, tokenizer

SIZES = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 3}


def csv(path: Path) -> Any:
    datasets.Dataset.from_dict({"text": texts()}).to_csv(path / "a.csv")
    return str(path / "a.csv")


def tsv(path: Path) -> Any:
    datasets.Dataset.from_dict({"text": texts()}).to_csv(path / "a.tsv", sep="\t")
    return str(path / "a.tsv")


def json_gz(path: Path) -> Any:
    with gzip.open(path / "c4.json.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in texts()))
    return path / "c4.json.gz"


def upper_case(path: Path) -> Any:
    (path / "T.TXT").write_text("\n\n".join(texts()))
    return str(path / "T.TXT")


def token_ids(path: Path) -> Any:
    ids = [tokenizer()(text)["input_ids"] for text in texts()]
    datasets.Dataset.from_dict({"ids": ids}).to_parquet(path / "ids.parquet")
    return TextSource(str(path / "ids.parquet"), column="ids")


def parquet_folder(path: Path) -> Any:
    for part in range(2):
        rows = datasets.Dataset.from_dict({"text": texts()[part::2]})
        rows.to_parquet(path / f"train-{part}.parquet")
    return str(path)


def some_files(path: Path) -> TextSource:
    parquet_folder(path)
    datasets.Dataset.from_dict({"text": ["w1 w2"] * 900}).to_parquet(path / "other.parquet")
    return TextSource(str(path), data_files=["train-0.parquet", "train-1.parquet"])


SOURCES: dict[str, Callable[[Path], Any]] = {
    "csv": csv,
    "tsv": tsv,
    "json.gz": json_gz,
    "TXT": upper_case,
    "folder": parquet_folder,
    "stream of a file": lambda path: TextSource(str(json_gz(path)), streaming=True),
    "streamed dataset": lambda path: datasets.Dataset.from_dict(
        {"text": texts()}
    ).to_iterable_dataset(),
    "rows": lambda path: [{"text": text} for text in texts()],
    "generator of rows": lambda path: ({"text": text} for text in texts()),
    "token ids": token_ids,
    "files of a folder": some_files,
    "slice of files": lambda path: replace(some_files(path), split="train[:100%]"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources(tmp_path, name):
    data = CalibrationDataModule(SOURCES[name](tmp_path), tokenizer(), seed=3, **SIZES)
    data.setup()
    ids = torch.cat([batch["input_ids"] for batch in data.calibration_dataloader()]).flatten()
    known = [tokenizer()(text)["input_ids"] for text in texts()]
    first = next(row for row in known if row == ids[:30].tolist())
    assert first
    again = CalibrationDataModule(SOURCES[name](tmp_path), tokenizer(), seed=3, **SIZES)
    assert again.hashes == data.hashes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": texts()})), "splits train"),
        (
            [{"content": "a"}],
            "the dataset have no column 'text'; their columns are: content",
        ),
        ([[{"role": "user", "content": "w1"}]] * 9, "chats, and the tokenizer has no chat templ"),
        ([[0.5, 0.25]], "holds a list of float, and no text"),
        ([b"text"], "row 0 of the dataset has a bytes in column 'text'"),
        ([7, 8], "has a int in column 'text': pass texts"),
        ({"text": texts()}, "the dataset is a dict: pass an iterable"),
        ([None, ""], r"only 0 are available; .*2 of 2 rows of the dataset have no text"),
        (
            datasets.Dataset.from_dict({"body": texts()}),
            r"no column 'text'; its columns are: body.*rename_column\(..., 'text'\)",
        ),
        (DataLoader(texts()), r"is a DataLoader, which yields batches: pass its dataset"),
        (pandas.DataFrame({"text": texts()}), "is a DataFrame: pass one of its columns as a list"),
        ("\n\n".join(texts()), "is one text of .* characters, where a path or a name of the hub"),
    ],
)
def test_mistakes(source, message):
    with pytest.raises(ValueError, match=message):
        CalibrationDataModule(source, tokenizer(), **SIZES).setup()


def test_chats_are_formatted_by_the_template_of_the_tokenizer(tmp_path):
    chats = [[{"role": "user", "content": text}] for text in texts()]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    template = tokenizer()
    template.chat_template = "{% for m in messages %}w0 {{ m['content'] }} w1{% endfor %}"
    data = CalibrationDataModule(TextSource(str(path), column="messages"), template, **SIZES)
    data.setup()
    ids = next(iter(data.calibration_dataloader()))["input_ids"][0].tolist()
    assert ids[0] == template("w0")["input_ids"][0]
    texts_with_template = [template(f"w0 {text} w1")["input_ids"] for text in texts()]
    assert any(row[:16] == ids for row in texts_with_template)


def test_chats_have_their_special_tokens_once():
    template = tokenizer(bos=True)
    template.chat_template = "<s> {% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in texts()]
    data = CalibrationDataModule(chats, template, **SIZES)
    data.setup()
    ids = torch.cat([b["input_ids"] for b in data.calibration_dataloader()])
    assert (ids[:, 0] == 1).all()
    assert not (ids[:, 1:] == 1).any()
    assert not ((ids[:, 1:] == 2) & (ids[:, :-1] == 2)).any()


def test_a_stream_is_read_no_further_than_needed():
    read = []

    def endless() -> Iterator[str]:
        for i in range(1_000_000):
            read.append(i)
            yield texts()[i % 40]

    CalibrationDataModule(endless(), tokenizer(), **SIZES).setup()
    assert len(read) < 10


def test_settings_describe_every_source():
    sources = [
        "python-docs",
        TextSource("a.csv", joiner="\n", streaming=True),
        TextSource("org/a", data_files=["a.json", "b.json"], revision="v1"),
        PTB("/ptb"),
        {"a": "wikitext2", "b": TextSource("b")},
        C4(path="/c4"),
        *PROTOCOLS.values(),
    ]
    for source in sources:
        restored = source_from_settings(json.loads(json.dumps(source_settings(source))))
        assert restored == source or PROTOCOLS[restored] == source
    with pytest.raises(ValueError, match="data in memory"):
        source_from_settings(source_settings(texts()))


@pytest.mark.parametrize("option", [{"data_files": "a.csv"}, {"revision": "main"}])
def test_files_of_a_single_file(option):
    with pytest.raises(ValueError, match="is a single file: data_files and revision"):
        TextSource("a.csv", **option)


def test_the_names_of_rows_are_those_of_the_file(tmp_path):
    reader = TextReader(csv(tmp_path), 0, "the texts")
    assert next(iter(reader)) in texts()
    assert reader.name.endswith("a.csv")


def test_files_without_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt has no text, or is no text file"):
        CalibrationDataModule(str(tmp_path / "empty.txt"), tokenizer(), **SIZES).setup()
    (tmp_path / "no.jsonl").write_text("no json")
    with pytest.raises(ValueError, match=r"no.jsonl has no text, or is no json file"):
        CalibrationDataModule(str(tmp_path / "no.jsonl"), tokenizer(), **SIZES).setup()


def test_a_text_file_without_empty_lines_is_one_text(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(texts(3)))
    message = r"one.txt has 1 texts; texts of a .txt file are separated by empty lines"
    with pytest.raises(ValueError, match=message):
        CalibrationDataModule(str(tmp_path / "one.txt"), tokenizer(), **SIZES).setup()


def test_files_of_a_folder_have_the_texts_of_single_files(tmp_path):
    """Paragraphs: a line of a wrapped text is no document."""
    paragraphs = [text.replace(" ", "\n", 1) for text in texts(40)]
    for name, part in (("a", paragraphs[:20]), ("b", paragraphs[20:])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part))
    for source in (TextSource(str(tmp_path)), TextSource(str(tmp_path), data_files="*.txt")):
        assert sorted(TextReader(source, 0, "the texts")) == sorted(paragraphs)


def test_settings_of_a_path_are_text(tmp_path):
    source = TextSource(path=tmp_path / "a.jsonl")
    assert json.loads(json.dumps(source_settings(source)))["path"] == str(tmp_path / "a.jsonl")
    assert json.dumps(source_settings(C4(path=tmp_path)))


@pytest.mark.parametrize("source", ["org/no-data", PROTOCOLS["wikitext2"], PROTOCOLS["c4"]])
def test_a_hub_that_cannot_be_reached(source, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("symprune_lightning.checkpoints.hub.getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        OSError, match=r"not in the cache, and http://127.0.0.1:9 cannot be reached"
    ):
        CalibrationDataModule(source, tokenizer(), **SIZES).setup()


def test_sources_that_are_none(tmp_path):
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ValueError, match=r"notes.md has no known format: use one of .txt, .jsonl"):
        CalibrationDataModule(str(tmp_path / "notes.md"), tokenizer(), **SIZES).setup()
    with pytest.raises(ValueError, match="'self' is a source of calibration texts only"):
        CalibrationDataModule(texts(), tokenizer(), evaluation="self", **SIZES).setup()
