"""Refiners: better masks at the same budget, without training.

A refiner swaps weights inside rows: one that was pruned is grown, one that was kept is pruned. The
number of kept weights of every group is the same before and after, whatever the weights and the
statistics. It looks at dense weights, so it runs before a mask is applied.
"""

from symprune_lightning.functional.refiners.base import MaskRefiner
from symprune_lightning.functional.refiners.dsnot import DSnoT, R2DSnoT
from symprune_lightning.functional.refiners.exact import ExactSwap

__all__ = ["DSnoT", "ExactSwap", "MaskRefiner", "R2DSnoT"]
