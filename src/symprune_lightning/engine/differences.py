"""Differences between the fingerprints of two runs, as phrases for error messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def fingerprint_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield a phrase for each entry in which two fingerprints differ."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "layers":
            yield from _layer_differences(old or {}, new or {})
        elif key in ("weights", "data"):
            subject = {"weights": "the model's weights", "data": "the calibration data"}[key]
            yield f"{subject} differ"
        else:
            yield f"{key} was {old} and is now {new}"


def _layer_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield the differences of the first layer that differs; the others are likely the same."""
    name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
    old, new = before.get(name), now.get(name)
    if old is None or new is None:
        yield f"layer {name} was {'not ' if old is None else ''}among the layers to prune"
        return
    for key in old:
        if old[key] != new[key]:
            yield f"{key} of layer {name} was {old[key]} and is now {new[key]}"
