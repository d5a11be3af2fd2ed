"""A tokenizer for the tiny models, and texts for it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import build

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]


def tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word and the vocabulary of the tiny models.

    Args:
        bos: Whether it puts ``<s>`` in front of every text, as those of Llama and Gemma do.
    """
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if bos:
        special["bos_token"] = "<s>"
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def texts(count: int = 40, length: int = 30) -> list[str]:
    """Return ``count`` different texts of ``length`` words."""
    return [
        " ".join(WORDS[4 + (7 * i * j + i + j) % 60] for j in range(length)) for i in range(count)
    ]


def write_project(folder: Path) -> None:
    """Write a tiny model with its tokenizer to ``model``, and texts to ``texts.txt``."""
    build("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n\n".join(texts()))
