"""DataModules for calibration and evaluation: of texts, and of batches.

Longer than 300 lines since all sources and splits of the data are described here.
"""

from __future__ import annotations

import hashlib
import operator
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.checkpoints.pretrained import IGNORE_INDEX, Processor, load_tokenizer
from symprune_lightning.engine.forward.inputs import check_input_ids
from symprune_lightning.errors import PruningWarning
from symprune_lightning.module import pruning_target
from symprune_lightning.protocols import PROTOCOLS, WindowProtocol
from symprune_lightning.self_text import SELF, SelfText, sample_sequences
from symprune_lightning.sources import Evaluation, source_settings
from symprune_lightning.texts import TextReader, Texts, TextSource
from symprune_lightning.windows import MAX_OVERLAP, check_overlap, pack, text_prefix

MIN_TEXT_LENGTH = 20
"""Average number of tokens of a text below which end-of-sequence tokens distort the data."""

MIN_TEXTS = 10
"""Number of texts from which their average length is judged."""

EVALUATION = "evaluation"
"""Name of the evaluation split, or ``"evaluation/<name>"`` for each of several."""


class CalibrationDataModule(LightningDataModule):
    """Tokenizes texts and packs them into sequences for calibration, evaluation and training.

    Texts are shuffled, tokenized, terminated with the end-of-sequence token, and concatenated until
    a split is full. Every sequence begins with the tokens that the tokenizer puts in front of a
    text: models that were trained with a beginning-of-sequence token need it. No text is in more
    than one of the splits ``"calibration"``, ``"evaluation"`` and ``"training"``, and evaluation
    texts that share more than 30 % of their tokens with another split, in runs of 32, are
    refused. The same texts, tokenizer, sizes and seed give the same tokens, which can be checked
    with ``hashes``.

    Args:
        dataset: ``"python-docs"`` (the reference manual of the Python standard library, available
            offline; 113 thousand tokens with a vocabulary of 49 thousand), a hub dataset, a local
            folder or text file, a ``TextSource``, or an iterable of texts, of lists of token ids,
            or of rows with a column ``"text"``; ``"wikitext2"``, ``"c4"`` or another
            ``WindowProtocol`` of publications; or ``"self"`` or a ``SelfText``, sampled from the
            model that is pruned (for calibration and training; needs ``evaluation``).
        tokenizer: A tokenizer, or a model name as in ``CausalLMModule``. Not needed for token ids.
            Default: ``None``.
        sequences: Number of calibration sequences. Default: 128, as in the Wanda and RIA papers.
        sequence_length: Number of tokens per sequence. Default: 2048, as in these papers.
        evaluation: Evaluation texts, in any form that ``dataset`` accepts except ``"self"`` and
            ``SelfText``, or a mapping of names to several such sets, ``{"wiki": ..., "code":
            ...}``, which are evaluated separately and together. Default: ``None``, which uses
            further texts of ``dataset``.
        evaluation_sequences: Number of evaluation sequences, per set if there are several; ``None``
            for all windows of a ``WindowProtocol``. Default: 64.
        training_sequences: Number of training sequences for ``fit``, from texts of ``dataset`` that
            the other splits do not use. Default: 0.
        batch_size: Number of sequences per batch. Default: 1.
        add_bos: Whether every sequence begins with the beginning-of-sequence token. A
            ``WindowProtocol`` has its own rule. Default: ``None``, with the special tokens that the
            tokenizer puts in front of a text.
        seed: Seed of the shuffle. Iterables that are not sequences keep their order. Default: 0.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        ValueError: A size is not positive, there are not enough texts, or texts are passed without
            a tokenizer; ``dataset`` is ``"self"`` and ``evaluation`` is missing, or no transformers
            model in memory is attached; evaluation texts are also used for calibration; or the
            Trainer's model has fewer embeddings or positions than the sequences need.
        FileNotFoundError: ``dataset`` or ``evaluation`` is a text file that does not exist.

    Examples:
        >>> data = CalibrationDataModule([[1, 2, 3], [4, 5, 6], [7, 8, 9]], sequences=1,
        ...                              sequence_length=2, evaluation_sequences=2, seed=0)
        >>> data.setup()
        >>> next(iter(data.calibration_dataloader()))["input_ids"].shape
        torch.Size([1, 2])
        >>> len(data.hashes["calibration"])
        64
    """

    def __init__(
        self,
        dataset: TextSource | SelfText | WindowProtocol | Texts,
        tokenizer: Tokenizer | str | None = None,
        *,
        sequences: int = 128,
        sequence_length: int = 2048,
        evaluation: Evaluation = None,
        evaluation_sequences: int | None = 64,
        training_sequences: int = 0,
        batch_size: int = 1,
        add_bos: bool | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "sequences": sequences,
            "sequence_length": sequence_length,
            "evaluation_sequences": evaluation_sequences,
            "batch_size": batch_size,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, but got {size}")
        if isinstance(evaluation, Mapping) and not (evaluation and all(evaluation)):
            raise ValueError(
                "evaluation must be a mapping with at least one entry and no empty names, but got "
                f"the names {list(evaluation)}"
            )
        if training_sequences < 0:
            raise ValueError(
                f"training_sequences must not be negative, but got {training_sequences}"
            )
        if isinstance(dataset, str) and dataset == SELF:
            dataset = SelfText()
        if isinstance(dataset, str):
            dataset = PROTOCOLS.get(dataset, dataset)
        if isinstance(dataset, SelfText | WindowProtocol) and add_bos is not None:
            raise ValueError(
                f"add_bos={add_bos} has no effect on {type(dataset).__name__}, which has its own "
                f"rule: use add_bos=None"
            )
        if isinstance(dataset, WindowProtocol) and training_sequences:
            raise ValueError(
                f"{type(dataset).__name__} has calibration and evaluation windows only: use "
                f"training_sequences=0, or another dataset"
            )
        if isinstance(dataset, SelfText) and evaluation is None:
            raise ValueError(
                "dataset='self' samples calibration and training sequences only: pass evaluation=, "
                "such as evaluation='python-docs'"
            )
        self.dataset = dataset
        self.evaluation = evaluation
        self.sequences = sequences
        self.sequence_length = sequence_length
        self.evaluation_sequences = evaluation_sequences
        self.training_sequences = training_sequences
        self.batch_size = batch_size
        self.add_bos = add_bos
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self._tokenizer = tokenizer
        self._splits: dict[str, Tensor] = {}
        self._sampled_from: weakref.ref[PreTrainedModel] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sampled_from": None}  # weak references cannot be pickled

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, loaded on first access."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(
                self._tokenizer, trust_remote_code=self.trust_remote_code
            )
        return self._tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Tokenize and pack all splits. Further calls do nothing.

        With ``"self"``, calibration and training sequences are sampled before the model is pruned,
        or when a loader of them is first requested.
        """
        if self._splits:
            return
        splits: dict[str, Tensor] = {}
        reader: _Reader | None = None
        if isinstance(self.dataset, WindowProtocol):
            splits["calibration"] = self.dataset.calibration_windows(
                self._required_tokenizer, self.sequences, self.sequence_length, self.seed
            )
        elif not isinstance(self.dataset, SelfText):
            # One reader for all splits: each continues after the last text of the previous one, so
            # that no text is in two splits.
            reader = _Reader(self, self.dataset, "the dataset")
            splits["calibration"] = reader.pack(self.sequences, "calibration")
        for split, source in self._evaluation_sets().items():
            splits |= {split: self._evaluation_windows(split, source, reader)}
        if self.training_sequences and reader is not None:
            splits["training"] = reader.pack(self.training_sequences, "training")
        skipped = 0 if reader is None else reader.prefix_length
        check_overlap({name: ids[:, skipped:] for name, ids in splits.items()}, EVALUATION)
        self._splits = splits

    def calibration_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return calibration batches, ``{"input_ids": (batch_size, sequence_length)}``."""
        return self._dataloader("calibration")

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return training batches, in the same order in every epoch.

        Raises:
            ValueError: ``training_sequences`` is 0.
        """
        if not self.training_sequences:
            raise ValueError("there is no training split: set training_sequences to at least 1")
        return self._dataloader("training")

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return evaluation batches: one dataloader, or one per name for several evaluation sets.

        With several processes, rows without labels are appended until the number of rows is
        divisible by the number of processes. Lightning's distributed sampler then repeats no row,
        and the perplexity equals that of a single process.
        """
        loaders = {s.partition("/")[2]: self._dataloader(s) for s in self._evaluation_sets()}
        return loaders.get("", loaders)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Return the batches of ``val_dataloader``."""
        return self.val_dataloader()

    def sample(self) -> None:
        """Sample the splits of ``dataset="self"`` from the Trainer's model.

        Pruning callbacks call this before they prune. Further calls do nothing, unless the Trainer
        has another model.

        Raises:
            ValueError: There is no transformers model in memory.
        """
        if not isinstance(self.dataset, SelfText):
            return
        module = None if self.trainer is None else self.trainer.lightning_module
        model = None if module is None else pruning_target(module)
        if not isinstance(model, PreTrainedModel) or any(p.is_meta for p in model.parameters()):
            raise ValueError(
                "dataset='self' samples from the model that is pruned, which must be a "
                "transformers model in memory: use it with a Trainer and a CausalLMModule, and "
                "without streaming"
            )
        if self._sampled_from is not None and self._sampled_from() is model:
            return
        counts = {"calibration": self.sequences, "training": self.training_sequences}
        for i, (split, count) in enumerate(counts.items()):
            if count:
                self._splits[split] = sample_sequences(
                    model,
                    self.tokenizer,
                    self.dataset,
                    count=count,
                    length=self.sequence_length,
                    seed=2 * self.seed + i,
                )
        self._sampled_from = weakref.ref(model)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the token ids of each split (int64, little-endian, row-major)."""
        self.setup()
        return {
            split: hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
            for split, ids in self._splits.items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments and hashes as JSON-serializable values, as recorded in the manifest."""
        numbers = (
            "sequences",
            "evaluation_sequences",
            "training_sequences",
            "sequence_length",
            "batch_size",
            "add_bos",
            "seed",
        )
        return {
            "dataset": source_settings(self.dataset),
            "evaluation": source_settings(self.evaluation),
            **{name: getattr(self, name) for name in numbers},
            "sha256": self.hashes,
        }

    def _dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        self.setup()
        if isinstance(self.dataset, SelfText) and split not in self._evaluation_sets():
            self.sample()
        self._check_model(split)
        rows: Any = [{"input_ids": ids} for ids in self._splits[split]]
        if split in self._evaluation_sets():
            rows = _padded_rows(rows, self._num_replicas)
        return DataLoader(rows, batch_size=self.batch_size)

    def _evaluation_sets(self) -> dict[str, WindowProtocol | Texts | None]:
        """Map the evaluation splits to their texts; ``None`` for further texts of ``dataset``."""
        if isinstance(self.evaluation, Mapping):
            return {f"{EVALUATION}/{name}": texts for name, texts in self.evaluation.items()}
        return {EVALUATION: self.evaluation}

    @property
    def _num_replicas(self) -> int:
        """Number of shards of the evaluation set; tensor-parallel ranks share one."""
        sampler = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return 1 if sampler is None else int(sampler["num_replicas"])

    def _evaluation_windows(
        self, split: str, source: WindowProtocol | Texts | None, reader: _Reader | None
    ) -> Tensor:
        """Return the windows of an evaluation split; ``reader`` continues those of ``dataset``."""
        if source is None and isinstance(self.dataset, WindowProtocol):
            source = self.dataset
        if isinstance(source, str):
            source = PROTOCOLS.get(source, source)
        if isinstance(source, WindowProtocol):
            return source.evaluation_windows(
                self._required_tokenizer, self.evaluation_sequences, self.sequence_length
            )
        if source is not None:
            reader = _Reader(self, source, "the evaluation dataset")
        assert reader is not None, "checked by __init__"
        if self.evaluation_sequences is None:
            raise ValueError(
                f"evaluation_sequences=None takes all windows of a protocol, and {split} is none: "
                f"pass a number"
            )
        return reader.pack(self.evaluation_sequences, split)

    @property
    def _required_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("texts need a tokenizer: pass tokenizer=<name of the model>")
        return self.tokenizer

    def _check_model(self, split: str) -> None:
        """Check that the Trainer's model has embeddings and positions for the tokens."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None:
            check_input_ids(pruning_target(module), self._splits[split])


class _Reader:
    """Packs texts of one source into windows, split after split.

    Args:
        data: The data module, whose sizes and tokenizer are used.
        source: The source.
        name: Name of the source in messages.
    """

    def __init__(self, data: CalibrationDataModule, source: Texts, name: str) -> None:
        self._data = data
        self._texts = TextReader(source, data.seed, name)
        self._ids = iter(self._tokenized())
        self._is_text = False
        self.prefix_length = 0
        self._remaining: list[int] = []
        self._lengths: list[int] = []

    def pack(self, count: int, split: str) -> Tensor:
        """Return the next ``count`` windows, ``(count, sequence_length)``."""
        first = next(self._ids, None)  # tells whether the source has texts or token ids
        ids = self._ids if first is None else chain([first], self._ids)
        if self._remaining:  # of a joined text, which all splits are parts of
            ids = chain([self._remaining], ids)
        prefix = self._prefix if self._is_text or self._data.add_bos else []
        self.prefix_length = len(prefix)
        try:
            windows, rest = pack(ids, count, self._data.sequence_length, prefix, split)
        except ValueError as error:
            raise ValueError(f"{error} ({self._texts.describe_skipped()})") from None
        self._remaining = rest if self._texts.is_joined else []
        self._texts.report_skipped()
        self._report_short_texts()
        return windows

    @cached_property
    def _prefix(self) -> list[int]:
        """The tokens that every window of texts begins with."""
        return text_prefix(self._data._required_tokenizer, self._data.add_bos)

    def _report_short_texts(self) -> None:
        """Warn once if end-of-sequence tokens are many, as they are if rows are lines."""
        if len(self._lengths) >= MIN_TEXTS and mean(self._lengths) < MIN_TEXT_LENGTH:
            warnings.warn(
                f"the rows of {self._texts.name} have {mean(self._lengths):.0f} tokens on "
                f"average, and each is ended by the end-of-sequence token: if they are lines of "
                f"documents, join them (TextSource(…, joiner='\\n\\n'))",
                PruningWarning,
                stacklevel=4,
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
        tokenizer = self._data._required_tokenizer
        # verbose=False: no warning about texts longer than the context; they are split anyway
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _encode(self, text: str) -> list[int]:
        """Return the token ids of a text, ended by the end-of-sequence token if there is one."""
        ids, eos = self._ids_of(text), self._data._required_tokenizer.eos_token_id
        if eos is None:
            return ids
        self._lengths.append(len(ids))
        return [*ids, eos]

    def _encode_chat(self, chat: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a chat, without the tokens that are added to every text."""
        tokenizer = self._data._required_tokenizer
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


Batches = Iterable[Mapping[str, Tensor]] | Dataset[Mapping[str, Tensor]]
"""Batches that are passed to a model as keyword arguments."""


class BatchDataModule(CalibrationDataModule):
    """Yields calibration and evaluation batches that are ready for the model.

    For models whose inputs are not only text, such as ``pixel_values`` and ``input_features``. The
    batches are those that the model's processor returns, with ``return_tensors="pt"``, and
    optionally ``labels``; see ``TransformersModule``. They are read once and kept in memory, so
    that the dense and the pruned model are evaluated on the same batches. There are no training
    batches.

    Args:
        calibration: Calibration batches: an iterable of mappings of argument names to tensors, such
            as a list or a ``DataLoader``; or a ``Dataset`` whose items are batches.
        evaluation: Evaluation batches in the same form, or a mapping of names to several such sets,
            which are evaluated separately and together.
        processor: The processor that made the batches, or a tokenizer; saved with the pruned
            checkpoint. Default: ``None``.

    Raises:
        TypeError: ``processor`` is not an object with ``save_pretrained``.
        ValueError: In ``setup``, if there are no batches, a batch is not a mapping of names to
            tensors, or more than 30 % of the evaluation batches are calibration batches too.

    Examples:
        >>> batches = [{"pixel_values": torch.randn(2, 3, 8, 8)} for _ in range(4)]
        >>> data = BatchDataModule(batches[:3], evaluation=batches[3:])
        >>> next(iter(data.calibration_dataloader()))["pixel_values"].shape
        torch.Size([2, 3, 8, 8])
        >>> data.settings["calibration_batches"]
        3
    """

    def __init__(
        self,
        calibration: Batches,
        evaluation: Batches | Mapping[str, Batches],
        processor: Processor | None = None,
    ) -> None:
        super().__init__(_iterable(calibration), evaluation=_iterable(evaluation))
        if processor is not None and not hasattr(processor, "save_pretrained"):
            raise TypeError(
                f"processor is a {type(processor).__name__}: pass the object that made the "
                f"batches, such as AutoProcessor.from_pretrained(name)"
            )
        self.processor = processor
        self._batches: dict[str, list[dict[str, Tensor]]] = {}

    @property
    def tokenizer(self) -> Any:
        """The processor, which is saved with the pruned checkpoint."""
        return self.processor

    def setup(self, stage: str | None = None) -> None:
        """Read all batches. Further calls do nothing."""
        if not self._batches:
            sources = {"calibration": self.dataset, **self._evaluation_sets()}
            self._batches = {split: _read_batches(x, split) for split, x in sources.items()}
            _check_common_batches(self._batches)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Raise ``ValueError``, since there are no training batches."""
        raise ValueError(
            "a BatchDataModule has no training batches: pass train_dataloaders= to fit in place of "
            "the data module, or define train_dataloader() in a subclass"
        )

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the batches of each split: names, dtypes, shapes and values."""
        self.setup()
        return {split: _hash_batches(batches) for split, batches in self._batches.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Types of the arguments, and hashes, as recorded in the manifest."""
        hashes = self.hashes
        counts = {split: len(batches) for split, batches in self._batches.items()}
        return {
            "dataset": {"iterable": type(self.dataset).__name__},
            "evaluation": source_settings(self.evaluation),
            "calibration_batches": counts.pop("calibration"),
            "evaluation_batches": sum(counts.values()),
            "processor": None if self.processor is None else type(self.processor).__name__,
            "sha256": hashes,
        }

    def _dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        self.setup()
        batches: Any = self._batches[split]
        if split in self._evaluation_sets():
            batches = _padded_batches(batches, self._num_replicas)
        return DataLoader(batches, batch_size=None)


def _iterable(batches: Any) -> Any:
    """Return an iterable over the items of a ``Dataset``; other values unchanged."""
    if isinstance(batches, Mapping):
        return {name: _iterable(part) for name, part in batches.items()}
    return DataLoader(batches, batch_size=None) if isinstance(batches, Dataset) else batches


def _read_batches(source: Any, split: str) -> list[dict[str, Tensor]]:
    batches: list[dict[str, Tensor]] = []
    for i, batch in enumerate(source):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch {i} for {split} is a {type(batch).__name__}: pass an iterable of mappings "
                f"of argument names to tensors, as a processor returns them"
            )
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name!r} in batch {i} for {split} is a {type(value).__name__}, not a tensor: "
                    f"call the processor with return_tensors='pt'"
                )
        batches.append(dict(batch))
    if not batches:
        raise ValueError(f"there are no batches for {split}: pass at least one")
    return batches


