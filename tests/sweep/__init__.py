"""Every architecture of transformers at tiny size: masks, coverage, export."""
