"""``symprune gain``: what the zeros of a checkpoint save on this machine.

Longer than 300 lines since each runtime has its own conversion and note.
"""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from symprune_lightning.checkpoints.masks import infer_masks, load_masks, mask_files
from symprune_lightning.checkpoints.masks_only import changes_of_weights
from symprune_lightning.checkpoints.packed import packed_size
from symprune_lightning.checkpoints.pretrained import load_model
from symprune_lightning.checkpoints.weight_files import read_tensors, refuse_packed, weight_files
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.match import match_layers

TOKENS = (1, 128)
"""Numbers of tokens of the timed products: one generated token, and a prompt."""

SECONDS = 1.0
"""Shortest time for which a pass over the layers is repeated."""

LIMIT = 1 << 30
"""Bytes of dense float32 weights up to which layers are timed: every layer would be a second copy
of the model."""

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
    """Time and memory of the timed layers in one runtime.

    Attributes:
        runtime: Name of the runtime.
        seconds: Number of tokens to the time of one product of each layer; empty if not measured.
        bytes: Memory of the weights; ``None`` if it was not measured.
        note: What was found, or why it was not measured.
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
    masks = sum(file.stat().st_size for file in mask_files(folder))
    if masks:
        changed = changes_of_weights(folder)
        refusal = f"not possible: {changed} changed the kept weights"
        note = refusal if changed else "with the dense model"
        result.append(Size("symprune pack --masks_only", None if changed else masks, note))
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


def pruned_layers(folder: Path, trust_remote_code: bool = False) -> list[Layer]:
    """Load a checkpoint in float32 and return its pruned layers.

    Raises:
        ValueError: No layer has zeros, or the folder is a packed copy.
    """
    refuse_packed(folder)
    weight_files(folder)  # raises if there are none
    model = load_model(str(folder), dtype="float32", trust_remote_code=trust_remote_code)
    masks = load_masks(folder) if mask_files(folder) else infer_masks(model)
    layers = match_layers(model, masks)
    if not layers:
        raise ValueError(f"no layer of {folder} has zeros: prune it first")
    return layers


def speeds(layers: Sequence[Layer]) -> list[Speed]:
    """Return time and memory of layers in runtimes that can use zeros."""
    weights = [layer.matrix() for layer in layers]
    return [
        _measured("dense (torch)", weights, lambda w: w, lambda w, x: w @ x),
        _measured("CSR (torch)", weights, Tensor.to_sparse_csr, lambda w, x: w @ x),
        _scipy(weights),
        _semi_structured(weights),
    ]


def timed(layers: Sequence[Layer]) -> list[Layer]:
    """Return the first layers, up to 1 GiB of dense weights; at least one."""
    total, chosen = 0, list[Layer]()
    for layer in layers:
        total += 4 * layer.shape.numel()
        if chosen and total > LIMIT:
            break
        chosen.append(layer)
    return chosen


def _scipy(weights: Sequence[Tensor]) -> Speed:
    name = "CSR (scipy)"
    if find_spec("scipy") is None:
        return Speed(name, {}, note="not measured: pip install scipy")
    sparse = import_module("scipy.sparse")
    return _measured(
        name, weights, lambda w: sparse.csr_array(w.numpy()), lambda w, x: w @ x.numpy()
    )


def _semi_structured(weights: Sequence[Tensor]) -> Speed:
    """Return the speed-up of 2:4 over dense float16 on the GPU, as a note."""
    name = "2:4 (torch, GPU)"
    if not torch.cuda.is_available():
        return Speed(name, {}, note="not measured: no CUDA device")
    if not all(_is_two_of_four(weight) for weight in weights):
        return Speed(name, {}, note="not measured: the layers are not 2:4")
    if torch.cuda.get_device_capability() < (8, 0):
        return Speed(name, {}, note="not measured: the GPU has no sparse tensor cores")
    on_gpu = [weight.half().cuda() for weight in weights]
    dense = _measured(name, on_gpu, lambda w: w, lambda w, x: w @ x)
    try:
        sparse = _measured(name, on_gpu, to_sparse_semi_structured, lambda w, x: w @ x)
    except RuntimeError as error:  # shapes that its kernels do not support
        return Speed(name, {}, note=f"torch cannot convert or run the layers: {error}")
    factors = " and ".join(
        f"{dense.seconds[tokens] / sparse.seconds[tokens]:.2f}x at {_tokens(tokens)}"
        for tokens in TOKENS
    )
    return Speed(name, {}, note=f"{factors}, relative to dense float16 on this GPU")


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight.view(len(weight), -1, 4) != 0).sum(-1) <= 2).all())


def _measured(
    runtime: str,
    weights: Sequence[Tensor],
    convert: Callable[[Tensor], Any],
    multiply: Callable[[Any, Tensor], Any],
) -> Speed:
    """Time products of all layers in turn, so that no layer stays in the cache."""
    converted = [convert(weight) for weight in weights]
    seconds = {}
    for tokens in TOKENS:
        inputs = {w.shape[1]: torch.randn(w.shape[1], tokens).to(w) for w in weights}
        products = [(x, inputs[w.shape[1]]) for x, w in zip(converted, weights, strict=True)]
        seconds[tokens] = _fastest_pass(products, multiply)
    return Speed(runtime, seconds, sum(_memory(weight) for weight in converted))


def _fastest_pass(products: Sequence[tuple[Any, Tensor]], multiply: Callable[..., Any]) -> float:
    _pass_seconds(products, multiply)  # warm-up
    times = [_pass_seconds(products, multiply)]
    while sum(times) < SECONDS:
        times.append(_pass_seconds(products, multiply))
    return min(times)


def _pass_seconds(products: Sequence[tuple[Any, Tensor]], multiply: Callable[..., Any]) -> float:
    start = time.perf_counter()
    for weight, inputs in products:
        multiply(weight, inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(weight: Any) -> int:
    """Return the bytes of a dense or CSR matrix."""
    if not isinstance(weight, Tensor):  # of scipy
        parts: list[Any] = [weight.data, weight.indices, weight.indptr]
    elif weight.layout is torch.sparse_csr:
        parts = [weight.values(), weight.col_indices(), weight.crow_indices()]
    else:
        parts = [weight]
    return sum(int(part.nbytes) for part in parts)


def print_gains(folder: str, trust_remote_code: bool = False) -> None:
    """Print sizes, times and memory of a checkpoint.

    Raises:
        FileNotFoundError: There are no weights in safetensors.
        ValueError: No layer has zeros, or the folder is a packed copy.
    """
    path, console = Path(folder).expanduser(), Console()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        layers = pruned_layers(path, trust_remote_code)
        console.print(_size_table(sizes(path)))
        chosen = timed(layers)
        found = speeds(chosen)
    console.print(_speed_table(found))
    about = f"{len(chosen)} of {len(layers)} pruned layers, float32, CPU, "
    console.print(
        f"\n{about}{torch.get_num_threads()} threads.",
        *_notes(found),
        sep="\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _size_table(found: Sequence[Size]) -> Table:
    table = Table("weights on disk", box=None, pad_edge=False)
    for heading in ("MB", "of the file"):
        table.add_column(heading, justify="right")
    table.add_column("")
    plain = found[0].bytes
    assert plain
    for size in found:
        if size.bytes is None:
            table.add_row(size.form, "–", "–", size.note)
            continue
        table.add_row(size.form, f"{size.bytes / 1e6:.1f}", f"{size.bytes / plain:.0%}", size.note)
    return table


def _speed_table(found: Sequence[Speed]) -> Table:
    table = Table("\npruned layers", box=None, pad_edge=False)
    for heading in (*(f"{_tokens(n)}, ms" for n in TOKENS), "speed", "memory, MB"):
        table.add_column(f"\n{heading}", justify="right")
    dense = found[0]
    for speed in found:
        if speed.bytes is None:
            continue
        times = [f"{speed.seconds[tokens] * 1e3:.1f}" for tokens in TOKENS]
        factors = (f"{dense.seconds[n] / speed.seconds[n]:.2f}x" for n in TOKENS)
        table.add_row(speed.runtime, *times, " / ".join(factors), f"{speed.bytes / 1e6:.1f}")
    return table


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count > 1)}"


def _notes(found: Sequence[Speed]) -> Iterator[str]:
    """Yield a sentence for each runtime that is slower, or was not measured on the CPU."""
    dense = found[0]
    for speed in found[1:]:
        if speed.note:
            yield f"{speed.runtime}: {speed.note}"
            continue
        slower = [_tokens(n) for n in TOKENS if speed.seconds[n] > dense.seconds[n]]
        if slower:
            yield f"{speed.runtime}: slower than the dense product at {' and '.join(slower)}"
