"""Writing of pruned checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from symprune_lightning.checkpoints.conversion import stored_tensors
from symprune_lightning.checkpoints.manifest import MANIFEST, build_manifest, write_manifest
from symprune_lightning.checkpoints.masks import (
    FILE,
    FOLDER,
    infer_masks,
    save_masks,
)
from symprune_lightning.checkpoints.pretrained import Processor, local_folder
from symprune_lightning.engine.coverage import record_coverage
from symprune_lightning.engine.distributed.communicator import Communicator
from symprune_lightning.engine.distributed.sharding import full_state_dict
from symprune_lightning.engine.files import PARTIAL, atomic_directory, hidden_sibling
from symprune_lightning.engine.layers.match import match_layers
from symprune_lightning.engine.layers.names import (
    COMPILED,
    has_transformers_adapters,
    is_peft_model,
    unwrapped,
)
from symprune_lightning.engine.result import LayerReport, PruneResult
from symprune_lightning.errors import PruningWarning
from symprune_lightning.functional.packing import PackedMasks


def check_destination(output: str | Path, size: int = 0) -> Path:
    """Check that a checkpoint can be written, before the run starts.

    Args:
        output: The folder to be written. A symbolic link to a folder stays; its target is written.
        size: Size of the checkpoint in bytes, as far as it is known.

    Returns:
        Its absolute path, without symbolic links.

    Raises:
        FileExistsError: It is not empty and holds no checkpoint of this package.
        PermissionError: Its parent folder cannot be written, or it is a mount point.
        OSError: The disk has less space than the checkpoint needs.
        NotADirectoryError: A component of the path is a file.
    """
    path = Path(output).expanduser().resolve()
    for component in (path, *path.parents):
        if component.exists() and not component.is_dir():
            raise NotADirectoryError(f"cannot write a checkpoint to {path}: {component} is a file")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise FileExistsError(
            f"{path} is not empty and is not a checkpoint written by symprune-lightning (it has "
            f"no {MANIFEST}): choose a new folder"
        )
    if os.path.ismount(path):
        raise PermissionError(
            f"{path} is a mount point, which cannot be replaced: choose a folder inside it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {path.parent}: {error}; choose another folder"
        ) from error
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            f"a checkpoint of {size / 1e9:.1f} GB does not fit on the disk of {path.parent}, which "
            f"has {free / 1e9:.1f} GB left: choose another folder"
        )
    return path


def name_unfinished(path: Path) -> None:
    """Warn about unfinished checkpoints of other runs in the same folder."""
    own = hidden_sibling(path, PARTIAL)
    for folder in path.parent.glob(f".*.{PARTIAL}"):
        if folder.is_dir() and folder != own:  # that of this path is cleaned up when it is written
            warnings.warn(
                f"{folder} is the unfinished checkpoint of a run that was killed, or that is still "
                f"writing: delete it if no such run exists",
                PruningWarning,
                stacklevel=3,
            )


def save_checkpoint(
    output: str | Path,
    model: PreTrainedModel,
    tokenizer: Processor | None,
    manifest: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a pruned model as plain safetensors with explicit zeros, its masks and manifest.

    The write is atomic: files go into a folder with a temporary name, are flushed to disk, and the
    folder is renamed. An earlier checkpoint of this package at that path is replaced only then.
    Shards are no larger than those of the model's source.

    Args:
        output: The folder.
        model: The pruned model.
        tokenizer: Tokenizer or processor, saved along, if given.
        manifest: Contents of ``sparsity_manifest.json``, see ``build_manifest``.
        masks: Layer name to bool mask ``(out_features, in_features)``, True = kept.
        state: The full weights, if the model is sharded.

    Returns:
        The folder's absolute path.

    Raises:
        TypeError: The tokenizer cannot be saved.
        OSError: See ``check_destination``; or the disk is full, and nothing has changed.
    """
    path = check_destination(output)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"the tokenizer is a {type(tokenizer).__name__}; pass a tokenizer or processor of "
            f"transformers, such as AutoTokenizer.from_pretrained(...)"
        )
    model, state = _plain(model, state)
    largest = _largest_file(str(manifest.get("model", "")))
    with atomic_directory(path) as tmp:
        try:
            model.save_pretrained(
                tmp,
                state_dict=None if state is None else dict(state),
                max_shard_size="50GB" if largest is None else largest,
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(tmp)
            save_masks(tmp / FOLDER / FILE, masks)
            write_manifest(tmp, {**manifest, **stored_tensors(model, masks)})
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"cannot write the checkpoint {path}: {error}. Its contents have not changed"
            ) from error
    return path


