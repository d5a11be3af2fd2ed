"""Every Python block of the README and the docs runs, in order, one name space a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.scores import Score
from tests.texts import write_project

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """With a tiny model in the place of the one on the hub."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block.replace(HUB_NAME, "./model"), str(page), "exec"), names)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize(
    "kind", ["scores", "refiners", "update", "allocation", "patterns"], ids=str
)
def test_every_method_has_a_card(kind):
    from symprune_lightning.functional.allocation import Allocation
    from symprune_lightning.functional.patterns import Pattern
    from symprune_lightning.functional.refiners import MaskRefiner
    from symprune_lightning.functional.update import WeightUpdate

    bases = {
        "scores": Score,
        "refiners": MaskRefiner,
        "update": WeightUpdate,
        "allocation": Allocation,
        "patterns": Pattern,
    }
    page = (ROOT / "docs" / "methods.md").read_text()
    for method in bases[kind].__subclasses__():
        if method.__module__.startswith("symprune_lightning"):
            assert f"### {method.__name__}" in page, (
                f"docs/methods.md has no card {method.__name__}"
            )


def test_the_example_of_an_own_score_is_found_by_name():
    (block, *_) = blocks(ROOT / "docs" / "own-score.md")
    names: dict[str, object] = {}
    exec(block, names)
    assert type(by_name(Score, "cubed-wanda")).__name__ == "CubedWanda"
