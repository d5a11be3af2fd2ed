"""A model and the calibration batches that run through it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from symprune_lightning.engine.distributed.communicator import SINGLE_PROCESS, Communicator
from symprune_lightning.engine.forward.inputs import check_batch
from symprune_lightning.engine.placement import WeightPlacement

Forward = Callable[[nn.Module, Any], object]
"""Runs the model on one batch."""

_NO_TENSORS = (str, bytes, int, float, np.ndarray, type(None))


@dataclass(frozen=True)
class Calibration:
    """A model and the batches that run through it.

    Attributes:
        model: The model, in the mode and on the device in which it is run.
        batches: This rank's calibration batches.
        forward: Runs the model on one batch.
        placement: Placement of the weights.
        communicator: The ranks that prune together.
        offload: Target of the hidden states of batches that wait in front of a block: ``"cpu"``,
            a folder, or ``None`` to leave them on the device.
        measures_all_tokens: Whether experts are measured on all tokens, also those that are not
            routed to them.
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward
    placement: WeightPlacement
    communicator: Communicator = SINGLE_PROCESS
    offload: str | os.PathLike[str] | None = None
    measures_all_tokens: bool = False

    def check_not_empty(self, count: int) -> None:
        """Raise ``ValueError`` if no rank has a batch; a collective.

        Args:
            count: Number of this rank's batches.
        """
        if not self.communicator.union_of_indices([0] if count else [], 1):
            raise ValueError(
                "the calibration set is empty: pass at least one batch; an iterator that was read "
                "before has none left, so pass a list or a data loader"
            )


def call_model(model: nn.Module, batch: Any, advice: str) -> object:
    """Call a model: mappings as keyword arguments, tuples and lists as positional ones.

    A mapping is passed whole to a model that requires one argument and takes none of the keys.

    Args:
        model: The model.
        batch: The batch.
        advice: What to do if the model has other arguments.

    Raises:
        TypeError: The model has other arguments, or the batch holds no tensors.
    """
    is_whole = isinstance(batch, Mapping) and _takes_whole(model, batch)
    try:
        return _call(model, batch, is_whole)
    except Exception as error:
        explanation = _explanation(model, batch, is_whole, error)
        if explanation is None:
            error.add_note(f"while the model ran on a calibration batch: {_describe(batch)}")
            raise
        raise TypeError(f"{error} ({explanation}; {advice})") from error


def _explanation(model: nn.Module, batch: object, is_whole: bool, error: Exception) -> str | None:
    """Return why the model does not take a batch; ``None`` if the error is another one."""
    kind = _type_without_tensors(batch)
    if kind is not None and isinstance(
        error, TypeError | AttributeError | LookupError | ValueError
    ):
        return f"a calibration batch has type {kind}: batches hold tensors, such as token ids"
    if isinstance(error, AttributeError) and is_whole:
        return (
            f"the mapping was passed as it is, since {type(model).__name__}.forward has one "
            f"argument and takes none of its keys"
        )
    if isinstance(error, TypeError):
        return "mappings are passed as keyword arguments, tuples and lists as positional ones"
    return None


def _call(model: nn.Module, batch: Any, is_whole: bool) -> object:
    if isinstance(batch, Mapping):
        check_batch(model, batch)
        return model(batch) if is_whole else model(**batch)
    if not isinstance(batch, tuple | list):
        return model(batch)
    try:
        inspect.signature(model.forward).bind(*batch)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__}.forward does not take a batch of {len(batch)} values: {error}"
        ) from error
    return model(*batch)


def _type_without_tensors(batch: object) -> str | None:
    """Return the type of a batch that no common model takes; ``None`` if it may hold tensors."""
    name = type(batch).__name__
    if isinstance(batch, _NO_TENSORS):
        return name
    if isinstance(batch, tuple | list) and batch and all(isinstance(x, _NO_TENSORS) for x in batch):
        return f"{name}[{', '.join(sorted({type(x).__name__ for x in batch}))}]"
    return None


def _describe(batch: object) -> str:
    """Return the shapes of a batch's tensors; of the first few of a long list."""
    if isinstance(batch, Tensor):
        return str(tuple(batch.shape))
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_describe(value)}" for key, value in batch.items())
    if isinstance(batch, tuple | list):
        return ", ".join(_describe(value) for value in batch[:8])
    return type(batch).__name__


def _takes_whole(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether ``forward`` requires one argument and takes none of the keys."""
    parameters = inspect.signature(model.forward).parameters
    if batch.keys() & parameters.keys():
        return False  # a key that it does not take is a mistake, which the call names
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.kind in kinds and p.default is p.empty]
    return len(required) == 1


def logits_of(output: object) -> Tensor | None:
    """Return the logits of a model's output: the output itself if it is a tensor, else ``.logits``.

    ``None`` if it has none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None
