"""The order in which a model uses its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

Trace = Sequence[nn.Module]
"""Modules in the order in which one batch used them."""


def execution_order(model: nn.Module, traces: Sequence[Trace]) -> dict[nn.Module, int]:
    """Return the position of every module in the order of execution.

    Children of a module are sorted so that every trace agrees. Where traces say nothing, as about
    experts that received no tokens, or contradict one another, the order is that of registration.

    Args:
        model: The model.
        traces: What some batches used.

    Examples:
        >>> model = nn.ModuleDict({"last": nn.Linear(1, 1), "first": nn.Linear(1, 1)})
        >>> position = execution_order(model, [[model["first"], model["last"]]])
        >>> position[model["first"]] < position[model["last"]]
        True
    """
    first_uses = [_first_uses(model, trace) for trace in traces]
    order: dict[nn.Module, int] = {}

    def walk(module: nn.Module) -> None:
        order.setdefault(module, len(order))
        for child in _sorted(list(module.children()), first_uses):
            walk(child)

    walk(model)
    return order


def _first_uses(model: nn.Module, trace: Trace) -> dict[nn.Module, int]:
    """Map every module to the time of the first use of a module inside it."""
    times: dict[nn.Module, int] = {}
    for time, module in enumerate(trace):
        times.setdefault(module, time)

    def visit(module: nn.Module) -> int | None:
        inside = [time for child in module.children() if (time := visit(child)) is not None]
        if module in times:
            inside.append(times[module])
        if inside:
            times[module] = min(inside)
        return times.get(module)

    visit(model)
    return times


def _sorted(
    children: Sequence[nn.Module], first_uses: Sequence[Mapping[nn.Module, int]]
) -> list[nn.Module]:
    """Sort children topologically by the traces; ties by registration."""
    before: dict[nn.Module, set[nn.Module]] = {child: set() for child in children}
    for times in first_uses:
        used = sorted((c for c in before if c in times), key=lambda child: times[child])
        for earlier, later in pairwise(used):
            before[later].add(earlier)
    result: list[nn.Module] = []
    remaining = dict.fromkeys(children)
    while remaining:
        ready = (c for c in remaining if not before[c] & remaining.keys())
        following = next(ready, None) or next(
            iter(remaining)
        )  # contradictory traces: the order of registration
        result.append(following)
        del remaining[following]
    return result
