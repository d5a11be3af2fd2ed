"""``symprune gain``: what the zeros of a checkpoint save on this machine."""

from __future__ import annotations

import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from symprune_lightning.checkpoints.masks import FILE, FOLDER, infer_masks, match_layers
from symprune_lightning.checkpoints.packed import packed_size
from symprune_lightning.checkpoints.pretrained import load_model
from symprune_lightning.checkpoints.weight_files import read_tensors, weight_files

TOKENS = (1, 128)
"""Numbers of tokens of the timed products: one generated token, and a prompt."""

SECONDS = 0.3
"""Shortest time for which a product is repeated."""

CHUNK, CHUNKS = 1 << 20, 64
"""Bytes and number of the parts of the weight files that are compressed."""


@dataclass(frozen=True)
class Size:
    """Size of the weights in one form.

    Attributes:
        form: Name of the form.
        bytes: ``None`` if it was not measured.
        note: How it was measured, or why not.
    """

    form: str
    bytes: float | None
    note: str = ""


@dataclass(frozen=True)
class Speed:
    """Time and memory of all pruned layers in one runtime.

    Attributes:
        runtime: Name of the runtime.
        seconds: Number of tokens to the time of one product of each layer; empty if not measured.
        bytes: Memory of the weights; ``None`` if it was not measured.
        note: Why it was not measured.
    """

    runtime: str
    seconds: dict[int, float]
    bytes: int | None = None
    note: str = ""


def sizes(folder: Path) -> list[Size]:
    """Return the size of a checkpoint's weights as they are, compressed, packed, and as masks."""
    files = weight_files(folder)
    paths = [folder / file for file in sorted(set(files.values()))]
    plain = sum(path.stat().st_size for path in paths)
    packed = sum(packed_size(tensor) for _, tensor in read_tensors(folder, files, files))
    about = f"estimated from {min(plain, CHUNK * CHUNKS) / 1e6:.0f} MB"
    result = [Size("safetensors", plain)]
    result.append(Size("zip (deflate)", plain * _ratio(paths, plain, zlib.compress), about))
    if find_spec("zstandard") is None:
        result.append(Size("zstd", None, "not measured: pip install zstandard"))
    else:
        compressor: Any = import_module("zstandard").ZstdCompressor()
        result.append(Size("zstd", plain * _ratio(paths, plain, compressor.compress), about))
    result.append(Size("symprune pack", packed))
    masks = folder / FOLDER / FILE
    if masks.is_file():
        note = "with the dense model, if pruning did not change the kept weights"
        result.append(Size("symprune pack --masks_only", masks.stat().st_size, note))
    return result


def _ratio(paths: list[Path], total: int, compress: Callable[[bytes], bytes]) -> float:
    """Return compressed by plain size of evenly spaced parts of the files."""
    before = after = 0
    step = max(CHUNK, total // CHUNKS)
    for path in paths:
        with path.open("rb") as file:
            for offset in range(0, path.stat().st_size, step):
                file.seek(offset)
                data = file.read(CHUNK)
                before, after = before + len(data), after + len(compress(data))
    return after / before


def speeds(folder: Path, trust_remote_code: bool = False) -> list[Speed]:
    """Return times and memory of the pruned layers in runtimes that can use zeros.

    One layer of each shape is timed, and counts for all layers of that shape.
    """
    model = load_model(str(folder), dtype="float32", trust_remote_code=trust_remote_code)
    layers = match_layers(model, infer_masks(model))
    if not layers:
        raise ValueError(f"no layer of {folder} has zeros: prune it first")
    counts = Counter(tuple(layer.shape) for layer in layers)
    matrices = {tuple(layer.shape): layer.matrix() for layer in layers}
    weights = [(matrix, counts[shape]) for shape, matrix in matrices.items()]
    return [
        _measured("dense (torch)", weights, lambda w: w, lambda w, x: w @ x),
        _measured("CSR (torch)", weights, Tensor.to_sparse_csr, lambda w, x: w @ x),
        _scipy(weights),
        _semi_structured(weights),
    ]


def _scipy(weights: list[tuple[Tensor, int]]) -> Speed:
    name = "CSR (scipy)"
    if find_spec("scipy") is None:
        return Speed(name, {}, note="not measured: pip install scipy")
    sparse = import_module("scipy.sparse")
    return _measured(
        name, weights, lambda w: sparse.csr_array(w.numpy()), lambda w, x: w @ x.numpy()
    )


def _semi_structured(weights: list[tuple[Tensor, int]]) -> Speed:
    name = "2:4 (torch, GPU)"
    if not torch.cuda.is_available():
        return Speed(name, {}, note="not measured: no CUDA device")
    if not all(_is_two_of_four(weight) for weight, _ in weights):
        return Speed(name, {}, note="not measured: the layers are not 2:4")
    if torch.cuda.get_device_capability() < (8, 0):
        return Speed(name, {}, note="not measured: the GPU has no sparse tensor cores")
    on_gpu = [(weight.half().cuda(), count) for weight, count in weights]
    dense = _measured("dense", on_gpu, lambda w: w, lambda w, x: w @ x)
    try:
        sparse = _measured(name, on_gpu, to_sparse_semi_structured, lambda w, x: w @ x)
    except (RuntimeError, NotImplementedError) as error:  # shapes that its kernels do not support
        return Speed(name, {}, note=f"torch cannot convert or run the layers: {error}")
    factors = ", ".join(
        f"{dense.seconds[tokens] / sparse.seconds[tokens]:.2f} at {tokens}" for tokens in TOKENS
    )
    note = f"speed-up over dense float16 on this GPU, by number of tokens: {factors}"
    return Speed(name, sparse.seconds, sparse.bytes, note)


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight.view(len(weight), -1, 4) != 0).sum(-1) <= 2).all())


