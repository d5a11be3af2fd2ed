"""Recipes: LightningCLI configurations of a model, its data, and how it is pruned."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from symprune_lightning.callbacks import PruningCallback
from symprune_lightning.datamodule import CalibrationDataModule
from symprune_lightning.module import CausalLMModule
from symprune_lightning.trainer import Trainer


class PlainPathParser(LightningArgumentParser):
    """Leaves a value that is the path of a file alone; Lightning's would put its contents there.

    Without this, ``dataset: my.txt`` and ``pretrained: model.gguf`` would be read as configuration.
    ``model: part.yaml`` still is.
    """

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """As in jsonargparse, never with ``sub_configs``."""
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})


class PruningCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` as in Lightning, and ``prune``."""

    trainer: Trainer

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands and the arguments that are no options."""
        skipped = {"model", "datamodule", "callbacks"}
        return {
            "prune": {*skipped, "dataloaders"},
            "validate": {*skipped, "dataloaders"},
            "test": {*skipped, "dataloaders"},
            "fit": {*skipped, "train_dataloaders", "val_dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data is tokenised for the model; and how much is said."""
        parser.link_arguments("model.pretrained", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        parser.add_argument("--quiet", action="store_true", help="No bars, only what came of it.")
        parser.add_argument("--json", action="store_true", help="What came of it as JSON, no more.")

    def before_instantiate_classes(self) -> None:
        """Silence what is not wanted."""
        if self._get(self.config, "quiet") or self._get(self.config, "json"):
            trainer = self._get(self.config, "trainer")
            trainer.enable_progress_bar = trainer.enable_model_summary = False
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")

    def after_prune(self) -> None:
        """Say what came of it."""
        if not self.trainer.is_global_zero:
            return
        pruner = next(c for c in self.trainer.callbacks if isinstance(c, PruningCallback))
        output = self._get(self.config, "output")
        as_json = self._get(self.config, "json")
        print(_as_json(pruner, output) if as_json else _in_words(pruner, output))


def instantiate(arguments: Sequence[str]) -> PruningCLI:
    """A recipe's model, data and Trainer, without running anything.

    Args:
        arguments: Those of ``symprune prune``, such as ``["--config", "recipes/ria.yaml"]``.
    """
    return _cli(arguments, run=False)


def run(arguments: Sequence[str] | None = None) -> None:
    """Do what the arguments say; ``None`` for those of the command line."""
    _cli(arguments)


def recipe_files() -> list[Path]:
    """The recipes that come with the package."""
    installed = Path(str(files("symprune_lightning"))) / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
    return sorted(folder.glob("*.yaml"))


def _cli(arguments: Sequence[str] | None, *, run: bool = True) -> PruningCLI:
    with warnings.catch_warnings():
        if arguments is not None:  # it warns of any that are not those of the command line
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        return PruningCLI(
            CausalLMModule,
            CalibrationDataModule,
            trainer_class=Trainer,
            parser_class=PlainPathParser,
            save_config_callback=None,
            seed_everything_default=0,
            args=None if arguments is None else list(arguments),
            run=run,
            # the default lists every option, before any message
            parser_kwargs={
                name: {"usage": f"symprune {name} [options]"} for name in PruningCLI.subcommands()
            },
        )


def _in_words(pruner: PruningCallback, output: str | None) -> str:
    assert pruner.result is not None
    lines = [f"sparsity: {pruner.result.sparsity:.6f} over {len(pruner.result.layers)} layers"]
    for name, dense in pruner.dense_metrics.items():
        lines.append(f"{name}: dense {dense:.4f}, pruned {pruner.sparse_metrics[name]:.4f}")
    if output is not None:
        lines.append(f"checkpoint: {output}")
    return "\n".join(lines)


def _as_json(pruner: PruningCallback, output: str | None) -> str:
    assert pruner.result is not None
    return json.dumps(
        {
            "sparsity": pruner.result.sparsity,
            "layers": len(pruner.result.layers),
            "seconds": pruner.seconds,
            "dense": pruner.dense_metrics,
            "pruned": pruner.sparse_metrics,
            "output": output,
        }
    )
