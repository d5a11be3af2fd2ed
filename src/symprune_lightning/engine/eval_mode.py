"""Eval mode for the duration of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set a module to eval mode, and restore the mode of each of its submodules at the end."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.train(False)
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True
