"""Registry: look up methods by name among the subclasses of a base class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


def lookup(base: type[T], method: T | str) -> T:
    """Return `method` itself, or a default instance of the subclass with that name.

    Case, hyphens and underscores are ignored. A subclass defined outside the package is available
    as soon as its module is imported.

    Args:
        base: ``Score``, ``MaskRefiner``, ….
        method: An instance, which is returned unchanged, or a name such as ``"ria"``.

    Raises:
        ValueError: No subclass has the name, several have it, or the class has required arguments.
        TypeError: It is neither a name nor an instance.

    Examples:
        >>> from symprune_lightning.functional.scores import Score
        >>> lookup(Score, "ria")
        RIA(alpha=0.5)
    """
    if not isinstance(method, str):
        return checked_instance(base, method)
    candidates = list(leaves(base))
    matches = [c for c in candidates if _normalized(c.__name__) == _normalized(method)]
    if not matches:
        names = ", ".join(sorted({c.__name__ for c in candidates}))
        known = {_normalized(c.__name__): c.__name__ for c in candidates}
        close = get_close_matches(_normalized(method), known, n=1)
        hint = f" (did you mean {known[close[0]]}?)" if close else ""
        raise ValueError(f"no {base.__name__} is called {method!r}{hint}; choose one of: {names}")
    # Picking either class would silently change what the name of a built-in method computes.
    if len(matches) > 1:
        classes = ", ".join(sorted(f"{c.__module__}.{c.__qualname__}" for c in matches))
        raise ValueError(
            f"{method!r} is the name of {len(matches)} {base.__name__} classes: {classes}; rename "
            f"one, or pass an instance"
        )
    return _default_instance(matches[0])


def checked_instance(base: type[T], method: object) -> T:
    """Return `method` if it is an instance of `base`.

    Raises:
        TypeError: It is a class, or of another type.
    """
    if isinstance(method, base):
        return method
    if isinstance(method, type):
        raise TypeError(f"{method.__name__} is a class: pass an instance, {method.__name__}()")
    raise TypeError(
        f"{method!r} is a {type(method).__name__}, and no {base.__name__}: pass an instance or a "
        f"name"
    )


def leaves(base: type[T]) -> Iterator[type[T]]:
    """Iterate over all subclasses of `base` that can be instantiated.

    Examples:
        >>> from symprune_lightning.functional.patterns import Pattern
        >>> [c.__name__ for c in leaves(Pattern)]
        ['Unstructured', 'NM']
    """
    latest: dict[tuple[str, str], type[T]] = {}
    for subclass in subclasses(base):
        # A notebook cell that is run again and `dataclass(slots=True)` define the same class
        # twice, and the first one stays a subclass until it is garbage-collected.
        latest[subclass.__module__, subclass.__qualname__] = subclass
    yield from (c for c in latest.values() if not inspect.isabstract(c))


def subclasses(base: type[T]) -> Iterator[type[T]]:
    """Iterate over all direct and indirect subclasses of `base`, abstract ones included."""
    for subclass in base.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def _default_instance(cls: type[T]) -> T:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in variadic
    ]
    if required:
        raise ValueError(
            f"{cls.__name__} has required arguments ({', '.join(required)}): pass an instance "
            f"instead of its name"
        )
    return cls()


def _normalized(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def check_at_least(minimum: float, **values: float) -> None:
    """Raise ``ValueError`` if a setting of a method is below its minimum.

    Examples:
        >>> check_at_least(0, cycles=50, damping=0.01)
    """
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")
