"""Pruning a checkpoint larger than memory: peak memory, and time relative to a lower bound.

    python benchmarks/streaming.py FOLDER [--layers 32] [--sequences 4] [--length 128]

Writes a Llama-3-8B-shaped checkpoint of random bfloat16 weights to FOLDER/dense (16 GB; kept for
the next call), prunes it to 50 % by RIA into FOLDER/sparse in a separate process, and checks the
output shard by shard. The lower bound is the time to copy the files plus the time of a forward of
the same tokens through one block in memory, times the number of blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from symprune_lightning import StreamedCheckpoint, prune_model
from symprune_lightning.checkpoints.manifest import build_manifest

GIB = 2**30


def config(layers: int) -> LlamaConfig:
    """Return a configuration with the shape of Llama 3 8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def write(folder: Path, layers: int) -> None:
    """Write random weights, one file per block and one per embedding."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    needed = 2.2 * (layers * 0.44e9 + 2.1e9)
    if free < needed:
        raise SystemExit(
            f"{folder.parent} has {free / GIB:.0f} GiB free; {needed / GIB:.0f} needed"
        )
    partial = folder.with_name(".dense")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config(layers)).named_parameters()}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else name
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    weights: dict[str, str] = {}
    for file, members in files.items():
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
            for name, shape in members.items()
        }
        save_file(tensors, partial / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(members, file)
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (partial / "model.safetensors.index.json").write_text(index)
    config(layers).save_pretrained(partial)
    partial.rename(folder)


def tokens(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 128256, (options.sequences, options.length))
    return [{"input_ids": row[None]} for row in ids]


def prune(options: argparse.Namespace) -> None:
    """Prune, and print time and peak memory; runs in a separate process."""
    start = time.perf_counter()
    folder = Path(options.folder)
    with StreamedCheckpoint(folder / "dense", folder / "sparse") as checkpoint:
        result = prune_model(
            checkpoint.model, tokens(options), score="ria", sparsity=0.5, placement=checkpoint
        )
        checkpoint.save(build_manifest(result, model=str(folder / "dense"), settings={}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    scoring = sum(layer.seconds for layer in result.layers)
    figures = {"seconds": time.perf_counter() - start, "peak": peak, "scoring": scoring}
    print(json.dumps(figures))


def copying(folder: Path) -> float:
    """Return the seconds to read and write all files once."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as copies:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened, Path(copies, file.name).open("wb") as copy:
                while data := opened.read(2**24):
                    copy.write(data)
        return time.perf_counter() - start


@torch.inference_mode()
def forward(options: argparse.Namespace) -> float:
    """Return the seconds of a forward of the tokens through one block."""
    model = LlamaForCausalLM(config(1)).model.bfloat16()
    batches = tokens(options)
    model(**batches[0], use_cache=False)
    start = time.perf_counter()
    for batch in batches:
        model(**batch, use_cache=False)
    return time.perf_counter() - start


def check(folder: Path) -> int:
    """Read every shard of the output, check its sparsity, and return the number of weights."""
    count = 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(index.values())):
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weight = opened.get_tensor(name)
                count += weight.numel()
                if name.endswith("_proj.weight"):
                    zeros = (weight == 0).sum(1)
                    assert (zeros == weight.shape[1] // 2).all(), name
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    for option, default in (("layers", 32), ("sequences", 4), ("length", 128)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--prune", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prune:
        prune(options)
        return
    dense = Path(options.folder) / "dense"
    if not dense.is_dir():
        write(dense, options.layers)
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    run = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--prune"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    figures = json.loads(run.stdout.splitlines()[-1])
    copied, block = copying(dense), forward(options)
    bound = copied + options.layers * block
    print(f"checkpoint {size / GIB:.1f} GiB, {options.sequences}×{options.length} tokens")
    print(f"peak resident set {figures['peak'] / GIB:.2f} GiB")
    print(f"pruned in {figures['seconds']:.0f} s, of which scoring {figures['scoring']:.0f} s")
    forward_seconds = f"forward {options.layers} × {block:.1f} s"
    print(f"lower bound: copying {copied:.0f} s + {forward_seconds} = {bound:.0f} s")
    print(f"ratio to the lower bound {figures['seconds'] / bound:.2f}")
    print(f"output: {check(Path(options.folder) / 'sparse') / 1e9:.2f} billion weights checked")


if __name__ == "__main__":
    main()
