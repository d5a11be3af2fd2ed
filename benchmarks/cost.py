"""Cost of pruning as a multiple of a plain forward of the same batches in the same process.

    python benchmarks/cost.py MODEL [--rounds 3] [--sequences 32] [--length 512] [--batch 4]

MODEL is any model that CausalLMModule accepts. Every round runs each method once on the dense
model, whose weights are restored in between; the table lists the median ratio over rounds and its
range. "forward" is the full model; pruning stops after the last prunable layer, so the time without
the output projection is listed too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from symprune_lightning import CalibrationDataModule, ExactSwap, R2DSnoT, prune_model
from symprune_lightning.checkpoints.pretrained import load_model
from tables import log, median_and_range, section

METHODS: dict[str, dict[str, Any]] = {
    "magnitude (no data)": {"score": "magnitude"},
    "Wanda": {"score": "wanda"},
    "RIA": {"score": "ria"},
    "RIA, order block": {"score": "ria", "calibration_order": "block"},
    "RIA + R²-DSnoT": {"score": "ria", "refine": R2DSnoT()},
    "RIA + R²-DSnoT, guard gram": {"score": "ria", "refine": R2DSnoT(guard="gram")},
    "RIA + ExactSwap": {"score": "ria", "refine": ExactSwap()},
}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def forward(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        model(**batch, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    for option, default in (("rounds", 3), ("sequences", 32), ("length", 512), ("batch", 4)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()

    model = load_model(options.model, dtype="float32")
    data = CalibrationDataModule(
        "python-docs",
        options.model,
        sequences=options.sequences,
        sequence_length=options.length,
        evaluation_sequences=1,
        batch_size=options.batch,
    )
    batches = list(data.calibration_dataloader())
    times = measure(model, batches, options.rounds, options.methods)
    about = (
        f"`benchmarks/cost.py`: SmolLM2-135M-Instruct, {options.sequences} × {options.length} "
        f"tokens, batches of {options.batch}, float32, {torch.get_num_threads()} threads; medians "
        f"of {options.rounds} rounds. "
        f"*Forward* is the full model; pruning does not run the output projection."
    )
    section(
        "One sequence in a batch" if options.batch == 1 else "Cost in plain forwards",
        about,
        ("run", "seconds", "× forward", "range", "× forward without output projection"),
        rows(times),
    )


def measure(
    model: PreTrainedModel,
    batches: list[dict[str, torch.Tensor]],
    rounds: int,
    methods: list[str],
) -> dict[str, list[float]]:
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    body = model.base_model
    forward(model, batches[:1])
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        runs: dict[str, Callable[[], object]] = {
            "forward": lambda: forward(model, batches),
            "forward without the output projection": lambda: forward(body, batches),
        }
        for name in methods:
            runs[name] = partial(prune_model, model, batches, **METHODS[name])
        for name, run in runs.items():
            model.load_state_dict(dense)
            times.setdefault(name, []).append(seconds(run))
    return times


def rows(times: dict[str, list[float]]) -> Iterator[list[str]]:
    body = times["forward without the output projection"]
    for name, values in times.items():
        full = [a / b for a, b in zip(values, times["forward"], strict=True)]
        without_head = [a / b for a, b in zip(values, body, strict=True)]
        yield [
            name,
            f"{statistics.median(values):.1f}",
            *median_and_range(full),
            f"{statistics.median(without_head):.2f}",
        ]


if __name__ == "__main__":
    main()
