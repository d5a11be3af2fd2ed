from __future__ import annotations

import io

import torch
from rich.console import Console

from symprune_lightning.display import layer_bar, summary
from symprune_lightning.engine.prune import prune_model
from symprune_lightning.engine.result import PruneResult
from tests.models import batches, build


def printed(tables) -> str:
    console = Console(file=io.StringIO(), width=100)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_summary_has_a_row_for_each_layer_type_and_metric():
    result = prune_model(build("llama"), batches(), score="wanda", refine="dsnot")
    text = printed(summary(result, {"val_perplexity": 10.5}, {"val_perplexity": 20.25, "n": 1.0}))
    lines = {line.split()[1]: line.split() for line in text.splitlines() if len(line.split()) > 6}
    assert {"q_proj", "down_proj", "all"} <= set(lines)
    assert lines["q_proj"][3] == "2"
    assert lines["up_proj"][7] == "0.5000"
    assert "10.5000" in text
    assert "20.2500" in text
    row = next(line for line in text.splitlines() if " n " in line)
    assert "–" in row


def test_summary_without_statistics_or_metrics():
    result = prune_model(build("llama"), [], score="magnitude")
    tables = summary(result, {}, {})
    assert len(tables) == 1
    assert "–" in printed(tables)


def test_bar_shows_layers_and_is_gone_afterwards():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with layer_bar(console) as progress:
        result = prune_model(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)),
            [torch.randn(4, 8)],
            progress=progress,
        )
    assert isinstance(result, PruneResult)
    assert "2/2" in console.file.getvalue()
