"""Cut units out of a model in memory, repair it, and write what is left as a checkpoint."""

from shallower.surgery.config import cut_config
from shallower.surgery.cut import cut, is_spread, leftovers, require_together, require_whole, sharing, skipping
from shallower.surgery.pairing import Layer, re_pair
from shallower.surgery.save import (
    Export,
    ordinary,
    require_apart,
    require_free,
    require_ordinary,
    require_space,
    require_unquantized,
    save,
)
from shallower.surgery.verify import verify_saved

__all__ = [
    "Export",
    "Layer",
    "cut",
    "cut_config",
    "is_spread",
    "leftovers",
    "ordinary",
    "re_pair",
    "require_apart",
    "require_free",
    "require_ordinary",
    "require_space",
    "require_together",
    "require_unquantized",
    "require_whole",
    "save",
    "sharing",
    "skipping",
    "verify_saved",
]
