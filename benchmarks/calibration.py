"""Perplexity by calibration text, and by the number of sequences with gradients.

    python benchmarks/calibration.py MODEL --csv docs/calibration.csv --texts english=FILE.jsonl ...
    python benchmarks/calibration.py MODEL --csv docs/calibration.csv --gradients 1 2 4 8 16
    python benchmarks/calibration.py --csv docs/calibration.csv --table

The first command prunes by RIA, ExactSwap, MaskedCG and Sensitivity from equally many tokens of
each text, of the Python manual, and of the model's own samples (``self``), and evaluates each
pruned model on all texts. Half of the documents of a text are for calibration, the others for
evaluation. The second prunes by GradientWanda and Sensitivity at 60 % with gradients of that many
sequences. Finished rows are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from quality import COMPOSITIONS, GRADIENT
from symprune_lightning import CalibrationDataModule, CausalLMModule, SymPrune, Trainer
from tables import QUIET_TRAINER, append_row, read_rows

Texts = dict[str, list[str]]
FIELDS = ("study", "calibration", "sparsity", "seed", "evaluation", "perplexity")
COMPOSITION = COMPOSITIONS["RIA + ExactSwap + MaskedCG + Sensitivity"]
DENSE = "dense"


def read_texts(arguments: list[str]) -> Texts:
    """Return the Python manual and the texts of NAME=FILE.jsonl arguments, by name."""
    texts: Texts = {"python-docs": list(topics.values())}
    for argument in arguments:
        name, _, path = argument.partition("=")
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        texts[name] = [json.loads(line)["text"] for line in lines]
    return texts


def halves(texts: Texts, seed: int) -> tuple[Texts, Texts]:
    """Divide the documents of each text at random: for calibration and for evaluation."""
    calibration, evaluation = {}, {}
    for name, documents in texts.items():
        shuffled = random.Random(seed).sample(documents, len(documents))
        half = len(shuffled) // 2
        calibration[name], evaluation[name] = shuffled[:half], shuffled[half:]
    return calibration, evaluation


class Study:
    """Runs of one model, whose weights are restored before each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.module = CausalLMModule(options.model, dtype="float32")
        self.module.configure_model()
        self.dense = {name: x.clone() for name, x in self.module.state_dict().items()}

    def is_finished(self, study: str, calibration: str, sparsity: float, seed: int) -> bool:
        """Return whether the CSV file has a row of the run."""
        key = (study, calibration, str(sparsity), str(seed))
        return any(
            (row["study"], row["calibration"], row["sparsity"], row["seed"]) == key
            for row in read_rows(self.options.csv)
        )

    def run(
        self,
        study: str,
        calibration: str,
        data: CalibrationDataModule,
        settings: dict[str, Any],
        seed: int,
    ) -> None:
        """Prune, and append a row for each evaluated text; of the dense model, too, at first."""
        sparsity = settings["sparsity"]
        if self.is_finished(study, calibration, sparsity, seed):
            return
        with torch.no_grad():
            self.module.load_state_dict(self.dense)
        prune = SymPrune(**settings)
        trainer = Trainer(callbacks=[prune], **QUIET_TRAINER)
        trainer.validate(self.module, datamodule=data, verbose=False)
        if not self.is_finished(study, DENSE, 0, seed):
            self._append(study, DENSE, 0, seed, prune.dense_metrics)
        self._append(study, calibration, sparsity, seed, prune.sparse_metrics)

    def _append(
        self, study: str, calibration: str, sparsity: float, seed: int, metrics: dict[str, float]
    ) -> None:
        for name, value in metrics.items():
            if name.startswith("val_perplexity/"):
                text = name.partition("/")[2]
                row = (study, calibration, sparsity, seed, text, value)
                append_row(self.options.csv, FIELDS, row)

    def texts(self, seed: int) -> None:
        """Prune from each calibration text."""
        calibration, evaluation = halves(read_texts(self.options.texts), seed)
        for sparsity in self.options.sparsities:
            for name in (*calibration, "self"):
                source: Any = calibration.get(name, "self")
                data = self._data(source, evaluation, seed)
                settings = {**COMPOSITION, "gradient_batches": 4, "sparsity": sparsity}
                self.run("texts", name, data, settings, seed)

    def gradients(self, seed: int) -> None:
        """Prune with gradients of each number of sequences."""
        calibration, evaluation = halves(read_texts([]), seed)
        for count in self.options.gradients:
            data = self._data(calibration["python-docs"], evaluation, seed, batch_size=1)
            settings = {**GRADIENT, "gradient_batches": count, "sparsity": 0.6}
            self.run("gradients", f"{count} of {self.options.sequences}", data, settings, seed)

    def _data(
        self, source: Any, evaluation: Texts, seed: int, batch_size: int = 4
    ) -> CalibrationDataModule:
        return CalibrationDataModule(
            source,
            self.options.model,
            sequences=self.options.sequences,
            sequence_length=512,
            evaluation=evaluation,
            evaluation_sequences=24,
            batch_size=batch_size,
            seed=seed,
        )


def table(path: Path) -> str:
    """Return a Markdown table per study: a column per evaluation text and seed."""
    lines: list[str] = []
    all_rows = read_rows(path)
    for study in dict.fromkeys(row["study"] for row in all_rows):
        rows = [row for row in all_rows if row["study"] == study]
        columns = list(dict.fromkeys((row["evaluation"], row["seed"]) for row in rows))
        keys = list(dict.fromkeys((row["calibration"], row["sparsity"]) for row in rows))
        heads = [f"{text}, seed {seed}" for text, seed in columns]
        lines += ["", f"| calibration | {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
        for calibration, sparsity in keys:
            values = {
                (row["evaluation"], row["seed"]): f"{float(row['perplexity']):.2f}"
                for row in rows
                if (row["calibration"], row["sparsity"]) == (calibration, sparsity)
            }
            cells = [values.get(column, "") for column in columns]
            name = calibration if calibration == DENSE else f"{calibration}, {float(sparsity):.0%}"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--csv", type=Path, default=Path("calibration.csv"))
    parser.add_argument("--table", action="store_true", help="print the tables and exit")
    parser.add_argument("--texts", nargs="*", metavar="NAME=FILE.jsonl", help="study of texts")
    parser.add_argument("--gradients", nargs="+", type=int, help="study of gradients")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--sequences", type=int, default=16, help="calibration sequences of 512 tokens"
    )
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.table:
        print(table(options.csv))
        return
    if options.model is None:
        parser.error("MODEL is required")
    study = Study(options)
    for seed in options.seeds:
        if options.texts is not None:
            study.texts(seed)
        if options.gradients:
            study.gradients(seed)


if __name__ == "__main__":
    main()
