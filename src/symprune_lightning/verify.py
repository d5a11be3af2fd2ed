"""Proof that a checkpoint is what its manifest says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from symprune_lightning.datamodule import EVALUATION, CalibrationDataModule, TextSource
from symprune_lightning.export import MANIFEST
from symprune_lightning.masks import layers_of, stored_masks
from symprune_lightning.module import CausalLMModule
from symprune_lightning.streaming import INDEX
from symprune_lightning.trainer import Trainer

TOLERANCE = 1e-3
"""Largest relative difference of perplexities: hardware and kernels sum in other orders."""


class VerificationError(RuntimeError):
    """A checkpoint is not what it says it is."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        found: What came of it, in words.
        passed: ``None`` if it could not be looked at.
    """

    name: str
    found: str
    passed: bool | None


def verify(folder: str, perplexity: bool = True, trust_remote_code: bool = False) -> list[Check]:
    """Prove that a pruned checkpoint is what its manifest says.

    Looks at the files (all there, whole, plain safetensors), the weights (zero where the masks say,
    as sparse as the manifest says), and the model (loads in transformers with nothing missing or
    left over, tied weights are one, perplexity as recorded if its data is at hand).

    Args:
        folder: A checkpoint written by symprune-lightning.
        perplexity: Evaluate the model again on the recorded data.
        trust_remote_code: Let the checkpoint run code of its own. Off unless you say so.

    Returns:
        What was looked at. Nothing else is looked at once something has failed that it needs.
    """
    path = Path(folder).expanduser()
    checks: list[Check] = []

    def passed(name: str, look: Callable[[], str | None]) -> bool:
        """Do one; ``None`` of it if it can't be done, an exception if it fails."""
        try:
            found = look()
            checks.append(Check(name, found or "", True))
        except _NotAtHandError as reason:
            checks.append(Check(name, f"not checked: {reason}", None))
        except (VerificationError, OSError, ValueError, KeyError, SafetensorError) as error:
            checks.append(Check(name, f"{error}", False))
        return checks[-1].passed is not False

    manifest: dict[str, Any] = {}
    models: list[PreTrainedModel] = []
    needed = [
        ("manifest", lambda: manifest.update(_manifest(path))),
        ("files", lambda: _files(path)),
        ("configuration", lambda: _configuration(path)),
        ("loads in transformers", lambda: models.append(_loaded(path, trust_remote_code))),
    ]
    if not all(passed(name, look) for name, look in needed):
        return checks
    passed("tied weights", lambda: _tied(models[0]))
    if passed("zeros and sparsity", lambda: _zeros(path, models[0], manifest)) and perplexity:
        passed("perplexity", lambda: _perplexity(path, models[0], manifest))
    return checks


class _NotAtHandError(Exception):
    """What a check needs is not there."""


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        names = [layer["name"] for layer in manifest["layers"]]
    except OSError as error:
        raise VerificationError(f"no {MANIFEST} in {folder}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{folder / MANIFEST} can't be read: {error!r}") from error
    if not names:
        raise VerificationError(f"{folder / MANIFEST} lists no layers")
    return manifest


def _files(folder: Path) -> str:
    """Every weight file is whole, and where the index has it."""
    found: dict[str, Path] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise VerificationError(f"no safetensors in {folder}")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise VerificationError(f"{path} is damaged or cut short: {error}") from error
    index = folder / INDEX
    if index.is_file():
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
        wrong = [n for n in {**listed, **found} if (folder / listed.get(n, "")) != found.get(n)]
        if wrong:
            raise VerificationError(f"{index} and the files disagree on {wrong[0]}")
    return f"{len(found)} tensors in {len(paths)} files"