def _hash_batches(batches: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for i, batch in enumerate(batches):
        for name, x in sorted(batch.items()):
            digest.update(f"{i} {name} {x.dtype} {tuple(x.shape)}".encode())
            flat = x.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_common_batches(splits: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> None:
    """Refuse evaluation batches that are calibration batches too."""
    calibration = {_hash_batches([batch]) for batch in splits["calibration"]}
    for split, batches in splits.items():
        common = sum(_hash_batches([batch]) in calibration for batch in batches)
        if split != "calibration" and common > MAX_OVERLAP * len(batches):
            raise ValueError(
                f"{common} of {len(batches)} batches for {split} are also used for calibration: "
                f"the pruned model would be evaluated on the data that it was fitted to; pass "
                f"other batches as evaluation="
            )


def _padded_batches(batches: list[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Append batches without any label until the number of batches is divisible by ``count``."""
    last = batches[-1]
    labelled = next((k for k in ("labels", "decoder_input_ids", "input_ids") if k in last), None)
    if labelled is not None:
        last = {**last, "labels": torch.full_like(last[labelled], IGNORE_INDEX)}
    return batches + [last] * (-len(batches) % count)


def _padded_rows(rows: list[dict[str, Tensor]], num_replicas: int) -> list[dict[str, Tensor]]:
    """Append rows without any label until the number of rows is divisible by ``num_replicas``."""
    missing = -len(rows) % num_replicas
    if not missing:
        return rows
    no_labels = torch.full_like(rows[0]["input_ids"], IGNORE_INDEX)
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    return labelled + [{**rows[0], "labels": no_labels}] * missing
