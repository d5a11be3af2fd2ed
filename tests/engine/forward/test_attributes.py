"""Attributes that a forward assigns belong to its batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaMLP

from symprune_lightning import StreamedCheckpoint, prune_model
from symprune_lightning.engine.forward.attributes import ForwardAttributes
from tests.models import batches, llama


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
        return self.kept_list[-1]


class Nested(Stateful):
    def keep(self, x):
        def assign():
            self.nested = x

        assign()

    def kept(self):
        return self.nested


class Declared(Stateful):
    skips = None

    def __init__(self):
        super().__init__()
        self.skips = []

    def keep(self, x):
        self.skips.append(x)

    def kept(self):
        return self.skips[-1]


class Guarded(Stateful):
    """A property that refuses other values, and a ``__setattr__`` that refuses to change back."""

    @property
    def skip(self):
        return self.__dict__["_skip"]

    @skip.setter
    def skip(self, x):
        if x.max() > 20:
            raise ValueError("too large")
        self.__dict__["_skip"] = x

    def __setattr__(self, name, value):
        if name == "_skip" and value is None:
            raise AttributeError(name)
        super().__setattr__(name, value)

    def keep(self, x):
        self._skip = x

    def kept(self):
        return self.skip


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


@pytest.mark.parametrize(
    "cls", [Attribute, List, Dict, Buffer, Replaced, Nested, Declared, Guarded]
)
@pytest.mark.parametrize(
    ("order", "in_block"), [("layer", False), ("layer", True), ("block", False)]
)
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


def test_a_forward_of_the_instance():
    model = Stateful()

    def forward(x):
        model.skip = x
        return model.second(0 * model.first(x) + model.skip)

    model.forward = forward
    dense = Attribute()
    result = prune_model(model, BATCHES, score="wanda")
    expected = prune_model(dense, BATCHES, score="wanda", calibration_order="dense")
    assert torch.equal(result.masks["second"], expected.masks["second"])


class Lazy(nn.Module):
    """Builds a layer in its first call."""

    def __init__(self):
        super().__init__()
        self.first, self.is_ready = nn.Linear(4, 4), False

    def forward(self, x):
        x = self.first(x)
        if not self.is_ready:
            self.extra, self.is_ready = nn.Linear(4, 4), True
        return self.extra(x)


def test_a_module_that_is_built_in_the_first_call_is_built_once():
    model = Lazy()
    prune_model(model, [torch.randn(2, 4)] * 3, score="wanda")
    assert model.is_ready
    extra = model.extra
    model(torch.randn(2, 4))
    assert model.extra is extra


def test_a_module_that_is_hidden_stays_hidden():
    class Hidden(Attribute):
        def __init__(self):
            super().__init__()
            self.__dict__["teacher"] = nn.Linear(4, 4)

        def forward(self, x):
            self.__dict__["teacher"], teacher = None, self.__dict__["teacher"]
            self.teacher = None
            result = super().forward(x)
            self.__dict__["teacher"] = teacher
            return result

    model = Hidden()
    prune_model(model, BATCHES, score="wanda")
    assert len(list(model.parameters())) == 4
    assert isinstance(vars(model)["teacher"], nn.Linear)


def test_outputs_of_transformers_and_tables_are_left_alone():
    model = Attribute()
    model.output = BaseModelOutput(last_hidden_state=torch.ones(1))
    model.table = list(range(500))
    assert set(ForwardAttributes(model)._names[model]) == {"skip", "kept_list", "kept_dict"}


def test_buffers_of_a_streamed_checkpoint_are_those_that_are_loaded(tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.mlp.register_buffer("gain", torch.full((1,), 3.0))
    model.save_pretrained(tmp_path)
    seen = []

    class MLP(LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("gain", torch.zeros(1))

        def set_gain(self, gain):
            self.gain = gain

        def forward(self, x):
            seen.append(float(self.gain))
            return super().forward(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", MLP)
        with StreamedCheckpoint(str(tmp_path), str(tmp_path / "out")) as checkpoint:
            prune_model(checkpoint.model, batches(), score="wanda", placement=checkpoint)
            checkpoint.save({})
    assert set(seen) == {3.0}
