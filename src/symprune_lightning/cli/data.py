"""``symprune data``: the sequences that a recipe would feed to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from symprune_lightning.cli.parser import instantiate
from symprune_lightning.datamodule import CalibrationDataModule
from symprune_lightning.self_text import SelfText

SHOWN = 300
"""Characters of the first sequence of a split that are printed."""


def print_data(arguments: Sequence[str], console: Console | None = None) -> None:
    """Print sizes, hashes and the first sequence of each split; the model is not loaded.

    Args:
        arguments: Those of ``symprune prune``, such as ``["--config", "ria"]``.
        console: Where to print; the terminal by default.

    Raises:
        ValueError: The data is sampled from the model.
    """
    console = console or Console()
    data: CalibrationDataModule = instantiate(arguments).datamodule
    if isinstance(data.dataset, SelfText):
        raise ValueError(
            "dataset='self' is sampled from the model when it is pruned: there is no text to show "
            "before"
        )
    splits = dict(_splits(data))
    console.print(_table(data, splits))
    for name, ids in splits.items():
        console.rule(f"first sequence for {name}", align="left")
        text = str(data.tokenizer.decode(ids[0])) if data.tokenizer is not None else str(ids[0])
        # neither markup nor highlighting: the text is shown as it is
        console.print(text[:SHOWN], markup=False, highlight=False)


def _splits(data: CalibrationDataModule) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and the token ids of all splits."""
    yield "calibration", _ids(data.calibration_dataloader())
    evaluation: Any = data.val_dataloader()
    several = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    for name, loader in several.items():
        yield f"evaluation/{name}".rstrip("/"), _ids(loader)
    if data.training_sequences:
        yield "training", _ids(data.train_dataloader())


def _ids(loader: Any) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in loader])


def _table(data: CalibrationDataModule, splits: dict[str, Tensor]) -> Table:
    table = Table(title="Sequences that the model is given")
    for heading in ("split", "sequences", "length", "tokens", "unknown", "end of text", "sha256"):
        table.add_column(heading, justify="left" if heading in ("split", "sha256") else "right")
    hashes = data.hashes
    for name, ids in splits.items():
        table.add_row(
            name,
            f"{len(ids):,}",
            f"{ids.shape[1]:,}",
            f"{ids.numel():,}",
            _share(ids, data, "unk_token_id"),
            _share(ids, data, "eos_token_id"),
            hashes[name][:12],
        )
    return table


def _share(ids: Tensor, data: CalibrationDataModule, token: str) -> str:
    """Return the share of a special token; a dash if the tokenizer has none."""
    number = getattr(data.tokenizer, token, None)
    return "–" if number is None else f"{float((ids == number).float().mean()):.2%}"
