"""From rows of images, sounds and texts to batches, by the processors of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import FeatureExtractionMixin

from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX
from symprune_lightning.data.windows import is_counted

PLACEHOLDERS = ("image_token", "video_token", "audio_token")
"""Attributes of processors: tokens that stand for parts of an image or a sound."""


def process(processor: Any, arguments: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return a batch, with labels if there is text.

    Args:
        processor: The processor.
        arguments: Its arguments, each a list with one value per row.
    """
    if "messages" in arguments:
        options = {"tokenize": True, "return_dict": True, "padding": True}
        media = {name: values for name, values in arguments.items() if name != "messages"}
        chats = [
            _with_media(chat, {name: values[i] for name, values in media.items()})
            for i, chat in enumerate(arguments["messages"])
        ]
        batch = processor.apply_chat_template(chats, return_tensors="pt", **options)
        return _with_labels(processor, dict(batch))
    inputs: dict[str, Any] = dict(arguments)
    if "audio" in inputs:
        sounds, rates = zip(*map(_decoded, inputs["audio"]), strict=True)
        if len(set(rates)) > 1:
            raise ValueError(f"sounds have sampling rates of {sorted(set(rates))}: resample them")
        key = "raw_speech" if isinstance(processor, FeatureExtractionMixin) else "audio"
        inputs.pop("audio")
        inputs |= {key: list(sounds), "sampling_rate": rates[0]}
        if "text" in inputs and getattr(processor, "audio_token", None) is None:
            return _transcribed(processor, inputs)
    if "text" in inputs:
        inputs["padding"] = True
    return _with_labels(processor, dict(processor(**inputs, return_tensors="pt")))


def _with_media(chat: Sequence[Mapping[str, Any]], media: Mapping[str, Any]) -> list[Any]:
    """Return a chat whose blocks of images and sounds have those of the row's columns."""
    left = {
        kind: list(values) if isinstance(values, list | tuple) else [values]
        for kind, values in ((name.removesuffix("s"), x) for name, x in media.items())
    }
    filled = []
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            content = [_filled(block, left) for block in content]
        filled.append({**message, "content": content})
    unused = [kind for kind, values in left.items() if values]
    if unused:
        raise ValueError(
            f"the chat has fewer blocks of {', '.join(unused)} than the row has values"
        )
    return filled


def _filled(block: Mapping[str, Any], left: Mapping[str, list[Any]]) -> Mapping[str, Any]:
    kind = str(block.get("type"))
    has_value = any(block.get(key) is not None for key in (kind, "url", "path", "base64"))
    if has_value or not left.get(kind):
        return block
    return {"type": kind, kind: left[kind].pop(0)}


def _decoded(sound: Any) -> tuple[Any, int]:
    """Return the samples and the sampling rate of a sound that ``datasets`` has decoded."""
    if isinstance(sound, Mapping):
        return torch.as_tensor(sound["array"]).float().numpy(), int(sound["sampling_rate"])
    if not hasattr(sound, "get_all_samples"):
        raise ValueError(
            f"a sound is a {type(sound).__name__}: pass {{'array': …, 'sampling_rate': …}}"
        )
    samples = sound.get_all_samples()  # of torchcodec
    return samples.data.mean(0).numpy(), int(samples.sample_rate)


def _transcribed(processor: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return features of sounds, and their transcriptions as labels."""
    # features are padded as the processor does by default: to the length that the model needs
    text = inputs.pop("text")
    tokens = processor.tokenizer(text, padding=True, return_tensors="pt")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORE_INDEX)
    start = getattr(processor.tokenizer, "prefix_tokens", [])[:1]
    if start and bool((labels[:, 0] == start[0]).all()):
        labels = labels[:, 1:]  # the model puts it in front of the labels itself
    return {**processor(**inputs, return_tensors="pt"), "labels": labels}


def _placeholders(processor: Any) -> Iterator[int]:
    """Yield the ids of the tokens that stand for parts of an image or a sound."""
    for attribute in PLACEHOLDERS:
        number = getattr(processor, f"{attribute}_id", None)
        token = getattr(processor, attribute, None)
        if number is None and token is not None:
            number = processor.tokenizer.convert_tokens_to_ids(str(token))
        if number is not None:
            yield int(number)


def _with_labels(processor: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Add the labels of text: all tokens but padding and those of images and sounds."""
    if "input_ids" not in batch:
        return batch
    ids = batch["input_ids"]
    ignored = ~is_counted(batch["attention_mask"])
    for token in _placeholders(processor):
        ignored = ignored | (ids == token)
    return {**batch, "labels": ids.masked_fill(ignored, IGNORE_INDEX)}
