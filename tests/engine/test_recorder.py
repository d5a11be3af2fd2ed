from __future__ import annotations

import pytest
import torch
from torch import nn

from symprune_lightning.engine.layers import Layer
from symprune_lightning.engine.recorder import (
    GramMatrix,
    InputMoments,
    LastInput,
    Recorder,
    SequenceVariance,
)


def layer(name):
    return Layer(name, nn.Linear(3, 2))


def recording(*needs):
    """A recorder, and what to measure with it."""
    names = ("q", "k", "v", "o", "a", "b", "later", "model.q")
    return Recorder(needs, [layer(name) for name in names]), LastInput()


def test_moments_add_up():
    sums = InputMoments(3)
    x = torch.randn(2, 5, 3)
    sums.update(x[:1])
    sums.update(x[1:])
    torch.testing.assert_close(sums.value.mean, x.double().flatten(0, 1).mean(0))
    assert sums.value.tokens == 10


def test_merging_is_addition():
    one, other, both = InputMoments(3), InputMoments(3), InputMoments(3)
    x = torch.randn(2, 5, 3)
    one.update(x[:1])
    other.update(x[1:])
    both.update(x[:1])
    both.update(x[1:])
    assert all(torch.equal((one + other).totals[n], both.totals[n]) for n in both.totals)


def test_a_view_of_the_same_input_is_no_other_input():
    (recorder, last), x = recording("input"), torch.ones(1, 4, 3)
    recorder.observe(layer("q"), x, last, None)
    recorder.observe(layer("k"), x.view_as(x), last, None)
    recorder.observe(layer("o"), x[:, :2], last, None)
    assert set(recorder._sums) == {"q", "o"}


def test_one_channel_stays_a_vector():
    for sums in (InputMoments(1), SequenceVariance(1)):
        sums.update(torch.randn(1, 4, 1))
    assert sums.value.shape == (1,)


def test_sequence_variance_is_token_weighted():
    sums = SequenceVariance(3)
    short, long = torch.randn(1, 2, 3).double(), torch.randn(3, 6, 3).double()
    sums.update(short)
    sums.update(long)
    inside = short.var(1, correction=0).sum(0) * 2 + long.var(1, correction=0).sum(0) * 6
    torch.testing.assert_close(sums.value, inside / 20)


def test_shared_input_is_measured_once():
    (recorder, last), x = recording("input"), torch.randn(1, 4, 3)
    for name in ("q", "k", "v"):
        recorder.observe(layer(name), x, last, None)
    recorder.observe(layer("o"), x.clone(), last, None)
    assert recorder.statistics("k").input is not None
    assert recorder.statistics("k").input.tokens == 4
    assert set(recorder._sums) == {"q", "o"}


def test_a_tensor_that_was_written_to_is_measured_again():
    (recorder, last), x = recording("input"), torch.ones(1, 4, 3)
    recorder.observe(layer("a"), x, last, None)
    x.mul_(2)
    recorder.observe(layer("b"), x, last, None)
    assert recorder.statistics("b").input.mean.tolist() == [2.0] * 3


def test_input_shared_in_some_batches_only():
    (recorder, last), x = recording("input"), torch.ones(1, 4, 3)
    recorder.observe(layer("a"), x, last, None)
    recorder.observe(layer("b"), x, last, None)
    recorder.observe(layer("b"), 3 * x, LastInput(), None)
    assert recorder.statistics("b").input.mean.tolist() == [2.0] * 3


def test_padding_is_left_out():
    (recorder, _), x = recording("input"), torch.ones(2, 3, 3)
    x[1, 2] = 100
    valid = torch.tensor([[True, True, True], [True, True, False]])
    recorder.observe(layer("a"), x, LastInput(), valid)
    assert recorder.statistics("a").input.mean.tolist() == [1.0] * 3
    assert recorder.statistics("a").input.tokens == 5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(value):
    (recorder, _), x = recording("input"), torch.ones(1, 4, 3)
    x[0, 0, 1] = value
    recorder.observe(layer("model.q"), x, LastInput(), None)
    with pytest.raises(ValueError, match=r"input of layer model.q holds NaN.*channel 1"):
        recorder.statistics("model.q")


def test_only_what_is_needed_is_collected():
    recorder, _ = recording()
    recorder.observe(layer("a"), torch.ones(1, 4, 3), LastInput(), None)
    statistics = recorder.statistics("a")
    assert statistics.input is None
    assert statistics.sequence_variance is None


def test_what_no_layer_needs_any_more_is_dropped():
    (recorder, last), x = recording("input"), torch.ones(1, 4, 3)
    recorder.observe(layer("later"), x.clone(), LastInput(), None)
    recorder.observe(layer("q"), x, last, None)
    recorder.finish(["q"])
    recorder.observe(layer("k"), x, last, None)
    recorder.finish(["k"])
    assert set(recorder._sums) == {"later", "q"}
    recorder.observe(layer("o"), x.clone(), last, None)
    recorder.finish(["o"])
    assert set(recorder._sums) == {"later", "o"}


def test_gram_matrix():
    sums, x = GramMatrix(3), torch.randn(2, 5, 3)
    sums.update(x[:1])
    sums.update(x[1:])
    flat = x.double().flatten(0, 1)
    torch.testing.assert_close(sums.value, flat.T @ flat / 10, rtol=1e-5, atol=1e-6)


def test_output_moments_are_of_the_product_without_bias():
    x, linear = torch.randn(2, 5, 3), nn.Linear(3, 2)
    recorder = Recorder(["output"], [Layer("a", linear)])
    recorder.observe(Layer("a", linear), x, LastInput(), None)
    y = (x @ linear.weight.T).detach()
    torch.testing.assert_close(
        recorder.statistics("a").output.norm.float(), y.square().flatten(0, 1).mean(0).sqrt()
    )