def _configuration(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "quantization_config" in config:
        raise VerificationError(
            "config.json has a quantization_config, though the weights are plain: servers would "
            "look for a compressed format"
        )
    return None


def _zeros(folder: Path, model: PreTrainedModel, manifest: dict[str, Any]) -> str:
    """Weights are zero where the masks say, and as many as the manifest says."""
    listed = {layer["name"]: layer["sparsity"] for layer in manifest["layers"]}
    zeros = total = 0
    for name, mask in _masks(folder):
        if name not in listed:
            raise VerificationError(f"there is a mask for {name}, which {MANIFEST} does not list")
        layer = layers_of(model, {name: mask})[0]
        pruned = layer.pruned(mask)
        weight, sparsity = layer.parameter, listed.pop(name)
        revived = int((weight[pruned] != 0).sum())
        if revived:
            raise VerificationError(
                f"layer {name}: {revived} weights are not zero that its mask says are pruned"
            )
        found = int((weight == 0).sum())
        if found != round(sparsity * weight.numel()):
            raise VerificationError(
                f"layer {name}: {found} of {weight.numel()} weights are zero, but {MANIFEST} says "
                f"a share of {sparsity}"
            )
        zeros, total = zeros + found, total + weight.numel()
    if listed:
        missing = next(iter(listed))
        raise VerificationError(f"{MANIFEST} lists {missing}, for which there is no mask")
    if abs(zeros / total - manifest["sparsity"]) > 1e-9:
        raise VerificationError(
            f"{zeros / total:.6f} of the weights are zero, {MANIFEST} says {manifest['sparsity']}"
        )
    return f"{zeros:,} of {total:,} weights in {len(manifest['layers'])} layers are zero"


def _masks(folder: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from stored_masks(folder)
    except (FileNotFoundError, ValueError) as error:
        raise VerificationError(str(error)) from error


def _loaded(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "local_files_only": True}
    loading: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = loading(
            folder, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    except Exception as error:
        raise VerificationError(f"transformers can't load it: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise VerificationError(f"{what.replace('_', ' ')}: {min(info[what])}")
    found: PreTrainedModel = model
    return found


def _tied(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not model.config.get_text_config().tie_word_embeddings or head is None:
        return "none in this model"
    if head.weight is not model.get_input_embeddings().weight:
        raise VerificationError("the output projection is no longer tied to the embeddings")
    return "output projection and embeddings are one"


def _perplexity(folder: Path, model: PreTrainedModel, manifest: dict[str, Any]) -> str:
    recorded = manifest.get("metrics", {}).get("pruned", {}).get("val_perplexity")
    if recorded is None:
        raise _NotAtHandError("none is recorded")
    data = _data(folder, manifest.get("data"))
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
    found = metrics[0]["val_perplexity"]
    if abs(found / recorded - 1) > TOLERANCE:
        raise VerificationError(f"{found:.4f}, recorded is {recorded:.4f}")
    return f"{found:.4f}, recorded is {recorded:.4f}"


def _data(folder: Path, settings: dict[str, Any] | None) -> CalibrationDataModule:
    """The data that was evaluated on, token by token."""
    if settings is None:
        raise _NotAtHandError("the manifest does not say on which data")
    settings = dict(settings)
    hashes = settings.pop("sha256")
    for part in ("dataset", "evaluation"):
        settings[part] = _source(settings[part])
    try:
        data = CalibrationDataModule(settings.pop("dataset"), str(folder), **settings)
        now = data.hashes
    except Exception as error:
        raise _NotAtHandError(f"its data can't be had here ({error})") from error
    if any(hashes.get(k) != v for k, v in now.items() if k.startswith(EVALUATION)):
        raise _NotAtHandError("the evaluation data gives other tokens here than it gave then")
    return data


def _source(described: Any) -> Any:
    """The texts that the manifest describes."""
    if not isinstance(described, dict):
        return described
    if "iterable" in described:
        raise _NotAtHandError("it was evaluated on texts in somebody's memory")
    if "sets" in described:
        return {name: _source(texts) for name, texts in described["sets"].items()}
    return TextSource(**described)


def report(folder: str, perplexity: bool = True, trust_remote_code: bool = False) -> None:
    """Prove that a pruned checkpoint is what its manifest says, and print what was looked at.

    Args:
        folder: A checkpoint written by symprune-lightning.
        perplexity: Evaluate the model again on the recorded data.
        trust_remote_code: Let the checkpoint run code of its own.

    Raises:
        VerificationError: It is not.
    """
    with torch.inference_mode(False):
        checks = verify(folder, perplexity, trust_remote_code)
    for check in checks:
        sign = {True: "ok", False: "FAILED", None: "--"}[check.passed]
        print(f"{sign:>6}  {check.name}{': ' + check.found if check.found else ''}")
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        raise VerificationError(f"{folder} is not what it says: {', '.join(failed)}")
