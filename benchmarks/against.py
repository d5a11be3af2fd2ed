"""Time for pruning by this checkout, relative to that of another commit.

    python benchmarks/against.py COMMIT MODEL [--rounds 3] [--sequences 32]

MODEL is anything that CausalLMModule takes. Both commits prune the same model on the same tokens in
processes that alternate, so that a slow period of the machine affects both. Prints the medians of
the ratios, with their range. Run nothing else at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tables import median_and_range

CHILD = """
import json, sys, time
import torch
from symprune_lightning import prune_model
from transformers import AutoModelForCausalLM

model_path, sequences = sys.argv[1], int(sys.argv[2])
options = {"dtype": torch.float32}
if model_path.endswith(".gguf"):
    folder, _, options["gguf_file"] = model_path.rpartition("/")
    model_path = folder
model = AutoModelForCausalLM.from_pretrained(model_path, **options).eval()
dense = {name: value.clone() for name, value in model.state_dict().items()}
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(model.config.vocab_size, (sequences, 512), generator=generator)
batches = [{"input_ids": ids} for ids in tokens.split(4)]
seconds = {}
for name, method in (("RIA", {}), ("RIA + ExactSwap", {"refine": "exactswap"})):
    model.load_state_dict(dense)
    start = time.perf_counter()
    prune_model(model, batches, score="ria", **method)
    seconds[name] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def measure(source: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each method with the package in ``source``."""
    command = [sys.executable, "-c", CHILD, options.model, str(options.sequences)]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    root = Path(__file__).parent.parent
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        worktree = ["git", "-C", str(root), "worktree"]
        subprocess.run([*worktree, "add", "--detach", str(other), options.commit], check=True)
        try:
            for _ in range(options.rounds):
                before = measure(other / "src", options)
                now = measure(root / "src", options)
                for name in now:
                    ratios.setdefault(name, []).append(now[name] / before[name])
                print({"before": before, "now": now}, flush=True)
        finally:
            subprocess.run([*worktree, "remove", "--force", str(other)], check=True)
    for name, values in ratios.items():
        ratio, spread = median_and_range(values)
        print(f"{name}: {ratio} × the time of {options.commit} ({spread})")


if __name__ == "__main__":
    main()
