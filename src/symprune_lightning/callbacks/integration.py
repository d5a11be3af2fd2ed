"""Access to the parts of a Trainer and a LightningModule that pruning uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DistributedSampler
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.data.datamodule import CalibrationDataModule
from symprune_lightning.engine.distributed.communicator import SINGLE_PROCESS, Communicator
from symprune_lightning.engine.forward.calibration import Forward, call_model
from symprune_lightning.engine.sensitivity import Loss
from symprune_lightning.module import TransformersModule, pruning_target


def trainer_callbacks(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks, an attribute that it does not declare."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def weight_averages(trainer: Trainer, module: LightningModule) -> Iterator[LightningModule]:
    """Yield the averages of a module's weights that callbacks keep.

    Those of Lightning's callbacks, and every ``AveragedModel``; other copies may be dense teachers.
    """
    for callback in trainer_callbacks(trainer):
        for key, value in vars(callback).items():
            average = value.module if isinstance(value, AveragedModel) else None
            if key == "_average_model" and average is None:  # StochasticWeightAveraging
                average = value
            if isinstance(average, type(module)):
                yield average


def model_name(module: LightningModule) -> str:
    """Return the name or path of the dense model; empty if it has none."""
    if isinstance(module, TransformersModule):
        return module.pretrained
    target = pruning_target(module)
    return str(target.config.name_or_path) if isinstance(target, PreTrainedModel) else ""


def calibration_datamodule(trainer: Trainer) -> CalibrationDataModule | None:
    """Return the Trainer's data module if it is a ``CalibrationDataModule``."""
    datamodule = getattr(trainer, "datamodule", None)  # set by Lightning during a call
    return datamodule if isinstance(datamodule, CalibrationDataModule) else None


def tokenizer_of(trainer: Trainer) -> Tokenizer | None:
    """Return the tokenizer of the Trainer's data module."""
    datamodule = calibration_datamodule(trainer)
    return None if datamodule is None else datamodule.tokenizer


def refuse_strategies(callback: Callback, trainer: Trainer) -> None:
    """Raise ``ValueError`` under a strategy that flattens or partitions the weights."""
    if _is_instance(trainer.strategy, "FSDPStrategy") or _is_instance(
        trainer.strategy, "DeepSpeedStrategy"
    ):
        raise ValueError(
            f"{type(callback).__name__} does not support {type(trainer.strategy).__name__}, which "
            f"flattens or partitions the weights: use strategy='ddp', or ModelParallelStrategy "
            f"(FSDP2 and tensor parallel)"
        )


def refuse_spawned_processes(callback: Callback, trainer: Trainer) -> None:
    """Raise ``ValueError`` for an evaluation in processes that return neither weights nor masks."""
    if _is_instance(trainer.strategy.launcher, "_MultiProcessingLauncher"):
        raise ValueError(
            f"{type(callback).__name__} would prune in processes that strategy='ddp_spawn', "
            f"'ddp_fork' or 'ddp_notebook' starts for this evaluation, and that return neither the "
            f"weights nor the masks: use strategy='ddp', or torchrun"
        )


def _is_instance(value: object, name: str) -> bool:
    """Return whether a value is of a class, of ``lightning`` or of ``pytorch_lightning``."""
    return name in {cls.__name__ for cls in type(value).__mro__}


def communicator_of(trainer: Trainer) -> Communicator:
    """Return the communicator of the Trainer's ranks."""
    strategy: Any = trainer.strategy
    if not _is_instance(trainer.strategy, "ParallelStrategy") or trainer.world_size == 1:
        return SINGLE_PROCESS
    if _is_instance(trainer.strategy, "ModelParallelStrategy"):
        # tensor-parallel ranks that hold shards of the same layers run the same batches
        sampler = strategy.distributed_sampler_kwargs
        return Communicator.from_default_group(sampler["rank"], sampler["num_replicas"])
    return Communicator.from_default_group()


def calibration_batches(
    trainer: Trainer, module: LightningModule, calibration: Iterable[Any] | None
) -> Iterator[Any]:
    """Yield all calibration batches, on every rank.

    Lazy, so that data-free methods work without a loader.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        calibration: Batches that take precedence over the loaders of data module and module.

    Raises:
        ValueError: There is no calibration data, or its loader has a distributed sampler or yields
            several batches at once.
    """
    limit = int(trainer.fast_dev_run) or None  # type: ignore[attr-defined]
    loader = _calibration_loader(trainer, module, calibration)
    if isinstance(loader, CombinedLoader):
        loader = _batches_in_sequence(loader)
    yield from islice(loader, limit)


def _batches_in_sequence(loader: CombinedLoader) -> Iterator[Any]:
    """Yield the batches of all loaders, without the indices that Lightning's loops unpack."""
    if loader._mode != "sequential":
        raise ValueError(
            f"the calibration loader is a CombinedLoader with mode={loader._mode!r}, which yields "
            f"several batches at once: use mode='sequential'"
        )
    for batch, _, _ in loader:
        yield batch


def _calibration_loader(
    trainer: Trainer, module: LightningModule, calibration: Iterable[Any] | None
) -> Iterable[Any]:
    loader = calibration
    owners: tuple[object, ...] = (getattr(trainer, "datamodule", None), module)
    for owner in owners:
        make_loader = getattr(owner, "calibration_dataloader", None)
        if loader is None and callable(make_loader):
            loader = make_loader()
    if loader is None:
        raise ValueError(
            "there is no calibration data: pass calibration=<a dataloader> to the pruning "
            "callback, use a CalibrationDataModule, or define calibration_dataloader() in your "
            "data module or LightningModule"
        )
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise ValueError(
            "the calibration loader has a DistributedSampler, which repeats samples to make them "
            "divisible: remove it; batches are divided among ranks by the pruning callback"
        )
    return loader


def calibration_forward(trainer: Trainer, module: LightningModule) -> Forward:
    """Return the forward of a calibration batch, in the Trainer's precision.

    Batches are given to the module's ``calibration_step(batch)`` if it has one, else to the module
    that is pruned.
    """
    step = getattr(module, "calibration_step", None)

    def forward(model: nn.Module, batch: Any) -> object:
        with trainer.precision_plugin.forward_context():
            if step is not None:
                return step(batch)
            return call_model(
                model,
                batch,
                "in a LightningModule whose forward expects something else, define "
                "calibration_step(batch)",
            )

    return forward


def calibration_loss(module: LightningModule) -> Loss | None:
    """Return the loss for sensitivities: the module's ``calibration_loss(batch)`` if it has one."""
    step = getattr(module, "calibration_loss", None)
    return None if step is None else lambda _, batch: step(batch)


def transfer_batches(batches: Iterable[Any], trainer: Trainer) -> Iterator[Any]:
    """Apply the same transfer hooks to batches as Lightning's loops."""
    for batch in batches:
        converted = trainer.precision_plugin.convert_input(batch)
        if trainer.lightning_module is not None:
            converted = trainer.lightning_module._on_before_batch_transfer(converted)
        yield trainer.strategy.batch_to_device(converted)


def metrics_of(trainer: Trainer) -> Mapping[str, float]:
    """Return the metrics of the last evaluation as floats."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
