"""Sensitivity of the loss to the outputs of layers, from one backward pass of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.distributed.dtensor import is_dtensor
from symprune_lightning.engine.forward.calibration import Calibration, logits_of
from symprune_lightning.engine.forward.padding import valid_tokens
from symprune_lightning.engine.forward.recorder import drop_padding, valid_rows
from symprune_lightning.engine.forward.sums import InputMoments
from symprune_lightning.engine.layers.base import Layer, Tokens, watch_layers
from symprune_lightning.functional.statistics import Statistics

Loss = Callable[[nn.Module, Any], Tensor]
"""Returns the summed loss of the model on one batch."""

CHUNK = 512
"""Tokens whose labels are drawn at once: bounds the memory of the probabilities."""


def measure_sensitivity(
    layers: Sequence[Layer],
    calibration: Calibration,
    *,
    max_batches: int | None = None,
    loss: Loss | None = None,
) -> dict[str, Statistics]:
    """Return the second moments of inputs and output gradients of the dense model.

    Each batch runs forward and backward once. Without ``loss``, the labels of every position are
    drawn from the model's own distribution, so that ``E[(∂L/∂y_q)²]`` is the diagonal of the Fisher
    information, and no labels of the data are needed. No gradient of a weight is computed.

    Args:
        layers: The layers to prune.
        calibration: The dense model and this rank's batches, which must be a list.
        max_batches: Number of batches to use over all ranks; ``None`` for all.
        loss: Replaces the loss of drawn labels.

    Returns:
        Layer name to statistics with ``input`` and ``output_gradient``, summed over ranks. Layers
        that no batch reached are missing.

    Raises:
        ValueError: The weights are sharded or not all in memory, there are no batches, or the
            model returns no logits.
    """
    _check_placement(layers, calibration)
    communicator = calibration.communicator
    inputs = {x.name: InputMoments(x.shape[1], x.parameter.device) for x in layers}
    gradients = {x.name: InputMoments(x.shape[0], x.parameter.device) for x in layers}
    valid: Tensor | None = None

    def add(
        sums: Mapping[str, InputMoments], layer: Layer, x: Tensor, tokens: Tokens | None = None
    ) -> None:
        kept = drop_padding(x.detach(), valid_rows(valid, layer, tokens))
        with torch.autocast(x.device.type, enabled=False):
            if kept.numel():
                sums[layer.name].update(kept)

    count = 0
    watched = watch_layers(layers, lambda *v: add(inputs, *v), lambda *v: add(gradients, *v))
    with torch.enable_grad(), _frozen(calibration.model), watched:
        for number, batch in _numbered(calibration, max_batches):
            count += 1
            valid = valid_tokens(batch, calibration.model)
            if loss is None:
                total = _drawn_loss(calibration, batch, number)
            else:
                total = loss(calibration.model, batch)
            total.backward()  # type: ignore[no-untyped-call]
    calibration.check_not_empty(count)
    return dict(_reduced(layers, inputs, gradients, communicator))


def _numbered(calibration: Calibration, max_batches: int | None) -> Iterator[tuple[int, Any]]:
    """Yield this rank's batches with their number over all ranks."""
    rank, size = calibration.communicator.data_rank, calibration.communicator.data_world_size
    numbered = ((rank + i * size, batch) for i, batch in enumerate(calibration.batches))
    if max_batches is None:
        yield from numbered
    else:
        own = max(0, -(-(max_batches - rank) // size))
        yield from islice(numbered, own)


def _drawn_loss(calibration: Calibration, batch: Any, number: int) -> Tensor:
    """Return the summed cross-entropy of labels drawn from the model's own distribution."""
    output = calibration.forward(calibration.model, batch)
    logits = logits_of(output)
    if logits is None or not _are_classes(calibration.model, logits):
        shape = "" if logits is None else f" of shape {tuple(logits.shape)}"
        raise ValueError(
            f"sensitivity needs logits, (batch, classes) or (batch, tokens, classes) with two "
            f"classes or more, and forward returned {type(output).__name__}{shape}: pass loss=, or "
            f"define calibration_loss(batch) in the LightningModule"
        )
    mask = valid_tokens(batch, calibration.model)
    flat = logits.flatten(0, -2)
    if mask is not None and mask.numel() == len(flat):
        flat = flat[mask.flatten()]
    # Seeded by the batch, so that labels do not depend on the number of ranks; on the CPU, so that
    # they do not depend on the device.
    generator = torch.Generator().manual_seed(number)
    total = flat.new_zeros((), dtype=torch.float32)
    for chunk in torch.split(flat, CHUNK):
        labels = _draw(chunk.detach().float().softmax(-1), generator)
        total = total + F.cross_entropy(chunk.float(), labels, reduction="sum")
    return total


def _are_classes(model: nn.Module, logits: Tensor) -> bool:
    """Return whether the last dimension of logits is that of classes, as far as is known.

    With four dimensions it is the width of an image, unless it is the size of the vocabulary.
    """
    config: Any = getattr(model, "config", None)
    is_text = logits.shape[-1] == getattr(config, "vocab_size", None)
    return logits.shape[-1] > 1 and (logits.dim() in (2, 3) or (logits.dim() > 3 and is_text))


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index per row by the inverse of the cumulative distribution.

    About eight times faster than ``torch.multinomial`` for a vocabulary of 50,000 on a CPU.
    """
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand((len(probabilities), 1), generator=generator)
    level = uniform.to(probabilities.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level)[:, 0].clamp_max(probabilities.shape[1] - 1)


def _reduced(
    layers: Sequence[Layer],
    inputs: Mapping[str, InputMoments],
    gradients: Mapping[str, InputMoments],
    communicator: Communicator,
) -> Iterator[tuple[str, Statistics]]:
    """Sum over ranks, and yield the statistics of the layers that were reached."""
    sums = [s for x in layers for s in (inputs[x.name], gradients[x.name])]
    communicator.all_reduce_sum_([total for s in sums for total in s.totals.values()])
    reached = [x for x in gradients.values() if int(x.totals["tokens"])]
    if reached and not any(bool(x.totals["total_square"].any()) for x in reached):
        raise ValueError(
            "all gradients of the loss are zero: check loss=, or calibration_loss(batch) of the "
            "LightningModule, that the model does not detach its output, and its precision (small "
            "gradients are zero in float16)"
        )
    for layer in layers:
        gradient = gradients[layer.name].value
        if int(gradient.tokens):
            energy = gradient.total_square / gradient.tokens
            if not bool(energy.isfinite().all()):
                raise ValueError(
                    f"the gradients of layer {layer.name} are not finite; check the model's "
                    f"precision (float16 overflows: try bfloat16 or float32)"
                )
            yield (
                layer.name,
                Statistics(layer.name, input=inputs[layer.name].value, output_gradient=energy),
            )


def add_gradient(
    layer: Layer, statistics: Statistics, sensitivity: Mapping[str, Statistics]
) -> Statistics:
    """Return the statistics of a layer with its ``output_gradient``, if gradients were measured.

    The dense model may send no token to an expert that is measured later, on other tokens. All its
    outputs then have the mean of the layers that were measured.
    """
    if not sensitivity:
        return statistics
    if layer.name in sensitivity:
        gradient = sensitivity[layer.name].output_gradient
    else:
        measured = [s.output_gradient for s in sensitivity.values()]
        energies = torch.stack([x.mean() for x in measured if x is not None])
        gradient = energies.mean().expand(layer.shape[0])
    return replace(statistics, output_gradient=gradient)


def _check_placement(layers: Sequence[Layer], calibration: Calibration) -> None:
    if not calibration.placement.always_loaded:
        raise ValueError(
            "sensitivity needs a backward pass through the full model: it cannot be combined with "
            "streaming"
        )
    if any(is_dtensor(layer.parameter) for layer in layers):
        raise ValueError(
            "sensitivity is not supported for sharded models (FSDP2, tensor parallel): use "
            "strategy='ddp'"
        )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disable ``requires_grad`` of all parameters: backward computes activation gradients only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
