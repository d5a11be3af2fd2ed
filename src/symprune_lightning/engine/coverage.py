"""Coverage: which weights are pruned, and why the others are not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.exempt import ROUTER, exempt_layers, is_router_class
from symprune_lightning.engine.layers.find import all_layers
from symprune_lightning.engine.layers.kinds.convolution import Convolution, is_depthwise
from symprune_lightning.engine.layers.names import module_names
from symprune_lightning.engine.layers.select import decoder_blocks
from symprune_lightning.engine.result import DenseWeight, PruneResult
from symprune_lightning.errors import PruningWarning

IGNORED = "ignored"
ALL_ZERO = "all zero"
UNREACHED = "not reached by any calibration batch"
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
THRESHOLD = 0.95
"""Coverage below which weights that were left dense without being asked for are warned about."""


def record_coverage(model: nn.Module, layers: Sequence[Layer], result: PruneResult) -> None:
    """Add the coverage of a run to its result.

    Args:
        model: The model.
        layers: The layers that were to be pruned.
        result: The result, with the reports of those that were.
    """
    known = all_layers(model)
    exempt = exempt_layers(model, known)
    selected = {layer.name for layer in layers}
    pruned = {report.name for report in result.layers}

    def reason(layer: Layer) -> str:
        if layer.name in result.all_zero:
            return ALL_ZERO
        if layer.name in selected:
            return UNREACHED
        return exempt.get(layer.name, IGNORED)

    # a layer that computes its weight is refused unless it is ignored
    computed = {layer.name for layer in known if layer.is_computed}
    by_parameter: dict[int, list[Layer]] = {}
    for layer in known:
        by_parameter.setdefault(id(layer.parameter), []).append(layer)
    for name, module, parameter, in_block in _weights(model, known):
        members = by_parameter.get(id(parameter), [])
        done = sum(layer.shape.numel() for layer in members if layer.name in pruned)
        # LongCat has matrices for experts that return their input, which it does not use
        size = parameter.numel()
        used = min(sum(layer.shape.numel() for layer in members), size) if members else size
        if in_block:
            result.coverage_counts.total += used
            result.coverage_counts.pruned += done
        if done < used:
            reasons = {reason(layer) for layer in members if layer.name not in pruned}
            is_parametrized = name.partition(".parametrizations.")[0] in computed
            reasons = reasons or {IGNORED if is_parametrized else _reason_without_layer(module)}
            # beside the blocks, a parameter of a user's module may be a table of positions
            is_beside = not in_block and not type(module).__module__.startswith("torch.nn.")
            dense = DenseWeight(
                name=name,
                shape=tuple(parameter.shape),
                num_weights=used - done,
                reason=", ".join(sorted(reasons)),
                is_intended=bool(members) or reasons <= {ROUTER, IGNORED} or is_beside,
                in_block=in_block,
            )
            result.left_dense.append(dense)
    result.left_dense.sort(key=lambda weight: -weight.num_weights)


def warn_about_coverage(result: PruneResult) -> None:
    """Warn if many weights were left dense that the settings do not exclude."""
    unintended = [weight for weight in result.left_dense if not weight.is_intended]
    outside = sum(weight.num_weights for weight in unintended if not weight.in_block)
    total = max(result.coverage_counts.total + outside, 1)
    share = sum(weight.num_weights for weight in unintended) / total
    if 1 - share < THRESHOLD:
        largest = ", ".join(f"{w.name} ({w.reason})" for w in unintended[:5])
        more = f" and {len(unintended) - 5} more" if len(unintended) > 5 else ""
        warnings.warn(
            f"{share:.0%} of the weights were left dense although nothing excludes "
            f"them: {largest}{more}. PruneResult.sparsity is that of the pruned layers only; a "
            f"subclass of LayerKind would make these weights prunable",
            PruningWarning,
            stacklevel=4,
        )


def _weights(
    model: nn.Module, layers: Sequence[Layer]
) -> Iterable[tuple[str, nn.Module, nn.Parameter, bool]]:
    """Yield all parameters with their modules, and whether they are in a decoder block.

    Without vectors, and without embeddings, which are looked up and not multiplied by. A model
    without blocks counts as one.
    """
    names = module_names(model)
    blocks = list(decoder_blocks(model, layers)) or [model]
    embeddings = (module for module in model.modules() if isinstance(module, EMBEDDINGS))
    seen = {id(embedding.weight) for embedding in embeddings}
    # of a streamed model, tied weights are parameters of their own
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    matrices = {id(layer.parameter) for layer in layers}
    for part in (*blocks, model):
        in_block = part in blocks
        for module in part.modules():
            for key, parameter in module.named_parameters(recurse=False):
                # the biases of packed experts are stacked vectors
                is_vector = key.endswith("bias") or parameter.numel() == max(
                    parameter.shape, default=1
                )
                if not in_block and id(parameter) in matrices:
                    is_vector = False  # a head with one output
                if id(parameter) in seen or is_vector or isinstance(module, EMBEDDINGS):
                    continue
                seen.add(id(parameter))
                name = f"{names[module]}.{key}".lstrip(".")
                if name not in tied:
                    yield name, module, parameter, in_block


def _reason_without_layer(module: nn.Module) -> str:
    if isinstance(module, Convolution):
        is_own = not is_depthwise(module)
        return "convolution with its own forward" if is_own else "depthwise convolution"
    if is_router_class(module):
        return ROUTER
    return f"parameter of {type(module).__name__}, which is no layer"
