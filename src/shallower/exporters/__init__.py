"""The forms in which a cut model can be stored, one a file: a function of the dense model's anatomy, the units removed
and the cut model, which gives an `Export` or refuses with ModelError. `shallower.forms` says what each form is.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shallower.anatomy import Anatomy
from shallower.exporters.native import native
from shallower.exporters.packaged import packaged
from shallower.exporters.padded import padded
from shallower.forms import require_form
from shallower.packaged import LeavesOut
from shallower.surgery.save import Export, ordinary
from shallower.surgery.save import save as write
from shallower.units import Unit

__all__ = ["export", "native", "packaged", "padded", "save"]


def export(anatomy: Anatomy, units: Collection[Unit], model: PreTrainedModel, form: str = "auto") -> Export:
    """The form in which `model`, which is `anatomy`'s without `units`, is to be stored.

    form: `auto` (ordinary where every block is whole, else native where transformers can, else packaged), `packaged` or
    `padded`. Whatever is asked for, a model of whole blocks is ordinary.

    Raises UnknownName for another form, and ModelError for one that cannot hold this model.
    """
    require_form(form)
    if not isinstance(model, LeavesOut):
        return ordinary(model)
    if form == "padded":
        return padded(anatomy, units, model)
    found = native(anatomy, units, model) if form == "auto" else None
    return packaged(anatomy, units, model) if found is None else found


def save(model: PreTrainedModel, folder: str | Path, **options: Any) -> Path:
    """Write a cut model: as an ordinary checkpoint, or as a packaged one where sublayers are missing.

    options: `plan` (required; may be None), `tokenizer`, `card`, `recoveries`, `pages`, `force`, `max_shard_size`,
    `verify_ids`, as for `shallower.surgery.save`. For a padded checkpoint, save what `cut(..., padded=True)` gives.

    Raises ModelError, OutputError or VerificationError, and leaves nothing behind then.
    """
    found = packaged(None, (), model) if isinstance(model, LeavesOut) else ordinary(model)
    return write(found, folder, **options)
