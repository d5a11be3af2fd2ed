"""Perplexity of a small mixture-of-experts model, trained here and pruned by several methods.

    python benchmarks/moe.py train runs/moe [--steps 1400]
    python benchmarks/moe.py measure runs/moe --csv docs/moe.csv [--budgets 50%] [--seeds 0 1]

``train`` needs no download: it makes a model of the Qwen3-MoE architecture with 11 million
parameters, in 4 blocks of 16 experts, of which the router sends each token to 2. Its text is the
Python manual and the sources of the standard library, with their docstrings, of the Python that
runs this; every tenth topic or module is held out. It writes the model, its tokenizer and both sets
of documents to one folder.

``measure`` calibrates on documents of the training text and evaluates on those held out; the seed
shuffles the documents. Every run appends a row to the CSV file, and runs that have a row are
skipped, so that a stopped study can be resumed. No pruning method is tuned on the held-out text:
all their hyper-parameters are defaults.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from symprune_lightning import (
    CalibrationDataModule,
    CausalLMModule,
    ExactSwap,
    GradientWanda,
    MaskedCG,
    PruneResult,
    Sensitivity,
    SymPrune,
    Trainer,
)
from symprune_lightning.checkpoints.export import check_destination
from symprune_lightning.engine.files import atomic_directory
from symprune_lightning.functional.schedule import warmup_cosine
from tables import QUIET_TRAINER, append_row, read_rows

Settings = dict[str, Any]
"""Arguments of ``SymPrune``."""

BUDGETS: dict[str, Settings] = {
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
}
METHODS: dict[str, Settings] = {
    "Magnitude": {"score": "magnitude"},
    "Wanda": {"score": "wanda"},
    "RIA": {"score": "ria"},
    "RIA + ExactSwap": {"score": "ria", "refine": ExactSwap()},
    "RIA + ExactSwap + MaskedCG": {"score": "ria", "refine": ExactSwap(), "update": MaskedCG()},
    "GradientWanda + Sensitivity": {
        "score": GradientWanda(),
        "group": "layer",
        "allocation": Sensitivity(),
    },
}
SETTINGS: dict[str, Settings] = {
    "routed": {},
    "all": {"experts": "all"},
    "unreached by magnitude": {"unreached": "magnitude"},
}
"""Further arguments that every method runs with."""

FIELDS = (
    *("sequences", "budget", "method", "setting", "seed"),
    *("dense", "perplexity", "coverage", "tokens", "unreached"),
)
"""``tokens``: the lowest number of calibration tokens of an expert layer that was reached;
``unreached``: number of layers without tokens, dense or pruned by magnitude."""

TRAINING, HELD_OUT = "training.jsonl", "held-out.jsonl"
EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Modules that are tests, tables of characters, or the manual itself."""

END = "<|endoftext|>"
VOCABULARY = 4096
LENGTH = 256
"""Number of tokens per sequence."""

BATCH = 4
"""Number of sequences per training step."""

PIECE = 4000
"""Number of characters of a document; longer ones would fill the evaluation set alone."""


def documents() -> list[str]:
    """Return the topics of the Python manual and the sources of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = list(topics.values())
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and EXCLUDED.isdisjoint(parts):
            texts.append(path.read_text("utf-8", errors="replace"))
    return texts


def pieces(texts: Iterable[str]) -> Iterator[str]:
    """Divide texts at line ends into pieces of at most ``PIECE`` characters."""
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > PIECE:
                yield piece
                piece = ""
            piece += line
        if piece.strip():
            yield piece


def write_texts(path: Path, texts: list[str]) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with ``VOCABULARY`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return a model with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        norm_topk_prob=True,
        initializer_range=0.06,  # 1 / √hidden_size; learns faster than the default of 0.02
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the tokens of all texts, each with the end-of-sequence token."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in (*ids, tokenizer.eos_token_id)])


def fit(model: Qwen3MoeForCausalLM, ids: Tensor, steps: int, learning_rate: float) -> None:
    """Train on random sequences, with a loss that balances the experts."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(min(step, steps - 1), steps)
    )
    model.train()
    losses, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        first = torch.randint(len(ids) - LENGTH, (BATCH, 1))
        batch = ids[first + torch.arange(LENGTH)]
        output = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        balance = output.aux_loss.item()  # the number of experts per token if they are balanced
        losses.append(output.loss.item() - model.router_aux_loss_coef * balance)
        if step % 50 == 0 or step == steps:
            seconds = (time.perf_counter() - start) / step
            loss = sum(losses) / len(losses)
            print(f"step {step}: loss {loss:.3f}, balance {balance:.3f}, {seconds:.2f} s per step")
            sys.stdout.flush()
            losses.clear()


