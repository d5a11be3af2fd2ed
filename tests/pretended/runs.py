"""Run methods on the pretended GPU and on the CPU, and write what differs.

``python -m tests.pretended.runs FOLDER`` writes ``FOLDER/runs.json``. In a process of its own,
since the device guard stays registered.
"""

from __future__ import annotations

import json
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch

from symprune_lightning import prune_model
from symprune_lightning.functional.allocation import AllocationMethod, Search, Sensitivity
from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.registry import leaves
from symprune_lightning.functional.scores import Diagonal, GradientWanda, Score
from symprune_lightning.functional.solvers import LayerSolver
from symprune_lightning.functional.update import WeightUpdate
from tests.models import batches, build
from tests.pretended.device import build_guard, host_copies, pretended_gpu

# Two need arguments, two a backward pass, for which autograd asks for a real accelerator.
EXCLUDED = (Diagonal, Search, GradientWanda, Sensitivity)
ORDERS = ("layer", "block", "dense")


def methods() -> dict[str, dict[str, Any]]:
    """Return every method of the library by name, as arguments of ``prune_model``."""
    found: dict[str, dict[str, Any]] = {
        "2:4": {"score": "ria", "pattern": "2:4"},
        "group layer": {"score": "ria", "group": "layer"},
        "group input": {"score": "ria", "group": "input"},
    }
    kinds: dict[str, Any] = {
        "score": Score,
        "refine": MaskRefiner,
        "update": WeightUpdate,
        "solver": LayerSolver,
        "allocation": AllocationMethod,
    }
    for argument, base in kinds.items():
        for cls in leaves(base):
            if cls not in EXCLUDED:
                found[cls.__name__] = {argument: cls()}
    return found


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Prune on both devices; return whether they agree, and the copies to the host."""
    model, data = build("llama"), batches("llama")
    model.config._attn_implementation = "eager"
    expected = prune_model(model, data, **options)
    with pretended_gpu():
        on_gpu = build("llama")
        on_gpu.config._attn_implementation = "eager"
        on_gpu = on_gpu.to("cuda:0")
        moved = [{name: x.to("cuda:0") for name, x in batch.items()} for batch in data]
        host_copies.clear()
        result = prune_model(on_gpu, moved, **options)
        copies = len(host_copies)
        weights = {name: p.cpu() for name, p in on_gpu.named_parameters()}
    return {
        "masks": all(
            torch.equal(result.masks[name], expected.masks[name]) for name in expected.masks
        ),
        "weights": all(torch.equal(weights[name], p) for name, p in model.named_parameters()),
        "layers": len(result.layers),
        "batches": len(data),
        "copies": copies,
    }


def main(folder: Path) -> None:
    """Run every method with every calibration order."""
    build_guard(folder)
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs: dict[str, Any] = {}
    for (name, options), order in product(methods().items(), ORDERS):
        try:
            runs[f"{name}, {order}"] = run({**options, "calibration_order": order})
        except Exception as error:  # reported by the test of this method
            runs[f"{name}, {order}"] = {"error": f"{type(error).__name__}: {error}"}
    (folder / "runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
