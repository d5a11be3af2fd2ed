"""Attributes that a forward assigns belong to its batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from symprune_lightning import prune_model
from symprune_lightning.engine.forward.attributes import ForwardAttributes


class Stateful(nn.Module):
    """Two layers; the input of the second one is kept while the first one runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kept_list, self.kept_dict = [], {}
        self.register_buffer("kept_buffer", torch.zeros(1, 4), persistent=False)

    def keep(self, x):
        raise NotImplementedError

    def kept(self):
        raise NotImplementedError

    def forward(self, x):
        self.keep(x)
        hidden = self.first(x)
        return self.second(0 * hidden + self.kept())


class Attribute(Stateful):
    def keep(self, x):
        self.skip = x

    def kept(self):
        return self.skip


class List(Stateful):
    def keep(self, x):
        self.kept_list.append(x)

    def kept(self):
        return self.kept_list.pop()


class Dict(Stateful):
    def keep(self, x):
        self.kept_dict["skip"] = x

    def kept(self):
        return self.kept_dict["skip"]


class Buffer(Stateful):
    def keep(self, x):
        self.kept_buffer = x

    def kept(self):
        return self.kept_buffer


class Replaced(Stateful):
    def keep(self, x):
        self.kept_list = [x]

    def kept(self):
        return self.kept_list[0]


BATCHES = [torch.eye(4)[:1] * 10, torch.eye(4)[1:2].expand(2, 4) * 1e-3]  # unequal sizes


@pytest.mark.parametrize("cls", [Attribute, List, Dict, Buffer, Replaced])
@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize("in_block", [False, True])
def test_each_batch_has_its_own_value(cls, order, in_block):
    model = nn.Sequential(cls()) if in_block else cls()
    expected = nn.Sequential(cls()) if in_block else cls()
    result = prune_model(model, BATCHES, score="wanda", calibration_order=order)
    dense = prune_model(expected, BATCHES, score="wanda", calibration_order="dense")
    name = "0.second" if in_block else "second"
    assert torch.equal(result.masks[name], dense.masks[name])
    assert result.masks[name][:, :2].sum() > 4  # by position, none of the first columns is kept


def test_the_model_is_as_before():
    model = Attribute()
    buffer = model.kept_buffer
    prune_model(model, BATCHES, score="wanda")
    assert not hasattr(model, "skip")
    assert model.kept_buffer is buffer
    listed = List()
    kept = listed.kept_list
    prune_model(listed, BATCHES, score="wanda")
    assert listed.kept_list is kept
    assert kept == []


def test_values_are_restored():
    model = Attribute()
    model.skip, model.kept_dict["a"], value = 1, torch.ones(1), torch.ones(1)
    model.kept_list.append(value)
    before = model.kept_dict["a"]
    with ForwardAttributes(model).isolated():
        model.skip = 2
        model.kept_dict.clear()
        model.kept_list[0] = torch.zeros(1)
    assert model.skip == 1
    assert model.kept_dict["a"] is before
    assert model.kept_list[0] is value


def test_modules_without_state_are_not_read():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    assert not ForwardAttributes(model)._names
