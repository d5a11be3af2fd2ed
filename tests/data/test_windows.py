"""Windows: packed, padded, overlapping, and the bytes of their text."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from symprune_lightning import (
    BatchDataModule,
    CalibrationDataModule,
    CausalLMModule,
    PruningWarning,
    SymPrune,
    Trainer,
    prune_model,
)
from symprune_lightning.data.windows import WindowDataset, Windows, overlapping, text_prefix
from tests.models import build
from tests.texts import texts, tokenizer
from tests.trainers import TRAINER

SIZES = {"sequences": 4, "sequence_length": 16, "evaluation_sequences": 5}
UNEVEN = [" ".join(text.split()[: 3 + i % 12]) for i, text in enumerate(texts(60))]
"""Texts of 3 to 14 words."""


def validate(model, data, **options):
    trainer = Trainer(**TRAINER, **options)
    return trainer.validate(CausalLMModule(model), datamodule=data, verbose=False)[0]


def losses(model, ids, labels=None):
    """Return the losses of the tokens of one row, of those that have labels."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    labels = (ids if labels is None else labels)[1:]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100]


def test_prefix():
    assert text_prefix(tokenizer(bos=True), None) == [1]
    assert text_prefix(tokenizer(), None) == []


# overlapping windows


def guide(model, ids, max_length, stride):
    """The loop that the guide of transformers describes; returns the loss of each token."""
    result, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        labels = ids[begin:end].clone()
        labels[: -(end - previous_end)] = -100
        result.append(losses(model, ids[begin:end], labels))
        previous_end = end
        if end == len(ids):
            break
    return torch.cat(result)


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16])
def test_overlapping_windows_are_those_of_the_guide(stride):
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES, batch_size=3)
    strided = CalibrationDataModule(
        texts(), tokenizer(), **SIZES, batch_size=3, evaluation_stride=stride
    )
    model = build("llama").double()
    expected = guide(model, data.splits["evaluation"].text, 16, stride)
    assert validate(model, strided)["val_loss"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert torch.equal(strided.splits["evaluation"].text, data.splits["evaluation"].text)
    if stride == 16:
        assert validate(model, data) == pytest.approx(validate(model, strided), rel=1e-6)
    else:  # of which the first token only is not predicted
        assert len(expected) == 5 * 16 - 1


def test_every_overlapping_window_begins_with_the_prefix():
    options = {**SIZES, "evaluation_stride": 7}
    data = CalibrationDataModule(texts(), tokenizer(bos=True), **options)
    windows = data.splits["evaluation"]
    assert (windows.ids[:, 0] == 1).all()
    assert (windows.labels[:, 0] == -100).all()
    plain = CalibrationDataModule(texts(), tokenizer(bos=True), **SIZES).splits["evaluation"]
    assert torch.equal(windows.text, plain.text)
    assert plain.text.tolist() == plain.ids[:, 1:].flatten().tolist()


def test_the_end_of_a_text_is_a_shorter_window():
    windows = overlapping(torch.arange(10, 31), 16, 8, [])
    assert windows.mask.sum(1).tolist() == [16, 13]
    assert [int((row != -100).sum()) for row in windows.labels] == [16, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluation_stride": 0}, "evaluation_stride must be at least 1, but got 0"),
        ({"evaluation_stride": 17}, "evaluation_stride is 17, which is more than the 16 tokens"),
        ({"evaluation_stride": 4, "packing": False}, "evaluation_stride needs packed sequences"),
    ],
)
def test_strides_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationDataModule(texts(), tokenizer(), **SIZES, **options).setup()


# one text in a window


@pytest.mark.parametrize("bos", [False, True])
def test_each_text_is_a_padded_window(bos):
    encoder = tokenizer(bos=bos)
    data = CalibrationDataModule(UNEVEN, encoder, **SIZES, packing=False, batch_size=3)
    rows = [row for b in data.calibration_dataloader() for row in _unpadded(b)]
    ends = {(*encoder(text).input_ids, 2) for text in UNEVEN}
    assert len(rows) == 4
    assert all(tuple(row.tolist()) in ends for row in rows)


