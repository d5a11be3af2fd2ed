"""Zeros and perplexity of a pruned checkpoint after weight-only quantisation by other tools.

    pip install --no-deps torchao bitsandbytes gguf
    python benchmarks/quantisation.py CHECKPOINT [--sequences 24]

Each tool quantises the weights of the pruned layers, and its own dequantisation gives the weights
that the model then computes with. The table lists the pruned weights that are still zero, and the
perplexity on further texts of the Python manual. A tool that is not installed is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from symprune_lightning import CalibrationDataModule, CausalLMModule, Trainer, load_masks
from symprune_lightning.engine.layers.match import match_layers
from tables import QUIET_TRAINER, log, section

Quantise = Callable[[Tensor], Tensor]
"""Maps a weight to what is left of it after quantisation and dequantisation."""


def torchao(bits: int) -> Quantise:
    """Return symmetric weight-only quantisation by torchao: per row, or in groups of 32."""
    ao: Any = import_module("torchao.quantization")
    config = ao.Int8WeightOnlyConfig()
    if bits == 4:
        int4: Any = torch.__dict__["int4"]  # not in the stubs
        config = ao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=ao.PerGroup(32))

    def quantise(weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        linear.weight = torch.nn.Parameter(weight.bfloat16())
        ao.quantize_(linear, config)
        # the rows of the identity are the inputs: the output is the weight as it is computed with
        computed: Tensor = linear(torch.eye(columns, dtype=torch.bfloat16))
        return computed.T.to(weight.dtype)

    return quantise


def bitsandbytes_4bit(kind: str) -> Quantise:
    """Return 4-bit quantisation by bitsandbytes."""
    functional: Any = import_module("bitsandbytes.functional")

    def quantise(weight: Tensor) -> Tensor:
        packed, state = functional.quantize_4bit(weight.clone(), quant_type=kind)
        restored: Tensor = functional.dequantize_4bit(packed, state)
        return restored.to(weight.dtype)

    return quantise


def gguf(kind: str) -> Quantise:
    """Return quantisation by the package gguf, as its converter of checkpoints uses it."""
    package: Any = import_module("gguf")

    def quantise(weight: Tensor) -> Tensor:
        quantisation = package.GGMLQuantizationType[kind]
        data = package.quants.quantize(weight.float().numpy(), quantisation)
        return torch.from_numpy(package.quants.dequantize(data, quantisation)).to(weight.dtype)

    return quantise


TOOLS: dict[str, tuple[str, Callable[[], Quantise]]] = {
    "none (float32)": ("torch", lambda: lambda weight: weight),
    "torchao, int8": ("torchao", lambda: torchao(8)),
    "torchao, int4 (groups of 32)": ("torchao", lambda: torchao(4)),
    "bitsandbytes, nf4": ("bitsandbytes", lambda: bitsandbytes_4bit("nf4")),
    "bitsandbytes, fp4": ("bitsandbytes", lambda: bitsandbytes_4bit("fp4")),
    **{
        f"GGUF, {kind}": ("gguf", partial(gguf, kind))
        for kind in ("BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
    },
}


def rows(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield a row for each tool."""
    module = CausalLMModule(options.checkpoint, dtype="float32")
    module.configure_model()
    masks = load_masks(options.checkpoint)
    layers = match_layers(module.prunable_model, masks)
    weights = {layer.name: layer.matrix().clone() for layer in layers}
    data = CalibrationDataModule(
        "python-docs",
        options.checkpoint,
        sequences=1,
        sequence_length=512,
        evaluation_sequences=options.sequences,
        batch_size=4,
    )
    for name, (package, make) in TOOLS.items():
        if find_spec(package) is None:
            yield name, f"not measured: pip install {package}", ""
            continue
        log(name)
        try:
            quantise = make()
            kept = pruned = 0
            for layer in layers:
                quantised = quantise(weights[layer.name])
                pruned_values = quantised[~masks[layer.name]]
                pruned, kept = (
                    pruned + pruned_values.numel(),
                    kept + int((pruned_values == 0).sum()),
                )
                layer.copy_(quantised)
        except Exception as error:  # of a tool; the others are still measured
            yield name, f"failed: {type(error).__name__}: {error}".partition("\n")[0], ""
            continue
        trainer = Trainer(**QUIET_TRAINER)
        (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
        yield name, f"{kept / pruned:.4%}", f"{metrics['val_perplexity']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--sequences", type=int, default=24, help="evaluation sequences of 512 tokens"
    )
    options = parser.parse_args()
    section(
        "Quantisation after pruning",
        "`benchmarks/quantisation.py`: weights of the pruned layers, weight-only.",
        ("tool", "pruned weights that are still zero", "perplexity"),
        rows(options),
    )


if __name__ == "__main__":
    main()
