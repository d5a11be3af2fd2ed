"""The journal of a run: what is finished, on disk, so that a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from symprune_lightning.engine.layers import Layer
from symprune_lightning.engine.method import Method
from symprune_lightning.engine.parallel import Ranks, gathered
from symprune_lightning.engine.result import LayerReport
from symprune_lightning.files import whole_file, write_json
from symprune_lightning.functional.packing import pack, unpack

RUN = "run.json"
PART = "part-{:05}.safetensors"


class JournalError(ValueError):
    """A journal is of another run, can't be read, or the run does not come out as it says."""


@dataclass(frozen=True)
class Record:
    """What was done to one layer.

    Attributes:
        report: Its figures.
        mask: Bool, ``(out_features, in_features)``, True = kept.
        weight: The new weight in the layer's dtype, if there was a weight update.
        order: Order of the inputs in which it was pruned, if it was permuted.
    """

    report: LayerReport
    mask: Tensor
    weight: Tensor | None
    order: Tensor | None


@dataclass(frozen=True)
class _Entry:
    """What a record holds, known to all processes, and where the first has it."""

    report: LayerReport
    part: int
    has: list[str]


class Journal:
    """What a run has finished, in a folder; one file for each decoder block.

    A file takes its name when all of it is on disk, so that a run may be killed at any moment. The
    run that is started again applies what is recorded, without measuring or scoring it, and goes
    on from there. The block that was recorded last is pruned again: if it does not come out the
    same, the two runs are not the same, and an error says so.

    The first process writes and reads; it tells the others.

    Args:
        folder: Made if it is not there.
        ranks: The processes that prune together.
    """

    def __init__(self, folder: str | PathLike[str], ranks: Ranks) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.ranks = ranks
        self._entries: dict[str, _Entry] = {}
        self._last: dict[str, _Entry] = {}
        self._heads: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._block: int | None = None
        self._parts = 0

    def open(self, run: dict[str, Any]) -> None:
        """Begin a journal of this run, or go on with one.

        Args:
            run: What makes it this run, in plain values: see ``described``.

        Raises:
            JournalError: The journal is of another run; or it can't be read.
            OSError: The folder can't be written to.
        """
        text = self._by_first(lambda: self._opened(run))
        entries = {name: _entry(**head) for name, head in json.loads(text).items()}
        last = max((entry.part for entry in entries.values()), default=-1)
        self._entries = {n: e for n, e in entries.items() if e.part < last}
        self._last = {n: e for n, e in entries.items() if e.part == last}
        self._parts = max(last, 0)

    def has(self, layer: str) -> bool:
        """Whether the layer is finished, and need not be pruned again."""
        return layer in self._entries

    def read(self, layer: Layer) -> Record:
        """What was done to a layer that is finished; all processes must call this."""
        entry = self._entries[layer.name]
        rows, columns = layer.shape
        found: dict[str, Tensor] = {}
        if self.ranks.rank == 0:
            with safe_open(self.folder / PART.format(entry.part), framework="pt") as file:
                found = {key: file.get_tensor(f"{layer.name}:{key}") for key in entry.has}
        like = {
            "mask": torch.empty(rows, -(-columns // 8), dtype=torch.uint8),
            "order": torch.empty(columns, dtype=torch.int64),
            "weight": torch.empty(rows, columns, dtype=layer.parameter.dtype),
        }
        device = layer.parameter.device
        got = {key: self.ranks.given(found.get(key, like[key])).to(device) for key in entry.has}
        mask = unpack(got["mask"], columns)
        return Record(entry.report, mask, got.get("weight"), got.get("order"))

    def begin(self, block: int) -> None:
        """Say that layers of this block come next: the one before is finished, and written.

        Raises:
            JournalError: It does not come out as it did before.
            OSError: It can't be written.
        """
        if self._heads and block != self._block:
            self.write()
        self._block = block

    def add(self, layer: Layer, record: Record) -> None:
        """Keep what was done to a layer until its block is finished."""
        found = {"mask": pack(record.mask), "order": record.order, "weight": record.weight}
        if record.weight is not None:
            found["weight"] = record.weight.to(layer.parameter.dtype).contiguous()
        there = {key: x for key, x in found.items() if x is not None}
        if self.ranks.rank == 0:
            self._tensors |= {f"{layer.name}:{key}": x.cpu() for key, x in there.items()}
        self._heads[layer.name] = {"report": asdict(record.report), "has": list(there)}

    def write(self) -> None:
        """Write what is finished."""
        if self._heads:
            self._by_first(self._written)
            self._parts += 1
            self._heads.clear()
            self._tensors.clear()
            self._last.clear()

    def note(self, name: str, value: Any) -> None:
        """Keep a plain value."""
        self._by_first(lambda: write_json(self.folder / f"{name}.json", value))

    def noted(self, name: str) -> Any:
        """A value that was kept, ``None`` if there is none."""
        path = self.folder / f"{name}.json"
        return json.loads(
            self._by_first(lambda: path.read_text("utf-8") if path.is_file() else "null")
        )

    def _by_first(self, work: Callable[[], str | None]) -> str:
        """Have the first process do something and tell the others what came of it."""
        text, error = "", None
        if self.ranks.rank == 0:
            try:
                text = work() or ""
            except Exception as raised:  # told to the other processes, and raised by all
                error = raised
        self.ranks.least(0, error)
        return self.ranks.told(text)

    def _opened(self, run: dict[str, Any]) -> str:
        path = self.folder / RUN
        files = list(takewhile(Path.is_file, (self.folder / PART.format(i) for i in count())))
        if files and not path.is_file():
            raise JournalError(f"{self.folder} has lost its {RUN}: delete it to begin anew")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                write_json(path, run)
        except OSError as error:
            raise OSError(f"cannot write the journal {self.folder}: {error}") from error
        differences = list(_differences(json.loads(path.read_text("utf-8")), run))
        if differences:
            raise JournalError(
                f"{self.folder} is the journal of another run: {'; '.join(differences)}. Run it "
                f"as before to go on with it, or delete the folder to begin anew"
            )
        entries: dict[str, Any] = {}
        for part, file in enumerate(files):
            entries |= {name: {**e, "part": part} for name, e in _head_of(file).items()}
        return json.dumps(entries)

    def _written(self) -> None:
        self._compare()
        path = self.folder / PART.format(self._parts)
        try:
            with whole_file(path) as partial:
                save_file(self._tensors, partial, metadata={"layers": json.dumps(self._heads)})
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"cannot write {path}: {error}. What was finished before is recorded: make room, "
                f"and start the same run again to go on"
            ) from error

    def _compare(self) -> None:
        """The block that was recorded last, and is pruned again, has to come out the same."""
        for name in self._heads:
            if name not in self._last:
                continue
            key = f"{name}:mask"
            with safe_open(self.folder / PART.format(self._last[name].part), "pt") as file:
                same = torch.equal(file.get_tensor(key), self._tensors[key])
            if not same:
                raise JournalError(
                    f"layer {name} does not come out as {self.folder} has it: the settings are the "
                    f"same, but the hardware, the number of threads or a library is not, or "
                    f"something is random. Delete the folder to begin anew"
                )


def _entry(report: dict[str, Any], has: list[str], part: int) -> _Entry:
    return _Entry(LayerReport(**{**report, "shape": tuple(report["shape"])}), part, has)


def described(
    model: nn.Module,
    layers: Sequence[Layer],
    method: Method,
    batches: Iterable[Any],
    ranks: Ranks,
    *,
    weights: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What makes a run the run it is, in plain values: settings, layers, weights, data.

    Args:
        model: The dense model.
        layers: The layers to prune.
        method: What is to be done.
        batches: Calibration batches of this process.
        ranks: The processes that prune together.
        weights: What tells the weights from others, if they are not in memory.
        settings: What else decides what comes out.
    """
    return {
        "score": _named(method.score),
        "update": _named(method.update),
        **{name: _named(value) for name, value in settings.items()},
        "layers": {
            layer.name: {
                "shape": list(layer.shape),
                "dtype": str(layer.parameter.dtype),
                "pattern": _named(method.patterns[layer.name]),
                "refine": _named(method.refiners.get(layer.name, [])),
            }
            for layer in layers
        },
        "weights": _hash_of_weights(model) if weights is None else weights,
        "data": _hash_of_data(batches, ranks),
    }


def _named(value: Any) -> str:
    """As it is written; where an object lies in memory is not part of it."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _hash_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        value = gathered(parameter.detach())
        bits = torch.hash_tensor(value).view(torch.int64)  # uint64 may not fit into an int
        digest.update(f"{name} {tuple(value.shape)} {int(bits)}".encode())
    return digest.hexdigest()


def _hash_of_data(batches: Iterable[Any], ranks: Ranks) -> str:
    """Of all processes' batches, in the order in which one process would have them."""
    total = 0
    for i, batch in enumerate(batches):
        leaves, structure = tree_flatten(batch)
        digest = hashlib.sha256(f"{ranks.share + i * ranks.shares} {structure}".encode())
        for leaf in leaves:
            digest.update(_bytes(leaf))
        total += int.from_bytes(digest.digest()[:4], "little")
    # sums of integers this small are exact in float64, and their order does not matter
    counted = torch.tensor([float(total) if ranks.counts else 0.0], dtype=torch.float64)
    return f"{int(ranks.added(counted)):x}"


def _bytes(leaf: Any) -> bytes:
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode()
    flat = leaf.detach().cpu().contiguous().flatten()
    head = f"{leaf.dtype} {tuple(leaf.shape)}".encode()
    return head + flat.view(torch.uint8).numpy().tobytes()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "layers":
            yield from _differing_layers(old or {}, new or {})
        elif key in ("weights", "data"):
            what = {"weights": "the model's weights", "data": "the calibration data"}[key]
            yield f"{what} differ"
        else:
            yield f"{key} was {old}, and is {new}"


def _differing_layers(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    name = differing[0]
    old, new = before.get(name), now.get(name)
    if old is None or new is None:
        yield f"layer {name} was {'not ' if old is None else ''}among the layers to prune"
        return
    yield from (
        f"{key} of layer {name} was {old[key]}, and is {new[key]}"
        for key in old
        if old[key] != new[key]
    )


def _head_of(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            head: dict[str, Any] = json.loads(opened.metadata()["layers"])
            return head
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise JournalError(
            f"cannot read {file}: {error}. Delete it and those with higher numbers to go on from "
            f"the block before"
        ) from error