def _unpadded(batch):
    return [
        ids[keep.bool()]
        for ids, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_padding_is_not_evaluated():
    data = CalibrationDataModule(UNEVEN, tokenizer(), **SIZES, packing=False, batch_size=3)
    model = build("llama").double()
    rows = [row for b in data.val_dataloader() for row in _unpadded(b)]
    expected = torch.cat([losses(model, row) for row in rows]).mean()
    assert len({len(row) for row in rows}) > 1
    assert validate(model, data)["val_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_padding_is_not_measured():
    data = CalibrationDataModule(UNEVEN, tokenizer(), **SIZES, packing=False, batch_size=4)
    rows = [{"input_ids": row[None]} for b in data.calibration_dataloader() for row in _unpadded(b)]
    prune = SymPrune("ria", refine="dsnot")
    Trainer(**TRAINER).validate(
        CausalLMModule(build("llama")), datamodule=data, callbacks=prune, verbose=False
    )
    alone = prune_model(build("llama"), rows, score="ria", refine="dsnot")
    assert all(torch.equal(mask, alone.masks[name]) for name, mask in prune.result.masks.items())


def test_padding_is_not_trained_on():
    model = build("llama").double()
    module = CausalLMModule(model)
    data = CalibrationDataModule(
        UNEVEN, tokenizer(), **SIZES, packing=False, batch_size=4, training_sequences=4
    )
    batch = next(iter(data.train_dataloader()))
    expected = torch.cat([losses(model, row) for row in _unpadded(batch)]).mean()
    assert float(module.training_step(batch, 0)) == pytest.approx(float(expected), rel=1e-6)


def test_long_texts_are_truncated_and_named():
    with pytest.warns(PruningWarning, match="have more than 16 tokens and are truncated") as named:
        CalibrationDataModule(texts(), tokenizer(), **SIZES, packing=False).setup()
    numbers = [str(warning.message).split(" have")[0] for warning in named]
    assert numbers == ["4 of 4 texts for calibration", "5 of 5 texts for evaluation"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CalibrationDataModule(UNEVEN, tokenizer(), **SIZES, packing=False).setup()


def test_too_few_texts_to_pad():
    with pytest.raises(ValueError, match="4 sequences need 4 texts, but only 3 are available"):
        CalibrationDataModule(UNEVEN[:3], tokenizer(), **SIZES, packing=False).setup()


@pytest.mark.parametrize("dataset", ["wikitext2", "self"])
def test_full_windows_are_not_padded(dataset):
    with pytest.raises(ValueError, match="packing=False has no effect on"):
        CalibrationDataModule(dataset, tokenizer(), evaluation=UNEVEN, packing=False)


# several processes


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"evaluation_stride": 5}])
def test_rows_that_fill_up_have_no_labels(options):
    source = texts() if options.get("packing", True) else UNEVEN
    windows = CalibrationDataModule(source, tokenizer(), **SIZES, **options).splits["evaluation"]
    plain, shared = WindowDataset(windows), WindowDataset(windows, num_replicas=11)
    assert len(shared) % 11 == 0 < len(shared) - len(plain)
    module = CausalLMModule(build("llama"))
    counts, totals = [], []
    for rows in (plain, shared):
        targets = [
            module._targets({name: x[None] for name, x in row.items()})[0]
            for row in map(rows.__getitem__, range(len(rows)))
        ]
        counts.append([int((t != -100).sum()) for t in targets])
        totals.append(sum(counts[-1]))
    assert totals == [plain.num_labels] * 2
    assert counts[1][: len(plain)] == counts[0]
    assert not any(counts[1][len(plain) :])


# bits per byte


def bits_per_byte(model, windows, encoder):
    """Transcription of the definition: the loss of all counted tokens over their bytes."""
    nats, counted = 0.0, []
    for row, targets in zip(windows.ids, windows.targets, strict=True):
        nats += float(losses(model, row, targets).sum())
        counted += row[targets != -100].tolist()
    size = len(encoder.decode(counted, skip_special_tokens=True).encode())
    return nats / math.log(2) / size


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("options", [{}, {"evaluation_stride": 5}])
def test_bits_per_byte(bos, options):
    encoder = tokenizer(bos=bos)
    data = CalibrationDataModule(texts(), encoder, **SIZES, **options)
    model = build("llama").double()
    expected = bits_per_byte(model, data.splits["evaluation"], encoder)
    assert validate(model, data)["val_bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_bits_per_byte_of_several_sets():
    sets = {"a": texts(20), "b": texts(30, 25)[20:]}
    data = CalibrationDataModule(
        [[5 + i] * 16 for i in range(9)], tokenizer(), **SIZES, evaluation=sets
    )
    model = build("llama").double()
    metrics = validate(model, data)
    sizes = {}
    for name in sets:
        windows = data.splits[f"evaluation/{name}"]
        expected = bits_per_byte(model, windows, tokenizer())
        assert metrics[f"val_bits_per_byte/{name}"] == pytest.approx(expected, rel=1e-6)
        sizes[name] = windows.num_bytes(tokenizer())
    mean = sum(sizes[name] * metrics[f"val_bits_per_byte/{name}"] for name in sets)
    assert metrics["val_bits_per_byte"] == pytest.approx(mean / sum(sizes.values()), rel=1e-6)


def test_no_bits_per_byte_without_all_texts():
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES)
    assert "val_bits_per_byte" not in validate(build("llama"), data, limit_val_batches=2)
    ids = CalibrationDataModule([[5 + i] * 16 for i in range(9)], **SIZES)
    assert "val_bits_per_byte" not in validate(build("llama"), ids)
    batches = [
        {"input_ids": torch.full((1, 16), i), "labels": torch.full((1, 16), i)} for i in (5, 6)
    ]
    batch_data = BatchDataModule(batches[:1], batches[1:])
    assert set(validate(build("llama"), batch_data)) == {"val_loss", "val_perplexity"}


def test_plain_windows_have_no_mask():
    rows = Windows(torch.zeros(2, 4, dtype=torch.long)).rows()
    assert [set(row) for row in rows] == [{"input_ids"}] * 2


def test_special_tokens_in_front_of_a_text_are_not_counted():
    ids = torch.tensor([[1, 2, 5, 6], [1, 2, 7, 8]])
    windows = Windows(ids, prefix_length=2)
    assert windows.targets.tolist() == [[-100, -100, 5, 6], [-100, -100, 7, 8]]
    assert [row["labels"].tolist() for row in windows.rows()] == windows.targets.tolist()
    assert "labels" not in Windows(ids, prefix_length=1).rows()[0]
