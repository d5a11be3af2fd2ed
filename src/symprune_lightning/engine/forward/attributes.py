"""Attributes that modules assign during a forward, kept apart for each suspended batch."""

from __future__ import annotations

import dis
import inspect
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

MAX_ENTRIES = 1000
"""Entries of a container up to which its contents are kept: larger ones are tables."""

_INTERNAL = nn.Module().__dict__.keys() | {"forward"}
_MISSING = object()


class ForwardAttributes:
    """Attributes of a model's modules that a forward may change, such as ``self.skip = x``.

    A forward that is suspended after such an assignment must find its own value when it continues,
    and not that of the batch that ran meanwhile. Covered are attributes and buffers that a method
    assigns, and the entries of lists, dicts, sets and deques that are attributes; tensors that are
    changed in place and objects of other classes are not.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        names = {module: _changeable(module) for module in model.modules()}
        self._names = {module: found for module, found in names.items() if found}

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Restore all attributes at the end of a context in which other code runs."""
        before = [
            (module, name, value, _entries(value))
            for module, names in self._names.items()
            for name in names
            for value in (_get(module, name),)
        ]
        try:
            yield
        finally:
            for module, name, value, entries in before:
                _restore(module, name, value, entries)


def _changeable(module: nn.Module) -> list[str]:
    """Return the names of attributes that a forward may change."""
    cls: Any = type(module)
    # declared by the class: settings, such as the plans of transformers' models
    own = {name: value for name, value in vars(module).items() if not hasattr(type(module), name)}
    containers = {name for name, value in own.items() if _may_hold_tensors(value)}
    fixed = {*module._modules, *module._parameters, *_INTERNAL}
    return sorted((containers | _assigned(cls)) - fixed)


@cache
def _assigned(cls: type) -> frozenset[str]:
    """Return the names of attributes that methods assign, other than the constructor."""
    names: set[str] = set()
    for base in cls.__mro__:
        # torch's own modules change buffers in place; the base classes of transformers' models
        # and of Lightning's modules assign while they load, generate and train
        if re.match(r"(torch|lightning)\.|transformers\.(?!models\.)", base.__module__):
            continue
        for name, function in vars(base).items():
            method = inspect.unwrap(function) if callable(function) else None
            if name != "__init__" and isinstance(method, FunctionType):
                instructions = dis.get_instructions(method.__code__)
                names |= {x.argval for x in instructions if x.opname == "STORE_ATTR"}
    return frozenset(names)


def _may_hold_tensors(value: Any) -> bool:
    entries = value.values() if isinstance(value, dict) else value
    return _is_container(value) and not any(isinstance(entry, str) for entry in entries)


def _is_container(value: object) -> bool:
    return isinstance(value, list | dict | set | deque) and len(value) <= MAX_ENTRIES


def _get(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, module._buffers.get(name, _MISSING))


def _entries(value: Any) -> Any:
    """Return a copy of a container; ``None`` for another value."""
    if not _is_container(value):
        return None
    return dict(value) if isinstance(value, dict) else list(value)


def _restore(module: nn.Module, name: str, value: Any, entries: Any) -> None:
    if _get(module, name) is not value:
        if value is _MISSING:
            delattr(module, name)
        else:
            setattr(module, name, value)
    if entries is not None and not _is_same(_entries(value), entries):
        value.clear()
        extend = value.extend if isinstance(value, list | deque) else value.update
        extend(entries)


def _is_same(now: Any, before: Any) -> bool:
    if now is None or len(now) != len(before):
        return False
    if isinstance(before, dict):
        return all(key in now and now[key] is value for key, value in before.items())
    return all(a is b for a, b in zip(now, before, strict=True))
