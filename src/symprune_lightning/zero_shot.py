"""Tasks of lm-evaluation-harness on the model in memory, before and after pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from symprune_lightning.callbacks import pruning_target


class ZeroShot(Callback):
    """Runs tasks of lm-evaluation-harness in ``validate``, and logs what comes of them.

    Beside a pruning callback, ``symprune_lightning.Trainer`` evaluates the dense model and then the
    pruned one, so the tasks are run on both; figures are named ``arc_easy/acc`` and go where all
    metrics go: to the loggers, the manifest, the model card and the report. Needs ``pip install
    "symprune-lightning[eval]"``. A checkpoint that is written already is better given to the
    harness itself: ``lm_eval --model hf --model_args pretrained=pruned``.

    Args:
        tasks: Names of tasks.
        limit: Only so many examples of each task; ``None`` for all.
        few_shot: Examples before each question; ``None`` for as many as the task says.
        batch_size: Requests in a batch.
        include_path: Folder with task files of your own.

    Raises:
        ValueError: There are no tasks, a task is unknown, or there are several processes.

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
        if not tasks:
            raise ValueError("there are no tasks to run: name some, such as ['arc_easy']")
        self.tasks = list(tasks)
        self.limit = limit
        self.few_shot = few_shot
        self.batch_size = batch_size
        self.include_path = include_path

    @cached_property
    def _manager(self) -> Any:
        """All tasks there are; looking for them takes seconds."""
        return TaskManager(include_path=self.include_path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the tasks, before hours are spent.

        Raises:
            ValueError: A task is unknown, or there are several processes.
        """
        if trainer.world_size > 1:
            raise ValueError("ZeroShot runs in one process: use devices=1")
        unknown = [task for task in self.tasks if task not in self._manager.all_tasks]
        if unknown:
            raise ValueError(f"lm-evaluation-harness has no task {unknown[0]!r}; see `lm_eval ls`")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the tasks on the model as it is now."""
        if trainer.state.fn != TrainerFn.VALIDATING:
            return
        model: Any = pruning_target(pl_module)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("ZeroShot takes the tokenizer of a CalibrationDataModule: use one")
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
            tasks=self.tasks,
            limit=self.limit,
            num_fewshot=self.few_shot,
            task_manager=self._manager,
            bootstrap_iters=0,
            log_samples=False,
        )
        pl_module.log_dict(dict(_figures(found["results"])))


def _figures(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Task and metric to value; the harness writes ``acc,none`` for ``acc`` without a filter."""
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not name.endswith("_stderr"):
                suffix = "" if kind == "none" else f",{kind}"
                yield f"{task}/{name}{suffix}", float(value)
