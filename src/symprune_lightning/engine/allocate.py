"""Resolution of an allocation: one target sparsity becomes a sparsity for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.forward.recorder import Recorder
from symprune_lightning.engine.forward.suspended import SuspendedForward
from symprune_lightning.engine.journal import Journal
from symprune_lightning.engine.layers.base import Layer, distinct_parameters, watch_layers
from symprune_lightning.engine.layers.select import excluded_layers
from symprune_lightning.engine.plan import PruningPlan, num_groups, prefix_errors
from symprune_lightning.engine.result import Trial
from symprune_lightning.engine.sensitivity import add_gradient
from symprune_lightning.functional.allocation import (
    Allocation,
    AllocationMethod,
    LayerInfo,
    Search,
)
from symprune_lightning.functional.statistics import Statistics


@dataclass(frozen=True)
class AllocationResolver:
    """Resolves the allocation of a plan.

    Attributes:
        plan: The plan, with the same sparsity for all layers.
        calibration: The dense model and its batches, which must be a list.
        sparsity: Fraction of zeros over all layers.
        sensitivity: Layer name to statistics of the dense model with inputs and output gradients.
        prune: Prunes the model by a plan; used for the trials of a search.
    """

    plan: PruningPlan
    calibration: Calibration
    sparsity: float
    sensitivity: Mapping[str, Statistics]
    prune: Callable[[PruningPlan], None]

    def resolve(
        self, method: AllocationMethod, journal: Journal | None
    ) -> tuple[PruningPlan, list[Trial]]:
        """Return the plan with a sparsity for each layer, and the trials of a search.

        Read from the journal if it has them.

        Raises:
            ValueError: The placement allows no search.
        """
        candidates = _candidates(method)
        recorded = None if journal is None else journal.load_value("allocation")
        if recorded is not None:
            trials = [Trial(candidates[i], error) for i, error in recorded["trials"]]
            return self.plan.with_sparsities(recorded["sparsity"]), trials
        plan, trials = self._choose(method, candidates)
        if journal is not None:
            sparsities = {name: pattern.sparsity for name, pattern in plan.patterns.items()}
            tried = [(candidates.index(trial.allocation), trial.error) for trial in trials]
            journal.save_value("allocation", {"sparsity": sparsities, "trials": tried})
        return plan, trials

    def _choose(
        self, method: AllocationMethod, candidates: Sequence[Allocation]
    ) -> tuple[PruningPlan, list[Trial]]:
        if not isinstance(method, Search) or len(candidates) == 1:
            return self._allocate(candidates[0]), []
        placement = self.calibration.placement
        if placement.blocks or not placement.always_loaded:
            raise ValueError(
                "a search over allocations needs the full model in memory: it cannot be combined "
                "with FSDP2, streaming or offload"
            )
        results = self._search(candidates)
        return results[0][0], [trial for _, trial in results]

    def _allocate(self, allocation: Allocation) -> PruningPlan:
        """Return the plan with the sparsities of an allocation."""
        blocks = self.plan.block_indices
        last_block = max(blocks.values())
        metrics = self._metrics(allocation)
        layers = []
        for layer in self.plan.layers:
            if layer.name not in metrics:
                continue  # no batch reached it
            groups, group_size = num_groups(layer, self.plan.patterns[layer.name])
            block = blocks[layer.name]
            depth = block / max(last_block, 1)
            info = LayerInfo(layer.name, groups, group_size, block, depth, metrics[layer.name])
            layers.append(info)
        uniform = dict.fromkeys(blocks, self.sparsity)
        return self.plan.with_sparsities(uniform | allocation(layers, self.sparsity))

    def _metrics(self, allocation: Allocation) -> dict[str, Any]:
        """Return the layer metrics of an allocation, after a forward of the dense model if needed.

        Layers that no batch reaches are missing.
        """
        layers, calibration = self.plan.layers, self.calibration
        score = self.plan.method.score
        needs = allocation.needs | score.needs if allocation.uses_scores else allocation.needs
        recorder = Recorder(needs, layers, calibration.communicator)
        metrics: dict[str, Any] = {}

        def metric(layer: Layer, statistics: Statistics) -> Any:
            weight = layer.matrix()
            scores = score(weight, statistics) if allocation.uses_scores else None
            return allocation.layer_metric(weight, statistics, scores)

        def measure(complete: Sequence[Layer]) -> None:
            for layer in complete:
                with prefix_errors(layer):
                    stats = recorder.statistics(layer.name) if needs else Statistics()
                    metrics[layer.name] = metric(
                        layer, add_gradient(layer, stats, self.sensitivity)
                    )
            recorder.release(layer.name for layer in complete)

        if self.sensitivity and needs <= {"input", "output_gradient"}:
            # the backward pass has measured both: no further forward
            for layer in layers:
                if layer.name in self.sensitivity:
                    metrics[layer.name] = metric(layer, self.sensitivity[layer.name])
        elif needs:
            SuspendedForward(calibration, layers, recorder, measure).run()
        else:
            measure(layers)
        return metrics

    def _search(self, candidates: Sequence[Allocation]) -> list[tuple[PruningPlan, Trial]]:
        """Prune by score with each candidate, measure the change of the output, and undo it.

        Needs a copy of the prunable weights and the last hidden state of every token.

        Returns:
            Plan and trial of each candidate, best first.
        """
        layers, communicator = self.plan.layers, self.calibration.communicator
        parameters = distinct_parameters(layers)
        dense_weights = [parameter.detach().clone() for parameter in parameters]
        dense_states = list(self._last_hidden_states())
        results = []
        for allocation in candidates:
            plan = self._allocate(allocation)
            sums = torch.zeros(2, dtype=torch.float64)
            try:
                self.prune(plan.for_trial())
                for x, y in zip(self._last_hidden_states(), dense_states, strict=True):
                    sums += torch.stack([(x - y).square().sum(), y.square().sum()]).double().cpu()
            finally:
                for parameter, weight in zip(parameters, dense_weights, strict=True):
                    parameter.copy_(weight)
            change, norm = communicator.all_reduce_sum(sums).tolist()
            results.append((plan, Trial(allocation, change / max(norm, 1e-30))))
        return sorted(results, key=lambda result: result[1].error)

    def _last_hidden_states(self) -> Iterator[Tensor]:
        """Yield the input of the output projection for each batch, or the model's output."""
        calibration = self.calibration
        with self._excluded_inputs() as inputs:
            for batch in calibration.batches:
                output = calibration.forward(calibration.model, batch)
                states = inputs or [x for x in tree_leaves(output) if isinstance(x, Tensor)]
                if not states:
                    raise ValueError(
                        "a search compares outputs of the model, but forward returns no tensor"
                    )
                yield states[-1]

    @contextmanager
    def _excluded_inputs(self) -> Iterator[list[Tensor]]:
        """Collect inputs of excluded layers that were called after the last pruned layer."""
        inputs: list[Tensor] = []
        layers = self.plan.layers
        excluded = excluded_layers(self.calibration.model, layers)
        with ExitStack() as stack:
            stack.enter_context(watch_layers(excluded, lambda _, x, *__: inputs.append(x)))
            stack.enter_context(watch_layers(layers, lambda *_: inputs.clear()))
            yield inputs


def _candidates(method: AllocationMethod) -> Sequence[Allocation]:
    if isinstance(method, Search):
        return method.candidates
    assert isinstance(method, Allocation)
    return (method,)
