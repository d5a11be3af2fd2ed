"""Layers have the names of the plain model, whatever wraps it, and masks fit both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from symprune_lightning import apply_masks, prune_model
from symprune_lightning.engine.layers.names import unwrapped
from tests.models import batches, build


def fabric(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = Fabric(accelerator="cpu", devices=1).setup(model)
    return wrapped


def compiled_blocks(model: Any) -> nn.Module:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    assert isinstance(model, nn.Module)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    for block in model.model.layers:  # type: ignore[union-attr]
        block.compile(backend="eager")
    return model


def adapted(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


@pytest.fixture
def gloo_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[arg-type,return-value]
    "compiled blocks": compiled_blocks,
    "compiled in place": compiled_in_place,
    "compiled Fabric": lambda model: torch.compile(fabric(model), backend="eager"),  # type: ignore[arg-type,return-value]
    "Fabric": fabric,
    "DataParallel": nn.DataParallel,
    "PeftModel": adapted,
    "compiled PeftModel": lambda model: torch.compile(adapted(model), backend="eager"),  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_masks_of_wrapped_models(name, order):
    settings: dict[str, Any] = {"score": "ria", "calibration_order": order}
    expected = prune_model(build("llama"), batches("llama"), **settings)
    wrapped = WRAPPERS[name](build("llama"))
    result = prune_model(wrapped, batches("llama"), **settings)
    assert list(result.masks) == list(expected.masks)
    assert all(torch.equal(result.masks[k], expected.masks[k]) for k in expected.masks)
    assert result.is_applied_to(wrapped)
    assert [dense.name for dense in result.left_dense if "lora" not in dense.name] == [
        dense.name for dense in expected.left_dense
    ]
    plain = build("llama")
    apply_masks(plain, result.masks)
    assert result.is_applied_to(plain)
    dense = WRAPPERS[name](build("llama"))
    apply_masks(dense, expected.masks)
    assert expected.is_applied_to(dense)


def test_ddp(gloo_group):
    wrapped = DistributedDataParallel(build("llama"))
    result = prune_model(wrapped, batches("llama"), score="wanda")
    assert "model.layers.0.self_attn.q_proj" in result.masks


def test_a_compiled_model_is_not_recompiled():
    """Dynamo compiles nothing during a run, and the model is compiled as before afterwards."""
    compilations = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compilations.append(module)
        return module.forward

    model: Any = torch.compile(build("llama"), backend=backend)
    prune_model(model, batches("llama"), score="wanda")
    assert not compilations
    model(**batches("llama")[0])
    assert compilations


def test_flattened_weights_are_refused(gloo_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(build("llama"), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="shard the model with fully_shard"):
        prune_model(wrapped, batches("llama"))


def test_a_wrapper_of_a_plain_module_is_itself():
    model = build("llama")
    assert unwrapped(model) is model


class Holder(nn.Module):
    """A module that holds a wrapped model, as a LightningModule does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Any) -> object:
        return self.net(**batch)


@pytest.mark.parametrize("name", ["PeftModel", "DataParallel", "Fabric", "compile"])
def test_a_wrapper_inside_a_module(name):
    expected = prune_model(Holder(build("llama")), batches("llama"), score="wanda")
    holder = Holder(WRAPPERS[name](build("llama")))
    result = prune_model(holder, batches("llama"), score="wanda")
    assert list(result.masks) == list(expected.masks)
    assert next(iter(result.masks)) == "net.model.layers.0.self_attn.q_proj"
    assert all(torch.equal(result.masks[k], mask) for k, mask in expected.masks.items())


def test_a_trained_copy_has_the_name_of_the_layer():
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["up_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(build("llama"), config)
    result = prune_model(model, batches("llama"), score="wanda")
    assert set(result.masks) == set(prune_model(build("llama"), batches("llama")).masks)
    assert not result.unreached
