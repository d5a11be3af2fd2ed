"""SIGKILL at a chosen call: for scripts that are to die while they write."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def dying_at(calls: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps functions so that the process is killed when that many calls of them have begun.

    All functions that are wrapped by one share the count; 0 never kills.
    """
    left = calls

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    return wrap
