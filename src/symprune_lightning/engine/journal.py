"""The journal of a run: an on-disk log of finished blocks, from which a run resumes.

Longer than 300 lines since reading and writing of a format belong together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from symprune_lightning.engine.differences import fingerprint_differences
from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.files import atomic_file, write_json
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.result import BlockRecord, BlockReport, LayerRecord, LayerReport
from symprune_lightning.errors import JournalError
from symprune_lightning.functional.packing import pack, unpack

FORMAT_VERSION = 1
"""Raised whenever a journal of an earlier version can no longer be read."""

RUN_FILE = "run.json"
BLOCK_FILE = "block-{:05}.safetensors"


@dataclass(frozen=True)
class _Entry:
    """The header of a layer's record, which all ranks know, and its place in the journal."""

    report: LayerReport
    file_index: int
    tensors: list[str]


@dataclass(frozen=True)
class _BlockEntry:
    """The header of the record of a reconstructed block, and its place in the journal."""

    report: BlockReport
    file_index: int
    parameters: list[str]


class Journal:
    """An on-disk log of the finished blocks of a run, one file per decoder block.

    Files are written atomically, so a run may be killed at any moment. When it is started again,
    the recorded layers are restored without being measured or scored, and the run continues after
    them. The block recorded last is pruned once more and compared: a difference proves that the two
    runs do not compute the same bits, and raises ``JournalError``.

    Rank 0 reads and writes; the other ranks receive its results.

    Args:
        folder: Created if it does not exist.
        communicator: The ranks that prune together.
    """

    def __init__(self, folder: str | PathLike[str], communicator: Communicator) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.communicator = communicator
        self._finished: dict[str, _Entry] = {}
        self._last_block: dict[str, _Entry] = {}
        self._finished_blocks: dict[str, _BlockEntry] = {}
        self._headers: dict[str, Any] = {}
        self._block_headers: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._current_block: int | None = None
        self._num_files = 0
        self._is_unused = False

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Start a journal, or continue the one in the folder.

        Args:
            fingerprint: See ``run_fingerprint``.

        Raises:
            JournalError: The journal belongs to another run or version, or cannot be read.
            OSError: The folder cannot be written.
        """
        text = self.communicator.on_rank_zero(lambda: self._open_folder(fingerprint))
        headers = json.loads(text)
        entries = {name: _entry(**header) for name, header in headers["layers"].items()}
        last = max((entry.file_index for entry in entries.values()), default=-1)
        self._finished = {n: e for n, e in entries.items() if e.file_index < last}
        self._last_block = {n: e for n, e in entries.items() if e.file_index == last}
        self._num_files = max(last, 0)
        blocks = {name: _block_entry(**header) for name, header in headers["blocks"].items()}
        self._finished_blocks = {n: e for n, e in blocks.items() if e.file_index < last}

    @property
    def recorded(self) -> list[str]:
        """Names of all recorded layers, also of the last block, which is pruned once more."""
        return [*self._finished, *self._last_block]

    def is_finished(self, layer: str) -> bool:
        """Return whether the layer is recorded and need not be pruned again."""
        return layer in self._finished

    def read(self, layer: Layer) -> LayerRecord:
        """Return the record of a finished layer; every rank must call this."""
        entry = self._finished[layer.name]
        rows, columns = layer.shape
        buffers = {
            "mask": torch.empty(rows, -(-columns // 8), dtype=torch.uint8),
            "channel_order": torch.empty(columns, dtype=torch.int64),
            "weight": torch.empty(rows, columns, dtype=layer.parameter.dtype),
        }
        recorded = {f"{layer.name}:{key}": buffers[key] for key in entry.tensors}
        values = self._broadcast_tensors(entry.file_index, recorded)
        device = layer.parameter.device
        tensors = {key: x.to(device) for key, x in zip(entry.tensors, values, strict=True)}
        mask = unpack(tensors["mask"], columns)
        return LayerRecord(entry.report, mask, tensors.get("weight"), tensors.get("channel_order"))

    def is_finished_block(self, block: str) -> bool:
        """Return whether the reconstruction of a block is recorded and need not be repeated."""
        return block in self._finished_blocks

    def read_block(self, name: str, block: nn.Module) -> BlockRecord:
        """Return the record of a reconstructed block; every rank must call this."""
        entry = self._finished_blocks[name]
        current = {key: block.get_parameter(key) for key in entry.parameters}
        recorded = {
            f"{name}::{key}": torch.empty(x.shape, dtype=x.dtype) for key, x in current.items()
        }
        values = self._broadcast_tensors(entry.file_index, recorded)
        return BlockRecord(
            entry.report,
            {k: v.to(x.device) for (k, x), v in zip(current.items(), values, strict=True)},
        )

    def start_block(self, block: int) -> None:
        """Announce layers of a block; the block before it is finished, and written.

        Raises:
            JournalError: The block's masks differ from the recorded ones.
            OSError: It cannot be written.
        """
        if self._headers and block != self._current_block:
            self.write()
        self._current_block = block

    def add(self, layer: Layer, record: LayerRecord) -> None:
        """Keep the record of a layer until its block is finished."""
        weight = record.weight
        if weight is not None:
            weight = weight.to(layer.parameter.dtype).contiguous()
        candidates = {
            "mask": pack(record.mask),
            "channel_order": record.channel_order,
            "weight": weight,
        }
        tensors = {key: x for key, x in candidates.items() if x is not None}
        if self.communicator.rank == 0:
            self._tensors |= {f"{layer.name}:{key}": x.cpu() for key, x in tensors.items()}
        self._headers[layer.name] = {"report": asdict(record.report), "tensors": list(tensors)}

    def add_block(self, name: str, record: BlockRecord) -> None:
        """Keep the record of a reconstructed block until its file is written."""
        if self.communicator.rank == 0:
            for key, value in record.parameters.items():
                self._tensors[f"{name}::{key}"] = value.contiguous().cpu()
        header = {"report": asdict(record.report), "parameters": list(record.parameters)}
        self._block_headers[name] = header

    def write(self) -> None:
        """Write the finished block."""
        if self._headers:
            self._is_unused = False
            self.communicator.on_rank_zero(self._write_block)
            self._num_files += 1
            self._headers.clear()
            self._block_headers.clear()
            self._tensors.clear()
            self._last_block.clear()

    def save_value(self, name: str, value: Any) -> None:
        """Save a JSON value."""
        self._is_unused = False
        self.communicator.on_rank_zero(lambda: write_json(self.folder / f"{name}.json", value))

    def discard_unused(self) -> None:
        """Delete the journal if this run has created it, and has recorded nothing.

        After an error, so that the corrected call is not refused as another run.
        """
        if self._is_unused and self.communicator.rank == 0:
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            with suppress(OSError):  # other files are in it
                self.folder.rmdir()

    def load_value(self, name: str) -> Any:
        """Load a saved JSON value; ``None`` if there is none."""
        path = self.folder / f"{name}.json"
        return json.loads(
            self.communicator.on_rank_zero(
                lambda: path.read_text("utf-8") if path.is_file() else "null"
            )
        )

    def _broadcast_tensors(self, file_index: int, buffers: Mapping[str, Tensor]) -> list[Tensor]:
        """Read tensors of a file on rank 0 and broadcast them.

        Args:
            file_index: Index of the file.
            buffers: Keys in the file, to tensors of the recorded shapes and dtypes.
        """
        stored: Mapping[str, Tensor] = buffers
        if self.communicator.rank == 0:
            with safe_open(self._file(file_index), framework="pt") as file:
                stored = {key: file.get_tensor(key) for key in buffers}
        return [self.communicator.broadcast(tensor) for tensor in stored.values()]

    def _file(self, index: int) -> Path:
        return self.folder / BLOCK_FILE.format(index)

    def _open_folder(self, fingerprint: dict[str, Any]) -> str:
        """Create or check the folder; return the headers of all recorded layers as JSON."""
        path = self.folder / RUN_FILE
        files = list(takewhile(Path.is_file, (self._file(i) for i in count())))
        if files and not path.is_file():
            raise JournalError(
                f"{self.folder} is missing {RUN_FILE}: delete the folder to start over"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                self._is_unused = True
                write_json(path, {"format_version": FORMAT_VERSION, **fingerprint})
        except OSError as error:
            raise OSError(f"cannot write the journal {self.folder}: {error}") from error
        self._check_run(path, fingerprint)
        headers: dict[str, dict[str, Any]] = {"layers": {}, "blocks": {}}
        for index, file in enumerate(files):
            for kind, records in _read_headers(file).items():
                for name, header in records.items():
                    headers[kind][name] = {**header, "file_index": index}
        return json.dumps(headers)

    def _check_run(self, path: Path, fingerprint: dict[str, Any]) -> None:
        """Raise ``JournalError`` if the journal is of another version or run."""
        try:
            recorded = json.loads(path.read_text("utf-8"))
            version = recorded.pop("format_version", None)
        except (ValueError, AttributeError) as error:
            raise JournalError(
                f"cannot read {path}: {error}. Delete the folder to start over"
            ) from error
        if version != FORMAT_VERSION:
            raise JournalError(
                f"{self.folder} was written in journal format {version or 'without a version'}, "
                f"this version of symprune-lightning reads format {FORMAT_VERSION}: resume with "
                f"the version that wrote it, or delete the folder to start over"
            )
        differences = list(fingerprint_differences(recorded, fingerprint))
        if differences:
            raise JournalError(
                f"{self.folder} is the journal of another run: {'; '.join(differences)}. Use the "
                f"same settings to resume it, or delete the folder to start over"
            )

    def _write_block(self) -> None:
        self._compare_with_last_block()
        path = self._file(self._num_files)
        try:
            with atomic_file(path) as tmp:
                headers = {"layers": self._headers, "blocks": self._block_headers}
                metadata = {kind: json.dumps(records) for kind, records in headers.items()}
                save_file(self._tensors, tmp, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"cannot write {path}: {error}. Earlier blocks are recorded: free disk space and "
                f"start the same run again to resume"
            ) from error

    def _compare_with_last_block(self) -> None:
        """Check that the block recorded last, which was pruned again, came out the same."""
        for name in self._headers:
            if name not in self._last_block:
                continue
            key = f"{name}:mask"
            with safe_open(self._file(self._last_block[name].file_index), "pt") as file:
                same = torch.equal(file.get_tensor(key), self._tensors[key])
            if not same:
                raise JournalError(
                    f"the mask of layer {name} differs from the one in {self.folder}: the settings "
                    f"are the same, but the hardware, the number of threads or a library is not, "
                    f"or the forward is random. Delete the folder to start over"
                )


def _entry(report: dict[str, Any], tensors: list[str], file_index: int) -> _Entry:
    shape = tuple(report["shape"])
    return _Entry(LayerReport(**{**report, "shape": shape}), file_index, tensors)


def _block_entry(report: dict[str, Any], parameters: list[str], file_index: int) -> _BlockEntry:
    return _BlockEntry(BlockReport(**report), file_index, parameters)


def _read_headers(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            return {kind: json.loads(metadata[kind]) for kind in ("layers", "blocks")}
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise JournalError(
            f"cannot read {file}: {error}. Delete it and all files with higher numbers to resume "
            f"from the block before"
        ) from error
