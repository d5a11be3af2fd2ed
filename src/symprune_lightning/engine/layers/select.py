"""Selection of layers: which are pruned, and in which blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.exempt import exempt_layers
from symprune_lightning.engine.layers.find import all_layers
from symprune_lightning.engine.layers.names import module_names
from symprune_lightning.errors import first_of

T = TypeVar("T")

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED_DTYPES = (
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
)


def prunable_layers(
    model: nn.Module,
    ignore: Sequence[str] = (),
    only: Sequence[str] | None = None,
    *,
    allow_meta: bool = False,
    with_exempt: bool = False,
) -> list[Layer]:
    """Return the layers to prune, in the order in which the model registers them.

    Heads, routers, output projections and adapters are left dense unless ``only`` names them
    exactly (see ``exempt_layers``). A parameter shared with a module that is no prunable layer (an
    output projection tied to the embeddings) is never pruned; one shared by several layers is
    listed once, and left dense if one of them is.

    Args:
        model: Any module.
        ignore: Layers to leave dense: qualified names, or regular expressions for the full name
            prefixed with ``re:``.
        only: Layers to prune, in the same form; ``None`` for all.
        allow_meta: Accept weights on the meta device, which are loaded later.
        with_exempt: Include heads, routers, output projections and adapters.

    Raises:
        ValueError: No layer remains, an entry matches no layer, or a layer is quantised or has
            no storage.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> [layer.name for layer in prunable_layers(model, ignore=["re:2"])]
        ['0']
    """
    _check_initialised(model)
    candidates = all_layers(model)
    _check_not_quantised(model)
    names = [layer.name for layer in candidates]
    ignored = {name for entry in ignore for name in matching(entry, names)}
    if not with_exempt:
        ignored |= exempt_layers(model, candidates).keys() - set(only or ())
    # a weight that several modules share is left dense for all of them
    dense = {layer.matrix_key for layer in candidates if layer.name in ignored}
    if only is not None:
        ignored |= set(names) - {name for entry in only for name in matching(entry, names)}
    owners = _parameter_owners(model, candidates)
    layers = []
    for layer in candidates:
        if layer.name in ignored or layer.matrix_key in dense:
            continue
        # one parameter may hold several layers, but only of the module that owns it
        if owners.setdefault(id(layer.parameter), layer.module) is layer.module:
            _check_weight(layer, allow_meta=allow_meta)
            layers.append(layer)
    if not candidates:
        raise ValueError(
            f"nothing to prune: {type(model).__name__} has no linear layers, packed experts or "
            f"convolutions; a LayerKind makes other weights prunable"
        )
    if not layers:
        raise ValueError(
            f"nothing to prune: {type(model).__name__} has {len(candidates)} layers that can be "
            f"pruned, and all are excluded by `ignore` or `only`, tied to other modules, or "
            f"heads, routers, output projections, adapters or patch embeddings, which are pruned "
            f"only if `only` has their exact names"
        )
    return layers


def _parameter_owners(model: nn.Module, layers: Sequence[Layer]) -> dict[int, nn.Module]:
    """Map the parameters of modules that hold no layer to these modules."""
    holders = {layer.module for layer in layers}
    others = [module for module in model.modules() if module not in holders]
    return {id(p): module for module in others for p in module.parameters(recurse=False)}


def refuse_tied(model: nn.Module, layers: Sequence[Layer], only: Sequence[str]) -> None:
    """Raise ``ValueError`` if ``only`` has the exact name of a layer that is tied to another one.

    Args:
        model: The model.
        layers: The layers that `prunable_layers` returned.
        only: Its argument.
    """
    dropped = set(only) - {layer.name for layer in layers}
    if not dropped:
        return
    candidates = all_layers(model)
    owners, names = _parameter_owners(model, candidates), module_names(model)
    for layer in candidates:
        owner = owners.get(id(layer.parameter))
        if layer.name in dropped and owner is not None:
            raise ValueError(
                f"only= has {layer.name}, whose weight is that of {names[owner]}, a "
                f"{type(owner).__name__}: untie them first, or leave it out"
            )


def excluded_layers(model: nn.Module, layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers that are not pruned, such as the output projection."""
    pruned = {layer.name for layer in layers}
    return [layer for layer in all_layers(model) if layer.name not in pruned]


