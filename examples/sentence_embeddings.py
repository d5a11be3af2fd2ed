"""Prune a model of sentence-transformers and compare its embeddings before and after.

    pip install sentence-transformers
    python examples/sentence_embeddings.py MODEL TEXT_FILE OUTPUT

Each line of TEXT_FILE is a sentence. The first half is for calibration, the other for comparison.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from symprune_lightning import prune_model


def main(pretrained: str, file: str, output: str, *, sparsity: float = 0.5) -> float:
    """Prune and save; return the mean cosine similarity of embeddings before and after."""
    model = SentenceTransformer(pretrained, device="cpu")
    sentences = Path(file).read_text(encoding="utf-8").splitlines()
    calibration, held_out = sentences[: len(sentences) // 2], sentences[len(sentences) // 2 :]
    before = model.encode(held_out, convert_to_tensor=True)

    batches = [model.preprocess(calibration[i : i + 16]) for i in range(0, len(calibration), 16)]
    result = prune_model(model, batches, score="wanda", sparsity=sparsity)
    after = model.encode(held_out, convert_to_tensor=True)
    similarity = float(torch.nn.functional.cosine_similarity(before, after).mean())
    model.save(output)  # sentence-transformers' own folder, with explicit zeros
    print(
        f"sparsity {result.sparsity:.4f}, coverage {result.coverage:.2f}, cosine {similarity:.4f}"
    )
    return similarity


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:4])
