"""Checkpoints on disk: models, masks, manifests, streaming."""