def decoder_blocks(model: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a model.

    Found by structure, not by name: a block is a child of a ``ModuleList`` or ``Sequential`` that
    contains some of ``layers`` and is not itself inside another block.
    """
    holders = {layer.module for layer in layers}

    def search(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            contains_layers = child not in holders and not holders.isdisjoint(child.modules())
            if contains_layers and isinstance(module, nn.ModuleList | nn.Sequential):
                yield child
            elif contains_layers:
                yield from search(child)

    return search(model)


def expand_by_layer(settings: Mapping[str, T], layers: Sequence[Layer]) -> dict[str, T]:
    """Expand settings given by name or regular expression; the first matching entry wins.

    Args:
        settings: Names, or regular expressions prefixed with ``re:``, to settings.
        layers: The layers to prune.

    Returns:
        Layer name to setting, for layers that an entry matches.

    Raises:
        ValueError: An entry matches no layer, or only a part of the layers that earlier entries
            match, or is not a valid regular expression.
    """
    names = [layer.name for layer in layers]
    expanded: dict[str, T] = {}
    for pattern, setting in settings.items():
        matches = matching(pattern, names)
        new = [name for name in matches if name not in expanded]
        # an entry for all other layers may come last, also if there are none
        if not new and len(matches) < len(expanded):
            raise ValueError(
                f"{pattern!r} has no effect, since earlier entries match all its layers: put it "
                f"before them"
            )
        expanded |= dict.fromkeys(new, setting)
    return expanded


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that equal ``pattern``, or fully match it if it is prefixed with ``re:``.

    Raises:
        ValueError: The expression is invalid, or nothing matches.

    Examples:
        >>> matching("re:.*q_proj", ["layers.0.q_proj", "layers.0.k_proj"])
        ['layers.0.q_proj']
    """
    regex = pattern[3:] if pattern.startswith("re:") else re.escape(pattern)
    try:
        matches = [name for name in names if re.fullmatch(regex, name)]
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None
    if not matches:
        is_unmarked = not pattern.startswith("re:") and bool(set(pattern) & set("*+?[]()|^$"))
        # `*` as in a shell
        expression = re.sub(r"(?<![.\])])\*", ".*", pattern)
        hint = f" (as a pattern: 're:{expression}')" if is_unmarked else ""
        raise ValueError(
            f"{pattern!r} matches none of the {len(names)} layers{hint}, which are: "
            f"{first_of(names)}"
        )
    return matches


def _check_initialised(model: nn.Module) -> None:
    """Refuse lazy modules, whose weights have no shape before their first call."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet: call the model once before pruning it")


def _check_not_quantised(model: nn.Module) -> None:
    """Refuse a model whose matrices are stored in modules of a quantisation library."""
    configs = (getattr(module, "config", None) for module in model.modules())
    if all(getattr(config, "quantization_config", None) is None for config in configs):
        return
    for module, name in module_names(model).items():
        tensors = [*module.named_parameters("", False), *module.named_buffers("", False)]
        if any(x.dtype in FLOATING_DTYPES and x.dim() > 1 for _, x in tensors):
            continue  # its integers are indices
        for key, tensor in tensors:
            if tensor.dtype in QUANTISED_DTYPES and tensor.dim() > 1:
                raise ValueError(
                    f"the model is quantised: {name}.{key} holds {tensor.dtype}; prune the model "
                    f"before quantising it"
                )


def _check_weight(layer: Layer, *, allow_meta: bool) -> None:
    if layer.is_computed:
        raise ValueError(
            f"layer {layer.name} computes its weight (a parametrization, or torch.nn.utils.prune): "
            f"zeros would not persist; make the weight a plain parameter first"
        )
    weight = layer.parameter
    # Tensors of quantisation libraries (quanto, torchao) state a floating dtype, and ignore writes.
    # Other subclasses are read back after they are written, see `_check_zeros`.
    if getattr(type(weight), "dequantize", None) not in (Tensor.dequantize, None):
        raise ValueError(
            f"layer {layer.name} holds a {type(weight).__name__}, which is quantised: prune the "
            f"model before quantising it"
        )
    if weight.is_complex():
        raise ValueError(f"layer {layer.name} holds complex numbers, which are not supported")
    if weight.dtype not in FLOATING_DTYPES or len(layer.shape) != 2:
        raise ValueError(
            f"layer {layer.name} holds {weight.dtype} of shape {tuple(weight.shape)}: it is "
            f"quantised; prune the model before quantising it"
        )
    if weight.device.type == "mps":
        raise ValueError(
            f"layer {layer.name} is on Apple's MPS device, which has no float64 for the "
            f"statistics: move the model to the CPU, or use Trainer(accelerator='cpu')"
        )
    if weight.is_meta and not allow_meta:
        raise ValueError(f"layer {layer.name} is on the meta device; load its weights first")
