"""Cost, memory and accuracy of pruning on one GPU, in less than ten minutes.

    python benchmarks/gpu.py MODEL >> docs/benchmarks.md
    python benchmarks/gpu.py MODEL --device cpu --small     # the script itself, without a GPU

MODEL is any model that CausalLMModule accepts. A Llama of about a billion random weights is created
on the device in addition. Rows that there was no time for are named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.sparse import to_sparse_semi_structured
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cost import forward
from symprune_lightning import CalibrationDataModule, ExactSwap, R2DSnoT, prune_model
from symprune_lightning.checkpoints.pretrained import load_model
from tables import log, section

METHODS: dict[str, dict[str, Any]] = {
    "Wanda": {"score": "wanda"},
    "RIA": {"score": "ria"},
    "RIA + R²-DSnoT": {"score": "ria", "refine": R2DSnoT()},
    "RIA + ExactSwap": {"score": "ria", "refine": ExactSwap()},
    "SparseGPT": {"solver": "sparsegpt"},
}
SIZES = ((32, 512), (128, 2048))
"""Numbers of calibration sequences, and their lengths."""
SMALL = ((2, 64),)
LIMIT = 480.0
"""Seconds after which no further row is measured."""
START = time.perf_counter()

Batches = list[dict[str, Tensor]]


def no_time_left() -> bool:
    return time.perf_counter() - START > LIMIT


def measured(function: Callable[[], object], device: torch.device) -> tuple[float, str]:
    """Return the seconds of a call, with its work on the GPU, and the peak memory in GiB."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start, "–"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"


def random_llama(device: torch.device, small: bool) -> PreTrainedModel:
    """Return a Llama of about a billion random weights."""
    width, layers = (64, 2) if small else (2048, 18)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).bfloat16()
    model.train(False)
    return model


def random_batches(size: tuple[int, int], device: torch.device) -> Batches:
    """Return batches of about 8192 random tokens."""
    sequences, length = size
    ids = torch.randint(0, 4096, (sequences, length), device=device)
    return [{"input_ids": rows} for rows in ids.chunk(-(-ids.numel() // 8192))]


def costs(
    name: str, model: PreTrainedModel, batches: Batches, device: torch.device
) -> Iterator[list[str]]:
    """Yield a row per method: seconds, multiple of a plain forward, peak memory."""
    dense = {key: value.cpu() for key, value in model.state_dict().items()}
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    forward(model, batches[:1])
    prune_model(model, batches[:1], score="ria")
    model.load_state_dict(dense)
    # of two, since the first one also loads kernels
    once, memory = min(measured(partial(forward, model, batches), device) for _ in range(2))
    yield [f"{name}, {tokens:,} tokens: forward", f"{once:.2f}", "1.00", memory]
    for method, options in METHODS.items():
        if no_time_left():
            yield [f"{method}: no time left", "–", "–", "–"]
            continue
        log(f"{name}, {tokens} tokens, {method}")
        seconds, memory = measured(partial(prune_model, model, batches, **options), device)
        yield [method, f"{seconds:.2f}", f"{seconds / once:.2f}", memory]
        model.load_state_dict(dense)


def accuracy(source: str, batches: Batches, device: torch.device) -> Iterator[list[str]]:
    """Yield the share of equal mask bits on the device and on the CPU, of the first block."""
    few = [{key: value[:1, :128] for key, value in batch.items()} for batch in batches[:4]]
    for method in ("RIA", "RIA + R²-DSnoT", "RIA + ExactSwap"):
        if no_time_left():
            yield [f"{method}: equal mask bits, device and CPU", "no time left"]
            continue
        masks = []
        for target in (torch.device("cpu"), device):
            model: Any = load_model(source, dtype="float32")
            model.to(target)
            on_target = [{key: x.to(target) for key, x in batch.items()} for batch in few]
            only = ["re:.*layers\\.0\\..*"]
            masks.append(prune_model(model, on_target, only=only, **METHODS[method]).masks)
        equal = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0])
        total = sum(mask.numel() for mask in masks[0].values())
        yield [f"{method}: equal mask bits, device and CPU", f"{equal / total:.6f}"]


def gram_errors(device: torch.device) -> Iterator[list[str]]:
    """Yield the relative error of Gram matrices of bfloat16 activations by precision."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8192, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    x = x.bfloat16()
    exact = x.double().T @ x.double()
    on_device = x.to(device)
    products = {
        "float32": on_device.float().T @ on_device.float(),
        "bfloat16 (not used by the library)": on_device.T @ on_device,
    }
    for name, product in products.items():
        error = (product.cpu().double() - exact).norm() / exact.norm()
        yield [f"Gram matrix, {name}: relative error", f"{float(error):.1e}"]


def speed_of_2_4(device: torch.device) -> list[str]:
    """Return the speed of a 2:4 product relative to the dense one."""
    name = "product with a 2:4 weight, × as fast as dense (4096 × 4096, 4096 tokens, float16)"
    if device.type != "cuda":
        return [name, "skipped: no CUDA device"]
    weight = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    weight *= torch.tensor([0, 0, 1, 1], device=device).tile(1024)
    x = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    sparse = to_sparse_semi_structured(weight)
    times = []
    for matrix in (weight, sparse):
        torch.mm(matrix, x)
        product = partial(_repeat, partial(torch.mm, matrix, x), 100)
        times.append(min(measured(product, device)[0] for _ in range(3)))
    return [name, f"{times[0] / times[1]:.2f}"]


def _repeat(function: Callable[[], object], count: int) -> None:
    for _ in range(count):
        function()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found: --device cpu --small runs without one")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, not a GPU"
    sizes = SMALL if options.small else SIZES
    data = CalibrationDataModule(
        "python-docs",
        options.model,
        sequences=sizes[0][0],
        sequence_length=sizes[0][1],
        evaluation_sequences=1,
        batch_size=4,
    )
    texts = [
        {key: value.to(device) for key, value in batch.items()}
        for batch in data.calibration_dataloader()
    ]
    model: Any = load_model(options.model, dtype="bfloat16")
    model.to(device)
    rows = [*costs("MODEL", model, texts, device)]
    del model
    model = random_llama(device, options.small)
    for size in sizes:
        rows += costs("random Llama", model, random_batches(size, device), device)
    section(
        "On a GPU",
        f"`benchmarks/gpu.py`: {hardware}, bfloat16; seconds, multiples of a plain forward of the "
        f"same batches, and the peak of allocated memory.",
        ("run", "seconds", "× forward", "peak, GiB"),
        rows,
    )
    figures = [*accuracy(options.model, texts, device), *gram_errors(device)]
    section(
        "Accuracy on a GPU",
        f"`benchmarks/gpu.py`: {hardware}.",
        ("figure", "value"),
        [*figures, speed_of_2_4(device)],
    )


if __name__ == "__main__":
    main()
