"""Post-training pruning of language models, as PyTorch Lightning callbacks.

Names are loaded on first access: ``from symprune_lightning import prune_model`` imports torch but
neither lightning nor transformers. ``__init__.pyi`` lists the public names.

Examples:
    >>> import torch
    >>> from symprune_lightning import prune_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> prune_model(model, [torch.randn(16, 8)], score="ria", sparsity=0.5).sparsity
    0.5
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("symprune-lightning")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
