"""Loading of models and tokenizers from a hub name, a local folder, or a GGUF file.

Longer than 300 lines since safetensors, GGUF files and custom code are loaded differently.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from symprune_lightning.checkpoints.hub import check_hub
from symprune_lightning.checkpoints.weight_files import refuse_packed
from symprune_lightning.errors import PruningWarning, first_of

IGNORE_INDEX = -100
"""Label of positions that are excluded from the loss, as in transformers."""

Processor = Tokenizer | ProcessorMixin | FeatureExtractionMixin | ImageProcessingMixin
"""Converts text, images or audio to inputs of a model; saved next to the model."""


def load_model(
    pretrained: str, *, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model by the class that its configuration names, in eval mode.

    The class is that of ``model_class``; for a GGUF file, it is ``AutoModelForCausalLM``. The
    weights of a GGUF file are dequantized to ``dtype`` (float32 for ``"auto"``), and the
    quantization settings are removed from the model's configuration, so that it can be saved as
    plain safetensors. Other checkpoints have to be in safetensors.

    Args:
        pretrained: Hub name, local folder, or path to a ``.gguf`` file.
        dtype: ``"auto"`` for the dtype of the checkpoint, or a name such as ``"bfloat16"``.
            Default: ``"auto"``.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        FileNotFoundError: ``pretrained`` is a path that does not exist.
        ValueError: ``dtype`` is unknown, the checkpoint needs ``trust_remote_code``, is a packed
            copy, or lacks weights of the model.
        OSError: The checkpoint has no weights in safetensors, or they are damaged.
    """
    torch_dtype = _resolve_dtype(dtype, pretrained)
    if not _is_gguf(pretrained):
        return _load_safetensors(pretrained, torch_dtype, trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        **_source_arguments(pretrained), dtype=torch_dtype, trust_remote_code=trust_remote_code
    )
    # the quantization attributes outlive dequantization, and would be saved with the plain weights
    # which of these attributes marks the model as quantised depends on the version of transformers
    vars(model.config).pop("quantization_config", None)
    for attribute in ("hf_quantizer", "is_quantized"):
        vars(model).pop(attribute, None)
    return model


