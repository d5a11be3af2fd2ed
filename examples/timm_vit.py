"""Prune a vision transformer of timm and compare its predictions before and after.

    pip install timm
    python examples/timm_vit.py MODEL IMAGE_FOLDER OUTPUT

MODEL is a name of timm, such as vit_small_patch16_224, whose weights come from the hub.
IMAGE_FOLDER holds images, in any subfolders. The first half is for calibration, the other for
comparison. OUTPUT is a file: `timm.create_model(MODEL, checkpoint_path=OUTPUT)` loads it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_model
from timm.data import create_transform, resolve_model_data_config

from symprune_lightning import prune_model


def main(
    name: str, folder: str, output: str, *, sparsity: float = 0.5, pretrained: bool = True
) -> float:
    """Prune and save; return the fraction of images whose predicted class stays the same."""
    model = timm.create_model(name, pretrained=pretrained).eval()
    transform = create_transform(**resolve_model_data_config(model))
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".jpg", ".jpeg", ".png"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    calibration, held_out = images[: len(images) // 2], images[len(images) // 2 :]
    with torch.inference_mode():
        before = model(held_out).argmax(1)

    batches = calibration.chunk(-(-len(calibration) // 16))
    result = prune_model(model, batches, score="ria", sparsity=sparsity)
    with torch.inference_mode():
        same = float((model(held_out).argmax(1) == before).float().mean())
    save_model(model, output)
    dense = ", ".join(f"{weight.name} ({weight.reason})" for weight in result.left_dense[:3])
    print(f"sparsity {result.sparsity:.4f}, coverage {result.coverage:.2f}, same class {same:.2f}")
    print(f"left dense: {dense or 'nothing'}")
    return same


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
