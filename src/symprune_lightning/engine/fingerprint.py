"""Fingerprint of a run: what must agree for an interrupted run to be resumed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.distributed.dtensor import full_tensor
from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.plan import PruningPlan


def run_fingerprint(plan: PruningPlan, calibration: Calibration) -> dict[str, Any]:
    """Return the fingerprint of a run as JSON values: settings, layers, weights and data.

    Args:
        plan: The method, for every layer.
        calibration: The dense model and this rank's batches, which must be a list.
    """
    method = plan.method
    weights = calibration.placement.fingerprint
    return {
        "score": _repr(method.score),
        "update": _repr(method.update),
        "solver": _repr(method.solver),
        "reconstruct": _repr(method.reconstruct),
        "calibration_order": method.calibration_order,
        "sparsity": _repr(method.sparsity),
        "allocation": _repr(method.allocation),
        "gradient_batches": method.gradient_batches,
        "experts": method.experts,
        "unreached": method.unreached,
        "layers": {
            layer.name: {
                "shape": list(layer.shape),
                "dtype": str(layer.parameter.dtype),
                "pattern": _repr(plan.patterns[layer.name]),
                "refine": _repr(list(plan.refiners.get(layer.name, []))),
            }
            for layer in plan.layers
        },
        "weights": hash_weights(calibration.model) if weights is None else weights,
        "data": _hash_batches(calibration.batches, calibration.communicator),
    }


def _repr(value: Any) -> str:
    """Return ``repr`` without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def hash_weights(model: nn.Module) -> str:
    """Return a hash of all parameters; gathers sharded ones, so every rank must call this."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        value = full_tensor(parameter.detach())
        bits = torch.hash_tensor(value).view(torch.int64)  # uint64 may not fit into an int
        digest.update(f"{name} {tuple(value.shape)} {int(bits)}".encode())
    return digest.hexdigest()


def _hash_batches(batches: Iterable[Any], communicator: Communicator) -> str:
    """Hash the batches of all ranks, independently of how they are divided among ranks."""
    total = 0
    for i, batch in enumerate(batches):
        number = communicator.data_rank + i * communicator.data_world_size
        leaves, structure = tree_flatten(_with_dicts(batch))
        digest = hashlib.sha256(f"{number} {structure}".encode())
        for leaf in leaves:
            digest.update(_leaf_bytes(leaf))
        total += int.from_bytes(digest.digest()[:4], "little")
    # sums of 32-bit integers are exact in float64, so their order has no effect
    value = float(total) if communicator.contributes else 0.0
    return f"{int(communicator.all_reduce_sum(torch.tensor([value], dtype=torch.float64))):x}"


def _with_dicts(value: Any) -> Any:
    """Return a batch with dicts in place of other mappings, which would be leaves."""
    if isinstance(value, Mapping):
        return {key: _with_dicts(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_dicts(item) for item in value)
    return value


def _leaf_bytes(leaf: Any) -> bytes:
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        return f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes()
    if not isinstance(leaf, Tensor):
        return _repr(leaf).encode()
    flat = leaf.detach().cpu().contiguous().flatten()
    header = f"{leaf.dtype} {tuple(leaf.shape)}".encode()
    return header + flat.view(torch.uint8).numpy().tobytes()
