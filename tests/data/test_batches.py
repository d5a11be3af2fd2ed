"""Batches that are ready for the model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from symprune_lightning import BatchDataModule


def images(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(2, 3, 4, 4, generator=generator)} for _ in range(count)]


class Images(Dataset):
    """A dataset whose ``__getitem__`` never raises ``IndexError``."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return images()[index % 4]


@pytest.mark.parametrize(
    "make",
    [
        images,
        lambda: iter(images()),
        Images,
        lambda: DataLoader([{"pixel_values": x} for b in images() for x in b["pixel_values"]], 2),
    ],
    ids=["list", "iterator", "dataset", "dataloader"],
)
def test_batches_are_read_once(make):
    data = BatchDataModule(make(), {"some": images(4, seed=2), "others": images(1, seed=1)})
    for _ in range(2):
        read = list(data.calibration_dataloader())
        assert all(
            torch.equal(a["pixel_values"], b["pixel_values"])
            for a, b in zip(read, images(), strict=True)
        )
    assert {name: len(loader) for name, loader in data.val_dataloader().items()} == {
        "some": 4,
        "others": 1,
    }
    settings = json.loads(json.dumps(data.settings))
    assert (settings["calibration_batches"], settings["evaluation_batches"]) == (4, 5)
    hashes = settings["sha256"]
    same = BatchDataModule(images(), images(1, seed=1)).hashes
    assert same["calibration"] == hashes["calibration"] != hashes["evaluation/some"]
    assert same["evaluation"] == hashes["evaluation/others"]


def test_hashes_of_batches_depend_on_names_types_and_order():
    batch, other = {"x": torch.zeros(2, 3)}, {"x": torch.ones(2, 3)}
    variants = [
        [batch, other],
        [other, batch],
        [{"y": batch["x"]}, other],
        [{"x": torch.zeros(3, 2)}, other],
        [{"x": torch.zeros(2, 3, dtype=torch.int32)}, other],
    ]
    assert len({hash_of(v) for v in variants}) == len(variants)
    half = [{"x": torch.zeros(2, dtype=torch.bfloat16), "y": torch.tensor(True)}]
    assert hash_of(half) == hash_of([{"y": torch.tensor(True), "x": half[0]["x"].clone()}])


def hash_of(batches):
    return BatchDataModule(batches, images(1)).hashes["calibration"]


def test_evaluation_batches_that_are_calibration_batches():
    data = BatchDataModule(images(), {"new": images(2, seed=1), "some": images()[:2]})
    with pytest.raises(ValueError, match="2 of 2 batches for evaluation/some are also used for"):
        data.setup()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches for calibration: pass at least one"),
        ([torch.zeros(2, 3)], "batch 0 for calibration is a Tensor: pass an iterable of mappings"),
        (images(1)[0], "batch 0 for calibration is a str: pass an iterable of mappings"),
        (
            [*images(1), {"pixel_values": [[0.5]]}],
            "'pixel_values' in batch 1 for calibration is a list, not a tensor: call the processor "
            "with return_tensors='pt'",
        ),
    ],
)
def test_batches_that_a_model_cannot_take(batches, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchDataModule(batches, images()).setup()


def test_other_mistakes_with_batches():
    with pytest.raises(TypeError, match=r"processor is a str: pass the object that made"):
        BatchDataModule(images(), images(), "org/model")
    with pytest.raises(ValueError, match="a BatchDataModule has no training batches: pass"):
        BatchDataModule(images(), images()).train_dataloader()
