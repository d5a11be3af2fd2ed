from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from symprune_lightning.engine.forward.recorder import LastInput, Recorder
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.kinds.linear import LinearKind
from symprune_lightning.functional.statistics import Moments


def layer(name, input_key=None):
    return Layer(name, nn.Linear(3, 2), LinearKind(), input_key=input_key)


def recording(*needs):
    """Return a recorder and the last input of a batch."""
    names = ("q", "k", "v", "o", "a", "b", "later", "model.q")
    return Recorder(needs, [layer(name) for name in names]), LastInput()


@pytest.fixture
def measured(monkeypatch):
    """Number of inputs whose moments were computed."""
    counts = []
    of = Moments.of.__func__

    def counting(cls, x):
        counts.append(x.shape)
        return of(cls, x)

    monkeypatch.setattr(Moments, "of", classmethod(counting))
    return counts


def test_a_full_view_of_an_input_is_not_measured_again(measured):
    (recorder, last), x = recording("input"), torch.ones(1, 4, 3)
    recorder.observe(layer("q"), x, last, None)
    recorder.observe(layer("k"), x.view_as(x), last, None)
    assert len(measured) == 1
    recorder.observe(layer("o"), x[:, :2], last, None)
    assert len(measured) == 2
    assert recorder.statistics("o").input.tokens == 2
    assert recorder.statistics("k").input.tokens == 4


def test_layers_with_another_input_key_do_not_share_an_input(measured):
    (recorder, last), x = recording("input"), torch.ones(1, 4, 3)
    recorder.observe(layer("q", input_key=1), x, last, None)
    recorder.observe(layer("k", input_key=2), x, last, None)
    recorder.observe(layer("v", input_key=2), x, last, None)
    assert len(measured) == 2


def test_shared_input_is_measured_once(measured):
    (recorder, last), x = recording("input"), torch.randn(1, 4, 3)
    for name in ("q", "k", "v"):
        recorder.observe(layer(name), x, last, None)
    recorder.observe(layer("o"), x.clone(), last, None)
    assert recorder.statistics("k").input is not None
    assert recorder.statistics("k").input.tokens == 4
    assert len(measured) == 2


def test_a_tensor_modified_in_place_is_measured_again():
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


def test_padding_is_not_measured():
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


def test_only_declared_statistics_are_collected():
    recorder, _ = recording()
    recorder.observe(layer("a"), torch.ones(1, 4, 3), LastInput(), None)
    statistics = recorder.statistics("a")
    assert statistics.input is None
    assert statistics.sequence_variance is None


def test_statistics_of_pruned_layers_are_freed():
    """By a weak reference to the totals: shared sums live until the last layer that uses them."""
    (recorder, last), x = recording("input"), torch.ones(1, 4, 3)
    recorder.observe(layer("q"), x, last, None)
    recorder.observe(layer("k"), x, last, None)
    recorder.observe(layer("o"), x.clone(), last, None)
    totals = weakref.ref(recorder.statistics("q").input.total)
    recorder.release(["q"])
    recorder.statistics("k")
    recorder.release(["k"])
    assert totals() is not None, "k came after q and shares its input"
    recorder.statistics("o")
    recorder.release(["o"])
    assert totals() is None


def test_output_moments_are_of_the_product_without_bias():
    x, a = torch.randn(2, 5, 3), layer("a")
    linear = a.module
    recorder = Recorder(["output"], [a])
    recorder.observe(a, x, LastInput(), None)
    y = (x @ linear.weight.T).detach()
    torch.testing.assert_close(
        recorder.statistics("a").output.norm.float(), y.square().flatten(0, 1).mean(0).sqrt()
    )
