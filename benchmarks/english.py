"""Extract a general English text from the Debian package ``anarchism`` (An Anarchist FAQ).

    apt-get download anarchism && dpkg -x anarchism_*.deb anarchism
    python benchmarks/english.py anarchism/usr/share/doc/anarchism/html english.jsonl

1.6 million words of prose by many authors, under a free licence, from a mirror that is reachable
where model hubs are not. One document per section, so that calibration and evaluation text come
from different sections.
"""

from __future__ import annotations

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path

MIN_WORDS = 200
"""Shorter sections are headings, tables of contents and links."""


class Sections(HTMLParser):
    """Collects the paragraphs of a page, one list per section."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[list[str]] = [[""]]

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Begin a section at a heading, and a paragraph at a block element."""
        if tag in ("h1", "h2", "h3"):
            self.sections.append([""])
        elif tag in ("p", "blockquote", "li", "br"):
            self.sections[-1].append("")

    def handle_data(self, data: str) -> None:
        """Add text to the current paragraph."""
        self.sections[-1][-1] += data


def documents(folder: Path) -> list[str]:
    """Return the sections of all pages, in the order of their file names."""
    texts = []
    for page in sorted(folder.glob("*.html")):
        parser = Sections()
        parser.feed(page.read_text("utf-8", errors="replace"))
        for paragraphs in parser.sections:
            lines = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs]
            text = "\n\n".join(line for line in lines if line)
            if len(text.split()) >= MIN_WORDS:
                texts.append(text)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder of the HTML pages")
    parser.add_argument("output", type=Path, help="the .jsonl file to write")
    options = parser.parse_args()
    texts = documents(options.folder)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(texts)} documents, {sum(len(text.split()) for text in texts):,} words")


if __name__ == "__main__":
    main()
