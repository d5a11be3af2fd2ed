"""Pruning of any ``nn.Module``: which layers, in which order, from which inputs."""
