"""``symprune verify``: verification of checkpoints against their manifest."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from symprune_lightning.checkpoints.manifest import MANIFEST, read_manifest
from symprune_lightning.checkpoints.masks import load_masks
from symprune_lightning.checkpoints.pretrained import model_class
from symprune_lightning.checkpoints.weight_files import INDEX
from symprune_lightning.data.datamodule import EVALUATION, CalibrationDataModule
from symprune_lightning.data.sources import source_from_settings
from symprune_lightning.engine.layers.match import match_layers
from symprune_lightning.errors import VerificationError
from symprune_lightning.functional.packing import PackedMasks
from symprune_lightning.module import CausalLMModule
from symprune_lightning.trainer import Trainer

TOLERANCE = 1e-3
"""Largest accepted relative difference of perplexities: other hardware and kernels accumulate in
another order."""


@dataclass(frozen=True)
class Check:
    """One check of a checkpoint.

    Attributes:
        name: Name of the check.
        message: Its finding.
        passed: ``None`` if it could not be performed.
    """

    name: str
    message: str
    passed: bool | None


def verify(folder: str, perplexity: bool = True, trust_remote_code: bool = False) -> list[Check]:
    """Verify a pruned checkpoint against its manifest.

    Checks the files (complete, plain safetensors), the weights (zero where the masks prune, as
    sparse as the manifest states) and the model (loads in transformers, by the class that its
    configuration names, without missing or unexpected keys; weights are tied; perplexity as
    recorded, if its data is available).

    Args:
        folder: A checkpoint written by symprune-lightning.
        perplexity: Whether to evaluate the model again on the recorded data.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Returns:
        The checks performed. Dependent checks are skipped after a failure.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    checks: list[Check] = []

    def passes(name: str, check: Callable[[], str | None]) -> bool:
        """Perform a check; return False if it failed."""
        try:
            checks.append(Check(name, check() or "", True))
        except _UnavailableError as reason:
            checks.append(Check(name, f"not checked: {reason}", None))
        except (VerificationError, OSError, ValueError, KeyError, SafetensorError) as error:
            checks.append(Check(name, f"{error}", False))
        return checks[-1].passed is not False

    manifest: dict[str, Any] = {}
    models: list[PreTrainedModel] = []
    required = [
        ("manifest", lambda: manifest.update(_read_manifest(path))),
        ("files", lambda: _check_files(path)),
        ("configuration", lambda: _check_configuration(path)),
        ("loads in transformers", lambda: models.append(_load(path, trust_remote_code))),
    ]
    if not all(passes(name, check) for name, check in required):
        return checks
    passes("tied weights", lambda: _check_tied(models[0]))
    zeros_ok = passes("zeros and sparsity", lambda: _check_zeros(path, models[0], manifest))
    if zeros_ok and perplexity:
        passes("perplexity", lambda: _check_perplexity(path, models[0], manifest))
    return checks


class _UnavailableError(Exception):
    """A precondition of a check is unavailable."""


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_manifest(folder)
    except OSError as error:
        raise VerificationError(f"no {MANIFEST} in {folder}: {error.strerror}") from error


def _check_files(folder: Path) -> str:
    """Check that every weight file is complete and agrees with the index."""
    file_of: dict[str, Path] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise VerificationError(f"no safetensors in {folder}")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                file_of |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise VerificationError(f"{path} is damaged or truncated: {error}") from error
    index = folder / INDEX
    if index.is_file():
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
        names = {**listed, **file_of}
        wrong = [n for n in names if (folder / listed.get(n, "")) != file_of.get(n)]
        if wrong:
            raise VerificationError(f"{index} and the files disagree on {wrong[0]}")
    return f"{len(file_of)} tensors in {len(paths)} files"