def _measured(
    runtime: str,
    weights: list[tuple[Tensor, int]],
    convert: Callable[[Tensor], Any],
    multiply: Callable[[Any, Tensor], Any],
) -> Speed:
    seconds = dict.fromkeys(TOKENS, 0.0)
    total = 0
    for weight, count in weights:
        converted = convert(weight)
        total += count * _memory(converted)
        for tokens in TOKENS:
            inputs = torch.randn(weight.shape[1], tokens).to(weight)
            seconds[tokens] += count * _seconds(partial(multiply, converted, inputs))
    return Speed(runtime, seconds, total)


def _memory(weight: Any) -> int:
    """Return the bytes of a matrix in its form."""
    if isinstance(weight, Tensor) and weight.layout is torch.sparse_csr:
        parts: list[Any] = [weight.values(), weight.col_indices(), weight.crow_indices()]
    elif isinstance(weight, Tensor):
        packed = getattr(weight, "packed", None)  # 2:4, with the positions in the same tensor
        parts = [weight if packed is None else packed]
    else:
        parts = [weight.data, weight.indices, weight.indptr]
    return sum(int(part.nbytes) for part in parts)


def _seconds(product: Callable[[], Any]) -> float:
    """Return the fastest of repeated products."""
    product()
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        product()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def print_gains(folder: str, trust_remote_code: bool = False) -> None:
    """Print sizes, times and memory of a checkpoint.

    Raises:
        FileNotFoundError: There are no weights in safetensors.
        ValueError: No layer has zeros.
    """
    path = Path(folder).expanduser()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        found_sizes, found_speeds = sizes(path), speeds(path, trust_remote_code)
    console = Console()
    console.print(_size_table(found_sizes))
    console.print(_speed_table(found_speeds))
    console.print(*_notes(found_speeds), sep="\n", markup=False, highlight=False, soft_wrap=True)


def _size_table(found: list[Size]) -> Table:
    table = Table("weights on disk", title_justify="left", box=None, pad_edge=False)
    for heading in ("MB", "of the file"):
        table.add_column(heading, justify="right")
    table.add_column("")
    plain = found[0].bytes
    assert plain
    for size in found:
        cells = ["–", "–"] if size.bytes is None else [_mb(size.bytes), f"{size.bytes / plain:.0%}"]
        table.add_row(size.form, *cells, size.note)
    return table


def _speed_table(found: list[Speed]) -> Table:
    table = Table("pruned layers", box=None, pad_edge=False)
    for heading in (*(f"{n} token{'s' * (n > 1)}, ms" for n in TOKENS), "speed", "memory, MB"):
        table.add_column(heading, justify="right")
    dense = found[0]
    for speed in found:
        if not speed.seconds or speed.bytes is None:
            continue
        times = [f"{speed.seconds[tokens] * 1e3:.1f}" for tokens in TOKENS]
        factors = " / ".join(_factor(dense, speed, tokens) for tokens in TOKENS)
        table.add_row(speed.runtime, *times, factors, _mb(speed.bytes))
    return table


def _factor(dense: Speed, speed: Speed, tokens: int) -> str:
    return f"{dense.seconds[tokens] / speed.seconds[tokens]:.2f}x"


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def _notes(found: list[Speed]) -> Iterator[str]:
    """Yield a sentence for each runtime: faster, slower, or not measured."""
    dense = found[0]
    threads = torch.get_num_threads()
    yield f"\nfloat32 on the CPU, {threads} threads; one layer of each shape is timed."
    for speed in found[1:]:
        if speed.note:
            yield f"{speed.runtime}: {speed.note}"
            continue
        slower = [n for n in TOKENS if speed.seconds[n] > dense.seconds[n]]
        if slower:
            counts = " and ".join(f"{n} token{'s' * (n > 1)}" for n in slower)
            yield f"{speed.runtime}: slower than the dense product at {counts}"
