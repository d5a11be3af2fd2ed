"""Model cards: what a checkpoint is, in words, for those who find it on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache


def model_card(manifest: Mapping[str, Any]) -> str:
    """The text of a checkpoint's ``README.md``: base model, license, method, figures.

    Args:
        manifest: Contents of ``sparsity_manifest.json``.
    """
    model = str(manifest.get("model", ""))
    # a path on somebody's machine is no name on the hub
    on_hub = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    is_named = on_hub and not Path(model).exists()
    data = ModelCardData(
        base_model=model if is_named else None,
        license=_license(model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "symprune-lightning"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_lines(Path(model).name, manifest)) + "\n"


def source_folder(model: str) -> Path | None:
    """Where the files of a model are on this machine, by its name or path, if they are."""
    if not model:
        return None
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    try:
        found = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no name of the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def _license(model: str) -> str | None:
    folder = source_folder(model)
    if folder is None or not (folder / "README.md").is_file():
        return None
    try:
        found = ModelCard.load(folder / "README.md").data.license
    except ValueError:  # a card without a head, or one that is no YAML
        return None
    return None if found is None else str(found)


def _lines(name: str, manifest: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {name}, pruned"
    yield ""
    sparsity = manifest.get("sparsity")
    share = "Some" if sparsity is None else f"{100 * sparsity:.1f} %"
    yield (
        f"{share} of the weights in the pruned layers are zero. They are stored as zeros in a "
        f"plain checkpoint, which loads as any other; dense kernels are no faster for it. Made "
        f"with symprune-lightning; `sparsity_manifest.json` has all settings and figures, "
        f"`symprune/` the masks."
    )
    settings = {k: v for k, v in manifest.get("settings", {}).items() if v not in (None, [], {})}
    yield from _table("Method", ("setting", "value"), settings.items())
    metrics = manifest.get("metrics", {})
    dense, pruned = metrics.get("dense", {}), metrics.get("pruned", {})
    rows = [(n, f"{dense[n]:.4f}" if n in dense else "", f"{v:.4f}") for n, v in pruned.items()]
    yield from _table("Figures", ("metric", "dense", "pruned"), rows)


def _table(title: str, head: tuple[str, ...], rows: Any) -> Iterator[str]:
    rows = [tuple(f"`{c}`" if i else str(c) for i, c in enumerate(row)) for row in rows]
    if not rows:
        return
    yield from ("", f"## {title}", "")
    for row in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
