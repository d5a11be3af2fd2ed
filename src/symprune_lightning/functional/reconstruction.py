"""Block reconstruction: training the kept weights of a block to reproduce the dense output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from symprune_lightning.functional.schedule import warmup_cosine

Weights = dict[str, Tensor]
"""Parameter name to float32 master copy, zero where pruned."""

ReconstructionTarget = Literal["block", "model"]
"""Target of a block's reconstruction. ``"block"``: the output of the dense block for the hidden
states of the pruned model. ``"model"``: the output of the same block in the dense model, so that
each block also compensates for the errors of the preceding blocks."""

LEARNING_RATES = (5e-3, 1e-2, 2e-2)
"""Learning rates that are tried if none is given."""

PROBE_STEPS = 8
"""Number of steps for which each of them is tried."""


class Objective(Protocol):
    """The error of a block on the calibration batches, over all ranks."""

    @property
    def batches(self) -> Sequence[int]:
        """Global indices of the batches."""

    def error(self, weights: Mapping[str, Tensor], batches: Sequence[int]) -> float:
        """Return the mean over tokens of the squared error relative to the target's square."""

    def gradient(self, weights: Mapping[str, Tensor], batches: Sequence[int]) -> Weights:
        """Return the gradient of ``error``."""


@dataclass(frozen=True)
class Fit:
    """Result of a reconstruction.

    Attributes:
        weights: The best weights, or ``None`` if none were better than the initial ones.
        errors: Error on the held-out batches before training and after each epoch.
        learning_rate: The learning rate, relative to the root mean square of each tensor.
        steps: Number of optimizer steps, without those of the probe.
    """

    weights: Weights | None
    errors: list[float]
    learning_rate: float
    steps: int


