"""Help pages of the ``symprune`` command; printed without importing torch."""

from __future__ import annotations

import re
from difflib import get_close_matches

HELP = """usage: symprune COMMAND ...

  prune     evaluate a model, prune it, evaluate it again, write the checkpoint
  compare   several recipes on the same model and tokens
  data      the sequences that a recipe would feed to the model
  eval      tasks of lm-evaluation-harness on the dense and on the pruned model
  report    method and figures of pruned checkpoints side by side, what to try next
  verify    verify a checkpoint against its manifest
  apply     zero the weights of a dense model by stored masks
  pack, unpack   a copy of a checkpoint without zeros, and the checkpoint again
  gain      what the zeros of a checkpoint save on this machine: disk, memory, time
  list      scores, refiners, weight updates, solvers, allocations, patterns, recipes
  validate, test, fit   as in LightningCLI, with pruning

examples:
  symprune prune --config ria-exactswap --output pruned
  symprune prune --config ria --model.pretrained ./my-model \\
      --data.dataset my-texts.jsonl --sparsity 0.6 --output pruned
  symprune compare ria wanda --output runs/compare --data.sequences=16
  symprune verify pruned

`symprune COMMAND --help` shows the options of a command. SYMPRUNE_TRACEBACK=1 shows tracebacks.
"""

PRUNE_HELP = """usage: symprune {command} --config RECIPE [options]

{summary}

  --config RECIPE        a recipe by name (`symprune list`), or a YAML file
  --output DIR           write the pruned checkpoint to this folder (prune only)

method (short for --pruning.score and so on; names: `symprune list`):
  --score NAME           importance of each weight: ria, wanda, gradientwanda, magnitude, ...
  --sparsity FRACTION    fraction of zeros, 0.5 for half
  --pattern N:M          keep N of every M inputs, such as 2:4, in place of --sparsity
  --group GROUP          weights that compete: output, input, layer, block, model
  --refine NAME          improve the mask: exactswap, r2dsnot, dsnot
  --update NAME          change the kept weights: maskedcg, obsupdate
  --solver NAME          mask and weights together, in place of score: sparsegpt, admm
  --allocation NAME      divide the sparsity among layers: sensitivity, owl, progression
  --reconstruct true     train the kept weights of each block
  --ignore LAYER         leave a layer dense; repeat as --ignore+ LAYER; or '["re:.*down_proj"]'
  --only LAYER           prune these layers only

model:
  --model.pretrained M   hub name, folder, or .gguf file
  --model.dtype DTYPE    auto, float32, bfloat16

data:
  --data.dataset D       hub dataset, file, folder, python-docs, c4, wikitext2, self
  --data.evaluation D    evaluation texts, if they are not further texts of the dataset
  --data.sequences N     calibration sequences
  --data.sequence_length N
  --data.evaluation_sequences N
  --data.batch_size N
  --data.seed N          order of the texts

run:
  --trainer.devices N    with --trainer.strategy ddp: number of processes
  --trainer.accelerator  cpu, gpu
  --stream true          read, prune and write block by block (prune only)
  --quiet, --json        no progress; the result as JSON only
  --seed_everything N

all options of one part, with their defaults:
  symprune {command} --help pruning | model | data | trainer | all
"""

SUMMARIES = {
    "prune": "Evaluate a model, prune it, evaluate it again, and write the pruned checkpoint.",
    "validate": "Evaluate a model, prune it, and evaluate it again on the validation data.",
    "test": "Prune with --when test: evaluate a model, prune it, and evaluate it again.",
    "fit": "Train with pruning: --when fit_start, or fit_end. Zeros are kept by MaskedFinetuning.",
}
"""Subcommands of LightningCLI."""

METHOD = (
    *("score", "sparsity", "pattern", "group", "refine", "update", "solver", "allocation"),
    *("reconstruct", "ignore", "only", "calibration_order", "gradient_batches", "experts"),
    *("unreached", "when", "journal", "baseline", "calibration"),
)
"""Settings of SymPrune: ``--sparsity`` is short for ``--pruning.sparsity``."""

OPTIONS = (
    *("help", "config", "print_config", "seed_everything", "trainer", "model", "data", "pruning"),
    *("output", "stream", "quiet", "json"),
    *("ckpt_path", "weights_only", "verbose", "optimizer", "lr_scheduler"),
)
"""First components of the other options of the subcommands of LightningCLI."""

ONE_DEVICE = "--trainer.devices=1"
"""Put before the options of what runs in one process: by default, a Trainer takes all GPUs."""

TOPICS = {
    "model": r"^LightningModule that",
    "data": r"^Encodes texts",
    "trainer": r"^Lightning's Trainer",
}
"""First line of the section of a topic in the full help."""


def section(text: str, topic: str) -> str:
    """Return the section of a topic from the full help of a subcommand."""
    lines = text.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if re.match(TOPICS[topic], line))
    length = next((n for n, x in enumerate(lines[start + 1 :]) if re.match(r"^\S", x)), len(lines))
    return "".join(lines[start : start + 1 + length])


class UsageError(ValueError):
    """A mistake in the command line; the exit code is 2, as for those that the parser finds."""


def suggestion(name: str, known: list[str]) -> str:
    """Return ``"; did you mean …?"`` if a known name is close."""
    close = closest(name, known)
    return f": did you mean {close}?" if close else ""


def closest(name: str, known: list[str]) -> str:
    """Return the known name that is closest to another; empty if none is close."""
    return next(iter(get_close_matches(name, known, n=1)), "")
