"""``prune_model``: any ``nn.Module`` in, the same module with zeros out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from symprune_lightning.engine.allocate import Division
from symprune_lightning.engine.journal import Journal, described
from symprune_lightning.engine.layers import LM_HEAD, decoder_blocks, prunable_layers
from symprune_lightning.engine.method import (
    Refine,
    Sparsity,
    resolve_method,
)
from symprune_lightning.engine.parallel import ALONE, Ranks, residence_of
from symprune_lightning.engine.residence import Residence
from symprune_lightning.engine.result import OnScores, Progress, PruneResult, Trial
from symprune_lightning.engine.run import Run
from symprune_lightning.engine.schedule import (
    Forward,
    Schedule,
    check_schedule,
)
from symprune_lightning.functional.allocation import Allocation
from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.patterns import Group, Pattern
from symprune_lightning.functional.scores import Score
from symprune_lightning.functional.update import WeightUpdate


def prune_model(
    model: nn.Module | Residence,
    batches: Iterable[Any],
    *,
    score: Score | str = "ria",
    sparsity: Sparsity = 0.5,
    pattern: Pattern | str | None = None,
    group: Group = "output",
    refine: Refine = None,
    update: WeightUpdate | str | None = None,
    allocation: Allocation | str | None = None,
    schedule: Schedule = "layer",
    ignore: Sequence[str] = LM_HEAD,
    only: Sequence[str] | None = None,
    forward: Forward | None = None,
    ranks: Ranks = ALONE,
    offload: str | PathLike[str] | None = None,
    journal: str | PathLike[str] | None = None,
    on_scores: OnScores | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model in place, in one pass over the calibration batches.

    Args:
        model: Any module with ``Linear`` (or transformers ``Conv1D``) layers, on any device and in
            any floating-point dtype. Runs in eval mode; its mode is restored. Or a checkpoint that
            is read block by block, see [`StreamedCheckpoint`]
            [symprune_lightning.streaming.StreamedCheckpoint].
        batches: Calibration data, an iterable of what the model takes: mappings are passed as
            keywords, tuples and lists as positional arguments, anything else as it is. Padding
            that a 2-D ``attention_mask`` marks is not measured. Not looked at by methods that need
            no data.
        score: Importance of each weight: a ``Score``, or its name.
        sparsity: Fraction of zeros in each group, in ``[0, 1)``; or by layer, first match first:
            ``{"re:.*down_proj": 0.4, "re:.*": 0.5}``.
        pattern: ``"2:4"`` or a ``Pattern``, in place of ``sparsity`` and ``group``.
        group: Which weights compete: of one ``"output"`` channel, of one ``"input"`` channel, of
            the whole ``"layer"``, of a decoder ``"block"`` (schedule block or dense), or of the
            ``"model"`` (schedule dense; holds all scores at once).
        refine: Improves each mask before it is applied: a ``MaskRefiner``, its name, several in a
            list, or for some layers only, such as ``{"re:.*self_attn.*": "dsnot"}``.
        update: Changes the kept weights to make up for the pruned ones: a ``WeightUpdate``, or its
            name. Without one kept weights keep their values.
        allocation: Divides the sparsity among layers: an ``Allocation``, or its name. Without one
            all layers have the same.
        schedule: When a layer is pruned, see [`Schedule`]
            [symprune_lightning.engine.schedule.Schedule].
        ignore: Layers to leave dense: names, or regular expressions behind ``re:``. Replaces the
            default, which spares the output projection ``lm_head``.
        only: Layers to prune, in the same way; ``None`` for all.
        forward: Called as ``forward(model, batch)`` in place of the rule above.
        ranks: The processes that prune this model together: ``Ranks.all()`` in a script started by
            torchrun. ``batches`` is then this process's share (``ranks.deal`` makes one). All must
            call alike, and all end with the same masks.
        offload: Where the hidden states of batches are kept while they wait before a decoder block:
            ``"cpu"`` for the CPU's memory, or a folder on disk; ``None`` leaves them on the device.
            Batches inside a block stay there, with schedule block one at a time.
        journal: Folder to keep every finished block in, so that a run that was killed goes on when
            it is started again, with the same masks bit for bit. Delete it afterwards.
        on_scores: Called with every layer's name, scores and mask before refining, to look at them.
        progress: Called after every layer.

    Returns:
        Masks and a report by layer. The model's weights are already zeroed.

    Raises:
        ValueError: An argument is wrong, there are no batches, or activations are not finite. The
            model is unchanged.
        PruningError: The same, or an error of the model's own (the cause), after some layers had
            been pruned. The message says how many: load the model again.
        RankError: Another process has failed.
        JournalError: The journal is of another run; the message says what differs.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> result = prune_model(model, [torch.randn(16, 8)], score="wanda", sparsity=0.5)
        >>> (model[0].weight == 0).sum(dim=1).tolist()
        [4, 4, 4, 4]
        >>> result.sparsity
        0.5
    """
    check_schedule(schedule)
    if isinstance(batches, Tensor):
        raise ValueError("batches is one tensor; pass an iterable of batches, such as [tensor]")
    residence = model if isinstance(model, Residence) else residence_of(model)
    if isinstance(model, Residence):
        model = model.model
    streamed = residence is not None and not residence.readable
    layers = prunable_layers(model, ignore, only, on_meta=streamed)
    method = resolve_method(
        model,
        layers,
        score=score,
        sparsity=sparsity,
        pattern=pattern,
        group=group,
        refine=refine,
        update=update,
        schedule=schedule,
    )
    if streamed and next(iter(method.patterns.values())).group == "model":
        raise ValueError("group 'model' needs all weights at once: load the model as a whole")
    forward = forward or call_model
    trials: list[Trial] = []
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model):
        book = None
        if journal is not None:
            batches = list(batches)
            book = Journal(journal, ranks)
            given = {"schedule": schedule, "sparsity": sparsity, "allocation": allocation}
            weights = None if residence is None else residence.identity
            book.open(described(model, layers, method, batches, ranks, weights=weights, **given))
        if allocation is not None:
            if isinstance(sparsity, Mapping):
                raise ValueError("sparsity by layer does not go with an allocation: give one level")
            batches = list(batches)
            division = Division(model, layers, batches, forward, method, schedule, ranks, residence)
            chosen = by_name(Allocation, allocation)  # type: ignore[type-abstract]
            method, trials = division.divided(chosen, sparsity, book)
        if offload is not None and residence is None:
            residence = Residence(model, list(decoder_blocks(model, layers)))
        run = Run(layers, method, ranks, residence, offload, book, on_scores, progress)
        run.result.trials.extend(trials)
        with run.saying_what_is_done():
            run.run(model, batches, forward, schedule)
            run.check_same()
    return run.result


def call_model(model: nn.Module, batch: Any) -> object:
    """Mappings as keywords, tuples and lists as positional arguments, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no KV cache, both restored at the end."""
    training = [module for module in model.modules() if module.training]
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if _caches(m)}
    caching = list(configs.values())
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for module in training:
            module.training = True


def _caches(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "use_cache", None) is True
