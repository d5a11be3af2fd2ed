"""``symprune data``: the sequences that a recipe would feed to the model."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import Tensor

from symprune_lightning.cli.parser import instantiate
from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.data.self_text import SelfText

SHARES = ("padding", "unknown", "end of text")
"""Columns with shares of tokens."""

SHOWN = 300
"""Characters of the first sequence of a split that are printed."""


def print_data(arguments: Sequence[str], console: Console | None = None) -> None:
    """Print sizes, hashes and the first sequence of each split; the model is not loaded.

    Args:
        arguments: Those of ``symprune prune``, such as ``["--config", "ria"]``; with ``--json``,
            the settings and hashes are printed as JSON.
        console: Where to print; the terminal by default.

    Raises:
        ValueError: The data is sampled from the model.
    """
    console = console or Console()
    project = instantiate(arguments)
    data: CalibrationDataModule = project.datamodule
    if isinstance(data.dataset, SelfText):
        raise ValueError(
            "dataset='self' is sampled from the model when it is pruned: there is no text to show "
            "before"
        )
    data.val_dataloader()  # checks that no split overlaps the evaluation
    if project.config["json"]:
        print(json.dumps(data.settings))
        return
    console.print(_table(data))
    for name, windows in data.splits.items():
        console.rule(f"first sequence for {name}", align="left")
        ids = windows.ids[0] if windows.mask is None else windows.ids[0][windows.mask[0]]
        text = str(ids) if data.tokenizer is None else str(data.tokenizer.decode(ids))
        # neither markup nor highlighting: the text is shown as it is
        console.print(text[:SHOWN], markup=False, highlight=False)


def _table(data: CalibrationDataModule) -> Table:
    table = Table(title="Sequences that the model is given", box=None, pad_edge=False)
    for heading in ("split", "sequences", "length", "tokens", *SHARES, "sha256"):
        is_name = heading in ("split", "sha256")
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    for name, windows in data.splits.items():
        ids = windows.ids if windows.mask is None else windows.ids[windows.mask]
        table.add_row(
            name,
            f"{len(windows.ids):,}",
            f"{windows.ids.shape[1]:,}",
            f"{ids.numel():,}",
            f"{1 - ids.numel() / windows.ids.numel():.0%}",
            _share(ids, data, "unk_token_id"),
            _share(ids, data, "eos_token_id"),
            windows.sha256[:12],
        )
    return table


def _share(ids: Tensor, data: CalibrationDataModule, token: str) -> str:
    """Return the share of a special token; a dash if the tokenizer has none."""
    number = getattr(data.tokenizer, token, None)
    return "–" if number is None else f"{float((ids == number).float().mean()):.2%}"
