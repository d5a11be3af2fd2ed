"""Values of layer reports by kind of layer, block and expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

LayerReports = Sequence[Mapping[str, Any]]
"""Entry ``layers`` of the manifest: one mapping per layer, in the order of pruning."""


def curves_of(layers: LayerReports, key: str) -> dict[str, dict[int, float]]:
    """Return an entry of the layer reports by kind of layer and block.

    The block is the first number in a layer's name, the kind all that follows; layers of one kind
    and block, such as experts, are averaged.

    Examples:
        >>> names = ("blocks.0.fc", "blocks.1.fc", "blocks.0.experts.0.up", "blocks.0.experts.1.up")
        >>> layers = [{"name": name, "swaps": i} for i, name in enumerate(names)]
        >>> curves_of(layers, "swaps")
        {'fc': {0: 0.0, 1: 1.0}, 'experts.up': {0: 2.5}}
    """
    kinds, values = kinds_of(layers), defaultdict[str, dict[int, list[float]]](dict)
    for layer in layers:
        if layer.get(key) is not None:
            kind, block = kinds[str(layer["name"])]
            values[kind].setdefault(block, []).append(float(layer[key]))
    return {
        kind: {block: sum(parts) / len(parts) for block, parts in sorted(blocks.items())}
        for kind, blocks in values.items()
    }


def kinds_of(layers: LayerReports) -> dict[str, tuple[str, int]]:
    """Return kind and block of each layer by its name."""
    found: dict[str, tuple[str, str, int]] = {}
    for name in (str(layer["name"]) for layer in layers):
        path = name.split(".")
        first = next((i for i, part in enumerate(path) if part.isdecimal()), None)
        rest = path if first is None else [part for part in path[first:] if not part.isdecimal()]
        prefix = "" if first is None else ".".join(path[:first])
        found[name] = (prefix, ".".join(rest), 0 if first is None else int(path[first]))
    several = len({prefix for prefix, _, _ in found.values() if prefix}) > 1
    return {
        name: (".".join(filter(None, [prefix, kind])) if several else kind or "layer", block)
        for name, (prefix, kind, block) in found.items()
    }


def tokens_by_expert(layers: LayerReports) -> dict[str, list[int]]:
    """Return the calibration tokens of each expert, by the name that all experts share.

    Experts are layers whose names contain "expert" and end with a number.

    Args:
        layers: Layer reports of the manifest.

    Examples:
        >>> tokens_by_expert([{"name": "mlp.experts.down_proj.1", "tokens": 5}])
        {'mlp.experts.down_proj': [0, 5]}
    """
    tokens: dict[str, dict[int, int]] = {}
    for layer in layers:
        name, _, number = str(layer["name"]).rpartition(".")
        if number.isdecimal() and "expert" in name.lower() and layer["tokens"]:
            tokens.setdefault(name, {})[int(number)] = int(layer["tokens"])
    return {
        name: [counts.get(i, 0) for i in range(max(counts) + 1)] for name, counts in tokens.items()
    }
