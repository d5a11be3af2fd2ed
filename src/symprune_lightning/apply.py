"""Stored masks, put onto the dense model again."""

from __future__ import annotations

from symprune_lightning.export import check_destination, export_model
from symprune_lightning.masks import apply_masks, load_masks
from symprune_lightning.pretrained import load_model, load_tokenizer


def apply(
    model: str, masks: str, output: str, dtype: str = "auto", trust_remote_code: bool = False
) -> None:
    """Zero the weights of a dense model that masks say are pruned, and write the checkpoint.

    Masks take a bit for each weight, so they are a small way to keep or send a pruned model whose
    kept weights are those of a model that everybody has.

    Args:
        model: Hub name, local folder or ``.gguf`` file of the model that the masks were made for.
        masks: A ``masks.safetensors``, or the folder of a checkpoint that has one.
        output: Folder to write.
        dtype: As for ``CausalLMModule``.
        trust_remote_code: Let the checkpoint run code of its own. Off unless you say so.

    Raises:
        ValueError: The masks are another model's.
        OSError: The folder can't be written.
    """
    check_destination(output)
    found = load_masks(masks)
    loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    apply_masks(loaded, found)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    path = export_model(loaded, output, tokenizer, settings={"masks": str(masks)})
    print(f"checkpoint: {path}")