def _check_configuration(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "quantization_config" in config:
        raise VerificationError(
            "config.json has a quantization_config, though the weights are plain: inference "
            "servers would expect a compressed format"
        )
    return None


def _check_zeros(folder: Path, model: PreTrainedModel, manifest: dict[str, Any]) -> str:
    """Check that weights are zero where the masks prune, and as many as the manifest states."""
    sparsities = {layer["name"]: layer["sparsity"] for layer in manifest["layers"]}
    masks = _load_masks(folder)
    for name in masks:
        if name not in sparsities:
            raise VerificationError(f"there is a mask for {name}, which {MANIFEST} does not list")
    missing = [name for name in sparsities if name not in masks]
    if missing:
        raise VerificationError(f"{MANIFEST} lists {missing[0]}, for which there is no mask")
    is_trained = bool(manifest.get("blocks") or manifest.get("distillation"))
    total_zeros = total = 0
    for layer in match_layers(model, masks):
        weight, sparsity = layer.matrix(), sparsities[layer.name]
        revived = int((weight[~masks[layer.name]] != 0).sum())
        if revived:
            raise VerificationError(
                f"layer {layer.name}: {revived} weights are not zero although its mask prunes them"
            )
        zeros = int((weight == 0).sum())
        expected = round(sparsity * weight.numel())
        if is_trained and zeros > expected:
            zeros = expected  # in half precision, training can round a kept weight to zero
        if zeros != expected:
            raise VerificationError(
                f"layer {layer.name}: {zeros} of {weight.numel()} weights are zero, but {MANIFEST} "
                f"states a sparsity of {sparsity}"
            )
        total_zeros, total = total_zeros + zeros, total + weight.numel()
    if abs(total_zeros / total - manifest["sparsity"]) > 1e-9:
        raise VerificationError(
            f"{total_zeros / total:.6f} of the weights are zero, {MANIFEST} states "
            f"{manifest['sparsity']}"
        )
    return f"{total_zeros:,} of {total:,} weights in {len(masks)} layers are zero"


def _load_masks(folder: Path) -> PackedMasks:
    try:
        return load_masks(folder)
    except (FileNotFoundError, ValueError) as error:
        raise VerificationError(str(error)) from error


def _load(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "local_files_only": True}
    try:
        model, info = model_class(str(folder), trust_remote_code).from_pretrained(
            folder, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    except Exception as error:
        raise VerificationError(f"transformers cannot load it: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise VerificationError(f"{problem.replace('_', ' ')}: {min(info[problem])}")
    loaded: PreTrainedModel = model
    return loaded


def _check_tied(model: PreTrainedModel) -> str:
    """Check that the weights share storage that class and configuration of the model tie."""
    # computed again: transformers removes from `all_tied_weights_keys` what it could not tie
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name, source in tied.items():
        if model.get_parameter_or_buffer(name) is not model.get_parameter_or_buffer(source):
            raise VerificationError(f"{name} is no longer tied to {source}")
    return ", ".join(sorted(tied)) or "none in this model"


def _check_perplexity(folder: Path, model: PreTrainedModel, manifest: dict[str, Any]) -> str:
    recorded = manifest.get("metrics", {}).get("pruned", {}).get("val_perplexity")
    if recorded is None:
        raise _UnavailableError("no perplexity is recorded")
    if getattr(model.config, "is_encoder_decoder", False):
        raise _UnavailableError("it is not that of a causal language model")
    if manifest.get("limit_val_batches") is not None:
        raise _UnavailableError("the recorded one is that of a part of the evaluation batches")
    data = _recorded_data(folder, manifest.get("data"))
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = trainer.validate(CausalLMModule(model), datamodule=data, verbose=False)
    perplexity = metrics[0]["val_perplexity"]
    if abs(perplexity / recorded - 1) > TOLERANCE:
        raise VerificationError(f"{perplexity:.4f}, but {recorded:.4f} is recorded")
    return f"{perplexity:.4f}, {recorded:.4f} is recorded"


def _recorded_data(folder: Path, settings: dict[str, Any] | None) -> CalibrationDataModule:
    """Return the data of the recorded evaluation, token by token."""
    if settings is None:
        raise _UnavailableError("the manifest does not record the data")
    settings = dict(settings)
    hashes = settings.pop("sha256")
    try:
        for key in ("dataset", "evaluation"):
            settings[key] = source_from_settings(settings[key])
        data = CalibrationDataModule(settings.pop("dataset"), str(folder), **settings)
        current = data.hashes
    except Exception as error:
        raise _UnavailableError(f"its data is not available here ({error})") from error
    if any(hashes.get(k) != v for k, v in current.items() if k.startswith(EVALUATION)):
        raise _UnavailableError("the evaluation data has other tokens here than it had then")
    return data


def print_checks(folder: str, perplexity: bool = True, trust_remote_code: bool = False) -> None:
    """Verify a pruned checkpoint against its manifest, and print the checks.

    Args:
        folder: A checkpoint written by symprune-lightning.
        perplexity: Whether to evaluate the model again on the recorded data.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        VerificationError: A check failed.
    """
    with torch.inference_mode(False):
        checks = verify(folder, perplexity, trust_remote_code)
    for check in checks:
        status = {True: "ok", False: "FAILED", None: "--"}[check.passed]
        print(f"{status:>6}  {check.name}{': ' + check.message if check.message else ''}")
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        raise VerificationError(f"{folder} does not match its manifest: {', '.join(failed)}")
