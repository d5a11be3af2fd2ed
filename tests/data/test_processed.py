"""Rows of images, sounds and chats, through the processors of transformers."""

from __future__ import annotations

import json
import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from symprune_lightning import ProcessorDataModule, SymPrune, Trainer, TransformersModule
from symprune_lightning.cli.verify import verify
from tests.test_multimodal import IMAGE_TOKEN, llava, llava_processor, t5, whisper
from tests.texts import texts, tokenizer
from tests.trainers import TRAINER

SIZES: dict[str, Any] = {"samples": 5, "evaluation_samples": 3, "batch_size": 2}


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)


def pictures() -> list[dict[str, Any]]:
    return [
        {"image": image(i), "text": f"<image> {text[: 20 + 3 * i]}"}
        for i, text in enumerate(texts(9))
    ]


def sounds(rate: int = 16_000) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).normal(size=(9, 16_000))
    return [
        {"audio": {"array": noise[i], "sampling_rate": rate}, "text": text[: 20 + 3 * i]}
        for i, text in enumerate(texts(9))
    ]


def whisper_processor() -> tf.WhisperProcessor:
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    processor = tf.WhisperProcessor.__new__(tf.WhisperProcessor)
    processor.feature_extractor, processor.tokenizer = extractor, tokenizer()
    processor.chat_template = None
    return processor


def chats() -> list[dict[str, Any]]:
    rows = []
    for i, text in enumerate(texts(9)):
        content = [{"type": "image", "image": image(i)}, {"type": "text", "text": text[:30]}]
        rows.append({"messages": [{"role": "user", "content": content}], "id": i})
    return rows


def chat_processor() -> tf.LlavaProcessor:
    processor = llava_processor()
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return processor


def pruned(model: tf.PreTrainedModel, data: ProcessorDataModule) -> SymPrune:
    prune = SymPrune("wanda")
    Trainer(**TRAINER).validate(
        TransformersModule(model), datamodule=data, callbacks=prune, verbose=False
    )
    assert prune.result is not None
    assert prune.result.sparsity == 0.5
    assert not prune.result.unreached
    return prune


def test_images_with_text(tmp_path):
    data = ProcessorDataModule(pictures(), llava_processor(), seed=1, **SIZES)
    batches = list(data.calibration_dataloader())
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 1]
    for batch in batches:
        assert (batch["input_ids"] == IMAGE_TOKEN).any()
        counted = batch["labels"] != -100
        assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
        is_text = (batch["attention_mask"] == 1) & (batch["input_ids"] != IMAGE_TOKEN)
        assert torch.equal(counted, is_text)
    assert pruned(llava(), data).sparse_metrics["val_perplexity"] > 1
    again = ProcessorDataModule(
        iter([pictures()[i] for i in order(9, seed=1)]), llava_processor(), **SIZES
    )
    assert again.hashes == data.hashes
    other = ProcessorDataModule(pictures(), llava_processor(), seed=2, **SIZES)
    assert other.hashes != data.hashes


def order(count: int, seed: int) -> list[int]:
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def test_chats_with_images():
    data = ProcessorDataModule(chats(), chat_processor(), **SIZES)
    batch = next(iter(data.calibration_dataloader()))
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert (batch["input_ids"] == IMAGE_TOKEN).any()
    pruned(llava(), data)


def test_sounds_with_transcriptions():
    data = ProcessorDataModule(sounds(), whisper_processor(), **SIZES)
    batch = next(iter(data.calibration_dataloader()))
    assert set(batch) == {"input_features", "labels"}
    assert batch["input_features"].shape == (2, 8, 100)
    rows = [row[row != -100].tolist() for row in batch["labels"]]
    assert [len(row) for row in rows] != [batch["labels"].shape[1]] * 2
    known = [tokenizer()(row["text"]).input_ids for row in sounds()]
    assert all(row in known for row in rows)
    pruned(whisper(), data)


def test_images_in_columns_of_their_own_fill_the_chat():
    inside = ProcessorDataModule(chats(), chat_processor(), **SIZES)
    rows = []
    for i, row in enumerate(chats()):
        content = [{"type": "image"}, row["messages"][0]["content"][1]]
        rows.append({"messages": [{"role": "user", "content": content}], "images": [image(i)]})
    assert ProcessorDataModule(rows, chat_processor(), **SIZES).hashes == inside.hashes
    rows[3]["images"] = [image(0), image(1)]
    with pytest.raises(ValueError, match="fewer blocks of image than the row has values"):
        ProcessorDataModule(rows, chat_processor(), **SIZES).setup()


def test_the_first_token_after_padding_on_the_left_has_no_label():
    processor = llava_processor()
    processor.tokenizer.padding_side = "left"
    data = ProcessorDataModule(pictures(), processor, **SIZES)
    for batch in data.calibration_dataloader():
        for mask, labels in zip(batch["attention_mask"], batch["labels"], strict=True):
            start = int(mask.argmax())
            assert start == 0 or labels[start] == -100


def test_the_start_token_of_transcriptions_is_added_by_the_model():
    processor = whisper_processor()
    words = tokenizer(bos=True)
    words.prefix_tokens = [1]
    processor.tokenizer = words
    data = ProcessorDataModule(sounds(), processor, **SIZES)
    plain = ProcessorDataModule(sounds(), whisper_processor(), **SIZES)
    for batch, expected in zip(
        data.calibration_dataloader(), plain.calibration_dataloader(), strict=True
    ):
        assert torch.equal(batch["labels"], expected["labels"])


