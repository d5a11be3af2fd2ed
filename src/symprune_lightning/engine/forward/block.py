"""Calls of decoder blocks: on copies of their arguments, and kept for block reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from symprune_lightning.engine.forward.modes import TorchModes
from symprune_lightning.engine.forward.offload import OffloadedTensor
from symprune_lightning.engine.forward.padding import aligned

HIDDEN_STATES = "hidden_states"
"""Name of the hidden states among the keyword arguments, as in transformers."""


@dataclass
class BlockCall:
    """The call of a block by one batch, which is suspended in front of it.

    Attributes:
        number: Global index of the batch over all ranks.
        args: Positional arguments.
        kwargs: Keyword arguments.
        target: What the dense block returned; its first tensor.
        valid: Bool, one per token: False where it is padding; ``None`` without padding.
        modes: The modes of the batch's forward, to be restored when it is called again.
        offloaded: Tensors among these that are offloaded while the batch waits.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Tensor
    valid: Tensor | None
    modes: TorchModes
    offloaded: Sequence[OffloadedTensor] = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding; the target may be offloaded."""
        axes = self.target.shape[:-1]
        valid = aligned(self.valid, axes)
        return math.prod(axes) if valid is None else int(valid.sum())

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Load the offloaded tensors inside the context."""
        with ExitStack() as stack:
            for tensor in self.offloaded:
                stack.enter_context(tensor.loaded())
            yield


def call_on_copies(
    block: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    x: Tensor | None = None,
) -> object:
    """Call a block on copies of its arguments, since it may write to them.

    Args:
        block: The block.
        args: Positional arguments.
        kwargs: Keyword arguments.
        x: Replaces the hidden states.
    """
    args, kwargs = tree_map(_copy, (args, kwargs))
    if x is not None and args:
        args = (x.clone(), *args[1:])
    elif x is not None:
        kwargs = {**kwargs, HIDDEN_STATES: x.clone()}
    return block(*args, **kwargs)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    # a KV cache of transformers, to which every call appends
    is_cache = hasattr(value, "get_seq_length") and hasattr(value, "update")
    return deepcopy(value) if is_cache else value


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states among the arguments of a block."""
    x = args[0] if args else kwargs.get(HIDDEN_STATES)
    return x if isinstance(x, Tensor) else None


def first_tensor(output: object) -> Tensor | None:
    """Return the first floating-point tensor of what a block returns."""
    tensors = (x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())
    return next(tensors, None)
