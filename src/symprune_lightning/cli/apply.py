"""``symprune apply``: stored masks on a dense model."""

from __future__ import annotations

from pathlib import Path

from symprune_lightning.checkpoints.export import check_destination, export_model
from symprune_lightning.checkpoints.masks import apply_masks, load_masks
from symprune_lightning.checkpoints.masks_only import restore_from_masks
from symprune_lightning.checkpoints.pretrained import load_model, load_tokenizer
from symprune_lightning.checkpoints.weight_files import INFO


def apply(
    masks: str,
    output: str,
    model: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Zero the pruned weights of a dense model by stored masks, and write the checkpoint.

    Masks take one bit per weight, so they are a compact way to store or share a pruned model whose
    kept weights are those of a public model. From a copy that ``symprune pack --masks_only`` wrote,
    the checkpoint is restored as it was, and the hash of every tensor is verified.

    Args:
        masks: A ``masks.safetensors``, the folder of a checkpoint that has one, or a copy of
            ``symprune pack --masks_only``.
        output: Folder to write.
        model: Hub name, local folder or ``.gguf`` file of the model that the masks were made for.
            Default: the one that a copy of ``symprune pack --masks_only`` names.
        dtype: As for ``CausalLMModule``. A copy of ``symprune pack --masks_only`` has its own.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        ValueError: The masks belong to another model, or ``model`` is missing.
        OSError: The folder cannot be written.
    """
    check_destination(output)
    if (Path(masks).expanduser() / INFO).is_file():
        if dtype != "auto":
            raise ValueError(f"{masks} has its own dtypes: leave out --dtype")
        path = restore_from_masks(masks, output, model, trust_remote_code=trust_remote_code)
        print(f"checkpoint: {path}, every tensor as in the one that was packed")
        return
    loaded_masks = load_masks(masks)
    if model is None:
        raise ValueError(f"{masks} does not name the dense model: pass --model")
    dense = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    apply_masks(dense, loaded_masks)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    path = export_model(dense, output, tokenizer, settings={"masks": str(masks)})
    print(f"checkpoint: {path}")
