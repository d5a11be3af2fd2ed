"""A pruning run: calibration, and the pruning of layers whose statistics are complete.

Longer than 300 lines since the steps of a run share its state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor, nn

from symprune_lightning.engine.distributed.dtensor import is_dtensor
from symprune_lightning.engine.forward.calibration import Calibration
from symprune_lightning.engine.forward.recorder import Recorder
from symprune_lightning.engine.forward.suspended import BlockTraining, SuspendedForward
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.journal import Journal
from symprune_lightning.engine.layers.base import Layer, distinct_parameters
from symprune_lightning.engine.layers.changes import LayerChange
from symprune_lightning.engine.masking import RowPruner, RowSlice
from symprune_lightning.engine.plan import PruningPlan
from symprune_lightning.engine.reconstruction import BlockReconstructor
from symprune_lightning.engine.result import LayerRecord, LayerReport, PruneResult
from symprune_lightning.engine.row_sums import NUM_SUMS
from symprune_lightning.engine.sensitivity import add_gradient
from symprune_lightning.errors import PruningError, PruningWarning
from symprune_lightning.functional.statistics import Statistics
from symprune_lightning.functional.tensors import as_number, row_chunks


class PruningRun:
    """State of a pruning run and the code that advances it.

    For each layer whose statistics are complete, ``prune`` scores its weights, computes and
    refines a mask, updates the kept weights, and writes the result into the model. Every rank does
    so for a slice of the rows.

    Args:
        plan: The method, for every layer.
        calibration: Model and batches.
        journal: Journal to resume from and write to.
        hooks: Observers.
        sensitivity: Layer name to statistics with ``output_gradient``, if a method needs them.

    Attributes:
        result: Masks and reports of the layers pruned so far.
    """

    def __init__(
        self,
        plan: PruningPlan,
        calibration: Calibration,
        journal: Journal | None = None,
        hooks: Sequence[PruningHooks] = (),
        sensitivity: Mapping[str, Statistics] | None = None,
    ) -> None:
        self.plan = plan
        self.calibration = calibration
        self.journal = journal
        self.hooks = hooks
        self.sensitivity = sensitivity or {}
        self.result = PruneResult()
        self._rows = RowPruner(plan, calibration.communicator, hooks)
        self._reconstructor: BlockReconstructor | None = None
        if plan.method.reconstruct is not None:
            self._reconstructor = BlockReconstructor(
                plan.method.reconstruct, plan.layers, calibration, self.result, journal, hooks
            )
        self._recorder: Recorder | None = None
        if plan.method.needs or self._reconstructor is not None:
            # moments are almost free and reveal activations that are not finite
            needs = {*plan.method.needs, "input"}
            self._recorder = Recorder(needs, plan.layers, calibration.communicator)

    def run(self) -> None:
        """Run calibration and prune layers as they complete; skip it for data-free methods."""
        if self._recorder is None:
            placement = self.calibration.placement
            with placement.session(self.plan.layers):
                placement.for_each_block(self.plan.layers, self.prune)
        else:
            self._prune_during_forward(self._recorder)
        _warn_about(self.result.all_zero, "these layers are all zero, and were left alone")
        pruned_whole = [x.name for x in self.result.layers if x.num_zeros == x.num_weights]
        _warn_about(pruned_whole, "all weights of these layers were pruned")
        if self.journal is not None:
            self.journal.write()

    def skip(self, layers: Sequence[Layer]) -> None:
        """Prune layers that no batch reached by magnitude, if the method says so."""
        if self.plan.method.unreached == "magnitude" and layers:
            self._prune(layers, self._prune_group_by_magnitude)

    def prune(self, layers: Sequence[Layer]) -> None:
        """Prune layers whose statistics are complete."""
        self._prune(layers, self._prune_group)

    def _prune(
        self, layers: Sequence[Layer], prune_group: Callable[[Sequence[Layer]], None]
    ) -> None:
        for group in self.plan.comparison_groups(layers):
            if self._is_recorded(group):
                self._restore(group)
                continue
            if self.journal is not None:
                self.journal.start_block(self.plan.block_indices[group[0].name])
            with torch.autocast(group[0].parameter.device.type, enabled=False):
                prune_group(group)
        if self._recorder is not None:
            self._recorder.release(layer.name for layer in layers)
        # autocast caches half-precision copies of weights, which are the dense ones
        torch.clear_autocast_cache()

    def check_ranks(self) -> None:
        """Check that all ranks hold the same weights, where each of them holds full ones."""
        weights = [p for p in distinct_parameters(self.plan.layers) if not is_dtensor(p)]
        if weights and self.calibration.placement.always_loaded:
            self.calibration.communicator.assert_identical_weights(weights)

    @contextmanager
    def error_context(self) -> Iterator[None]:
        """Wrap errors raised after the first layer was pruned in ``PruningError``."""
        try:
            yield
        except Exception as error:
            done, total = len(self.result.layers), len(self.plan.layers)
            if done == 0:
                raise
            advice = "before using it"
            if self.journal is not None:
                advice = f"and start the same run again: {self.journal.folder} has finished blocks"
            raise PruningError(
                f"pruning stopped after {done} of {total} layers: {error}. The model in memory is "
                f"partly sparse and partly dense; load it again {advice}"
            ) from error

    def _prune_during_forward(self, recorder: Recorder) -> None:
        order = self.plan.method.calibration_order
        training = None
        if self._reconstructor is not None:
            training = BlockTraining(self._reconstructor.train, self._reconstructor.targets)
        needs_dense = order == "dense" or (training is not None and training.targets.dense)
        finished: list[Layer] = []
        if not needs_dense:  # there the forward has to see the dense weights
            finished = [layer for layer in self.plan.layers if self._is_recorded([layer])]
        restored = set(finished)
        forward = SuspendedForward(
            self.calibration,
            [layer for layer in self.plan.layers if layer not in restored],
            recorder,
            self.prune,
            order,
            skip=self.skip,
            restore=self._restore_modules if finished else None,
            restored=finished,
            training=training,
        )
        forward.run()
        self._report_unreached()
        _warn_about(
            sorted(forward.called_after_pruning),
            "these layers were called again after they had been pruned, and those calls were not "
            "measured (use calibration_order='dense' to measure every call)",
        )
        if self._reconstructor is not None:
            _warn_about(
                self._reconstructor.detached_blocks,
                "target='model' needs blocks whose input is the output of the previous block; "
                "these blocks were reconstructed with target='block'",
            )

    def _report_unreached(self) -> None:
        """Name the layers that were measured on no token, or on few."""
        # every layer that was measured has an error
        measured = [report for report in self.result.layers if report.error is not None]
        if not measured and not self.result.all_zero:
            raise ValueError(
                f"none of the {len(self.plan.layers)} prunable layers, such as "
                f"{self.plan.layers[0].name}, was called during calibration: does `forward` run "
                f"this model?"
            )
        if self.calibration.placement.always_loaded:
            self.skip(self._dense_layers())
        reports, result = self.result.layers, self.result
        result.pruned_by_magnitude.extend(r.name for r in reports if r.error is None)
        result.unreached.extend(layer.name for layer in self._dense_layers())
        _warn_about(
            result.unreached, "no calibration batch reached these layers, which are still dense"
        )
        _warn_about(
            result.pruned_by_magnitude,
            "no calibration batch reached these layers, which were pruned by magnitude",
        )
        if self.sensitivity:
            _warn_about(
                [r.name for r in reports if r.tokens and r.name not in self.sensitivity],
                "no gradient was measured for these layers (the dense model sent them no token), "
                "so all their outputs count the same",
            )
        if "gram" in self.plan.method.needs:
            _warn_about(
                [r.name for r in reports if 0 < r.tokens < r.shape[1]],
                "these layers received fewer calibration tokens than they have inputs, so that "
                "their Gram matrix is singular, and refining or updating them is unreliable (use "
                "more calibration data; for experts, experts='all')",
            )

    def _dense_layers(self) -> list[Layer]:
        pruned = {*(report.name for report in self.result.layers), *self.result.all_zero}
        return [layer for layer in self.plan.layers if layer.name not in pruned]

    def _is_recorded(self, layers: Sequence[Layer]) -> bool:
        return self.journal is not None and all(self.journal.is_finished(x.name) for x in layers)

    def _restore(self, layers: Iterable[Layer]) -> None:
        """Apply the recorded masks and weights of finished layers."""
        for layer in layers:
            assert self.journal is not None
            self._commit(layer, self.journal.read(layer))

    def _restore_modules(self, modules: set[nn.Module]) -> None:
        """Restore the finished layers among modules that have just been loaded."""
        self._restore(
            layer
            for layer in self.plan.layers
            if layer.module in modules and self._is_recorded([layer])
        )
        if self._reconstructor is not None:
            self._reconstructor.restore(modules)

    def _statistics(self, layer: Layer) -> Statistics:
        if self._recorder is None:
            return Statistics(layer=layer.name)
        return add_gradient(layer, self._recorder.statistics(layer.name), self.sensitivity)

    def _prune_group(self, layers: Sequence[Layer]) -> None:
        """Prune layers that compete with one another."""
        self._compute_and_finish(layers, self._rows, [self._statistics(layer) for layer in layers])

    def _prune_group_by_magnitude(self, layers: Sequence[Layer]) -> None:
        """The same for layers without statistics."""
        rows = RowPruner(self.plan.by_magnitude(), self.calibration.communicator, self.hooks)
        self._compute_and_finish(layers, rows, [Statistics(layer=layer.name) for layer in layers])

    def _compute_and_finish(
        self, layers: Sequence[Layer], rows: RowPruner, statistics: Sequence[Statistics]
    ) -> None:
        weights = [layer.stored_matrix() for layer in layers]
        nonzero = [int(weight.count_nonzero()) for weight in weights]
        # a mask of zeros would be kept for ever
        self.result.all_zero.extend(x.name for x in compress(layers, [not n for n in nonzero]))
        layers, statistics = list(compress(layers, nonzero)), list(compress(statistics, nonzero))
        weights = list(compress(weights, nonzero))
        initial = [1 - n / w.numel() for n, w in zip(filter(None, nonzero), weights, strict=True)]
        if not layers:
            return
        slices: list[RowSlice] = []
        error = None
        try:
            slices = list(rows.compute(layers, weights, statistics))
        except Exception as raised:  # reported to the other ranks; every rank raises
            error = raised
        # `weights` may be views of the parameters, which _finish changes: not used below
        for i, layer in enumerate(layers):
            self._finish(layer, None if error else slices[i], error, statistics[i], initial[i])

    def _finish(
        self,
        layer: Layer,
        part: RowSlice | None,
        error: Exception | None,
        statistics: Statistics,
        initial_sparsity: float,
    ) -> None:
        """Gather the rows of all ranks, write the result into the model, and record it."""
        rows, columns = layer.shape
        communicator = self.calibration.communicator
        mask, sums = communicator.gather_masks(
            (rows, columns),
            slice(0) if part is None else part.rows,
            None if part is None else part.mask,
            torch.zeros(NUM_SUMS, dtype=torch.float64) if part is None else part.sums,
            error,
        )
        assert part is not None
        weight = part.weight
        if weight is not None:
            weight = communicator.gather_rows(weight, part.rows, rows)
        if part.channel_order is not None:
            inverse = part.channel_order.argsort()
            mask = mask[:, inverse]
            weight = None if weight is None else weight[:, inverse]
        report = self._report(layer, mask, sums, weight is not None, statistics, part.seconds)
        report = replace(report, initial_sparsity=initial_sparsity)
        record = LayerRecord(report, mask, weight, part.channel_order)
        self._commit(layer, record)
        if self.journal is not None:
            self.journal.add(layer, record)

    def _report(
        self,
        layer: Layer,
        mask: Tensor,
        sums: Tensor,
        updated: bool,
        statistics: Statistics,
        seconds: float,
    ) -> LayerReport:
        rows, columns = mask.shape
        output, *errors, swaps = sums.tolist()
        measured = statistics.input is not None
        relative = [error / max(output, 1e-30) if measured else None for error in errors]
        return LayerReport(
            name=layer.name,
            shape=(rows, columns),
            target_sparsity=self.plan.patterns[layer.name].sparsity,
            sparsity=(mask.numel() - int(mask.count_nonzero())) / mask.numel(),
            error=relative[0],
            error_refined=relative[1],
            error_updated=relative[2] if updated else None,
            swaps=round(swaps),
            tokens=0 if statistics.input is None else int(statistics.input.tokens),
            seconds=seconds,
        )

    def _commit(self, layer: Layer, record: LayerRecord) -> None:
        """Write a record into the model, and add it to the result."""
        change = LayerChange(layer, record.mask, record.weight)
        change()
        _check_zeros(layer, record.mask)
        self.calibration.placement.record_change(layer.module, change)
        self.result.masks.add(layer.name, record.mask)
        if record.channel_order is not None:
            self.result.permutations[layer.name] = record.channel_order.cpu()
        self.result.layers.append(record.report)
        for hook in self.hooks:
            hook.on_layer_pruned(record.report, record.mask)


def _check_zeros(layer: Layer, mask: Tensor) -> None:
    """Check that the weight is zero where the mask prunes, as the result is going to say."""
    if is_dtensor(layer.parameter):  # reading it would be a collective
        return
    weight = layer.view(layer.parameter.detach())
    parts = zip(row_chunks(weight), row_chunks(mask), strict=True)
    if any(_is_left(weight, kept) for weight, kept in parts):
        raise ValueError(
            f"layer {layer.name} is not zero where its mask prunes: the model does not store what "
            f"is written to its weight (a view that copies, or a tensor that ignores writes)"
        )


def _is_left(weight: Tensor, kept: Tensor) -> bool:
    """Return whether a pruned weight is not zero."""
    # the product is faster, but not a number where a kept weight is infinite
    removed = weight * as_number(~kept, weight.dtype)
    return bool(torch.stack(removed.aminmax()).any()) and bool(weight.masked_fill(kept, 0).any())


def _warn_about(names: Sequence[str], message: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(f"{message}: {shown}", PruningWarning, stacklevel=4)
