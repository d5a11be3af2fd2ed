"""Names of modules as in the plain model, whatever wraps it."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

M = TypeVar("M", bound=nn.Module)

COMPILED = "_orig_mod"
"""Attribute of the plain module in the wrapper of ``torch.compile``."""

ADAPTED = "base_layer"
"""Attribute of the plain layer in the layers of peft."""


def uncompiled(module: M) -> M:
    """Return the module inside the wrapper of ``torch.compile``; another module unchanged."""
    original: M = getattr(module, COMPILED, module)
    return original


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile``, Fabric, ``DataParallel`` or DDP wraps.

    Raises:
        ValueError: The model is wrapped by ``FullyShardedDataParallel``, which flattens weights.

    Examples:
        >>> plain = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(plain)) is plain
        True
    """
    while True:
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel flattens the weights: shard the model with fully_shard "
                "(FSDP2), or prune it before it is wrapped"
            )
        inner = None
        if isinstance(model, DataParallel | DistributedDataParallel):
            inner = model.module
        elif COMPILED in model._modules:
            inner = model._modules[COMPILED]
        elif "_forward_module" in model._modules:  # Fabric, of lightning or lightning_fabric
            inner = model._modules.get("_original_module") or model._modules["_forward_module"]
        if inner is None:
            return model
        model = inner


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return the qualified names that modules have in the plain model, in registration order.

    Without the components that ``torch.compile``, DDP, Fabric and peft add, so that masks fit the
    model with and without them.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
        >>> list(module_names(model).values())
        ['', '0', '0']
    """
    names: dict[nn.Module, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if module in names:
            return
        names[module] = name
        inner = _wrapped(module)
        if inner is not None:
            visit(inner, name)
        for key, child in module.named_children():
            visit(child, f"{name}.{key}".lstrip("."))

    visit(model, "")
    return names


def _wrapped(wrapper: nn.Module) -> nn.Module | None:
    """Return the module inside that bears the name of its wrapper."""
    module: Any = wrapper
    inside: nn.Module | None = None
    if (plain := unwrapped(wrapper)) is not wrapper:
        inside = plain
    elif is_adapted(wrapper):
        inside = module._modules.get(ADAPTED)
    elif is_peft_model(wrapper):
        inside = module.get_base_model()
    elif is_replaced(wrapper) and module.active_adapters:
        inside = module.modules_to_save[module.active_adapters[0]]
    return inside


def is_peft_model(module: nn.Module) -> bool:
    """Return whether a module is a ``PeftModel``, of any kind of adapter."""
    # by its attributes, since peft is no dependency
    return hasattr(module, "peft_config") and callable(getattr(module, "get_base_model", None))


def has_transformers_adapters(module: nn.Module) -> bool:
    """Return whether transformers itself has loaded or added adapters; no ``PeftModel`` then."""
    return bool(getattr(module, "_hf_peft_config_loaded", False))


def is_replaced(module: nn.Module) -> bool:
    """Return whether peft has replaced a module by a trained copy of it."""
    return type(module).__name__ == "ModulesToSaveWrapper"


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is an adapter of peft around a layer."""
    # by name, since peft is no dependency
    return "BaseTunerLayer" in {cls.__name__ for cls in type(module).__mro__}
