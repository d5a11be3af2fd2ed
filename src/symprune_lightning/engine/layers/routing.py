"""The tokens that a mixture of experts routes to each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

ROUTED_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"""Arguments of the forward of the uniform class of experts of transformers."""


@dataclass(frozen=True)
class Routing:
    """The call of an experts module by one batch.

    Attributes:
        hidden_states: Its input, ``(tokens, hidden)``.
        top_k_index: Experts of each token, ``(tokens, k)``.
        only: The expert that is measured in this call; ``None`` for all.
        is_measured: Whether uses in this call are visited.
    """

    hidden_states: Tensor
    top_k_index: Tensor
    only: int | None = None
    is_measured: bool = True

    def tokens(self, rows: slice, count: int) -> Tensor | None:
        """Return the token of some rows of the grouped product, which is sorted by expert.

        ``None`` if the module received another number of tokens than ``count``.
        """
        if len(self.hidden_states) != count:
            return None
        order = torch.sort(self.top_k_index.reshape(-1)).indices
        return (order // self.top_k_index.shape[-1])[rows]


_Calls = MutableMapping[greenlet, Routing]

# by greenlet: several batches are suspended in one module at the same time
_ROUTINGS: MutableMapping[nn.Module, _Calls] = WeakKeyDictionary()


def _calls(module: nn.Module) -> _Calls:
    """Return the current calls of a module."""
    if module not in _ROUTINGS:
        _ROUTINGS[module] = WeakKeyDictionary()
    return _ROUTINGS[module]


def current_routing(module: nn.Module) -> Routing | None:
    """Return the routing of the call that is running; ``None`` if it is not known."""
    return _calls(module).get(getcurrent())


@contextmanager
def note_routing(module: nn.Module) -> Iterator[None]:
    """Keep the routing of the current call of an experts module."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = _calls(module)
        before = calls.get(getcurrent())
        hidden_states, top_k_index = _bind(args, kwargs)[:2]
        is_measured = before is None or before.is_measured
        calls[getcurrent()] = Routing(hidden_states, top_k_index, is_measured=is_measured)

    def forget(*_: object) -> None:
        # a suspended batch would keep the hidden states of every module that it has passed
        _calls(module).pop(getcurrent(), None)

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True),
        module.register_forward_hook(forget, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _ROUTINGS.pop(module, None)


def _bind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, router indices and router weights of a call."""
    given = dict(zip(ROUTED_ARGUMENTS, args, strict=False)) | dict(kwargs)
    hidden_states, top_k_index, top_k_weights = (given[name] for name in ROUTED_ARGUMENTS)
    return hidden_states, top_k_index, top_k_weights


@contextmanager
def measure_all_tokens(module: nn.Module, is_needed: Callable[[], bool]) -> Iterator[None]:
    """Before each call of an experts module, call every expert with all tokens.

    Args:
        module: A module of the uniform class of experts, inside ``note_routing``.
        is_needed: Called before each call; returns whether a layer is measured.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_needed():
            return
        hidden_states, top_k_index, top_k_weights = _bind(args, kwargs)
        calls = _calls(module)
        ones = torch.ones_like(top_k_weights[:, :1])
        for index in range(int(module.num_experts)):  # type: ignore[arg-type]
            alone = torch.full_like(top_k_index[:, :1], index)
            calls[getcurrent()] = Routing(hidden_states, alone, only=index)
            module.forward(hidden_states, alone, ones)
        # the call that follows gives the output, and is not measured again
        calls[getcurrent()] = Routing(hidden_states, top_k_index, is_measured=False)

    handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
