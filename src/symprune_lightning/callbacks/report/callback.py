"""The callback that writes a report.

Longer than 300 lines since the sections of the page are described here.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from symprune_lightning.callbacks.integration import (
    calibration_datamodule,
    metrics_of,
    model_name,
    tokenizer_of,
    trainer_callbacks,
)
from symprune_lightning.callbacks.progress import peak_memory
from symprune_lightning.callbacks.pruning import pruning_callbacks
from symprune_lightning.callbacks.report.figures import Histogram, figures, histogram, png
from symprune_lightning.callbacks.report.summary import advice, asked, outcome
from symprune_lightning.checkpoints.manifest import build_manifest
from symprune_lightning.engine.files import atomic_file, write_json
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.result import PruneResult
from symprune_lightning.module import pruning_target

PAGE, FIGURES = "report.html", "report.json"
SECTIONS = [
    (
        "error",
        "Error of the layers",
        "Squared change of a layer's output on the calibration data, relative to its squared "
        "norm. One line for each kind of layer.",
    ),
    ("sparsity", "Sparsity of the layers", "Fraction of zeros."),
    (
        "reconstruction",
        "Reconstruction of the blocks",
        "Error of each block's output on held-out calibration sequences, relative to the error "
        "before its kept weights were trained. One curve per block.",
    ),
    (
        "experts",
        "Tokens of the experts",
        "Calibration tokens that reached each expert. An expert without tokens is left dense, or "
        "pruned by magnitude if that was requested.",
    ),
    ("swaps", "Refining", "Weights that the refiner exchanged in each layer."),
    (
        "scores",
        "Scores and threshold",
        "Kept and pruned weights overlap because each group has its own threshold.",
    ),
    ("masks", "Masks", "The upper left corner of some layers; dark is kept."),
    ("time", "Time", "Pruning is split into the calibration forward and everything else."),
]
PROMPTS = ("The capital of France is", "To make a cup of tea,")


class Report(Callback, PruningHooks):
    """Writes ``report.html``: summary, metrics, figures and samples of a run on one page.

    The page is self-contained, responsive, and supports dark mode; the figures are also written to
    ``symprune/`` as PNG files, and all numbers and sentences to ``report.json``. Scalars by layer,
    and the figures if it accepts any, go to the Trainer's loggers. ``Trainer.prune(output=…)``
    writes the page into the checkpoint; otherwise ``Trainer.validate`` or ``Trainer.test`` of the
    pruned model writes it into ``folder``. After a fit that prunes, call one of them.

    Add it to the callbacks of the Trainer, together with a pruning callback. Needs ``pip install
    "symprune-lightning[report]"``.

    Args:
        folder: Where to write, for runs without an output folder.
        prompts: Prompts that the dense and the pruned model complete; empty for no samples. Not
            used with several processes, nor for a streamed checkpoint.
        new_tokens: Number of tokens to generate for each prompt.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed.

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
        for package in ("matplotlib", "jinja2"):
            if find_spec(package) is None:
                raise ModuleNotFoundError(
                    f"Report needs {package}: pip install 'symprune-lightning[report]'"
                )
        self.folder = folder
        self.prompts = list(prompts)
        self.new_tokens = new_tokens
        self._reset()

    def _reset(self) -> None:
        self._result: PruneResult | None = None
        self._samples: dict[str, list[str]] = {}
        self._sampling = ""
        self._histograms: dict[str, Histogram] = {}
        self._times: dict[str, float] = {}
        self._phase_start = time.perf_counter()
        self._is_finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the timer of a new run."""
        # several evaluations and a training call setup within one run
        if self._is_finished or not self._times:
            self._reset()

    def on_pruning_start(self, layers: Sequence[str]) -> None:
        """Record the time of loading."""
        self._end_phase("loading")

    def on_layer_scored(self, layer: str, scores: Tensor, mask: Tensor) -> None:
        """Store the histogram of a layer's scores."""
        scores_histogram = histogram(scores, mask)
        if scores_histogram is not None:
            self._histograms[layer] = scores_histogram

    def on_pruning_end(self, result: PruneResult) -> None:
        """Record the time of pruning."""
        self._end_phase("pruning")
        self._result = result

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the time of loading."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._end_phase("loading")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the time of loading."""
        self._end_phase("loading")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate samples, and write the page if it has its own folder."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._record_evaluation(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate samples, and write the page if it has its own folder."""
        self._record_evaluation(trainer, pl_module)

    def _record_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the phase; write the page if the model is pruned."""
        pruning = pruning_callbacks(trainer_callbacks(trainer))
        pruned_before = any(callback.has_pruned(pl_module) for callback in pruning)
        if self._result is None and pruned_before:
            return  # by an earlier call, which has written the page
        phase = "dense" if self._result is None else "pruned"
        self._is_finished = self._result is not None
        self._end_phase(f"evaluation, {phase}")
        self._samples[phase] = self._generate(trainer, pl_module)
        manifest = self._manifest(trainer, pl_module)
        if manifest is None:
            return
        self._log(trainer, manifest)
        if self.folder is not None and trainer.is_global_zero:
            self.write(self.folder, manifest)

    def on_recovery_start(self) -> None:
        """Note that another evaluation follows."""
        self._is_finished = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the time of training."""
        self._end_phase("training")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log after a fit that has pruned that an evaluation writes the page."""
        if stage == "fit" and self.folder is not None and self._result is not None:
            rank_zero_info(
                "Report writes its page after an evaluation of the pruned model: call "
                "Trainer.validate or Trainer.test with the same callbacks after this fit"
            )

    def on_checkpoint_saved(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Write the page into the checkpoint."""
        self.write(path, manifest)

    def write(self, folder: str | Path, manifest: Mapping[str, Any]) -> Path:
        """Write the page and its figures.

        Args:
            folder: Destination.
            manifest: Contents of ``sparsity_manifest.json``.

        Returns:
            Path of the page. ``report.json`` beside it has the same figures.
        """
        plots = figures(
            manifest["layers"],
            {} if self._result is None else self._result.masks,
            self._histograms,
            self._split_times(manifest),
            manifest["blocks"],
        )
        images = {name: png(figure) for name, figure in plots.items()}
        folder = Path(folder)
        images_folder = folder / "symprune"
        images_folder.mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            with atomic_file(images_folder / f"{name}.png") as tmp:
                tmp.write_bytes(data)
        summary = {
            "asked": asked(manifest),
            "outcome": list(outcome(manifest)),
            "advice": advice(manifest),
        }
        with atomic_file(folder / PAGE) as tmp:
            tmp.write_text(self._page(manifest, images, summary), encoding="utf-8")
        times, samples = self._split_times(manifest), self._sample_rows()
        content = {**summary, "seconds": times, "samples": samples, "manifest": dict(manifest)}
        write_json(folder / FIGURES, content)
        return folder / PAGE

    def _sample_rows(self) -> list[dict[str, str]]:
        """Return prompts with the answers of the dense and of the pruned model."""
        answers = (self._samples.get("dense", []), self._samples.get("pruned", []))
        rows = zip(self.prompts, *answers, strict=False)
        return [{"prompt": p, "dense": d, "pruned": s} for p, d, s in rows]

    def _page(
        self,
        manifest: Mapping[str, Any],
        images: Mapping[str, bytes],
        summary: Mapping[str, Any],
    ) -> str:
        from jinja2 import Environment, PackageLoader, StrictUndefined

        loader = PackageLoader("symprune_lightning.callbacks.report", ".")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
        metrics = manifest["metrics"]
        dense = metrics.get("dense", {})
        rows = [
            (name, format_metric(dense.get(name)), format_metric(value))
            for name, value in metrics["pruned"].items()
        ]
        keys = (
            "model",
            "settings",
            "data",
            "distillation",
            "versions",
            "trials",
            "coverage",
            "unreached_layers",
            "layers_pruned_by_magnitude",
        )
        settings = {key: manifest[key] for key in keys if manifest.get(key)}
        return environment.get_template("page.html.j2").render(
            title=f"{Path(str(manifest['model'])).name or 'Model'}, pruned",
            made=time.strftime("%Y-%m-%d %H:%M"),
            manifest=manifest,
            metrics=rows,
            summary=summary,
            facts=[("peak memory of the process", peak_memory())],
            sections=SECTIONS,
            images={name: base64.b64encode(data).decode() for name, data in images.items()},
            samples=self._sample_rows(),
            sampling=self._sampling,
            is_refined=any(layer["swaps"] for layer in manifest["layers"]),
            settings=json.dumps(settings, indent=2, ensure_ascii=False),
            number=format_number,
        )

    def _split_times(self, manifest: Mapping[str, Any]) -> dict[str, float]:
        """Return the phases, with pruning split into the forward and the work on weights."""
        times: dict[str, float] = {}
        for phase, seconds in self._times.items():
            if phase == "pruning":
                scoring = sum(layer["seconds"] for layer in manifest["layers"])
                training = sum(block["seconds"] for block in manifest["blocks"])
                times["pruning: scores, masks, refining"] = scoring
                if manifest["blocks"]:
                    times["pruning: reconstruction"] = training
                times["pruning: calibration forward"] = max(0.0, seconds - scoring - training)
            else:
                times[phase] = seconds
        return times

    def _end_phase(self, name: str) -> None:
        now = time.perf_counter()
        self._times[name] = self._times.get(name, 0.0) + now - self._phase_start
        self._phase_start = now

    def _manifest(self, trainer: Trainer, module: LightningModule) -> dict[str, Any] | None:
        """Return the manifest as far as it is known before a checkpoint is written."""
        for callback in pruning_callbacks(trainer_callbacks(trainer)):
            if callback.result is not None and callback.has_pruned(module):
                return build_manifest(
                    callback.result,
                    model=model_name(module),
                    architecture=type(pruning_target(module)).__name__,
                    settings=callback.settings,
                    datamodule=calibration_datamodule(trainer),
                    dense=callback.dense_metrics,
                    pruned=metrics_of(trainer),
                )
        return None

    @torch.no_grad()
    def _generate(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """Complete each prompt greedily; in the chat format of the tokenizer, if it has one."""
        model: Any = pruning_target(module)
        tokenizer: Any = tokenizer_of(trainer)
        can_generate = callable(getattr(model, "generate", None))  # a module of the user's
        if tokenizer is None or trainer.world_size > 1 or not can_generate:
            return []
        is_chat = tokenizer.chat_template is not None
        form = "as a message in the tokenizer's chat format" if is_chat else "as it is"
        self._sampling = f"The most likely {self.new_tokens} tokens; each prompt is given {form}."
        texts = []
        for prompt in self.prompts:
            if not is_chat:
                inputs = tokenizer(prompt, return_tensors="pt").to(module.device)
            else:
                inputs = tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                ).to(module.device)
            ids = model.generate(
                **inputs,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
            answer = ids[0, inputs["input_ids"].shape[1] :]
            texts.append(tokenizer.decode(answer, skip_special_tokens=True))
        return texts

    @staticmethod
    def _log(trainer: Trainer, manifest: Mapping[str, Any]) -> None:
        """Send scalars by layer, and figures, to the Trainer's loggers."""
        keys = ("sparsity", "error", "error_refined", "swaps")
        for logger in trainer.loggers:
            for step, layer in enumerate(manifest["layers"]):
                values = {k: float(layer[k]) for k in keys if layer[k] is not None}
                logger.log_metrics({f"pruning/{k}": v for k, v in values.items()}, step=step)
            for step, block in enumerate(manifest["blocks"]):
                errors = {k: block[k] for k in ("error", "error_reconstructed")}
                logger.log_metrics({f"blocks/{k}": v for k, v in errors.items()}, step=step)
            # TensorBoard's writer takes figures; loggers of other kinds have no such method
            add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if callable(add_figure):
                for name, figure in figures(
                    manifest["layers"], {}, {}, {}, manifest["blocks"]
                ).items():
                    add_figure(f"pruning/{name}", figure)
            logger.save()


def format_number(value: float | None) -> str:
    """Format an error for tables."""
    return "–" if value is None else f"{value:.4f}"


def format_metric(value: float | None) -> str:
    """Format a metric such as a perplexity, with two decimals from 1 on.

    Examples:
        >>> format_metric(13.4189), format_metric(0.81234)
        ('13.42', '0.8123')
    """
    return "–" if value is None else f"{value:,.{2 if abs(value) >= 1 else 4}f}"
