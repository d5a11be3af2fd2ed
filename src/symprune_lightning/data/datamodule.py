"""Data module of texts: calibration, evaluation and training sequences.

Longer than 300 lines since the documentation of the data module lists all arguments.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.checkpoints.pretrained import load_tokenizer
from symprune_lightning.data.overlap import check_overlap
from symprune_lightning.data.protocols import PROTOCOLS, WindowProtocol, consecutive
from symprune_lightning.data.self_text import SelfText, sample_sequences
from symprune_lightning.data.sources import Evaluation, source_settings
from symprune_lightning.data.texts import SELF, Texts, TextSource
from symprune_lightning.data.tokens import TokenReader, required
from symprune_lightning.data.windows import (
    WindowDataset,
    Windows,
    num_replicas,
    overlapping,
    text_prefix,
)
from symprune_lightning.engine.forward.inputs import check_input_ids, context_length
from symprune_lightning.errors import PruningWarning
from symprune_lightning.module import pruning_target

EVALUATION = "evaluation"
"""Name of the evaluation split, or ``"evaluation/<name>"`` for each of several."""


def check_positive(sizes: Mapping[str, int | None]) -> None:
    """Raise ``ValueError`` if a size is below 1; ``None`` is no size."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, but got {size}")


class CalibrationDataModule(LightningDataModule):
    """Encodes texts as sequences of tokens for calibration, evaluation and training.

    Texts are shuffled, tokenized, terminated with the end-of-sequence token, and concatenated until
    a split is full. Every sequence begins with the tokens that the tokenizer puts in front of a
    text: models that were trained with a beginning-of-sequence token need it. No text is in more
    than one of the splits ``"calibration"``, ``"evaluation"`` and ``"training"``, and evaluation
    texts that share more than 30 % of their tokens with another split, in runs of 32, are
    refused. The same texts, tokenizer, sizes and seed give the same tokens, which can be checked
    with ``hashes``.

    Args:
        dataset: ``"python-docs"`` (the topics of Python's ``help()``, available offline; 113
            thousand tokens with Python 3.11 and a vocabulary of 49 thousand), a hub dataset, a
            local folder or text file, a ``TextSource``, or an iterable of texts, of lists of token
            ids, or of rows with a column ``"text"``; ``"wikitext2"``, ``"c4"``, ``"ptb"`` or
            another ``WindowProtocol`` of publications; or ``"self"`` or a ``SelfText``, sampled
            from the model that is pruned (for calibration and training; needs ``evaluation``).
        tokenizer: A tokenizer, or a model name as in ``CausalLMModule``. Not needed for token ids.
            Default: ``None``.
        sequences: Number of calibration sequences. Default: 128, as in the Wanda and RIA papers.
        sequence_length: Number of tokens per sequence. Default: 2048, as in these papers.
        evaluation: Evaluation texts, in any form that ``dataset`` accepts except ``"self"`` and
            ``SelfText``, or a mapping of names to several such sets, ``{"wiki": ..., "code":
            ...}``, which are evaluated separately and together. ``None``, also as one of the sets,
            uses further texts of ``dataset``: ``{"docs": None, "other": ...}`` evaluates both
            kinds. Default: ``None``.
        evaluation_sequences: Number of evaluation sequences, per set if there are several; ``None``
            for all windows of a ``WindowProtocol``. Default: 64.
        evaluation_stride: Number of tokens between the beginnings of two evaluation sequences. They
            overlap, so that each token is predicted from more context, and the perplexity is lower;
            each token is counted once. The same tokens are evaluated, in about ``sequence_length /
            evaluation_stride`` times as many sequences; of a ``WindowProtocol`` with
            ``evaluation_sequences=None`` also those after the last whole window. Default: ``None``,
            sequences do not overlap.
        training_sequences: Number of training sequences for ``fit``, from texts of ``dataset`` that
            the other splits do not use. Default: 0.
        batch_size: Number of sequences per batch. Default: 1.
        packing: Whether texts are concatenated and divided into sequences. With ``False``, each
            text is one sequence, truncated to ``sequence_length`` and padded to the longest of the
            split; padding is neither measured, evaluated nor trained on. Default: ``True``.
        add_bos: Whether every sequence begins with the beginning-of-sequence token. A
            ``WindowProtocol`` has it in the first window only, as the publications; ``True``
            replaces the first token of every window by it, which is not counted in the perplexity.
            Default: ``None``, with the special tokens that the tokenizer puts in front of a text.
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
        evaluation_stride: int | None = None,
        training_sequences: int = 0,
        batch_size: int = 1,
        packing: bool = True,
        add_bos: bool | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(dataset, str):
            dataset = SelfText() if dataset == SELF else PROTOCOLS.get(dataset, dataset)
        self.dataset = dataset
        if isinstance(evaluation, Mapping):
            # --print_config writes null in a mapping as the text None
            evaluation = {
                name: None if isinstance(part, str) and part == "None" else part
                for name, part in evaluation.items()
            }
        self.evaluation = evaluation
        self.sequences = sequences
        self.sequence_length = sequence_length
        self.evaluation_sequences = evaluation_sequences
        self.evaluation_stride = evaluation_stride
        self.training_sequences = training_sequences
        self.batch_size = batch_size
        self.packing = packing
        self.add_bos = add_bos
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self._tokenizer = tokenizer
        self._splits: dict[str, Windows] = {}
        self._overlap_checked = False
        self._sampled_from: weakref.ref[PreTrainedModel] | None = None
        self._check_sizes()
        self._check_sources()

    def _check_sizes(self) -> None:
        sizes = {
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
            "evaluation_sequences": self.evaluation_sequences,
            "evaluation_stride": self.evaluation_stride,
            "batch_size": self.batch_size,
        }
        check_positive(sizes)
        if self.sequence_length == 1:
            raise ValueError(
                "sequence_length is 1, and the first token is not predicted: use 2 or more"
            )
        if self.training_sequences < 0:
            raise ValueError(
                f"training_sequences must not be negative, but got {self.training_sequences}"
            )
        if self.evaluation_stride is not None and not self.packing:
            raise ValueError(
                "evaluation_stride needs packed sequences: use packing=True, or no stride"
            )

    def _check_sources(self) -> None:
        dataset, evaluation = self.dataset, self.evaluation
        name = type(dataset).__name__
        if isinstance(evaluation, Mapping) and not (evaluation and all(evaluation)):
            raise ValueError(
                "evaluation must be a mapping with at least one entry and no empty names, but got "
                f"the names {list(evaluation)}"
            )
        if isinstance(dataset, SelfText) and self.add_bos is not None:
            raise ValueError(f"add_bos={self.add_bos} has no effect on {name}: use add_bos=None")
        if isinstance(dataset, WindowProtocol) and self.add_bos is False:
            raise ValueError(
                f"add_bos=False has no effect on {name}, which encodes texts as the tokenizer does "
                f"by default: use add_bos=None"
            )
        if isinstance(dataset, SelfText | WindowProtocol) and not self.packing:
            raise ValueError(
                f"packing=False has no effect on {name}, whose windows are full: use packing=True"
            )
        if isinstance(dataset, WindowProtocol) and self.training_sequences:
            raise ValueError(
                f"{name} has calibration and evaluation windows only: use training_sequences=0, or "
                f"another dataset"
            )
        sets = evaluation.values() if isinstance(evaluation, Mapping) else [evaluation]
        if isinstance(dataset, SelfText) and any(texts is None for texts in sets):
            raise ValueError(
                "dataset='self' samples calibration and training sequences only: pass evaluation=, "
                "such as evaluation='python-docs'"
            )

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
        splits: dict[str, Windows] = {}
        reader: TokenReader | None = None
        if isinstance(self.dataset, WindowProtocol):
            ids = self.dataset.calibration_windows(
                required(self.tokenizer), self.sequences, self.sequence_length, self.seed
            )
            splits["calibration"] = self._protocol_windows(ids)
        elif not isinstance(self.dataset, SelfText):
            reader = self._reader(self.dataset, "the dataset")
            splits["calibration"] = reader.windows(self.sequences, "calibration")
        for split, source in self._evaluation_sets().items():
            splits |= {split: self._evaluation_windows(split, source, reader)}
        if self.training_sequences and reader is not None:
            splits["training"] = reader.windows(self.training_sequences, "training")
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

        Raises:
            ValueError: Evaluation texts are also used for calibration or training.
        """
        self.setup()
        if not self._overlap_checked:  # here, since data for calibration only needs no check
            check_overlap({name: part.text for name, part in self._splits.items()}, EVALUATION)
            self._overlap_checked = True
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
                ids = sample_sequences(
                    model,
                    self.tokenizer,
                    self.dataset,
                    count=count,
                    length=self.sequence_length,
                    seed=2 * self.seed + i,
                )
                self._splits[split] = Windows(ids)
        self._sampled_from = weakref.ref(model)

    @property
    def splits(self) -> Mapping[str, Windows]:
        """The sequences of each split; of ``"self"``, those that are sampled already."""
        self.setup()
        return self._splits

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the token ids of each split (int64, little-endian, row-major).

        Where sequences are padded or overlap, the hash includes the padding mask and the labels.
        """
        return {split: windows.sha256 for split, windows in self.splits.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments and hashes as JSON-serializable values, as recorded in the manifest."""
        names = (
            "sequences",
            "evaluation_sequences",
            "evaluation_stride",
            "training_sequences",
            "sequence_length",
            "batch_size",
            "packing",
            "add_bos",
            "seed",
        )
        return {
            "dataset": source_settings(self.dataset),
            "evaluation": source_settings(self.evaluation),
            **{name: getattr(self, name) for name in names},
            "sha256": self.hashes,
        }

    def _dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        self.setup()
        if isinstance(self.dataset, SelfText) and split not in self._evaluation_sets():
            self.sample()
        self._check_model(split)
        windows, num_bytes, replicas = self._splits[split], None, 1
        if split in self._evaluation_sets():
            replicas = self._num_replicas
            if self.tokenizer is not None:
                num_bytes = windows.num_bytes(self.tokenizer)
        dataset = WindowDataset(windows, num_bytes, replicas)
        return DataLoader(dataset, batch_size=self.batch_size)

    def _reader(self, source: Texts, name: str) -> TokenReader:
        return TokenReader(
            source,
            name,
            tokenizer=self.tokenizer,
            length=self.sequence_length,
            add_bos=self.add_bos,
            packing=self.packing,
            seed=self.seed,
        )

    def _evaluation_sets(self) -> dict[str, WindowProtocol | Texts | None]:
        """Map the evaluation splits to their texts; ``None`` for further texts of ``dataset``."""
        if isinstance(self.evaluation, Mapping):
            return {f"{EVALUATION}/{name}": texts for name, texts in self.evaluation.items()}
        return {EVALUATION: self.evaluation}

    @property
    def _num_replicas(self) -> int:
        return 1 if self.trainer is None else num_replicas(self.trainer)

    def _evaluation_windows(
        self, split: str, source: WindowProtocol | Texts | None, reader: TokenReader | None
    ) -> Windows:
        """Return the windows of an evaluation split; ``reader`` continues those of ``dataset``."""
        if source is None and isinstance(self.dataset, WindowProtocol):
            source = self.dataset
        if isinstance(source, str):
            source = PROTOCOLS.get(source, source)
        if isinstance(source, WindowProtocol):
            return self._evaluated_protocol(source)
        if source is not None:
            reader = self._reader(source, "the evaluation dataset")
        assert reader is not None, "checked by __init__"
        if self.evaluation_sequences is None:
            raise ValueError(
                f"evaluation_sequences=None takes all windows of a protocol, and {split} is none: "
                f"pass a number"
            )
        windows = reader.windows(self.evaluation_sequences, split)
        if self.evaluation_stride is None:
            return windows
        prefix = windows.ids[0, : windows.prefix_length].tolist()
        return overlapping(windows.text, self.sequence_length, self.evaluation_stride, prefix)

    def _evaluated_protocol(self, protocol: WindowProtocol) -> Windows:
        count, length = self.evaluation_sequences, self.sequence_length
        ids = protocol.evaluation_ids(required(self.tokenizer), length)
        whole = consecutive(protocol.path, ids, count, length)
        if self.evaluation_stride is None:
            return self._protocol_windows(whole)
        ids = ids if count is None else whole.flatten()
        prefix: list[int] = []
        if self.add_bos:
            prefix = text_prefix(required(self.tokenizer), True)
            ids = ids[int(ids[0] == prefix[0]) :]
        return overlapping(ids, length, self.evaluation_stride, prefix)

    def _protocol_windows(self, ids: Tensor) -> Windows:
        """Return windows of a protocol, with ``add_bos`` in place of their first tokens."""
        if not self.add_bos:
            return Windows(ids)
        prefix = text_prefix(required(self.tokenizer), True)
        return Windows(ids.index_fill(1, torch.tensor([0]), prefix[0]), prefix_length=1)

    def _check_model(self, split: str) -> None:
        """Check that the Trainer's model has embeddings and positions for the tokens."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is None:
            return
        model, ids = pruning_target(module), self._splits[split].ids
        check_input_ids(model, ids)
        context = context_length(model)
        if context is not None and ids.shape[1] > context:
            warnings.warn(
                f"the sequences have {ids.shape[1]} tokens, and {type(model).__name__} was trained "
                f"on up to {context}: beyond, its perplexity rises. Use sequence_length={context} "
                f"or less",
                PruningWarning,
                stacklevel=2,
            )
