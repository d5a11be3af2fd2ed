"""Vision-language, speech and encoder-decoder models: pruned, exported, verified, loaded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import AddedToken

from symprune_lightning import (
    BatchDataModule,
    CausalLMModule,
    SymPrune,
    Trainer,
    TransformersModule,
    load_masks,
)
from symprune_lightning.checkpoints.manifest import read_manifest
from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX
from symprune_lightning.cli.verify import verify
from tests.groups import run_trainers
from tests.models import DECODER, VOCABULARY, batches, build
from tests.texts import texts, tokenizer
from tests.trainers import TRAINER

IMAGE_TOKEN = VOCABULARY
"""Id of the token that follows those of the tokenizer."""


def llava() -> tf.PreTrainedModel:
    vision = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = tf.LlamaConfig(**{**DECODER, "vocab_size": VOCABULARY + 1})
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return tf.LlavaForConditionalGeneration(config)


def llava_processor() -> tf.LlavaProcessor:
    words = tokenizer()
    words.add_tokens([AddedToken("<image>", special=True)])
    return tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_batch(processor: Any, lines: list[str], seed: int) -> dict[str, Tensor]:
    pixels = np.random.default_rng(seed).integers(0, 255, (len(lines), 16, 16, 3), dtype=np.uint8)
    prompts = [f"<image> {line}" for line in lines]
    batch = dict(processor(images=list(pixels), text=prompts, padding=True, return_tensors="pt"))
    ids = batch["input_ids"]
    is_label = (batch["attention_mask"] == 1) & (ids != IMAGE_TOKEN)
    return {**batch, "labels": ids.masked_fill(~is_label, IGNORE_INDEX)}


def whisper() -> tf.PreTrainedModel:
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return tf.WhisperForConditionalGeneration(config)


def whisper_batch(processor: Any, lines: list[str], seed: int) -> dict[str, Tensor]:
    audio = np.random.default_rng(seed).normal(size=(len(lines), 16_000)).astype(np.float32)
    inputs = processor(list(audio), sampling_rate=16_000, return_tensors="pt")
    return {"input_features": inputs["input_features"], "labels": _labels(lines)}


def t5() -> tf.PreTrainedModel:
    config = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return tf.T5ForConditionalGeneration(config)


def t5_batch(processor: Any, lines: list[str], seed: int) -> dict[str, Tensor]:
    sources = [line[: len(line) // 2] for line in lines]
    inputs = processor(sources, padding=True, return_tensors="pt")
    masked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return {**masked, "labels": _labels(lines)}


def _labels(lines: list[str]) -> Tensor:
    batch = tokenizer()(lines, padding=True, return_tensors="pt")
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)


@dataclass(frozen=True)
class Kind:
    """A tiny model with its processor.

    Attributes:
        build: Returns the model.
        auto_class: Loads the model.
        processor: Returns the processor.
        batch: Returns a batch of texts, with random images or sounds of a seed.
        auto_processor: Loads the processor.
        tower: Part of the names of layers that process images, sounds or the source text.
    """

    build: Callable[[], tf.PreTrainedModel]
    auto_class: Any
    processor: Callable[[], Any]
    batch: Callable[[Any, list[str], int], dict[str, Tensor]]
    auto_processor: Any
    tower: str

    def model(self) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        return self.build().eval()

    def data(self, evaluation: int = 3) -> BatchDataModule:
        processor, lines = self.processor(), [t[: 20 + 3 * i] for i, t in enumerate(texts(30))]
        made = [self.batch(processor, lines[2 * i : 2 * i + 2], i) for i in range(3 + evaluation)]
        return BatchDataModule(made[:3], made[3:], processor)


KINDS = {
    "llava": Kind(
        llava,
        tf.AutoModelForImageTextToText,
        llava_processor,
        llava_batch,
        tf.AutoProcessor,
        "vision_tower.",
    ),
    "whisper": Kind(
        whisper,
        tf.AutoModelForSpeechSeq2Seq,
        lambda: tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        whisper_batch,
        tf.AutoFeatureExtractor,
        "model.encoder.",
    ),
    "t5": Kind(
        t5,
        tf.AutoModelForSeq2SeqLM,
        tokenizer,
        t5_batch,
        tf.AutoTokenizer,
        "encoder.",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def loss_of_transformers(model: tf.PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def test_from_pruning_to_the_loaded_checkpoint(kind, tmp_path):
    model, data, callback = kind.model(), kind.data(), SymPrune("wanda", sparsity=0.5)
    module = TransformersModule(model)
    output = str(tmp_path / "out")
    result = Trainer(**TRAINER).prune(module, datamodule=data, callbacks=callback, output=output)
    assert not result.unreached
    assert result.sparsity == 0.5

    checks = {check.name: check for check in verify(output)}
    is_causal = not model.config.is_encoder_decoder
    reason = "data in memory, which is not stored)" if is_causal else "a causal language model"
    assert checks.pop("perplexity").message.endswith(reason)
    assert all(check.passed for check in checks.values()), checks

    loaded = kind.auto_class.from_pretrained(output)
    assert type(loaded) is type(model)
    assert all(torch.equal(model.state_dict()[n], x) for n, x in loaded.state_dict().items())
    name, mask = next((n, m) for n, m in load_masks(output).items() if kind.tower in n)
    assert torch.equal(loaded.get_submodule(name).weight.flatten(1) != 0, mask)
    processor = kind.auto_processor.from_pretrained(output)
    assert type(processor) is type(data.processor)
    lines = ["w1 w2 w3", "w4 w5"]
    again, expected = kind.batch(processor, lines, 7), kind.batch(data.processor, lines, 7)
    assert all(torch.equal(again[name], x) for name, x in expected.items())

    manifest = read_manifest(Path(output))
    assert manifest["metrics"]["dense"].keys() == {"val_loss", "val_perplexity"}
    assert manifest["metrics"]["pruned"]["val_perplexity"] == pytest.approx(
        callback.sparse_metrics["val_perplexity"]
    )
    assert manifest["data"] == data.settings
    assert manifest["data"]["calibration_batches"] == manifest["data"]["evaluation_batches"] == 3


def test_loss_and_perplexity_are_those_of_transformers(kind):
    model, data = kind.model(), kind.data(evaluation=1)
    module = TransformersModule(model)
    (metrics,) = Trainer(**TRAINER).validate(module, datamodule=data, verbose=False)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        expected = loss_of_transformers(model, batch)
    assert metrics["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)
    loss = TransformersModule(model).training_step(batch, 0)
    torch.testing.assert_close(loss, loss_of_transformers(model, batch))


def test_a_module_is_loaded_by_the_class_of_its_checkpoint(kind, tmp_path):
    kind.model().save_pretrained(tmp_path)
    module = TransformersModule(tmp_path)
    prune = SymPrune("wanda", sparsity=0.5)
    Trainer(**TRAINER).validate(module, datamodule=kind.data(), callbacks=prune, verbose=False)
    assert type(module.prunable_model) is type(kind.model())
    assert prune.dense_metrics["val_perplexity"] != prune.sparse_metrics["val_perplexity"]


def test_lightning_trains_on_labels():
    model, batch = KINDS["t5"].model(), next(iter(_loader("t5")))
    before = loss_of_transformers(model, batch).item()
    module = TransformersModule(model, learning_rate=1e-2)
    Trainer(**TRAINER, max_epochs=5).fit(module, train_dataloaders=_loader("t5"))
    assert loss_of_transformers(model.eval(), batch).item() < before


def _loader(name: str) -> Any:
    return KINDS[name].data().calibration_dataloader()


def test_without_labels_nothing_is_logged(tmp_path):
    made = [{k: x for k, x in b.items() if k != "labels"} for b in _loader("llava")]
    module, prune = TransformersModule(llava()), SymPrune("wanda")
    data = BatchDataModule(made[:1], {"some": made[1:2], "others": made[2:]})
    output = str(tmp_path / "out")
    result = Trainer(**TRAINER).prune(module, datamodule=data, callbacks=prune, output=output)
    assert result.sparsity == 0.5
    assert read_manifest(Path(output))["metrics"] == {"dense": {}, "pruned": {}}
    assert [c.message for c in verify(output)][-1] == "not checked: no perplexity is recorded"
    with pytest.raises(ValueError, match="training requires labels: add 'labels'"):
        module.training_step(made[0], 0)


def test_a_set_without_labels_has_no_metric():
    made = list(_loader("t5"))
    unlabelled = [{**b, "labels": torch.full_like(b["labels"], IGNORE_INDEX)} for b in made]
    data = BatchDataModule(made[:1], {"some": made[1:], "none": unlabelled})
    metrics: dict[str, float] = {}
    for part in Trainer(**TRAINER).validate(TransformersModule(t5()), datamodule=data):
        metrics |= part
    assert metrics.keys() == {"val_loss", "val_perplexity", "val_perplexity/some"}
    assert metrics["val_perplexity"] == metrics["val_perplexity/some"]


def test_labels_of_a_model_that_does_not_generate():
    config = tf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    module = TransformersModule(tf.BertForMaskedLM(config))
    ids = batches()[0]["input_ids"]
    with pytest.raises(ValueError, match="BertForMaskedLM does not generate tokens, so its labels"):
        module.validation_step({"input_ids": ids, "labels": ids}, 0)


def test_labels_of_another_length():
    ids = batches()[0]["input_ids"]
    module = TransformersModule(build("llama"))
    with pytest.raises(ValueError, match=r"labels have shape \(2, 5\): pass one label per token"):
        module.validation_step({"input_ids": ids, "labels": ids[:, :5]}, 0)


def test_a_model_without_an_output_projection():
    module = CausalLMModule(build("llama").model)
    with pytest.raises(ValueError, match="LlamaModel returns no logits: pass a model with"):
        module.validation_step(batches()[0], 0)


def test_a_causal_module_refuses_an_encoder(tmp_path):
    t5().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder: use Transf"):
        CausalLMModule(tmp_path).configure_model()


def evaluate(folder: Path, **trainer: Any) -> dict[str, Any]:
    module, prune = TransformersModule(str(folder / "dense")), SymPrune("wanda", sparsity=0.5)
    Trainer(**TRAINER, **trainer).validate(
        module, datamodule=KINDS["t5"].data(), callbacks=prune, verbose=False
    )
    assert prune.result is not None
    return {
        "masks": dict(prune.result.masks),
        "dense": prune.dense_metrics,
        "sparse": prune.sparse_metrics,
    }


def evaluate_rank(rank: int, size: int, folder: Path) -> None:
    torch.save(evaluate(folder, strategy="ddp", devices=size), folder / f"{rank}.pt")


def test_two_processes_give_the_masks_and_metrics_of_one(tmp_path):
    """With a number of evaluation batches that is not divisible."""
    KINDS["t5"].model().save_pretrained(tmp_path / "dense")
    single = evaluate(tmp_path, devices=1)
    run_trainers(evaluate_rank, 2, tmp_path)
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(saved["masks"][name], m) for name, m in single["masks"].items())
        for stage in ("dense", "sparse"):
            assert saved[stage] == pytest.approx(single[stage], rel=1e-6)
