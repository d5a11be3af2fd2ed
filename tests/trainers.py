"""Arguments of a Trainer that shows and writes nothing."""

from __future__ import annotations

from typing import Any

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
