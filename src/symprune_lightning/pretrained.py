"""Models and tokenizers by name: a hub name, a local folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORE = -100
"""Label of a position where nothing is to be predicted, as in transformers."""


def load_model(
    pretrained: str, *, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model.

    A GGUF file is de-quantised to ``dtype`` (float32 for ``"auto"``), and its quantisation is
    dropped from the configuration, so that the model can be saved as plain safetensors.

    Args:
        pretrained: Hub name, local folder, or path of a ``.gguf`` file.
        dtype: ``"auto"`` for the checkpoint's own, or a name such as ``"bfloat16"``.
        trust_remote_code: Let the checkpoint run code of its own. Off unless you say so.

    Raises:
        FileNotFoundError: ``pretrained`` is a path, and nothing is there.
        ValueError: The dtype is unknown.
    """
    options: dict[str, Any] = {
        "dtype": _dtype(dtype, pretrained),
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if not _is_gguf(pretrained):
        return AutoModelForCausalLM.from_pretrained(_existing(pretrained), **options)
    options.pop("use_safetensors")
    model = AutoModelForCausalLM.from_pretrained(**_gguf(pretrained), **options)
    del model.config.quantization_config, model.hf_quantizer
    del model.is_quantized
    return model


def load_tokenizer(pretrained: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer that belongs to a model.

    Args:
        pretrained: As in ``load_model``.
        trust_remote_code: As in ``load_model``.

    Raises:
        FileNotFoundError: ``pretrained`` is a path, and nothing is there.
    """
    source = _gguf(pretrained) if _is_gguf(pretrained) else _folder(pretrained)
    return AutoTokenizer.from_pretrained(**source, trust_remote_code=trust_remote_code)


def _is_gguf(pretrained: str) -> bool:
    return pretrained.endswith(".gguf")


def _gguf(pretrained: str) -> dict[str, Any]:
    path = Path(_existing(pretrained))
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _folder(pretrained: str) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": _existing(pretrained)}


def _existing(pretrained: str) -> str:
    """The name itself; a path must exist, lest it be taken for the name of a hub model."""
    looks_like_a_path = _is_gguf(pretrained) or pretrained.startswith(("/", ".", "~"))
    path = Path(pretrained).expanduser()
    if looks_like_a_path and not path.exists():
        raise FileNotFoundError(
            f"no model at {path}: give a folder written by save_pretrained, a .gguf file, or the "
            f"name of a model on the hub"
        )
    return str(path) if path.exists() else pretrained


def _dtype(name: str, pretrained: str) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if _is_gguf(pretrained) else "auto"
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {name!r}; use 'auto', 'float32', 'bfloat16' or 'float16'")
    return dtype