def test_feature_extractors_take_sounds():
    extractor = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    rows = [{"audio": row["audio"]} for row in sounds()]
    batch = next(iter(ProcessorDataModule(rows, extractor, **SIZES).calibration_dataloader()))
    assert batch["input_features"].shape == (2, 8, 100)
    with pytest.raises(ValueError, match=r"a sound is a ndarray: pass \{'array': …"):
        ProcessorDataModule([{"audio": np.zeros(9)}] * 9, extractor, **SIZES).setup()


def test_batches_without_labels():
    data = ProcessorDataModule(pictures(), llava_processor(), labels=False, **SIZES)
    assert "labels" not in next(iter(data.calibration_dataloader()))
    assert pruned(llava(), data).sparse_metrics == {}


def test_streams_are_shuffled():
    rows = [{"image": image(i).tolist(), "number": i} for i in range(9)]
    stream = datasets.Dataset.from_list(rows).with_format("numpy").to_iterable_dataset()
    processor = llava_processor().image_processor
    hashes = {
        ProcessorDataModule(stream, processor, seed=seed, **SIZES).hashes["calibration"]
        for seed in range(3)
    }
    assert len(hashes) == 3


def test_labels_that_are_the_input_of_an_encoder():
    ids = torch.full((1, 8), 5)
    with pytest.raises(ValueError, match="the labels are the input of the encoder of T5ForCondit"):
        TransformersModule(t5()).validation_step({"input_ids": ids, "labels": ids}, 0)


def test_images_alone_of_a_dataset_with_other_columns(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"photo": [image(i) for i in range(8)], "text": ["w1"] * 8}
    ).with_format("numpy")
    processor = llava_processor().image_processor
    data = ProcessorDataModule(rows, processor, columns={"images": "photo"}, **SIZES)
    batch = next(iter(data.val_dataloader()))
    assert set(batch) == {"pixel_values"}
    model = tf.CLIPVisionModel(
        tf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )
    assert pruned(model, data).sparse_metrics == {}


def test_a_folder_and_a_processor_by_name(tmp_path):
    rows = [{"image": Image.fromarray(row["image"]), "text": row["text"]} for row in pictures()]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    llava_processor().save_pretrained(tmp_path / "model")
    data = ProcessorDataModule(str(tmp_path / "data"), str(tmp_path / "model"), **SIZES)
    output = tmp_path / "out"
    trainer = Trainer(**TRAINER)
    trainer.prune(
        TransformersModule(llava()),
        datamodule=data,
        output=str(output),
        callbacks=SymPrune("wanda"),
    )
    recorded = json.loads((output / "sparsity_manifest.json").read_text())["data"]
    assert recorded["dataset"]["rows"] == str(tmp_path / "data")
    assert recorded["samples"] == 5
    assert recorded["sha256"] == data.hashes
    assert all(check.passed for check in verify(output) if check.passed is not None)


def test_the_sets_of_a_mapping():
    data = ProcessorDataModule(
        pictures()[:5],
        llava_processor(),
        evaluation={"a": pictures()[5:8], "b": pictures()[6:]},
        **SIZES,
    )
    assert {name: len(loader) for name, loader in data.val_dataloader().items()} == {
        "a": 2,
        "b": 2,
    }


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (pictures()[:4], {}, "not enough rows for calibration: 5 are needed, and the dataset has "),
        (pictures()[:6], {}, "for evaluation: 3 are needed, and the dataset has only 1 more"),
        ([{"photo": 1}] * 9, {}, r"row \d of the dataset has the columns photo, and not image, im"),
        (pictures(), {"columns": {"images": "photo"}}, "has the columns image, text, and not phot"),
        (texts(9), {}, r"row \d of the dataset is a str: pass mappings of columns"),
        ([{**row, "image": "w1"} for row in pictures()], {}, "LlavaProcessor cannot process rows "),
        (chats(), {}, "cannot process rows .* of the dataset, with the arguments messages: .*chat"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})),
            {},
            "the dataset has the splits train: pass one",
        ),
        (
            iter([row if i % 2 else {"text": row["text"]} for i, row in enumerate(pictures())]),
            {"batch_size": 4},
            r"row \d of the dataset has the columns .*: use batch_size=1",
        ),
        (pictures() + pictures(), {"samples": 15}, "batches for evaluation are also used for cal"),
    ],
)
def test_mistakes(rows, options, message):
    with pytest.raises(ValueError, match=message):
        ProcessorDataModule(
            rows, llava_processor(), **{**SIZES, "batch_size": 1, **options}
        ).setup()


def test_sounds_of_two_rates():
    rows = [row for pair in zip(sounds(), sounds(8_000), strict=True) for row in pair]
    with pytest.raises(ValueError, match=r"sounds have sampling rates of \[8000, 16000\]"):
        ProcessorDataModule(iter(rows), whisper_processor(), **SIZES).setup()


def test_sounds_at_another_rate():
    with pytest.raises(ValueError, match=r"cannot process rows .* 16000"):
        ProcessorDataModule(sounds(8_000), whisper_processor(), **SIZES).setup()


def test_sizes():
    with pytest.raises(ValueError, match="samples must be at least 1, but got 0"):
        ProcessorDataModule(pictures(), llava_processor(), samples=0)


def test_a_processor_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        ProcessorDataModule(pictures(), str(tmp_path / "nothing"))
