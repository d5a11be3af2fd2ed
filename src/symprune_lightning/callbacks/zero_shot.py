"""Tasks of lm-evaluation-harness on the model in memory, before and after pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from symprune_lightning.callbacks.integration import tokenizer_of
from symprune_lightning.engine.hooks import PruningHooks
from symprune_lightning.module import pruning_target


class ZeroShot(Callback, PruningHooks):
    """Runs tasks of lm-evaluation-harness in ``validate`` and logs their metrics.

    Together with a pruning callback, ``symprune_lightning.Trainer`` evaluates the dense model and
    then the pruned one, so the tasks run on both. Metrics are named ``arc_easy/acc`` and appear
    wherever metrics do: in loggers, manifest, model card and report. Needs ``pip install
    "symprune-lightning[eval]"``. For a checkpoint on disk, use the harness itself: ``lm_eval
    --model hf --model_args pretrained=pruned``.

    Args:
        tasks: Names of tasks.
        limit: Maximum number of examples per task; ``None`` for all.
        few_shot: Number of examples in the prompt; ``None`` for the task's default.
        batch_size: Requests per batch.
        include_path: Folder with additional task files.

    Raises:
        ValueError: ``tasks`` is empty, a task is unknown, there are several processes, or a
            checkpoint is streamed.
        ModuleNotFoundError: lm_eval is not installed.

    Examples:
        >>> ZeroShot(["arc_easy"], limit=100).tasks
        ['arc_easy']
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        limit: int | None = None,
        few_shot: int | None = None,
        batch_size: int = 8,
        include_path: str | None = None,
    ) -> None:
        if find_spec("lm_eval") is None:
            raise ModuleNotFoundError(
                "ZeroShot needs lm_eval: pip install 'symprune-lightning[eval]'"
            )
        if not tasks:
            raise ValueError("tasks is empty: pass at least one, such as ['arc_easy']")
        self.tasks = list(tasks)
        self.limit = limit
        self.few_shot = few_shot
        self.batch_size = batch_size
        self.include_path = include_path

    @cached_property
    def _manager(self) -> Any:
        """The registry of tasks; cached, since building it takes seconds."""
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.include_path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the names of the tasks before anything runs.

        Raises:
            ValueError: A task is unknown, or there are several processes.
        """
        if trainer.world_size > 1:
            raise ValueError("ZeroShot runs on one process: use devices=1")
        unknown = [task for task in self.tasks if task not in self._manager.all_tasks]
        if unknown:
            raise ValueError(f"lm-evaluation-harness has no task {unknown[0]!r}; see `lm_eval ls`")

    def on_stream_start(self) -> None:
        """Refuse a model that is not in memory.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "ZeroShot needs the full model in memory, but a streamed checkpoint is not evaluated: "
            "remove it, and run lm_eval on the written checkpoint"
        )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the tasks on the current model."""
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        model: Any = pruning_target(pl_module)
        tokenizer = tokenizer_of(trainer)
        if tokenizer is None:
            raise ValueError(
                "ZeroShot uses the tokenizer of a CalibrationDataModule: pass one as datamodule"
            )
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
            tasks=self.tasks,
            limit=self.limit,
            num_fewshot=self.few_shot,
            task_manager=self._manager,
            bootstrap_iters=0,
            log_samples=False,
        )
        pl_module.log_dict(dict(_metrics(results["results"])))


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield name and value; the harness names a metric without a filter ``acc,none``."""
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, filter_name = key.partition(",")
            if isinstance(value, int | float) and filter_name and not name.endswith("_stderr"):
                suffix = "" if filter_name == "none" else f",{filter_name}"
                yield f"{task}/{name}{suffix}", float(value)
