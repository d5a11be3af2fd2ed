"""Sources of calibration and evaluation data, and their description in the manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

from symprune_lightning.data.protocols import C4, PROTOCOLS, PTB, WikiText2, WindowProtocol
from symprune_lightning.data.self_text import SelfText
from symprune_lightning.data.texts import SELF, Texts, TextSource

# The order matters, see Texts.
Evaluation = (
    TextSource | WindowProtocol | Mapping[str, WindowProtocol | Texts | None] | None | Texts
)


def source_settings(source: Any) -> Any:
    """Return a JSON-serializable description of a source."""
    if isinstance(source, Mapping):
        return {"sets": {name: source_settings(part) for name, part in source.items()}}
    if isinstance(source, SelfText):
        return {SELF: asdict(source)}
    if isinstance(source, WindowProtocol):
        names = [name for name, protocol in PROTOCOLS.items() if protocol == source]
        return names[0] if names else {type(source).__name__: asdict(source)}
    if isinstance(source, TextSource):
        return asdict(source)
    if source is None or isinstance(source, str | PathLike):
        return None if source is None else os.fspath(source)
    return {"iterable": type(source).__name__}


def source_from_settings(settings: Any) -> Any:
    """Return the source that ``source_settings`` describes.

    Raises:
        ValueError: It was an iterable in memory.
    """
    if not isinstance(settings, Mapping):
        return settings
    if "iterable" in settings:
        raise ValueError("it was pruned or evaluated on data in memory, which is not stored")
    if "sets" in settings:
        return {name: source_from_settings(part) for name, part in settings["sets"].items()}
    if SELF in settings:
        return SelfText(settings[SELF]["temperature"], tuple(settings[SELF]["prefixes"]))
    for protocol in (WikiText2, C4, PTB):
        if protocol.__name__ in settings:
            return protocol(**settings[protocol.__name__])
    if "path" not in settings:
        raise ValueError(f"it was evaluated on {', '.join(settings)}, which is not of this package")
    return TextSource(**settings)
