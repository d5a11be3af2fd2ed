"""Refiners: better masks at the same budget, without training.

A refiner swaps weights within rows: a pruned weight is grown, and a kept one is pruned. Every group
has the same number of kept weights before and after, for any weights and statistics. Refiners use
the dense weights, so they run before a mask is applied.
"""

import importlib
import pkgutil

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.refiners.dsnot import DSnoT, R2DSnoT
from symprune_lightning.functional.refiners.exact import ExactSwap

# A class is registered when its module is imported, so a new refiner is one new file in this
# folder. The imports above are for type checkers and for `__all__`.
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["DSnoT", "ExactSwap", "MaskRefiner", "R2DSnoT"]
