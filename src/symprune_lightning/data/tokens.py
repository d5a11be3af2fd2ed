"""Texts to tokens: encoding, end-of-sequence tokens, chats, and the windows of each split."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.data.reader import TextReader
from symprune_lightning.data.texts import Texts
from symprune_lightning.data.windows import Windows, pack, pad, text_prefix
from symprune_lightning.errors import PruningWarning

MIN_TEXT_LENGTH = 20
"""Average number of tokens of a text below which end-of-sequence tokens distort the data."""

MIN_TEXTS = 10
"""Number of texts from which their average length is judged."""


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer.

    Raises:
        ValueError: There is none.
    """
    if tokenizer is None:
        raise ValueError("texts need a tokenizer: pass tokenizer=<name of the model>")
    return tokenizer


class TokenReader:
    """Encodes the texts of one source as windows, split after split.

    Each split continues after the last text of the previous one, so that no text is in two splits.

    Args:
        source: The source.
        name: Name of the source in messages, if it has none.
        tokenizer: The tokenizer; ``None`` for token ids.
        length: Number of tokens in a window.
        add_bos: Whether windows begin with the beginning-of-sequence token; ``None`` for what the
            tokenizer puts in front of a text.
        packing: Whether texts are concatenated; otherwise each is a padded window of its own.
        seed: Seed of the shuffle.
    """

    def __init__(
        self,
        source: Texts,
        name: str,
        *,
        tokenizer: Tokenizer | None,
        length: int,
        add_bos: bool | None,
        packing: bool,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._add_bos = add_bos
        self._packing = packing
        self._texts = TextReader(source, seed, name)
        self._ids = iter(self._tokenized())
        self._is_text = False
        self._remaining: list[int] = []
        self._lengths: list[int] = []

    def windows(self, count: int, split: str) -> Windows:
        """Return the next ``count`` windows.

        Raises:
            ValueError: There is not enough text, or a row cannot be encoded.
        """
        first = next(self._ids, None)  # tells whether the source has texts or token ids
        ids = self._ids if first is None else chain([first], self._ids)
        if self._remaining:  # of a joined text, which all splits are parts of
            ids = chain([self._remaining], ids)
        prefix = self._prefix if self._is_text or self._add_bos else []
        try:
            windows = self._filled(ids, count, prefix, split)
        except ValueError as error:
            raise ValueError(f"{error} ({self._texts.describe_rows()})") from None
        self._texts.report_skipped()
        return windows

    def _filled(
        self, ids: Iterator[Sequence[int]], count: int, prefix: Sequence[int], split: str
    ) -> Windows:
        if not self._packing:
            windows, num_truncated = pad(ids, count, self._length, prefix, split)
            if num_truncated:
                warnings.warn(
                    f"{num_truncated} of {count} texts for {split} have more than {self._length} "
                    f"tokens and are truncated",
                    PruningWarning,
                    stacklevel=5,
                )
            return windows
        windows, rest = pack(ids, count, self._length, prefix, split)
        self._remaining = rest if self._texts.is_joined else []
        self._report_short_texts()
        return windows

    @cached_property
    def _prefix(self) -> list[int]:
        """The tokens that every window of texts begins with."""
        return text_prefix(required(self._tokenizer), self._add_bos)

    def _report_short_texts(self) -> None:
        """Warn once if end-of-sequence tokens are many, as they are if rows are lines."""
        if len(self._lengths) >= MIN_TEXTS and mean(self._lengths) < MIN_TEXT_LENGTH:
            warnings.warn(
                f"the rows of {self._texts.name} have {mean(self._lengths):.0f} tokens on "
                f"average, and each is ended by the end-of-sequence token: if they are lines of "
                f"documents, join them (TextSource(…, joiner='\\n\\n'))",
                PruningWarning,
                stacklevel=5,
            )
            self._lengths.clear()

    def _tokenized(self) -> Iterator[Sequence[int]]:
        for text in self._texts:
            self._is_text = isinstance(text, str) or isinstance(text[0], Mapping)
            if isinstance(text, str):
                yield self._encode(text)
            elif self._is_text:
                yield self._encode_chat([dict(message) for message in text])
            else:
                yield self._token_ids(text)

    def _ids_of(self, text: str) -> list[int]:
        tokenizer = required(self._tokenizer)
        # verbose=False: no warning about texts longer than the context; they are split anyway
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _encode(self, text: str) -> list[int]:
        """Return the token ids of a text, ended by the end-of-sequence token if there is one."""
        ids, eos = self._ids_of(text), required(self._tokenizer).eos_token_id
        if eos is None:
            return ids
        self._lengths.append(len(ids))
        return [*ids, eos]

    def _encode_chat(self, chat: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a chat, without the tokens that are added to every text."""
        tokenizer = required(self._tokenizer)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{self._texts.name} holds chats, and the tokenizer has no chat template: set "
                f"tokenizer.chat_template, or use a column of texts"
            )
        try:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        except Exception as error:  # raised by the template
            raise ValueError(
                f"the chat template refuses a chat of {self._texts.name}: {error}"
            ) from error
        ids, eos = self._ids_of(text), tokenizer.eos_token_id
        if self._prefix and ids[: len(self._prefix)] == self._prefix:
            ids = ids[len(self._prefix) :]
        # templates end a turn by it, and may add a newline
        return ids if eos is None or eos in ids[-2:] else [*ids, eos]

    def _token_ids(self, ids: Sequence[Any]) -> list[int]:
        try:
            return [operator.index(i) for i in ids]
        except TypeError:
            raise ValueError(
                f"{self._texts.name} holds a {type(ids).__name__} of {type(ids[0]).__name__}, and "
                f"no text: pass texts, lists of token ids, or chats (lists of messages)"
            ) from None
