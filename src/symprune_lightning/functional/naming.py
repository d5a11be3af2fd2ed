"""Methods by name: the subclasses of a base class are its registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def by_name(base: type[T], method: T | str) -> T:
    """The method itself, or a default instance of the subclass of that name.

    Case, hyphens and underscores don't count. A class of your own is found once it is imported.

    Args:
        base: ``Score``, ``MaskRefiner``, ….
        method: An instance, or a name such as ``"ria"``.

    Raises:
        ValueError: No subclass has the name; the message lists those there are.

    Examples:
        >>> from symprune_lightning.functional.scores import Score
        >>> by_name(Score, "ria")
        RIA(alpha=0.5)
    """
    if not isinstance(method, str):
        return method
    found = {_plain(c.__name__): c for c in subclasses(base)}
    if _plain(method) not in found:
        names = ", ".join(sorted(c.__name__ for c in found.values()))
        raise ValueError(f"no {base.__name__} is called {method!r}; there are: {names}")
    return found[_plain(method)]()


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def subclasses(base: type[T]) -> Iterator[type[T]]:
    """All subclasses, those of subclasses too."""
    for subclass in base.__subclasses__():
        yield subclass
        yield from subclasses(subclass)
