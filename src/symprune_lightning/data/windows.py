"""Windows of tokens: packed, padded and overlapping ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX


@dataclass(frozen=True)
class Windows:
    """Sequences of tokens that a model is given.

    Attributes:
        ids: Token ids, shape ``(windows, length)``.
        mask: Whether a token is text and no padding, same shape; ``None`` without padding.
        labels: Token ids that are counted in the perplexity, ``-100`` for others, same shape;
            ``None`` if all tokens are counted that are no padding.
        prefix_length: Number of special tokens that each window begins with.
    """

    ids: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None
    prefix_length: int = 0

    def rows(self) -> list[dict[str, Tensor]]:
        """Return the arguments of the model for each window."""
        columns = {"input_ids": self.ids}
        if self.mask is not None:
            columns["attention_mask"] = self.mask.long()
        if self.labels is not None:
            columns["labels"] = self.labels
        elif self.prefix_length > 1:  # the first token is never counted, further special ones are
            columns["labels"] = self.targets
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    @property
    def targets(self) -> Tensor:
        """Token ids that are counted, ``-100`` for others, such as the first of each window."""
        labels = self.ids if self.labels is None else self.labels
        if self.mask is not None:
            labels = labels.masked_fill(~self.mask, IGNORE_INDEX)
        return labels.index_fill(1, torch.arange(max(1, self.prefix_length)), IGNORE_INDEX)

    @property
    def text(self) -> Tensor:
        """All tokens of text in their order, each once, shape ``(tokens,)``."""
        if self.labels is not None:
            return self.ids[self.labels != IGNORE_INDEX]
        start = self.prefix_length
        if self.mask is not None:
            return self.ids[:, start:][self.mask[:, start:]]
        return self.ids[:, start:].flatten()

    @property
    def sha256(self) -> str:
        """SHA-256 of the token ids, and of mask and labels if there are any."""
        digest = hashlib.sha256()
        for part in (self.ids, self.mask, self.labels):
            if part is not None:
                digest.update(part.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def num_bytes(self, tokenizer: Tokenizer) -> int:
        """Return the number of UTF-8 bytes of the text that is counted in the perplexity.

        Special tokens have no bytes. All counted tokens are decoded at once, so that characters and
        spaces at the boundaries of windows are not lost.
        """
        targets = self.targets
        text = tokenizer.decode(
            targets[targets != IGNORE_INDEX].tolist(),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return len(str(text).encode())


def is_counted(mask: Tensor) -> Tensor:
    """Return which tokens of padded rows are counted in a loss: text that follows no padding.

    Padding on the left would predict the first token of the text.

    Args:
        mask: Attention mask, ``(rows, length)``, 0 or ``False`` for padding.
    """
    is_text = mask.bool()
    return is_text & F.pad(is_text[:, :-1], (1, 0), value=True)


class WindowDataset(Dataset[dict[str, Tensor]]):
    """Windows as arguments of the model, with the size of their text.

    Args:
        windows: The windows.
        num_bytes: Bytes of the text that is counted; ``None`` if there is no tokenizer.
        num_replicas: Number of processes that share the windows. Rows without labels are appended
            until the number of rows is divisible by it.

    Attributes:
        num_bytes: Bytes of the text that is counted, or ``None``.
        num_labels: Number of tokens that are counted.
    """

    def __init__(
        self, windows: Windows, num_bytes: int | None = None, num_replicas: int = 1
    ) -> None:
        self.num_bytes = num_bytes
        self.num_labels = int((windows.targets != IGNORE_INDEX).sum())
        missing = -len(windows.ids) % num_replicas
        self._rows = windows.rows()
        if missing:
            labelled = zip(self._rows, windows.targets, strict=True)
            self._rows = [{**row, "labels": labels} for row, labels in labelled]
            no_labels = torch.full_like(windows.ids[0], IGNORE_INDEX)
            self._rows += [{**self._rows[0], "labels": no_labels}] * missing

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index]


def num_replicas(trainer: Trainer) -> int:
    """Return the number of shards of the evaluation data; tensor-parallel ranks share one."""
    sampler = trainer.distributed_sampler_kwargs
    return 1 if sampler is None else int(sampler["num_replicas"])


def text_prefix(tokenizer: Tokenizer, add_bos: bool | None) -> list[int]:
    """Return the tokens that every window begins with.

    Args:
        tokenizer: The tokenizer.
        add_bos: Whether that is the beginning-of-sequence token; ``None`` for what the tokenizer
            puts in front of a text.

    Raises:
        ValueError: ``add_bos`` is ``True``, and the tokenizer has no such token.
    """
    if add_bos is None:
        # a letter, or what the tokenizer makes of nothing if it has no letters
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        ids: list[int] = tokenizer("a" if plain else "")["input_ids"]
        if not plain:
            return [i for i in ids[:1] if i == tokenizer.bos_token_id]
        starts = (i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        return ids[: next(starts, 0)]
    if not add_bos:
        return []
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"add_bos=True, but {type(tokenizer).__name__} has no beginning-of-sequence token"
        )
    return [int(tokenizer.bos_token_id)]


def pack(
    texts: Iterator[Sequence[int]], count: int, length: int, prefix: Sequence[int], split: str
) -> tuple[Windows, list[int]]:
    """Concatenate texts until windows are full.

    Args:
        texts: Token ids of each text.
        count: Number of windows.
        length: Tokens in each, with the prefix.
        prefix: Tokens that each begins with.
        split: Name of the split in messages.

    Returns:
        The windows, and the rest of the last text.

    Raises:
        ValueError: The texts are too short, or the prefix leaves no room.
    """
    _check_room(length, prefix)
    size = length - len(prefix)
    required = count * size
    ids: list[int] = []
    for text in texts:
        ids.extend(text)
        if len(ids) >= required:
            rows = torch.tensor(ids[:required]).view(count, size)
            start = torch.tensor(list(prefix), dtype=rows.dtype).expand(count, -1)
            windows = Windows(torch.cat([start, rows], 1), prefix_length=len(prefix))
            return windows, ids[required:]
    raise ValueError(
        f"the texts for {split} are too short: {count} sequences of {length} tokens need "
        f"{required:,} tokens, but only {len(ids):,} are available; use fewer or shorter "
        f"sequences, or more text"
    )


def pad(
    texts: Iterator[Sequence[int]], count: int, length: int, prefix: Sequence[int], split: str
) -> tuple[Windows, int]:
    """Pad each text to the longest, on the right.

    Args:
        texts: Token ids of each text.
        count: Number of windows.
        length: Maximum number of tokens in each, with the prefix; longer texts are truncated.
        prefix: Tokens that each begins with.
        split: Name of the split in messages.

    Returns:
        The windows, padded with the token id 0, and the number of texts that were truncated.

    Raises:
        ValueError: There are not enough texts, or the prefix leaves no room.
    """
    _check_room(length, prefix)
    rows: list[Tensor] = []
    num_truncated = 0
    for text in texts:
        row = [*prefix, *text]
        num_truncated += len(row) > length
        rows.append(torch.tensor(row[:length]))
        if len(rows) == count:
            break
    if len(rows) < count:
        raise ValueError(
            f"there are not enough texts for {split}: with packing=False, {count} sequences need "
            f"{count} texts, but only {len(rows)} are available; use fewer sequences, or more texts"
        )
    return Windows(*_padded(rows), prefix_length=len(prefix)), num_truncated


def overlapping(ids: Tensor, length: int, stride: int, prefix: Sequence[int]) -> Windows:
    """Return windows that begin every ``stride`` tokens, and count each token once.

    As in the guide of transformers to the perplexity of models with a fixed length: tokens that
    an earlier window has counted are context only, and the last window, which ends with the text,
    may be shorter.

    Args:
        ids: Tokens of the text, shape ``(tokens,)``.
        length: Tokens in each window, with the prefix.
        stride: Tokens between the beginnings of two windows.
        prefix: Tokens that each begins with.

    Raises:
        ValueError: The stride is larger than a window without its prefix.
    """
    _check_room(length, prefix)
    size = length - len(prefix)
    if stride > size:
        raise ValueError(
            f"evaluation_stride is {stride}, which is more than the {size} tokens of text in a "
            f"sequence: tokens between two windows would not be evaluated"
        )
    start = torch.tensor(list(prefix), dtype=ids.dtype)
    rows, labels = [], []
    begin = counted = 0
    while counted < len(ids):
        row = ids[begin : begin + size]
        num_context = counted - begin
        rows.append(torch.cat([start, row]))
        context = torch.full((len(start) + num_context,), IGNORE_INDEX)
        labels.append(torch.cat([context, row[num_context:]]))
        counted, begin = begin + len(row), begin + stride
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return Windows(*_padded(rows), padded_labels, len(prefix))


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows padded to the longest with token id 0, and which tokens are no padding."""
    mask = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)


def _check_room(length: int, prefix: Sequence[int]) -> None:
    if length <= len(prefix):
        raise ValueError(
            f"sequence_length is {length}, and each sequence begins with {len(prefix)} special "
            f"tokens: use longer sequences"
        )
