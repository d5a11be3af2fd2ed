"""The training loop of block reconstruction, on least-squares problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from symprune_lightning import BlockReconstruction
from symprune_lightning.functional.reconstruction import Weights, split_batches


class LeastSquares:
    """``‖x (w − dense)ᵀ‖²`` relative to the dense output, one input matrix per batch."""

    def __init__(self, inputs: Sequence[Tensor], dense: Tensor) -> None:
        self.inputs, self.dense = inputs, dense
        self.batches = range(len(inputs))
        self.trained: list[list[int]] = []
        self.fail = False

    def _loss(self, weight: Tensor, batches: Sequence[int]) -> Tensor:
        x = torch.cat([self.inputs[i] for i in batches])
        return (x @ (weight - self.dense).T).square().sum() / (x @ self.dense.T).square().sum()

    def error(self, weights: Mapping[str, Tensor], batches: Sequence[int]) -> float:
        return float(self._loss(weights["w"].detach(), batches))

    def gradient(self, weights: Mapping[str, Tensor], batches: Sequence[int]) -> Weights:
        self.trained.append(list(batches))
        with torch.enable_grad():
            weight = weights["w"].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._loss(weight, batches), [weight])
        return {"w": gradient}


def problem(batches: int = 20, seed: int = 0) -> tuple[LeastSquares, Tensor, Tensor]:
    """Correlated inputs, a dense weight, and a mask that keeps half of it."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 8, generator=generator)
    inputs = [torch.randn(32, 8, generator=generator) @ mix for _ in range(batches)]
    dense = torch.randn(4, 8, generator=generator)
    mask = torch.rand(4, 8, generator=generator) > 0.5
    return LeastSquares(inputs, dense), dense, mask


def test_approaches_the_least_squares_solution_and_keeps_zeros():
    objective, dense, mask = problem()
    gram = sum(x.T @ x for x in objective.inputs)
    best = torch.zeros_like(dense)
    for row, (weight, kept) in enumerate(zip(dense, mask, strict=True)):
        right = (gram @ weight)[kept]
        best[row, kept] = torch.linalg.solve(gram[kept][:, kept], right)
    fit = BlockReconstruction(epochs=60, learning_rate=2e-2).fit(
        {"w": dense * mask}, {"w": mask}, objective
    )
    assert fit.weights is not None
    assert not fit.weights["w"][~mask].any()
    everything = objective.batches
    reached = objective.error(fit.weights, everything)
    least = objective.error({"w": best}, everything)
    start = objective.error({"w": dense * mask}, everything)
    assert least <= reached < least + 0.05 * (start - least)


def test_the_best_epoch_is_kept_and_the_start_if_none_is_better():
    objective, dense, mask = problem()
    fit = BlockReconstruction(epochs=3).fit({"w": dense * mask}, {"w": mask}, objective)
    held_out = split_batches(objective.batches)[1]
    assert fit.weights is not None
    assert objective.error(fit.weights, held_out) == pytest.approx(min(fit.errors))
    assert len(fit.errors) == 4
    # the dense weights have no error, and every step away from them has one
    noise = LeastSquares(objective.inputs, dense)
    noise.gradient = lambda weights, batches: {"w": torch.ones_like(dense)}  # type: ignore[method-assign]
    fit = BlockReconstruction(epochs=3).fit({"w": dense}, {}, noise)
    assert fit.weights is None
    assert min(fit.errors) == fit.errors[0] == 0


def test_weights_without_a_mask_are_trained_in_full():
    objective, dense, _ = problem()
    start = dense.clone()
    start[:, 0] = 0
    fit = BlockReconstruction(epochs=20).fit({"w": start}, {}, objective)
    assert fit.weights is not None
    assert fit.weights["w"][:, 0].any()


def test_held_out_batches_are_not_trained_on_and_arguments_not_modified():
    objective, dense, mask = problem(batches=20)
    start = dense * mask
    before = start.clone()
    BlockReconstruction(epochs=2, batches_per_step=4, learning_rate=0.01).fit(
        {"w": start}, {"w": mask}, objective
    )
    assert torch.equal(start, before)
    assert [len(step) for step in objective.trained] == [4, 4, 4, 4, 2] * 2
    for epoch in (objective.trained[:5], objective.trained[5:]):
        assert sorted(i for step in epoch for i in step) == list(range(18))
    assert objective.trained[:5] != objective.trained[5:], "every epoch has its own order"


def test_training_is_reproducible_and_depends_on_the_seed():
    def train(seed: int) -> Tensor:
        objective, dense, mask = problem()
        fit = BlockReconstruction(epochs=2, seed=seed).fit(
            {"w": dense * mask}, {"w": mask}, objective
        )
        assert fit.weights is not None
        return fit.weights["w"]

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_learning_rate_does_not_depend_on_the_scale_of_the_weights(scale):
    objective, dense, mask = problem()
    settings = BlockReconstruction(epochs=3, learning_rate=1e-2)
    fit = settings.fit({"w": dense * mask}, {"w": mask}, objective)
    scaled = LeastSquares(objective.inputs, dense * scale)
    other = settings.fit({"w": dense * mask * scale}, {"w": mask}, scaled)
    assert other.errors == pytest.approx(fit.errors, rel=0.02)


def test_a_learning_rate_is_chosen_by_trial():
    objective, dense, mask = problem()
    settings = BlockReconstruction(epochs=1, learning_rate=None)
    fit = settings.fit({"w": dense * mask}, {"w": mask}, objective)
    assert fit.learning_rate == 2e-2, "the weights are far from the solution: the largest"
    assert len(objective.trained) == 3 * 8 + 18
    # from the solution, where every step adds noise, the smallest is the least harm
    fit = BlockReconstruction(epochs=60).fit({"w": dense * mask}, {"w": mask}, objective)
    assert settings.fit(fit.weights or {}, {"w": mask}, objective).learning_rate == 5e-3


def test_errors_that_are_not_finite():
    objective, dense, mask = problem()
    settings = BlockReconstruction(epochs=4)
    values = iter([0.5, 0.4, float("nan")])
    objective.error = lambda weights, batches: next(values)  # type: ignore[method-assign]
    fit = settings.fit({"w": dense * mask}, {"w": mask}, objective)
    assert fit.errors == [0.5, 0.4]
    assert fit.steps == 2 * 18
    assert fit.weights is not None
    objective.error = lambda weights, batches: float("inf")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="is not finite; check the model's precision"):
        settings.fit({"w": dense * mask}, {"w": mask}, objective)


def test_epochs_are_reported():
    objective, dense, mask = problem()
    seen: list[tuple[int, float]] = []
    fit = BlockReconstruction(epochs=2).fit(
        {"w": dense * mask}, {"w": mask}, objective, lambda *figures: seen.append(figures)
    )
    assert seen == list(enumerate(fit.errors))


@pytest.mark.parametrize("count", [2, 9, 10, 11, 128])
def test_a_tenth_is_held_out(count):
    training, held_out = split_batches(range(count))
    assert [*training, *held_out] == list(range(count))
    assert len(held_out) == -(-count // 10)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="epochs is 0; it must be positive"):
        BlockReconstruction(epochs=0)
    with pytest.raises(ValueError, match=r"learning_rate is -0\.1; it must be positive"):
        BlockReconstruction(learning_rate=-0.1)
    with pytest.raises(ValueError, match="target is 'layer'; it must be 'block' or 'model'"):
        BlockReconstruction(target="layer")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="one of which is held out, but got 1: use a smaller batch"
    ):
        split_batches([3])
