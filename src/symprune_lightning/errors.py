"""Exceptions and warnings of the package.

Invalid arguments raise ``ValueError`` or ``TypeError`` and problems with files raise ``OSError``.
The classes below are for states that callers may want to handle separately.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_of(names: Sequence[str]) -> str:
    """Return the first three names of a list for a message.

    Examples:
        >>> first_of(["a", "b", "c", "d"])
        'a, b, c, …'
    """
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)


class PruningError(RuntimeError):
    """Pruning stopped part-way: some layers are already sparse, the others are still dense."""


class JournalError(ValueError):
    """A journal belongs to another run, cannot be read, or does not match the resumed run."""


class RankError(RuntimeError):
    """Another rank failed; the message names the rank and its error."""


class VerificationError(RuntimeError):
    """A checkpoint does not match its manifest."""


class SweepError(RuntimeError):
    """At least one recipe of a sweep failed."""


class PruningWarning(UserWarning):
    """A property of a pruning run that its masks do not show, such as layers left dense."""
