"""A sweep: several pruning methods on the same model and the same tokens."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from symprune_lightning.callbacks.pruning import PruningCallback
from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.engine.files import hidden_sibling, write_json
from symprune_lightning.module import CausalLMModule, pruning_target
from symprune_lightning.trainer import Trainer

RESULTS = "results.json"


@dataclass(frozen=True)
class SweepResult:
    """Result of one method of a sweep.

    Attributes:
        name: Name of the method.
        sparsity: Realised fraction of zeros.
        dense: Perplexity of the dense model.
        perplexity: Perplexity of the pruned model.
        seconds: Time for pruning: calibration forward, scores, masks, refining; ``None`` if the run
            was resumed, of which the time before is not known.
        error: Mean relative squared error of the layers; ``None`` without input statistics.
        failure: Error message if the method failed, and the other figures are ``None``.
    """

    name: str
    sparsity: float | None = None
    dense: float | None = None
    perplexity: float | None = None
    seconds: float | None = None
    error: float | None = None
    failure: str | None = None


class Sweep:
    """Prunes one model by several methods, and evaluates each on the same tokens.

    The model is loaded and evaluated once, and its weights are restored before each method.
    Results are cached in ``results.json``: a finished method is not run again, an interrupted one
    resumes from its journal, and a failed one is recorded and run again next time.

    Args:
        module: The model.
        data: Calibration and evaluation data.
        folder: Folder of ``results.json``; created if it does not exist.
    """

    def __init__(self, module: CausalLMModule, data: CalibrationDataModule, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.module, self.data, self.folder = module, data, folder
        self._cache: dict[str, Any] = {}
        if (folder / RESULTS).is_file():
            self._cache = json.loads((folder / RESULTS).read_text("utf-8"))
        self._dense_weights: dict[str, torch.Tensor] = {}
        self._dense_perplexity: float | None = None

    def run(self, name: str, trainer: Trainer, callback: PruningCallback) -> SweepResult:
        """Return the cached result of a method, or run it.

        Args:
            name: Name of the method, unique in the sweep.
            trainer: A Trainer with ``callback`` among its callbacks.
            callback: Prunes before ``validate``.
        """
        settings = {
            "model": self.module.pretrained,
            "dtype": self.module.dtype_name,
            "settings": callback.settings,
            "data": self.data.settings,
        }
        key = json.loads(json.dumps(settings))  # JSON has no tuples: comparable with the cache
        cached = self._cache.get(name)
        if cached is not None and cached["key"] == key and cached["result"]["failure"] is None:
            return SweepResult(**cached["result"])
        try:
            result = self._run(name, trainer, callback)
        except Exception as error:  # recorded, so that the other methods still run
            result = SweepResult(name, failure=f"{type(error).__name__}: {error}")
        self._cache[name] = {"key": key, "result": asdict(result)}
        write_json(self.folder / RESULTS, self._cache)
        return result

    def _run(self, name: str, trainer: Trainer, callback: PruningCallback) -> SweepResult:
        self._restore_dense_weights()
        callback.baseline = self._dense_perplexity is None
        journal = hidden_sibling(self.folder / name.replace("/", "_"), "journal")
        callback.journal = journal
        is_resumed = journal.is_dir()
        try:
            metrics = trainer.validate(self.module, datamodule=self.data, verbose=False)[0]
        finally:  # the dense evaluation comes first, and is valid even if pruning fails
            dense = callback.dense_metrics.get("val_perplexity", self._dense_perplexity)
            self._dense_perplexity = dense
        assert callback.result is not None
        shutil.rmtree(journal, ignore_errors=True)
        layers = callback.result.layers
        known = [x.final_error for x in layers if x.final_error is not None]
        return SweepResult(
            name=name,
            sparsity=callback.result.sparsity,
            dense=self._dense_perplexity,
            perplexity=metrics["val_perplexity"],
            seconds=None if is_resumed else callback.seconds,
            error=sum(known) / len(known) if known else None,
        )

    @torch.no_grad()
    def _restore_dense_weights(self) -> None:
        self.module.configure_model()
        model = pruning_target(self.module)
        if not self._dense_weights:
            self._dense_weights = {k: p.detach().clone() for k, p in model.named_parameters()}
        for key, value in self._dense_weights.items():
            model.get_parameter(key).copy_(value)