def train(options: argparse.Namespace) -> None:
    """Train the model and write it with its tokenizer and documents."""
    destination = check_destination(options.folder)
    torch.manual_seed(options.seed)
    texts = documents()
    held_out = list(pieces(texts[9::10]))
    training = list(pieces(text for i, text in enumerate(texts) if i % 10 != 9))
    tokenizer = train_tokenizer(training)
    ids = token_ids(training, tokenizer)
    model = new_model(tokenizer)
    print(f"{len(texts)} documents, {len(ids):,} tokens, {model.num_parameters():,} parameters")
    fit(model, ids, options.steps, options.learning_rate)
    with atomic_directory(destination) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_texts(folder / TRAINING, training)
        write_texts(folder / HELD_OUT, held_out)
    data = data_module(destination, seed=0)
    metrics = Trainer(**QUIET_TRAINER).validate(
        module_of(destination), datamodule=data, verbose=False
    )
    print(f"held-out perplexity {metrics[0]['val_perplexity']:.3f}")


def data_module(folder: Path, seed: int, sequences: int = 64) -> CalibrationDataModule:
    return CalibrationDataModule(
        str(folder / TRAINING),
        str(folder),
        sequences=sequences,
        sequence_length=LENGTH,
        evaluation=str(folder / HELD_OUT),
        evaluation_sequences=64,
        batch_size=4,
        seed=seed,
    )


def module_of(folder: Path) -> CausalLMModule:
    return CausalLMModule(folder, dtype="float32")


def lowest_tokens(result: PruneResult) -> int | None:
    """Return the lowest number of tokens of an expert layer; ``None`` without input statistics."""
    return min(
        (r.tokens for r in result.layers if r.tokens and ".experts." in r.name), default=None
    )


def runs(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Yield budget, method, setting and seed of the runs that have no row yet."""
    finished = {tuple(row[field] for field in FIELDS[:5]) for row in read_rows(options.csv)}
    sequences = str(options.sequences)
    for seed in options.seeds:
        for budget in options.budgets:
            for setting in options.settings:
                for method in options.methods:
                    if "allocation" in METHODS[method] and ":" in budget:
                        continue
                    if (sequences, budget, method, setting, str(seed)) not in finished:
                        yield budget, method, setting, seed


def measure(options: argparse.Namespace) -> None:
    """Prune the model by every method and append the rows."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # three lines per Trainer
    for budget, method, setting, seed in runs(options):
        callback = SymPrune(**METHODS[method], **BUDGETS[budget], **SETTINGS[setting])
        data = data_module(options.folder, seed, options.sequences)
        result = Trainer(callbacks=[callback], **QUIET_TRAINER).prune(
            module_of(options.folder), datamodule=data
        )
        perplexities = [
            metrics["val_perplexity"]
            for metrics in (callback.dense_metrics, callback.sparse_metrics)
        ]
        unreached = len(result.unreached) + len(result.pruned_by_magnitude)
        figures = (*perplexities, result.coverage, lowest_tokens(result), unreached)
        run = (options.sequences, budget, method, setting, seed)
        append_row(options.csv, FIELDS, (*run, *figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train the model")
    command.set_defaults(run=train)
    command.add_argument("folder", type=Path, help="folder to write; new or empty")
    command.add_argument("--steps", type=int, default=1400, help="steps of 1024 tokens")
    command.add_argument("--learning-rate", type=float, default=2e-3)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("measure", help="prune the model by every method")
    command.set_defaults(run=measure)
    command.add_argument("folder", type=Path, help="folder that train has written")
    command.add_argument("--csv", type=Path, default=Path("moe.csv"))
    command.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    command.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    command.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    command.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
