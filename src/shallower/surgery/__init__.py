"""Cut units out of a model in memory, repair it, and write what is left as an ordinary checkpoint."""

from shallower.surgery.config import cut_config
from shallower.surgery.cut import cut, leftovers, skipping
from shallower.surgery.pairing import Layer, re_pair
from shallower.surgery.save import require_free, require_ordinary, save
from shallower.surgery.verify import verify_saved

__all__ = [
    "Layer",
    "cut",
    "cut_config",
    "leftovers",
    "re_pair",
    "require_free",
    "require_ordinary",
    "save",
    "skipping",
    "verify_saved",
]
