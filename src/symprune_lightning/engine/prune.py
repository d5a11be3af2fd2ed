"""``prune_model``: prune any ``nn.Module`` in place.

Longer than 300 lines since the arguments of a run are documented here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from symprune_lightning.engine.allocate import AllocationResolver
from symprune_lightning.engine.coverage import record_coverage, warn_about_coverage
from symprune_lightning.engine.distributed.communicator import SINGLE_PROCESS, Communicator
from symprune_lightning.engine.distributed.sharding import (
    has_nested_fsdp,
    is_tensor_parallel,
    placement_of,
)
from symprune_lightning.engine.eval_mode import eval_mode
from symprune_lightning.engine.fingerprint import run_fingerprint
from symprune_lightning.engine.forward.calibration import Calibration, Forward, call_model
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.engine.journal import Journal
from symprune_lightning.engine.layers.base import Layer
from symprune_lightning.engine.layers.names import unwrapped
from symprune_lightning.engine.layers.select import decoder_blocks, prunable_layers, refuse_tied
from symprune_lightning.engine.method import (
    DEFAULT_SPARSITY,
    Experts,
    PruningMethod,
    Refine,
    Sparsity,
    Unreached,
)
from symprune_lightning.engine.placement import WeightPlacement
from symprune_lightning.engine.plan import PruningPlan
from symprune_lightning.engine.result import PruneResult, Trial
from symprune_lightning.engine.run import PruningRun
from symprune_lightning.engine.sensitivity import Loss, measure_sensitivity
from symprune_lightning.functional.allocation import AllocationMethod
from symprune_lightning.functional.patterns import Group, Pattern
from symprune_lightning.functional.reconstruction import BlockReconstruction, split_batches
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.solvers import LayerSolver
from symprune_lightning.functional.statistics import CalibrationOrder, Statistics
from symprune_lightning.functional.update import WeightUpdate


@dataclass(frozen=True)
class RunOptions:
    """How a run is executed, as opposed to which weights it prunes; see ``prune_model``.

    Attributes:
        forward: Runs the model on one batch.
        loss: Returns the summed loss of the model on one batch, for sensitivities.
        placement: Placement of the weights, inferred by default.
        communicator: The ranks that prune together.
        offload: Target of offloaded hidden states.
        journal: Folder of the journal.
        hooks: Observers.
        initial_sparsity: Layer name to the fraction of zeros before gradual pruning began, for its
            later steps; measured by default.
    """

    forward: Forward | None = None
    loss: Loss | None = None
    placement: WeightPlacement | None = None
    communicator: Communicator = SINGLE_PROCESS
    offload: str | PathLike[str] | None = None
    journal: str | PathLike[str] | None = None
    hooks: Sequence[PruningHooks] = ()
    initial_sparsity: Mapping[str, float] | None = None


def prune_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    score: Score | str = "ria",
    sparsity: Sparsity = DEFAULT_SPARSITY,
    pattern: Pattern | str | None = None,
    group: Group = "output",
    refine: Refine = None,
    update: WeightUpdate | str | None = None,
    solver: LayerSolver | str | None = None,
    allocation: AllocationMethod | str | None = None,
    reconstruct: BlockReconstruction | bool | None = None,
    calibration_order: CalibrationOrder = "layer",
    gradient_batches: int | None = None,
    experts: Experts = "routed",
    unreached: Unreached = "dense",
    ignore: Sequence[str] | str = (),
    only: Sequence[str] | str | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    placement: WeightPlacement | None = None,
    communicator: Communicator = SINGLE_PROCESS,
    offload: str | PathLike[str] | None = None,
    journal: str | PathLike[str] | None = None,
    hooks: Sequence[PruningHooks] = (),
) -> PruneResult:
    """Prune a model in place, in one pass over the calibration batches.

    Args:
        model: Any module with ``Linear`` (or transformers ``Conv1D``) layers, on any device and in
            any floating-point dtype. Runs in eval mode; its mode is restored. A module wrapped by
            ``torch.compile``, Fabric, ``DataParallel`` or DDP is run without the wrapper, and its
            layers have the names of the plain module.
        batches: Calibration data, an iterable of inputs of the model: mappings are passed as
            keyword arguments (whole to a model that requires one argument and takes none of the
            keys), tuples and lists as positional ones, anything else as the single argument.
            Padding marked by a 2-D ``attention_mask`` is not measured. Not iterated by methods that
            need no data.
        score: Importance of each weight: a ``Score``, or its name.
        sparsity: Fraction of zeros in each group, in ``[0, 1)``; or by layer, first match first:
            ``{"re:.*down_proj": 0.4, "re:.*": 0.5}``.
        pattern: ``"2:4"`` or a ``Pattern``, in place of ``sparsity`` and ``group``.
        group: Which weights compete: those of one ``"output"`` channel, of one ``"input"``
            channel, of the ``"layer"``, of a decoder ``"block"`` (calibration order ``"block"`` or
            ``"dense"``), or of the ``"model"`` (order ``"dense"``; holds all scores in memory).
        refine: Improves each mask before it is applied: a ``MaskRefiner``, its name, a sequence of
            them, or a mapping by layer, such as ``{"re:.*self_attn.*": "dsnot"}``.
        update: Changes the kept weights to compensate for the pruned ones: a ``WeightUpdate``, or
            its name. Without one kept weights keep their values.
        solver: Chooses mask and weights together, in place of score, refiners and update: a
            ``LayerSolver``, or its name such as ``"sparsegpt"``.
        allocation: Divides the sparsity among layers: an ``Allocation``, ``Search``, or a name.
            Without one all layers have the same sparsity.
        reconstruct: Trains the kept weights of each decoder block, after it is pruned, to reproduce
            the dense output: a ``BlockReconstruction``, or ``True`` for its defaults. Requires
            ``calibration_order="block"`` and at least two batches.
        calibration_order: ``"layer"`` prunes each layer as soon as its inputs are known,
            ``"block"`` block by block, ``"dense"`` all layers by statistics of the dense model;
            see [`CalibrationOrder`][symprune_lightning.functional.statistics.CalibrationOrder].
        gradient_batches: Number of batches for sensitivities (``GradientWanda``, ``Sensitivity``),
            which take a forward and a backward pass of the dense model; ``None`` for all.
        experts: Tokens that the experts of a mixture of experts are measured on: ``"routed"`` for
            those that the router sends to each, ``"all"`` for all tokens of its block (each expert
            is called with all of them once more; the routed ones give the output).
        unreached: Layers that no calibration token reached are left ``"dense"``, or pruned by
            ``"magnitude"``. Both are named in the result.
        ignore: Layers to leave dense: names, or regular expressions prefixed with ``re:``. Heads,
            routers, output projections and adapters are left dense in any case, unless ``only`` has
            their exact names.
        only: Layers to prune, in the same form; ``None`` for all.
        forward: Called as ``forward(model, batch)`` in place of the rule for ``batches``.
        loss: Called as ``loss(model, batch)`` for sensitivities; must return the summed loss. By
            default the loss of labels drawn from the model's logits.
        placement: Placement of the weights if ``model`` is not in memory, such as a
            [`StreamedCheckpoint`][symprune_lightning.StreamedCheckpoint]. By default it is
            inferred: in memory, or sharded by FSDP2.
        communicator: The ranks that prune together: ``Communicator.from_default_group()`` in a
            script started by torchrun. ``batches`` are then those of this rank
            (``communicator.shard`` selects them). All ranks must make the same call, and end with
            the same masks.
        offload: Target of the hidden states of batches that wait in front of a decoder block:
            ``"cpu"`` for CPU memory, or a folder on disk; ``None`` leaves them on the device.
            Batches inside a block stay there: with order ``"block"`` one at a time.
        journal: Folder in which every finished block is recorded. After a crash, the same call
            resumes after the last finished block, with the same masks bit for bit. Delete it
            afterwards.
        hooks: Observers of the run, see [`PruningHooks`][symprune_lightning.PruningHooks].

    Returns:
        Masks and a report by layer. The model's weights are already zeroed.

    Raises:
        ValueError: An argument is invalid, there are no batches, or activations are not finite.
            The model is unchanged.
        PruningError: The same, or an error of the model's own (the cause), after some layers had
            been pruned. The message says how many: load the model again.
        RankError: Another rank failed.
        JournalError: The journal belongs to another run; the message names the differences.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> result = prune_model(model, [torch.randn(16, 8)], score="wanda", sparsity=0.5)
        >>> (model[0].weight == 0).sum(dim=1).tolist()
        [4, 4, 4, 4]
        >>> result.sparsity
        0.5
    """
    method = PruningMethod.resolve(
        score=score,
        sparsity=sparsity,
        pattern=pattern,
        group=group,
        refine=refine,
        update=update,
        solver=solver,
        allocation=allocation,
        reconstruct=reconstruct,
        calibration_order=calibration_order,
        gradient_batches=gradient_batches,
        experts=experts,
        unreached=unreached,
        ignore=ignore,
        only=only,
    )
    options = RunOptions(forward, loss, placement, communicator, offload, journal, hooks)
    return prune_with(model, batches, method, options)


def prune_with(
    model: nn.Module, batches: Iterable[Any], method: PruningMethod, options: RunOptions
) -> PruneResult:
    """Prune a model in place by a method object; see ``prune_model``."""
    model = unwrapped(_checked_model(model))
    if isinstance(batches, Tensor | Mapping | str):
        raise ValueError(
            f"batches is one {type(batches).__name__}; pass an iterable of batches, such as [batch]"
        )
    placement = options.placement or placement_of(model)
    layers = prunable_layers(
        model, method.ignore, method.only, allow_meta=not placement.always_loaded
    )
    refuse_tied(model, layers, method.only or ())
    if method.experts == "all" and not any(layer.is_routed for layer in layers):
        raise ValueError(
            f"experts='all' requires packed experts, and {type(model).__name__} has none among the "
            f"layers to prune: use experts='routed'"
        )
    plan = PruningPlan.resolve(model, layers, method)
    if not placement.always_loaded and method.budget(0.0).group == "model":
        raise ValueError(
            "group 'model' compares all weights at once: load the full model into memory"
        )
    users = (options.journal, method.allocation, method.reconstruct)
    if method.needs_sensitivity or any(user is not None for user in users):
        batches = _listed(batches, options.communicator)  # iterated more than once, or counted
        if method.reconstruct is not None:
            _check_reconstruction(model, layers, len(batches), options.communicator)
    forward = options.forward or _call
    calibration = Calibration(
        model,
        batches,
        forward,
        placement,
        options.communicator,
        measures_all_tokens=method.experts == "all",
    )
    for hook in options.hooks:
        hook.on_pruning_start([layer.name for layer in layers])
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        # compiled code does not call the hooks of its modules
        torch.compiler.set_stance("force_eager"),
        eval_mode(model),
        _no_cache(model),
    ):
        run = _run(plan, calibration, options)
    _set_initial_sparsity(run.result, options.initial_sparsity)
    record_coverage(model, layers, run.result)
    warn_about_coverage(run.result)
    for hook in options.hooks:
        hook.on_pruning_end(run.result)
    return run.result


def _run(plan: PruningPlan, calibration: Calibration, options: RunOptions) -> PruningRun:
    """Measure sensitivities, resolve the allocation, and prune."""
    journal = _open_journal(options, plan, calibration)
    method, placement = plan.method, calibration.placement
    try:
        sensitivity: dict[str, Statistics] = {}
        if method.needs_sensitivity:
            sensitivity = measure_sensitivity(
                plan.layers, calibration, max_batches=method.gradient_batches, loss=options.loss
            )
        plan, trials = _resolve_allocation(plan, calibration, journal, sensitivity)
        if options.offload is not None:
            calibration = replace(calibration, offload=options.offload)
            placement.blocks = placement.blocks or list(
                decoder_blocks(calibration.model, plan.layers)
            )
        run = PruningRun(plan, calibration, journal, options.hooks, sensitivity)
        run.result.trials.extend(trials)
        with run.error_context():
            run.run()
            run.check_ranks()
    except Exception:
        if journal is not None:
            journal.discard_unused()
        raise
    return run


def _set_initial_sparsity(result: PruneResult, known: Mapping[str, float] | None) -> None:
    """Replace the measured fractions of zeros by those before gradual pruning began."""
    if known is not None:
        result.layers[:] = [
            replace(report, initial_sparsity=known.get(report.name, report.initial_sparsity))
            for report in result.layers
        ]


def _checked_model(model: object) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    advice = "pass the module"
    if isinstance(model, WeightPlacement):
        advice = "pass its model: prune_model(placement.model, batches, placement=placement)"
    raise TypeError(f"model is a {type(model).__name__}, which is no nn.Module: {advice}")


def _listed(batches: Iterable[Any], communicator: Communicator) -> list[Any]:
    """Return this rank's batches as a list; an error of one rank's loader is raised on all."""
    listed, error = [], None
    try:
        # outside of Lightning's inference mode: the tensors are saved for backward passes
        with torch.inference_mode(False):
            listed = list(batches)
    except Exception as raised:
        error = raised
    communicator.all_reduce_min(0, error)
    return listed


def _check_reconstruction(
    model: nn.Module, layers: Sequence[Layer], num_batches: int, communicator: Communicator
) -> None:
    """Check before anything is pruned that blocks can be trained; a collective."""
    if is_tensor_parallel(model, layers):
        raise ValueError(
            "reconstruct is not supported for tensor parallelism: use strategy='ddp' or FSDP2"
        )
    blocks = list(decoder_blocks(model, layers))
    if not blocks:
        raise ValueError(
            f"reconstruct trains decoder blocks, and {type(model).__name__} has none: blocks are "
            f"the children of a ModuleList or Sequential that contain several layers"
        )
    if any(has_nested_fsdp(block) for block in blocks):
        raise ValueError(
            "reconstruct does not support modules that are sharded by FSDP2 inside a decoder "
            "block: apply fully_shard to the blocks only"
        )
    count = torch.tensor([num_batches if communicator.contributes else 0])
    split_batches(range(int(communicator.all_reduce_sum(count))))


def _call(model: nn.Module, batch: Any) -> object:
    """Run the model on a batch, where the caller has not said how."""
    return call_model(
        model,
        batch,
        "otherwise say how to run the model, such as forward=lambda model, batch: model(batch[0]), "
        "or model(batch['x']) for mappings",
    )


def _open_journal(
    options: RunOptions, plan: PruningPlan, calibration: Calibration
) -> Journal | None:
    if options.journal is None:
        return None
    journal = Journal(options.journal, calibration.communicator)
    journal.open(run_fingerprint(plan, calibration))
    for hook in options.hooks if journal.recorded else ():
        hook.on_resume(journal.folder, journal.recorded)
    return journal


def _resolve_allocation(
    plan: PruningPlan,
    calibration: Calibration,
    journal: Journal | None,
    sensitivity: Mapping[str, Statistics],
) -> tuple[PruningPlan, list[Trial]]:
    """Give each layer its sparsity; return the plan and the trials of a search."""
    method = plan.method
    if method.allocation is None:
        return plan, []
    assert not isinstance(method.sparsity, Mapping), "checked by PruningMethod"
    resolver = AllocationResolver(
        plan,
        calibration,
        method.sparsity,
        sensitivity,
        prune=lambda trial: PruningRun(trial, calibration, sensitivity=sensitivity).run(),
    )
    return resolver.resolve(method.allocation, journal)


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Disable the KV cache of a model inside the context."""
    cached: dict[int, Any] = {id(m.config): m.config for m in model.modules() if _uses_cache(m)}
    configs = list(cached.values())
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _uses_cache(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "use_cache", None) is True
