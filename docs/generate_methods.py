"""Generate the method tables of docs/methods.md from the classes.

python docs/generate_methods.py            # rewrite the tables
python docs/generate_methods.py --check    # exit with 1 if they are out of date
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from symprune_lightning.cli import list as cli_list
from symprune_lightning.functional.registry import leaves

PAGE = Path(__file__).with_name("methods.md")
PACKAGE = "symprune_lightning."
BASES: dict[str, type[Any]] = {
    kind: resolve_name(f"symprune_lightning.functional.{base}")
    for kind, base in cli_list.BASES.items()
}
REGION = re.compile(r"<!-- generated: ([a-z ]+) -->\n.*?<!-- end -->", re.DOTALL)


def generate(page: str) -> str:
    """Return the text of the page with current tables.

    Raises:
        ValueError: The page does not have exactly one region for each kind of method.
    """
    names = REGION.findall(page)
    if sorted(names) != sorted(BASES):
        raise ValueError(f"the page has regions for {names}, but needs {list(BASES)}")
    return REGION.sub(lambda match: _region(match[1]), page)


def _region(name: str) -> str:
    # Python-Markdown recognises a table only after a blank line
    return f"<!-- generated: {name} -->\n\n{_table(BASES[name])}\n<!-- end -->"


def _table(base: type[Any]) -> str:
    methods = [cls for cls in leaves(base) if cls.__module__.startswith(PACKAGE)]
    # patterns read scores only
    has_needs = any(hasattr(cls, "needs") for cls in methods)
    heading = ["name", "definition", *["statistics"] * has_needs, "reference"]
    rows = [heading, ["---"] * len(heading)]
    for cls in methods:
        statistics = [_statistics(cls)] * has_needs
        rows.append([f"`{cls.__name__}`", _summary(cls), *statistics, _link(cls.reference_url)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _summary(cls: type[Any]) -> str:
    """Return the first paragraph of the docstring as a table cell."""
    paragraph = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r"``(.*?)``", lambda match: _code(match[1]), paragraph)


def _code(text: str) -> str:
    # GitHub and Python-Markdown disagree on escaped pipes in code spans of a table
    if "|" not in text:
        return f"`{text}`"
    return f"<code>{text.replace('|', '&#124;')}</code>"


def _statistics(cls: type[Any]) -> str:
    """Return the statistics that the method needs with its default arguments."""
    needs = cls().needs if hasattr(cls, "needs") else ()
    return ", ".join(f"`{need}`" for need in sorted(needs)) or "none"


def _link(url: str) -> str:
    if not url:
        return ""
    number = url.rpartition("/")[2]
    return f"[{f'arXiv {number}' if 'arxiv.org' in url else 'OpenReview'}]({url})"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    page = PAGE.read_text("utf-8")
    generated = generate(page)
    if not options.check:
        PAGE.write_text(generated, encoding="utf-8")
    elif generated != page:
        sys.exit(f"{PAGE} is out of date: run python docs/generate_methods.py")


if __name__ == "__main__":
    main()
