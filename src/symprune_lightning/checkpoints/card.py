"""Model cards for pruned checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.models.auto import modeling_auto as auto

from symprune_lightning.checkpoints.pretrained import local_folder, resolve_source
from symprune_lightning.engine.result import describe_sparse_start

PIPELINES = (
    (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "image-text-to-text"),
    (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "automatic-speech-recognition"),
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "text2text-generation"),
    (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "image-classification"),
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "text-classification"),
    (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "fill-mask"),
    # last: its mapping has multimodal models too
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text-generation"),
)
"""Classes of transformers, by model type, and the pipeline that the Hub shows for them."""

ONE_SOURCE = (
    "Calibration and evaluation texts are from one source. On texts of another kind, a pruned "
    "model loses more: evaluate it on the texts that it is for."
)
"""Shown with figures of such a run."""

DATA = (
    "dataset",
    "sequences",
    "samples",
    "calibration_batches",
    "sequence_length",
    "add_bos",
    "seed",
)
"""Settings of the calibration data that are shown, as far as the data module has them."""


def model_card(manifest: Mapping[str, Any]) -> str:
    """Return the ``README.md`` of a checkpoint: base model, license, method and metrics.

    Args:
        manifest: Contents of ``sparsity_manifest.json``; all entries are optional.

    Examples:
        >>> card = model_card({"model": "org/model", "sparsity": 0.5})
        >>> "base_model: org/model" in card, "# model (pruned)" in card
        (True, True)
    """
    model = str(manifest.get("model", ""))
    data = ModelCardData(
        base_model=_hub_name(model),
        license=_license(model),
        library_name="transformers",
        pipeline_tag=_pipeline_tag(str(manifest.get("architecture", ""))),
        tags=["pruned", "sparse", "symprune-lightning"],
    )
    name = Path(model).name or str(manifest.get("architecture", ""))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_lines(name, manifest)) + "\n"


def _pipeline_tag(architecture: str) -> str | None:
    """Return the pipeline of the Hub for a class of transformers; ``None`` if it has none."""
    for names, tag in PIPELINES:
        if architecture in names.values():
            return tag
    return None


def _hub_name(model: str) -> str | None:
    """Return ``model`` if it is a hub name and no local path, which the Hub would reject."""
    try:
        source = resolve_source(model)
    except FileNotFoundError:
        return None
    return source if isinstance(source, str) and source.count("/") == 1 else None


def _license(model: str) -> str | None:
    """Return the license of the base model, if its model card is available locally."""
    folder = local_folder(model)
    if folder is None or not (folder / "README.md").is_file():
        return None
    try:
        license_name = ModelCard.load(folder / "README.md").data.license
    except (ValueError, yaml.YAMLError):  # the metadata is no mapping, or not valid YAML
        return None
    return None if license_name is None else str(license_name)


def _lines(name: str, manifest: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {name} (pruned)" if name else "# Pruned model"
    yield ""
    sparsity = manifest.get("sparsity")
    fraction = "Some" if sparsity is None else f"{100 * sparsity:.1f} %"
    yield (
        f"{fraction} of the weights in the pruned layers are zero. The zeros are stored explicitly "
        f"in a regular checkpoint that loads like any other; inference with dense kernels is no "
        f"faster. Created with symprune-lightning: `sparsity_manifest.json` records all settings "
        f"and metrics, and `symprune/` contains the masks."
    )
    yield from _sparse_start(manifest)
    yield from _coverage(manifest.get("coverage") or {})
    method, data = shown_settings(manifest)
    yield from _table("Method", ("setting", "value"), method.items())
    yield from _table("Calibration data", ("setting", "value"), data.items())
    distillation = manifest.get("distillation") or {}
    yield from _table("Distillation", ("setting", "value"), distillation.items())
    metrics = manifest.get("metrics", {})
    dense, pruned = metrics.get("dense", {}), metrics.get("pruned", {})
    rows = [(n, f"{dense[n]:.4f}" if n in dense else "", f"{v:.4f}") for n, v in pruned.items()]
    yield from _table("Metrics", ("metric", "dense", "pruned"), rows)
    if is_one_source(manifest):
        yield from ("", ONE_SOURCE)


def shown_settings(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the method and of the calibration data that differ from ``None``.

    Methods are written as calls.
    """
    settings = manifest.get("settings") or {}
    method = {k: _short(v) for k, v in settings.items() if v not in (None, [], {})}
    data = manifest.get("data") or {}
    return method, {name: _short(data[name]) for name in DATA if data.get(name) is not None}


def is_one_source(manifest: Mapping[str, Any]) -> bool:
    """Return whether a model was evaluated on further texts of the calibration data."""
    data = manifest.get("data") or {}
    is_evaluated = bool((manifest.get("metrics") or {}).get("pruned"))
    evaluation = data.get("evaluation")
    sets = (
        evaluation["sets"].values()
        if isinstance(evaluation, Mapping) and "sets" in evaluation
        else [evaluation]
    )
    return is_evaluated and "evaluation" in data and all(texts is None for texts in sets)


def _short(value: Any) -> Any:
    """Return a method or a source as a call, such as ``R2DSnoT(guard='gram')``."""
    if isinstance(value, list):
        return ", ".join(str(_short(part)) for part in value)
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"re:.*"}:  # one method for all layers
        return _short(value["re:.*"])
    if "name" in value and "path" not in value:  # a source has a name too
        options = ", ".join(f"{k}={v!r}" for k, v in value.items() if k != "name")
        return f"{value['name']}({options})" if options else value["name"]
    return ", ".join(f"{k}: {_short(v)}" for k, v in value.items() if v is not None)


def _sparse_start(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say that the model was sparse before."""
    before, after = manifest.get("initial_sparsity") or 0.0, manifest.get("sparsity") or 0.0
    sentence = describe_sparse_start(before, after)
    if sentence:
        yield from ("", sentence)


def _coverage(coverage: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say which weights of the decoder blocks are not pruned."""
    if not coverage:
        return
    yield ""
    yield (
        f"The pruned layers have {100 * coverage['fraction']:.1f} % of the weights of the model's "
        f"blocks."
    )
    left = [(w["name"], w["num_weights"], w["reason"]) for w in coverage["left_dense"][:10]]
    yield from _table("Left dense", ("weight", "entries", "reason"), left)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Markdown lines of a section with a table; no lines if there are no rows."""
    cells = [tuple(f"`{c}`" if i else str(c) for i, c in enumerate(row)) for row in rows]
    if not cells:
        return
    yield from ("", f"## {title}", "")
    for row in (header, ("---",) * len(header), *cells):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
