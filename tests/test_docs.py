"""Python blocks of the README and the docs run, links resolve, generated tables are current."""

from __future__ import annotations

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest

import symprune_lightning
from symprune_lightning.functional.registry import lookup
from symprune_lightning.functional.scores import Score
from tests.texts import write_project

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Blocks of a page share a namespace; a tiny model replaces the one on the Hub."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block.replace(HUB_NAME, "./model"), str(page), "exec"), names)


def test_links_resolve():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.fixture
def generate():
    return runpy.run_path(str(DOCS / "generate_methods.py"))["generate"]


def test_method_tables_are_current(generate):
    page = (DOCS / "methods.md").read_text("utf-8")
    assert generate(page) == page, "run python docs/generate_methods.py"


def test_outdated_method_tables_are_detected(generate):
    page = (DOCS / "methods.md").read_text("utf-8")
    assert generate(page.replace("| `Wanda` |", "| `Wander` |")) == page
    with pytest.raises(ValueError, match="the page has regions"):
        generate(page.replace("generated: scores", "generated: refiners"))


def test_every_method_name_in_a_heading_exists():
    """Cards of methods that were renamed or removed are noticed."""
    tables = re.findall(r"^\| `(\w+)` \|", (DOCS / "methods.md").read_text("utf-8"), re.MULTILINE)
    headings = re.findall(r"^### (\w+)$", (DOCS / "methods.md").read_text("utf-8"), re.MULTILINE)
    assert set(headings) <= set(tables)


def test_every_decision_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for decision in (DOCS / "decisions").glob("*.md"):
        assert f"decisions/{decision.name}" in navigation


def test_the_example_of_a_custom_score_is_found_by_name():
    (block, *_) = blocks(DOCS / "own-score.md")
    names: dict[str, object] = {}
    exec(block, names)
    assert type(lookup(Score, "cubed-wanda")).__name__ == "CubedWanda"


def messages() -> list[str]:
    """Return all texts of the package but docstrings, with ``…`` for values that are inserted."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_troubleshooting_page_exists():
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    documented = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(documented) > 30
    texts = messages()
    for message in documented:
        # values may stand where the page has an example, such as a number or a name
        words = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        assert any(re.search(".*".join(words), text, re.DOTALL) for text in texts), message


def test_no_page_has_places_to_be_filled():
    for page in PAGES:
        assert not re.findall(r"^[A-Z]{4,}$|\b(?:TODO|TBD|FIXME)\b", page.read_text("utf-8"), re.M)


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"site_name: symprune-lightning {version}\n" in (ROOT / "mkdocs.yml").read_text("utf-8")
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_every_public_name_is_in_the_api_pages():
    pages = "".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    for name in symprune_lightning.__all__:
        module = getattr(symprune_lightning, name).__module__
        entries = (f"symprune_lightning.{name}", f"{module}.{name}", module)
        assert any(f"::: {entry}\n" in pages for entry in entries), name
