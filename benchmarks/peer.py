"""Comparison with llm-compressor: time and perplexity of Wanda on the same model and tokens.

    python benchmarks/peer.py MODEL [--rounds 3] [--sparsity 0.5] [--sequences 16] [--length 512]

Creates a separate virtual environment with the newest llm-compressor from PyPI in runs/peer (kept
for the next call). Every round uses other texts. Each library prunes in a separate process, from
the same float32 checkpoint and the same token ids; the time of the pruning call is measured, with
the model loaded. All results of a round are evaluated by the same code on the same text.
llm-compressor is configured to ignore the output projection, which is tied to the embeddings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from tables import log, median_and_range, section

ROOT = Path("runs/peer")
OURS: dict[str, dict[str, Any]] = {
    "Wanda": {"score": "wanda"},
    "Wanda, order block": {"score": "wanda", "calibration_order": "block"},
    "Wanda, allocation progression": {"score": "wanda", "allocation": "progression"},
}
BEST = "Wanda, allocation progression"
PEER = "llm-compressor Wanda"


def ours(folder: Path, name: str, sparsity: float) -> dict[str, Any]:
    """Prune with this library."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from symprune_lightning import prune_model

    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    batches = [{"input_ids": row[None]} for row in torch.load(folder / "tokens.pt")]
    start = time.perf_counter()
    prune_model(model, batches, sparsity=sparsity, **OURS[name])
    figures = {"seconds": time.perf_counter() - start}
    save_file(weights(model), folder / f"{name}.safetensors")
    return figures


def peer(folder: Path, sparsity: float) -> dict[str, Any]:
    """Prune with llm-compressor; runs in the separate environment."""
    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    rows = torch.load(folder / "tokens.pt").tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    recipe = WandaPruningModifier(
        sparsity=sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    save_file(weights(model), folder / f"{PEER}.safetensors")
    return {"seconds": seconds, "version": getattr(llmcompressor, "__version__", "?")}


def weights(model: Any) -> dict[str, Any]:
    """Return the weights of the layers that both libraries prune."""
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if "_proj" in n}


def forward(folder: Path) -> float:
    """Return the seconds of a plain forward of the calibration tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    model.train(False)
    rows = torch.load(folder / "tokens.pt")
    with torch.inference_mode():
        model(input_ids=rows[:1], use_cache=False)
        start = time.perf_counter()
        for row in rows:
            model(input_ids=row[None], use_cache=False)
    return time.perf_counter() - start


def child(python: str, part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a separate process, and return its figures."""
    command = [python, __file__, options.model, f"--part={part}", f"--sparsity={options.sparsity}"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return figures


def environment() -> str:
    """Return the Python of llm-compressor's environment, which is created if it does not exist."""
    python = ROOT / "venv" / "bin" / "python"
    if not python.is_file():
        venv.create(ROOT / "venv", with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "llmcompressor", "torch==2.13.0"], check=True)
    return str(python.absolute())


def main() -> None:
    """Run all methods in every round, evaluate them, and print a table."""
    options = arguments()
    python = environment()
    prepare(options.model)
    rounds = [one_round(options, python, seed) for seed in range(options.rounds)]
    names = [*OURS, PEER]
    time, time_range = median_and_range(
        [figures[PEER]["seconds"] / figures["Wanda"]["seconds"] for figures in rounds]
    )
    perplexity, perplexity_range = median_and_range(
        [figures[BEST]["perplexity"] / figures[PEER]["perplexity"] for figures in rounds]
    )
    section(
        "Comparison with llm-compressor",
        f"`benchmarks/peer.py`: llm-compressor {rounds[0][PEER]['version']}, newest on PyPI, in a "
        f"separate environment, configured to ignore lm_head; SmolLM2-135M-Instruct, "
        f"{options.sparsity:.0%}, {options.sequences} × {options.length} tokens, float32; medians "
        f"of {options.rounds} rounds with different texts. Wanda of llm-compressor takes {time} × "
        f"the time of ours ({time_range}). The perplexity of our Wanda with an allocation is "
        f"{perplexity} × that of its Wanda ({perplexity_range}).",
        ("", "seconds", "× forward", "sparsity", "perplexity", "by round"),
        [row(name, rounds) for name in names],
    )


def prepare(model: str) -> None:
    """Write the dense checkpoint that all runs load."""
    from symprune_lightning.checkpoints.pretrained import load_model, load_tokenizer

    load_model(model, dtype="float32").save_pretrained(ROOT / "dense")
    load_tokenizer(model).save_pretrained(ROOT / "dense")


def one_round(options: argparse.Namespace, python: str, seed: int) -> dict[str, dict[str, Any]]:
    """Return seconds, perplexity and sparsity by method."""
    import torch

    from symprune_lightning import CalibrationDataModule

    data = CalibrationDataModule(
        "python-docs",
        str(ROOT / "dense"),
        sequences=options.sequences,
        sequence_length=options.length,
        evaluation_sequences=24,
        seed=seed,
    )
    batches = list(data.calibration_dataloader())
    torch.save(torch.cat([batch["input_ids"] for batch in batches]), ROOT / "tokens.pt")
    plain = child(sys.executable, "forward", options)["seconds"]
    figures = {}
    for name in [*OURS, PEER]:
        log(f"round {seed + 1} of {options.rounds}: {name}")
        run = child(python if name == PEER else sys.executable, name, options)
        figures[name] = run | {"ratio": run["seconds"] / plain} | evaluated(data, name)
    return figures


def evaluated(data: Any, name: str) -> dict[str, float]:
    """Evaluate the weights that a run has written."""
    import torch
    from safetensors.torch import load_file

    from symprune_lightning import CausalLMModule, Trainer

    module = CausalLMModule(str(ROOT / "dense"))
    module.configure_model()
    state = load_file(ROOT / f"{name}.safetensors")
    with torch.no_grad():
        for key, value in state.items():
            module.prunable_model.get_parameter(key).copy_(value)
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    zeros = sum(int((value == 0).sum()) for value in state.values())
    sparsity = zeros / sum(value.numel() for value in state.values())
    return {"perplexity": float(metrics["val_perplexity"]), "sparsity": sparsity}


def row(name: str, rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """Return a row of the table."""

    def median(figure: str) -> float:
        return float(statistics.median(figures[name][figure] for figures in rounds))

    return [
        name,
        f"{median('seconds'):.1f}",
        f"{median('ratio'):.2f}",
        f"{median('sparsity'):.4f}",
        f"{median('perplexity'):.2f}",
        ", ".join(f"{figures[name]['perplexity']:.2f}" for figures in rounds),
    ]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--part", choices=[*OURS, PEER, "forward"])
    return parser.parse_args()


if __name__ == "__main__":
    parsed = arguments()
    ROOT.mkdir(parents=True, exist_ok=True)
    if parsed.part == "forward":
        print(json.dumps({"seconds": forward(ROOT)}))
    elif parsed.part is not None:
        work = peer(ROOT, parsed.sparsity) if parsed.part == PEER else None
        print(json.dumps(work or ours(ROOT, parsed.part, parsed.sparsity)))
    else:
        main()
