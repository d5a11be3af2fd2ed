"""How the sparsity asked for comes to be divided among the layers, before they are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from symprune_lightning.engine.journal import Journal
from symprune_lightning.engine.layers import Layer, spared_modules
from symprune_lightning.engine.method import Method, naming, with_sparsity
from symprune_lightning.engine.parallel import Ranks
from symprune_lightning.engine.recorder import Recorder
from symprune_lightning.engine.residence import Residence
from symprune_lightning.engine.result import Trial
from symprune_lightning.engine.run import EMPTY, Run
from symprune_lightning.engine.schedule import Forward, Schedule, SuspendedForward
from symprune_lightning.functional.allocation import Allocation, Share
from symprune_lightning.functional.statistics import Statistics


@dataclass(frozen=True)
class Division:
    """Dividing a sparsity among layers.

    Attributes:
        model: The dense model.
        layers: The layers to prune.
        batches: Calibration batches of this process.
        forward: How a batch is given to the model.
        method: What is to be done, with one sparsity for all layers.
        schedule: When a layer is pruned.
        ranks: The processes that prune together.
        residence: Where the weights are, if not in memory all the time.
    """

    model: nn.Module
    layers: list[Layer]
    batches: list[Any]
    forward: Forward
    method: Method
    schedule: Schedule
    ranks: Ranks
    residence: Residence | None

    def divided(
        self, allocation: Allocation, sparsity: float, journal: Journal | None = None
    ) -> tuple[Method, list[Trial]]:
        """The method with each layer's own sparsity, and what was tried to find it, best first.

        Taken from the journal, if that has it.

        Raises:
            ValueError: The method leaves nothing to divide, or can't be searched.
        """
        with_sparsity(self.method, dict.fromkeys(self.method.patterns, sparsity))
        choices = allocation.choices()
        known = None if journal is None else journal.noted("allocation")
        if known is not None:
            trials = [Trial(choices[i], error) for i, error in known["trials"]]
            return with_sparsity(self.method, known["sparsity"]), trials
        method, trials = self._divided(choices, sparsity)
        if journal is not None:
            levels = {name: pattern.sparsity for name, pattern in method.patterns.items()}
            tried = [(choices.index(trial.allocation), trial.error) for trial in trials]
            journal.note("allocation", {"sparsity": levels, "trials": tried})
        return method, trials

    def _divided(
        self, choices: Sequence[Allocation], sparsity: float
    ) -> tuple[Method, list[Trial]]:
        if len(choices) == 1:
            return self._with(choices[0], sparsity), []
        if self.residence is not None:
            raise ValueError("a search over allocations needs the whole model in memory")
        tried = self._search(choices, sparsity)
        return tried[0][0], [trial for _, trial in tried]

    def _with(self, allocation: Allocation, sparsity: float) -> Method:
        """The method with an allocation."""
        blocks = self.method.blocks
        last = max(blocks.values())
        measured = self._measured(allocation)
        shares = []
        for layer in self.layers:
            if layer.name in measured:
                whole = torch.empty(layer.shape, device="meta")
                groups, group_size = self.method.patterns[layer.name].groups(whole).shape
                shares.append(
                    Share(
                        name=layer.name,
                        groups=groups,
                        group_size=group_size,
                        block=blocks[layer.name],
                        depth=blocks[layer.name] / max(last, 1),
                        measured=measured[layer.name],
                    )
                )
        levels = dict.fromkeys(blocks, sparsity) | allocation(shares, sparsity)
        return with_sparsity(self.method, levels)

    def _measured(self, allocation: Allocation) -> dict[str, Any]:
        """What it wants to know of each layer; takes a forward of the dense model if it needs one.

        Layers that no batch reaches are left out.
        """
        recorder = Recorder(allocation.needs, self.layers, self.ranks)
        measured: dict[str, Any] = {}

        def measure(complete: Sequence[Layer]) -> None:
            for layer in complete:
                with naming(layer):
                    known = recorder.statistics(layer.name) if allocation.needs else Statistics()
                    measured[layer.name] = allocation.measure(layer.read(), known)
            recorder.finish(layer.name for layer in complete)

        if allocation.needs:
            suspended = SuspendedForward(
                self.model, self.layers, recorder, measure, "layer", self.ranks, self.residence
            )
            if not suspended.run(self.batches, self.forward):
                raise ValueError(EMPTY)
        else:
            measure(self.layers)
        return measured

    def _search(
        self, candidates: Sequence[Allocation], sparsity: float
    ) -> list[tuple[Method, Trial]]:
        """Prune by score alone with each, see what that does to the output, and undo it.

        Gives the method with each and what came of it, best first.

        Holds a copy of the prunable weights and the dense model's last hidden state of every token.
        """
        before = [layer.parameter.detach().clone() for layer in self.layers]
        dense = list(self._last_states())
        tried = []
        for allocation in candidates:
            method = self._with(allocation, sparsity)
            try:
                run = Run(self.layers, replace(method, refiners={}, update=None), self.ranks)
                run.run(self.model, self.batches, self.forward, self.schedule)
                sums = torch.zeros(2, dtype=torch.float64)
                for x, y in zip(self._last_states(), dense, strict=True):
                    sums += torch.stack([(x - y).square().sum(), y.square().sum()]).double().cpu()
            finally:
                for layer, weight in zip(self.layers, before, strict=True):
                    layer.parameter.copy_(weight)
            changed, whole = self.ranks.added(sums).tolist()
            tried.append((method, Trial(allocation, changed / max(whole, 1e-30))))
        return sorted(tried, key=lambda pair: pair[1].error)

    def _last_states(self) -> Iterator[Tensor]:
        """What the head is given for each batch; the output, if the last linear layer is pruned."""
        with self._inputs_behind_pruned_layers() as seen:
            for batch in self.batches:
                output = self.forward(self.model, batch)
                found = seen or [x for x in tree_leaves(output) if isinstance(x, Tensor)]
                if not found:
                    raise ValueError(
                        "a search compares the model's outputs, and forward returns no tensor"
                    )
                yield found[-1]

    @contextmanager
    def _inputs_behind_pruned_layers(self) -> Iterator[list[Tensor]]:
        """Inputs of the spared linear layers that were called since the last pruned one was."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.extend(args[:1])

        spared = spared_modules(self.model, self.layers)
        hooks = [module.register_forward_pre_hook(note) for module in spared]
        for layer in self.layers:
            hooks.append(layer.module.register_forward_pre_hook(lambda *_: seen.clear()))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
