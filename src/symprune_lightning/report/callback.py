"""The callback that writes a report."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from symprune_lightning.callbacks import PruningCallback, callbacks_of, pruning_target
from symprune_lightning.display import peak_memory
from symprune_lightning.export import manifest_of
from symprune_lightning.files import whole_file
from symprune_lightning.report.pictures import Histogram, histogram, pictures, png

PAGE = "report.html"
SECTIONS = [
    (
        "error",
        "Error of the layers",
        "Squared change of a layer's output on the calibration text, "
        "relative to its square: by the score's mask, and after refining.",
    ),
    ("sparsity", "Sparsity of the layers", "Share of zeros."),
    ("swaps", "Refining", "Weights that the refiner exchanged in each layer."),
    ("scores", "Scores and the cut", "Where kept and pruned overlap, each group has its own cut."),
    ("masks", "Masks", "The upper left corner of some layers; dark is kept."),
    ("time", "Where the time went", "The rest of pruning is the forward of the calibration text."),
]
PROMPTS = ("The capital of France is", "To make a cup of tea,")


class Report(Callback):
    """Writes ``report.html``: figures, pictures and samples of a run, on one page.

    The page holds all that it shows, needs no net, and suits a phone and a dark screen; the
    pictures are in ``symprune/`` as PNG files too. Scalars by layer, and the pictures if it takes
    some, go to the Trainer's loggers. ``Trainer.prune(output=…)`` writes the page into the
    checkpoint.

    Give it to the Trainer beside a pruning callback. Needs ``pip install
    "symprune-lightning[report]"``.

    Args:
        folder: Where to write, for runs without an output folder.
        prompts: Beginnings that the dense and the pruned model continue; none for no samples. Not
            used where several processes hold the model.
        new_tokens: How far they go on.

    Examples:
        >>> Report(prompts=["The weather is"]).prompts
        ['The weather is']
    """

    def __init__(
        self,
        folder: str | None = None,
        prompts: Sequence[str] = PROMPTS,
        new_tokens: int = 40,
    ) -> None:
        self.folder = folder
        self.prompts = list(prompts)
        self.new_tokens = new_tokens
        self._samples: dict[str, list[str]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._times: dict[str, float] = {}
        self._begun = 0.0
        self._pruner: PruningCallback | None = None

    def on_scores(self, name: str, scores: Tensor, mask: Tensor) -> None:
        """Keep the histogram of a layer's scores."""
        found = histogram(scores, mask)
        if found is not None:
            self._histograms[name] = found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the time."""
        self._begun = time.perf_counter()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What has passed until now is loading and, in the second evaluation, pruning."""
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        pruner = self._pruning(trainer)
        self._lap("loading" if pruner is None else "pruning")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take samples, and write the page if it has a folder of its own."""
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        pruner = self._pruning(trainer)
        which = "dense" if pruner is None else "pruned"
        self._lap(f"evaluation, {which}")
        self._samples[which] = self._generate(trainer, pl_module)
        if pruner is None or not pruner.has_pruned(pl_module):
            return
        self._pruner = pruner
        manifest = _manifest(trainer, pruner)
        self._log(trainer, manifest)
        if self.folder is not None and trainer.is_global_zero:
            self.write_report(self.folder, manifest)

    def write_report(self, folder: str | Path, manifest: Mapping[str, Any]) -> Path:
        """Write the page and its pictures.

        Args:
            folder: Where to.
            manifest: As ``sparsity_manifest.json`` has it.

        Returns:
            The page's path.
        """
        result = None if self._pruner is None else self._pruner.result
        figures = pictures(
            manifest["layers"],
            {} if result is None else result.masks,
            self._histograms,
            self._where_time_went(manifest["layers"]),
        )
        images = {name: png(figure) for name, figure in figures.items()}
        folder = Path(folder)
        beside = folder / "symprune"
        beside.mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            with whole_file(beside / f"{name}.png") as partial:
                partial.write_bytes(data)
        with whole_file(folder / PAGE) as partial:
            partial.write_text(self._page(manifest, images), encoding="utf-8")
        return folder / PAGE

    def _page(self, manifest: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
        loader = PackageLoader("symprune_lightning.report", ".")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
        metrics = manifest["metrics"]
        dense = metrics.get("dense", {})
        both = [
            (name, number(dense.get(name)), number(value))
            for name, value in metrics["pruned"].items()
        ]
        keys = ("model", "settings", "data", "versions", "trials", "unreached_layers")
        settings = {key: manifest[key] for key in keys if manifest.get(key)}
        return environment.get_template("page.html.j2").render(
            title=f"{Path(str(manifest['model'])).name}, pruned",
            made=time.strftime("%Y-%m-%d %H:%M"),
            manifest=manifest,
            metrics=both,
            facts=[("peak memory of the process", peak_memory())],
            sections=SECTIONS,
            images={name: base64.b64encode(data).decode() for name, data in images.items()},
            samples=[
                {"prompt": prompt, "dense": before, "pruned": after}
                for prompt, before, after in zip(
                    self.prompts,
                    self._samples.get("dense", []),
                    self._samples.get("pruned", []),
                    strict=False,
                )
            ],
            settings=json.dumps(settings, indent=2, ensure_ascii=False),
            number=number,
        )

    def _where_time_went(self, layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        times = dict(self._times)
        if "pruning" in times:
            scoring = sum(layer["seconds"] for layer in layers)
            at = list(times).index("pruning")
            parts = {
                "pruning: scores, masks, refining": scoring,
                "pruning: calibration forward": max(0.0, times.pop("pruning") - scoring),
            }
            items = list(times.items())
            times = dict([*items[:at], *parts.items(), *items[at:]])
        return times

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._times[name] = now - self._begun
        self._begun = now

    @staticmethod
    def _pruning(trainer: Trainer) -> PruningCallback | None:
        return next((c for c in callbacks_of(trainer) if isinstance(c, PruningCallback)), None)

    @torch.no_grad()
    def _generate(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """How the model goes on from each prompt, by its most probable tokens."""
        model: Any = pruning_target(module)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None or trainer.world_size > 1 or not hasattr(model, "generate"):
            return []
        texts = []
        for prompt in self.prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(module.device)
            ids = model.generate(
                **inputs,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
            texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
        return texts

    @staticmethod
    def _log(trainer: Trainer, manifest: Mapping[str, Any]) -> None:
        """Scalars by layer, and pictures, to the Trainer's loggers."""
        kinds = ("sparsity", "error", "error_refined", "swaps")
        for logger in trainer.loggers:
            for step, layer in enumerate(manifest["layers"]):
                known = {k: float(layer[k]) for k in kinds if layer[k] is not None}
                logger.log_metrics({f"pruning/{k}": v for k, v in known.items()}, step=step)
            board: Any = getattr(logger, "experiment", None)
            if hasattr(board, "add_figure"):
                for name, figure in pictures(manifest["layers"], {}, {}, {}).items():
                    board.add_figure(f"pruning/{name}", figure)
            logger.save()


def number(value: float | None) -> str:
    """A figure as the manifest's tables show it."""
    return "–" if value is None else f"{value:.4f}"


def _manifest(trainer: Trainer, pruner: PruningCallback) -> dict[str, Any]:
    """As much of a manifest as is known before a checkpoint is written."""
    assert pruner.result is not None
    data = getattr(trainer, "datamodule", None)
    return manifest_of(
        pruner.result,
        model=str(getattr(trainer.lightning_module, "pretrained", None) or "model"),
        settings=pruner.settings,
        data=getattr(data, "settings", None),
        dense=pruner.dense_metrics,
        pruned={name: float(value) for name, value in trainer.callback_metrics.items()},
    )
