"""Attributes that modules assign during a forward, kept apart for each suspended batch."""

from __future__ import annotations

import dis
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
"""Types of attributes whose entries are kept; subclasses may refuse changes."""

MAX_ENTRIES = 1000
"""Entries of a container up to which they are kept: larger ones are tables."""

PLAIN = (str, int, float, bool, type(None))
"""Types of entries that are settings."""

_BASES = re.compile(r"(torch|lightning)\.|transformers\.(?!models\.)")
"""Modules of base classes that assign attributes while they load, generate and train. Modules of
torch change buffers in place."""

_INTERNAL = nn.Module().__dict__.keys() | {"forward"}
_MISSING = object()


class _Saved(NamedTuple):
    """Value of an attribute, and a copy of its entries if it is a container."""

    module: nn.Module
    name: str
    value: Any
    entries: Any
    num_children: int


class ForwardAttributes:
    """Attributes of a model's modules that a forward may change, such as ``self.skip = x``.

    A forward that is suspended after such an assignment must find its own value when it continues,
    and not that of the batch that ran meanwhile. Covered are attributes and buffers that the code
    of a class (or of a patched ``forward``) assigns, and the entries of lists, dicts, sets and
    deques that are attributes. Tensors that are changed in place, containers inside containers,
    ``setattr``, and objects of other classes are not.

    Args:
        model: The model.
        with_buffers: Whether buffers are covered; not where the weights are loaded block by block
            while batches are suspended.
    """

    def __init__(self, model: nn.Module, *, with_buffers: bool = True) -> None:
        names = {module: _changeable(module, with_buffers) for module in model.modules()}
        self._names = {module: found for module, found in names.items() if found}

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Restore all attributes at the end of a context in which other code runs."""
        before = [_save(module, name) for module, names in self._names.items() for name in names]
        try:
            yield
        finally:
            for saved in before:
                _restore(saved)


def _changeable(module: nn.Module, with_buffers: bool) -> list[str]:
    """Return the names of attributes that a forward may change."""
    containers = {name for name, value in vars(module).items() if _may_hold_tensors(value)}
    cls: Any = type(module)
    assigned, settings = _names_of(cls)
    fixed = {*module._modules, *module._parameters, *_INTERNAL}
    if not with_buffers:
        fixed |= module._buffers.keys()
    return sorted((containers - settings | assigned | _patched(module)) - fixed)


@cache
def _names_of(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return the attributes that methods assign, and those that base classes declare."""
    assigned: set[str] = set()
    declared: set[str] = set()
    for base in cls.__mro__:
        if _BASES.match(base.__module__):
            declared |= vars(base).keys()
            continue
        for name, member in vars(base).items():
            if name != "__init__":
                assigned |= _assigned_by(member)
    return frozenset(assigned), frozenset(declared)


def _patched(module: nn.Module) -> set[str]:
    """Return the attributes that a ``forward`` assigns which was set on the instance."""
    forward = vars(module).get("forward")
    while isinstance(forward, partial):
        forward = forward.func
    return _assigned_by(getattr(forward, "__func__", forward))


def _assigned_by(function: object) -> set[str]:
    """Return the attributes that a function assigns, or one that it wraps."""
    assigned: set[str] = set()
    while isinstance(function, FunctionType):
        assigned |= set(_stored(function.__code__))
        function = vars(function).get("__wrapped__")
    return assigned


def _stored(code: CodeType) -> Iterator[str]:
    """Yield the attributes that code assigns, in nested functions too."""
    yield from (x.argval for x in dis.get_instructions(code) if x.opname == "STORE_ATTR")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _stored(constant)


def _may_hold_tensors(value: Any) -> bool:
    if not _is_container(value):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return not value or any(not isinstance(entry, PLAIN) for entry in entries)


def _is_container(value: Any) -> bool:
    return type(value) in CONTAINERS and len(value) <= MAX_ENTRIES


def _get(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, module._buffers.get(name, _MISSING))


def _entries(value: Any) -> Any:
    """Return a copy of a container; ``None`` for another value."""
    if not _is_container(value):
        return None
    return dict(value) if isinstance(value, dict) else list(value)


def _num_children(module: nn.Module) -> int:
    return len(module._modules) + len(module._parameters)


def _save(module: nn.Module, name: str) -> _Saved:
    value = _get(module, name)
    return _Saved(module, name, value, _entries(value), _num_children(module))


def _restore(saved: _Saved) -> None:
    module, name, value, entries, num_children = saved
    if _num_children(module) != num_children:
        return  # its first call has built it, which its attributes say
    if _get(module, name) is not value:
        # not by setattr: properties and __setattr__ of the class may refuse or register it
        place: dict[str, Any] = module._buffers if name in module._buffers else module.__dict__
        if value is _MISSING:
            del place[name]
        else:
            place[name] = value
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
