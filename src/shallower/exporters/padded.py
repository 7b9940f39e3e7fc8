"""Removed sublayers that are still there and add nothing: an ordinary checkpoint that is no smaller."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from shallower.anatomy import Anatomy
from shallower.errors import ModelError
from shallower.packaged import has_maps
from shallower.surgery.cut import cut
from shallower.surgery.runtimes import misreadings
from shallower.surgery.save import Export, form_of
from shallower.units import Unit


def padded(anatomy: Anatomy, units: Collection[Unit], model: PreTrainedModel) -> Export:
    """Re-pair what pairs up, and put zeros in the output projections of the sublayers left over.

    Raises ModelError when a map stands for a removed sublayer, and for a family in which zeros cannot make a sublayer
    add nothing.
    """
    if has_maps(model.config):
        raise ModelError(
            "a map stands where a sublayer was removed, and a padded checkpoint has no room for it: save it packaged."
        )
    filled = cut(anatomy, units, padded=True)
    return Export(form_of("padded", anatomy.model), filled, notes=misreadings(filled))
