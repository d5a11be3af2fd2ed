"""The ``symprune`` command: LightningCLI with one more subcommand."""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from symprune_lightning.apply import apply
from symprune_lightning.callbacks import PruningCallback
from symprune_lightning.datamodule import CalibrationDataModule
from symprune_lightning.engine.parallel import RankError
from symprune_lightning.engine.result import PruningError
from symprune_lightning.module import CausalLMModule
from symprune_lightning.trainer import Trainer
from symprune_lightning.verify import VerificationError, report


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
        """The data is tokenised for the model."""
        parser.link_arguments("model.pretrained", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def after_prune(self) -> None:
        """Say what came of it."""
        if self.trainer.is_global_zero:
            print(_summary(self.trainer.callbacks, self._get(self.config, "output")))


def _summary(callbacks: list[Any], output: str | None) -> str:
    callback = next(c for c in callbacks if isinstance(c, PruningCallback))
    assert callback.result is not None
    lines = [f"sparsity: {callback.result.sparsity:.6f} over {len(callback.result.layers)} layers"]
    for name, dense in callback.dense_metrics.items():
        lines.append(f"{name}: dense {dense:.4f}, pruned {callback.sparse_metrics[name]:.4f}")
    if output is not None:
        lines.append(f"checkpoint: {output}")
    return "\n".join(lines)


def main() -> None:
    """Entry point of ``symprune``."""
    command, rest = sys.argv[1:2], sys.argv[2:]
    try:
        if command == ["verify"]:
            auto_cli(report, args=rest, prog="symprune verify")
        elif command == ["apply"]:
            auto_cli(apply, args=rest, prog="symprune apply", as_positional=False)
        else:
            PruningCLI(
                CausalLMModule,
                CalibrationDataModule,
                trainer_class=Trainer,
                parser_class=PlainPathParser,
                save_config_callback=None,
                seed_everything_default=0,
            )
    except (ValueError, OSError, PruningError, RankError, VerificationError) as error:
        sys.exit(f"symprune: {error}")
