"""``symprune apply``: stored masks on a dense model."""

from __future__ import annotations

from symprune_lightning.checkpoints.export import check_destination, export_model
from symprune_lightning.checkpoints.masks import apply_masks, load_masks
from symprune_lightning.checkpoints.pretrained import load_model, load_tokenizer


def apply(
    model: str, masks: str, output: str, dtype: str = "auto", trust_remote_code: bool = False
) -> None:
    """Zero the pruned weights of a dense model by stored masks, and write the checkpoint.

    Masks take one bit per weight, so they are a compact way to store or share a pruned model whose
    kept weights are those of a public model.

    Args:
        model: Hub name, local folder or ``.gguf`` file of the model that the masks were made for.
        masks: A ``masks.safetensors``, or the folder of a checkpoint that has one.
        output: Folder to write.
        dtype: As for ``CausalLMModule``.
        trust_remote_code: Allow custom code from the checkpoint. Default: ``False``.

    Raises:
        ValueError: The masks belong to another model.
        OSError: The folder cannot be written.
    """
    check_destination(output)
    loaded_masks = load_masks(masks)
    dense = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    apply_masks(dense, loaded_masks)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    path = export_model(dense, output, tokenizer, settings={"masks": str(masks)})
    print(f"checkpoint: {path}")