@dataclass(frozen=True)
class BlockReconstruction:
    """Trains the kept weights of each decoder block to reproduce the output of the dense model.

    After a block is pruned (and its weights updated), Adam minimises over its kept weights
    ``mean_t ‖f(x_t) − y_t‖² / ‖y_t‖²``, where ``x_t`` are the inputs that come through the pruned
    blocks before it, and ``y_t`` the targets. Attention and MLP of a block compensate together for
    what its masks removed, which no method for a single matrix can do (arXiv 2510.14444). The error
    is divided by each token's own square, since a few tokens have activations that are larger by
    orders of magnitude and would dominate the plain mean.

    The last tenth of the batches is held out: the weights of the epoch with the lowest error on it
    are kept, and the initial weights if no epoch is better, so that a block can only improve.
    Pruned weights stay zero. Needs ``calibration_order="block"``.

    Attributes:
        epochs: Passes over the calibration batches for each block. Default: 6.
        learning_rate: Learning rate of Adam relative to the root mean square of the kept weights of
            each tensor, so that it suits models of any scale. Warms up, then decays to zero along a
            cosine. ``None`` tries 0.005, 0.01 and 0.02 for eight steps in each block, which favours
            rates that are lower than the best ones for a whole training.
        batches_per_step: Calibration batches per optimizer step, over all ranks. Default: 1.
        target: ``"model"`` or ``"block"``, see
            [`ReconstructionTarget`][symprune_lightning.functional.reconstruction.ReconstructionTarget].
        train_norms: Whether the norms and biases of the block are trained too. Default: ``False``.
        seed: Seed of the order of the batches. Default: 0.

    Raises:
        ValueError: A number is not positive, or ``target`` is unknown.

    Examples:
        >>> BlockReconstruction(epochs=2).target
        'model'
    """

    epochs: int = 6
    learning_rate: float | None = 1e-2
    batches_per_step: int = 1
    target: ReconstructionTarget = "model"
    train_norms: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batches_per_step"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.target not in get_args(ReconstructionTarget):
            raise ValueError(f"target is {self.target!r}; it must be 'block' or 'model'")

    def fit(
        self,
        weights: Weights,
        masks: Mapping[str, Tensor],
        objective: Objective,
        on_epoch: Callable[[int, float], None] = lambda epoch, error: None,
    ) -> Fit:
        """Train weights.

        Args:
            weights: The initial weights. Not modified.
            masks: Bool masks, True = kept, of the shape of the weights; weights without one are
                trained in full.
            objective: The error of the block.
            on_epoch: Called with the number of finished epochs and the held-out error, also before
                the first one.

        Returns:
            The best weights and the held-out errors.

        Raises:
            ValueError: There are fewer than two batches, or the error is not finite.
        """
        training, held_out = split_batches(objective.batches)
        errors = [objective.error(weights, held_out)]
        if not math.isfinite(errors[0]):
            raise ValueError(
                "the output of a block is not finite; check the model's precision (float16 "
                "overflows: try bfloat16 or float32)"
            )
        on_epoch(0, errors[0])
        rate = self.learning_rate
        if rate is None:
            rate = self._probe(weights, masks, objective, training, held_out)
        trainer = _Trainer(weights, masks, objective, rate)
        per_epoch = math.ceil(len(training) / self.batches_per_step)
        best: Weights | None = None
        steps = 0
        for epoch in range(self.epochs):
            for step in self._steps(training, epoch):
                trainer.step(step, warmup_cosine(steps, self.epochs * per_epoch))
                steps += 1
            error = objective.error(trainer.weights, held_out)
            if not math.isfinite(error):
                break  # diverged, or overflowed in half precision
            if error < min(errors):
                best = {name: weight.detach().clone() for name, weight in trainer.weights.items()}
            errors.append(error)
            on_epoch(epoch + 1, error)
        return Fit(best, errors, rate, steps)

    def _steps(self, training: Sequence[int], epoch: int) -> list[list[int]]:
        """Return the batches of each step of an epoch, the same on all ranks."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
        size = self.batches_per_step
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _probe(
        self,
        weights: Weights,
        masks: Mapping[str, Tensor],
        objective: Objective,
        training: Sequence[int],
        held_out: Sequence[int],
    ) -> float:
        """Return the learning rate with the lowest error after a few steps."""
        steps = self._steps(training, 0)[:PROBE_STEPS]
        errors = {}
        for rate in LEARNING_RATES:
            trainer = _Trainer(weights, masks, objective, rate)
            for i, step in enumerate(steps):
                trainer.step(step, warmup_cosine(i, len(steps)))
            errors[rate] = objective.error(trainer.weights, held_out)
        return min(errors, key=errors.__getitem__)


class _Trainer:
    """Adam on copies of the weights, with masked gradients."""

    def __init__(
        self, weights: Weights, masks: Mapping[str, Tensor], objective: Objective, rate: float
    ) -> None:
        self.weights = {
            name: weight.detach().clone().requires_grad_() for name, weight in weights.items()
        }
        self._masks = masks
        self._objective = objective
        self._rates = {name: rate * scale for name, scale in _scales(weights).items()}
        groups = [{"params": [w], "lr": self._rates[name]} for name, w in self.weights.items()]
        # fused takes a quarter of the time on a CPU
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)

    def step(self, batches: Sequence[int], factor: float) -> None:
        """Take one step, with the learning rates times a factor."""
        gradients = self._objective.gradient(self.weights, batches)
        for name, weight in self.weights.items():
            weight.grad = gradients[name]
            # pruned weights: with gradients of zero, the moments of Adam and its steps are zero too
            if name in self._masks:
                weight.grad.mul_(self._masks[name])
        for group, rate in zip(self._optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()


def split_batches(batches: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Divide batches into those for training and the last tenth, which is held out.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(batches) < 2:
        raise ValueError(
            f"reconstruct needs at least 2 calibration batches, one of which is held out, but got "
            f"{len(batches)}: use a smaller batch_size or more sequences"
        )
    count = math.ceil(len(batches) / 10)
    return batches[:-count], batches[-count:]


def _scales(weights: Weights) -> dict[str, float]:
    """Return the root mean square of the weights of each tensor that are not zero."""
    scales = {}
    for name, weight in weights.items():
        count = int(weight.count_nonzero())
        scales[name] = math.sqrt(float(weight.square().sum()) / max(count, 1))
    # a bias that is zero has no scale of its own
    smallest = min((scale for scale in scales.values() if scale), default=0.0)
    return {name: scale or smallest for name, scale in scales.items()}
