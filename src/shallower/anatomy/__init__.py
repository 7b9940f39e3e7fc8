"""Where a model keeps its blocks and sublayers, and what each of them weighs. Families are recognised by structure."""

from shallower.anatomy.dissect import Anatomy, Block, dissect
from shallower.anatomy.weigh import UnitWeight, Weights, weigh

__all__ = ["Anatomy", "Block", "UnitWeight", "Weights", "dissect", "weigh"]