def export_model(
    model: PreTrainedModel,
    output: str | Path,
    tokenizer: Processor | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write any model with zeros, such as one that was fine-tuned after pruning.

    Masks and sparsity are inferred from its zeros. With several ranks all must call this; rank 0
    writes.

    Args:
        model: The model, sharded or not.
        output: The folder, see ``save_checkpoint``.
        tokenizer: Tokenizer or processor, saved along, if given.
        settings: How the model was made, as JSON values, for manifest and model card.
        metrics: Metrics of the model.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: No layer has zeros.
        TypeError: The model has adapters that are not merged, or the tokenizer cannot be saved.
        OSError: See ``save_checkpoint``.
        RankError: Rank 0 failed, on all other ranks.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from symprune_lightning import prune_model
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> _ = prune_model(model, [torch.arange(32)[None]], score="wanda")
        >>> path = export_model(model, f"{tempfile.mkdtemp()}/pruned")
        >>> sorted(file.name for file in path.iterdir())[:3]
        ['README.md', 'config.json', 'generation_config.json']
    """
    model, _ = _plain(model, None)
    masks = infer_masks(model)
    if not masks:
        raise ValueError(f"no layer of {type(model).__name__} has zeros: prune it first")
    result = _result_of(masks)
    record_coverage(model, match_layers(model, masks), result)
    manifest = build_manifest(
        result,
        model=str(model.config.name_or_path),
        architecture=type(model).__name__,
        settings=settings or {},
        pruned=metrics,
    )
    manifest["initial_sparsity"] = None  # not known
    state, communicator = full_state_dict(model), Communicator.from_default_group()
    path = communicator.on_rank_zero(
        lambda: str(save_checkpoint(output, model, tokenizer, manifest, masks, state))
    )
    return Path(path)


def _plain(
    model: Any, state: Mapping[str, Tensor] | None
) -> tuple[PreTrainedModel, Mapping[str, Tensor] | None]:
    """Return the model that wrappers hold, and its weights by their plain names.

    Raises:
        TypeError: The model is no model of transformers, or has adapters that are not merged.
    """
    plain: Any = unwrapped(model)
    if is_peft_model(plain):
        raise TypeError(
            "a PeftModel is written without its base weights: merge the adapters first, "
            "merge_adapters(model)"
        )
    if has_transformers_adapters(plain):
        raise TypeError(
            f"transformers has added adapters to this {type(plain).__name__}, and would write them "
            f"without the base weights: load them by peft, PeftModel.from_pretrained(model, "
            f"adapters), and merge them, merge_adapters(model)"
        )
    if not isinstance(plain, PreTrainedModel):
        raise TypeError(f"{type(plain).__name__} is no model of transformers, which can be written")
    wrapper = f"{COMPILED}."
    if state is None and any(wrapper in key for key, _ in plain.named_parameters()):
        state = plain.state_dict()
    if state is not None:
        state = {key.replace(wrapper, ""): value for key, value in state.items()}
    return plain, state


def _result_of(masks: PackedMasks) -> PruneResult:
    """Return a result that holds masks whose origin is not known."""
    result = PruneResult(masks=masks)
    for name, mask in masks.items():
        sparsity = int((~mask).sum()) / mask.numel()
        rows, columns = mask.shape
        report = LayerReport(name, (rows, columns), sparsity, sparsity, None, None, None, 0, 0, 0.0)
        result.layers.append(report)
    return result


def _largest_file(model: str) -> int | None:
    """Return the size of the largest weight file of a model's source, if it has several."""
    folder = local_folder(model)
    files = [] if folder is None else list(folder.glob("*.safetensors"))
    return max(file.stat().st_size for file in files) if len(files) > 1 else None
