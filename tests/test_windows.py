"""Windows begin as the model was trained, and splits do not overlap."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import transformers as tf
from lightning.pytorch import seed_everything

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    SymPrune,
    TextSource,
    Trainer,
    prune_model,
)
from symprune_lightning.errors import PruningWarning
from symprune_lightning.windows import overlap, text_prefix
from tests.models import build, gpt2, llama
from tests.texts import WORDS, texts, tokenizer

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


def test_prefix():
    assert text_prefix(tokenizer(bos=True), None) == [BOS]
    assert text_prefix(tokenizer(), None) == []


# overlap


def test_the_same_texts_are_refused(tmp_path):
    message = r"100% of the tokens for evaluation are also used for calibration"
    with pytest.raises(ValueError, match=message):
        CalibrationDataModule(texts(), tokenizer(), evaluation=texts(), **SIZES).setup()
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts()))
    data = CalibrationDataModule(
        str(path), tokenizer(), evaluation={"own": TextSource(str(path))}, **SIZES
    )
    with pytest.raises(ValueError, match="tokens for evaluation/own are also used for calibration"):
        data.setup()


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
        data.setup()


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
        data.setup()


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
        data.setup()


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
            data.setup()


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
        data.setup()


def test_overlap_is_the_share_of_runs():
    ids = torch.randint(0, 1000, (4, 100), generator=torch.Generator().manual_seed(0))
    others = torch.randint(0, 1000, (4, 100), generator=torch.Generator().manual_seed(1))
    assert overlap(ids, others) == 0
    others[0] = ids[2]
    assert overlap(ids, others) == pytest.approx((100 - 32 + 1) / (400 - 32 + 1))


# rows that are no documents


def write(tmp_path, rows):
    import datasets

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


# models that the data does not fit


def test_sequences_longer_than_the_positions_of_a_model():
    data = CalibrationDataModule(texts(80, 60), tokenizer(), **{**SIZES, "sequence_length": 129})
    with pytest.raises(ValueError, match="GPT2LMHeadModel has learned 128 positions: use seq"):
        run(gpt2(), data)
    run(llama(), data)  # rotary positions are computed


def test_ids_without_an_embedding():
    data = CalibrationDataModule(texts(), tokenizer(), **SIZES)
    with pytest.raises(ValueError, match=r"token id \d+, and LlamaForCausalLM has 50 embeddings"):
        run(llama(vocab_size=50), data)


def test_batches_of_the_user_are_checked_too():
    model = build("gpt2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="has learned 128 positions"):
        prune_model(model, [{"input_ids": torch.zeros(1, 130, dtype=torch.int64)}])
    with pytest.raises(ValueError, match="token id 64, and GPT2LMHeadModel has 64 embeddings"):
        prune_model(model, [{"input_ids": torch.full((1, 8), 64)}])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_positions_of_roberta_begin_after_padding():
    config = tf.XLMRobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=18,
        is_decoder=True,
    )
    model = tf.XLMRobertaForCausalLM(config)
    prune_model(model, [{"input_ids": torch.full((1, 16), 5)}])
    with pytest.raises(ValueError, match="has learned 16 positions"):
        prune_model(model, [{"input_ids": torch.full((1, 17), 5)}])


def test_a_model_without_common_embeddings_is_not_checked():
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "projection_dim": 16}
    vision = {**text, "image_size": 8, "patch_size": 4} | heads
    vision.pop("vocab_size")
    config = tf.CLIPConfig(text_config=text | heads, vision_config=vision, projection_dim=16)
    batch = {"input_ids": torch.full((2, 8), 5), "pixel_values": torch.randn(2, 3, 8, 8)}
    assert prune_model(tf.CLIPModel(config), [batch]).sparsity == 0.5


def run(model, data):
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(
        CausalLMModule(model), datamodule=data, callbacks=SymPrune("wanda"), verbose=False
    )


def test_runs_without_text_do_not_count():
    unknown = torch.full((4, 100), 3)
    assert overlap(unknown, unknown) == 0
