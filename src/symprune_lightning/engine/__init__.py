"""Pruning of any ``nn.Module``: layer selection, calibration forward, masks, journal."""