def _load_safetensors(
    pretrained: str, dtype: torch.dtype | str, trust_remote_code: bool
) -> PreTrainedModel:
    folder = local_folder(pretrained)
    if folder is not None:
        refuse_packed(folder)
    model: PreTrainedModel
    try:
        # no pickled weights: unpickling can execute code
        model, info = model_class(pretrained, trust_remote_code).from_pretrained(
            **_source_arguments(pretrained),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise OSError(f"the weights of {pretrained} are damaged or truncated: {error}") from error
    _check_complete(model, sorted(info["missing_keys"]), pretrained)
    return model


def _check_complete(model: PreTrainedModel, missing: Sequence[str], pretrained: str) -> None:
    """Refuse a checkpoint that lacks weights, which transformers initialises at random.

    Weights beside the blocks and the embeddings, such as a pooler, may be missing on purpose.
    """
    if not missing:
        return
    get_output: Any = model.get_output_embeddings  # without types
    embeddings = {model.get_input_embeddings(), get_output()}
    names = {name for name, module in model.named_modules() if module in embeddings}
    # blocks have numbers
    essential = [
        key for key in missing if re.search(r"\.\d+\.", key) or key.rpartition(".")[0] in names
    ]
    model_name = type(model).__name__
    if essential:
        raise ValueError(
            f"{pretrained} lacks {len(missing)} of the weights of {model_name}, such as "
            f"{essential[0]}: the checkpoint is incomplete, or its config.json is that of another "
            f"model"
        )
    warnings.warn(
        f"{pretrained} lacks {first_of(missing)}: {model_name} has random weights there",
        PruningWarning,
        stacklevel=4,
    )


def model_class(pretrained: str, trust_remote_code: bool = False) -> Any:
    """Return the class whose ``from_pretrained`` loads a checkpoint.

    This is the class of transformers that the configuration lists in ``architectures``. With
    ``trust_remote_code`` and an ``auto_map``, it is the auto class that ``auto_map`` assigns to the
    custom model. ``AutoModelForCausalLM`` is returned if there is no such class.

    Args:
        pretrained: Hub name or local folder.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        FileNotFoundError: ``pretrained`` is a path that does not exist.

    Examples:
        >>> import tempfile
        >>> from transformers import ViTConfig
        >>> folder = tempfile.mkdtemp()
        >>> ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(folder)
        >>> model_class(folder).__name__
        'ViTForImageClassification'
    """
    source = str(resolve_source(pretrained))
    try:
        # the file itself: AutoConfig would run custom code, or raise for an unknown model type
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError:  # no config.json: an adapter, whose base model AutoModel finds
        return AutoModelForCausalLM
    architectures = config.get("architectures") or []
    if trust_remote_code and (auto_class := _auto_class(config, architectures)) is not None:
        return auto_class
    # a custom model may bear the name of a class of transformers, but has its own model type
    for name in architectures if config.get("model_type") in CONFIG_MAPPING else ():
        candidate = getattr(transformers, name, None)
        if isinstance(candidate, type) and issubclass(candidate, PreTrainedModel):
            return candidate
    return AutoModelForCausalLM


def _auto_class(config: dict[str, Any], architectures: list[str]) -> Any:
    """Return the auto class that loads the custom model of a checkpoint; ``None`` without one."""
    auto_map: dict[str, str] = config.get("auto_map") or {}
    names = [name for name in auto_map if name.startswith("AutoModel")]
    # ordered by preference; the sort is stable
    names.sort(key=lambda name: name != AutoModelForCausalLM.__name__)
    names.sort(key=lambda name: auto_map[name].rpartition(".")[2] not in architectures)
    return getattr(transformers, names[0], None) if names else None


def load_tokenizer(pretrained: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        pretrained: Hub name, local folder, or path to a ``.gguf`` file.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        FileNotFoundError: ``pretrained`` is a path that does not exist.
        ValueError: The checkpoint needs ``trust_remote_code``.
    """
    arguments = _source_arguments(pretrained)
    try:
        return AutoTokenizer.from_pretrained(**arguments, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{pretrained} has no tokenizer that can be read: save it there, "
            f"tokenizer.save_pretrained({pretrained!r}) ({reason})"
        ) from error


def load_processor(pretrained: str, *, trust_remote_code: bool = False) -> Processor:
    """Load the processor of a model.

    Args:
        pretrained: Hub name or local folder.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        FileNotFoundError: ``pretrained`` is a path that does not exist.
        ValueError: The checkpoint needs ``trust_remote_code``.
    """
    auto: Any = AutoProcessor
    processor: Processor = auto.from_pretrained(
        **_source_arguments(pretrained), trust_remote_code=trust_remote_code
    )
    return processor


def resolve_source(pretrained: str) -> Path | str:
    """Tell local paths from hub names.

    Args:
        pretrained: Hub name, local folder, or path to a ``.gguf`` file.

    Returns:
        The path, with ``~`` expanded, if it exists; otherwise ``pretrained`` itself, a hub name.

    Raises:
        FileNotFoundError: ``pretrained`` starts with ``/``, ``.`` or ``~`` or ends with ``/`` or
            ``.gguf``, and there is no such file or folder.

    Examples:
        >>> resolve_source("HuggingFaceTB/SmolLM2-135M")
        'HuggingFaceTB/SmolLM2-135M'
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> resolve_source(folder) == Path(folder)
        True
    """
    path = Path(pretrained).expanduser()
    if path.exists():
        return path
    # from_pretrained would look for a mistyped path on the Hub and report a network error
    if _is_gguf(pretrained) or pretrained.startswith(("/", ".", "~")) or pretrained.endswith("/"):
        raise FileNotFoundError(
            f"no model at {path}: expected a folder written by save_pretrained, a .gguf file, or "
            f"the name of a model on the Hub"
        )
    return pretrained


def local_folder(pretrained: str) -> Path | None:
    """Return the local folder that contains a model's files, without downloading anything.

    Args:
        pretrained: Hub name or local folder; may be empty.

    Returns:
        The folder itself, the snapshot of a hub model in the local cache, or ``None`` if there is
        neither.

    Examples:
        >>> local_folder("no-such/model") is None
        True
    """
    # an empty path is the current directory
    if not pretrained:
        return None
    try:
        source = resolve_source(pretrained)
        if isinstance(source, Path):
            return source if source.is_dir() else None
        config = try_to_load_from_cache(source, "config.json")
    except (FileNotFoundError, ValueError):  # ValueError: not a valid hub name
        return None
    return Path(config).parent if isinstance(config, str) else None


def _is_gguf(pretrained: str) -> bool:
    return pretrained.endswith(".gguf")


def _source_arguments(pretrained: str) -> dict[str, str]:
    """Arguments of ``from_pretrained`` that name the source."""
    source = resolve_source(pretrained)
    if isinstance(source, str):
        check_hub(source, "model", f"pass a folder (./{source}) or a .gguf file")
    if isinstance(source, Path) and _is_gguf(pretrained):
        if find_spec("gguf") is None:
            raise ModuleNotFoundError(
                f"reading {source.name} needs the package gguf: pip install "
                f"'symprune-lightning[gguf]'"
            )
        return {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    return {"pretrained_model_name_or_path": str(source)}


def _resolve_dtype(name: str, pretrained: str) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if _is_gguf(pretrained) else "auto"
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', but got {name!r}"
        )
    return dtype
