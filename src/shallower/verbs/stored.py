"""A cut model as it is stored: in the precision of the checkpoint that it comes from, whatever it was measured in, with
what recoveries made of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shallower import progress
from shallower.anatomy import Anatomy
from shallower.surgery import cut
from shallower.surgery.adopt import adopt
from shallower.surgery.mapping import mapped
from shallower.surgery.patch import patches
from shallower.units import Unit
from shallower.verbs.subject import ModelLike, Subject, open_subject


@dataclass(frozen=True, eq=False)
class Stored:
    """A cut model, and the anatomy of the dense one, both in the precision that is stored."""

    dense: Anatomy
    model: PreTrainedModel


def stored_cut(dense: Subject, removed: frozenset[Unit]) -> Stored | None:
    """The plain cut in the precision that the dense checkpoint is stored in; None where it is in memory in that."""
    if dense.stored_dtype == dense.dtype:
        return None
    assert dense.loaded.path is not None
    trusted = type(dense.model).is_remote_code()  # as it was when it was opened
    anatomy = _again(dense.loaded.path, device="cpu", dtype=dense.stored_dtype, trust_remote_code=trusted).anatomy
    return Stored(anatomy, cut(anatomy, removed))


def stored_checkpoint(folder: Path, dense: Subject, **options: Any) -> Stored:
    """The checkpoint of a cut model, and its dense one, loaded again. options: of `open_subject`, for both."""
    teacher = dense.model if dense.loaded.path is None else dense.loaded.path
    return Stored(_again(teacher, **options).anatomy, _again(folder, **options).model)


def as_stored(
    dense: Anatomy,
    model: PreTrainedModel,
    removed: frozenset[Unit],
    again: Stored | None,
    before: Iterable[nn.Parameter] | None,
) -> Stored:
    """What is to be stored of a cut model; where maps stand at cuts, one that has them in place of what is missing.

    dense, model: as they were measured. again: the same before any repair, in the precision that is stored; None where
    they are in that. before: the parameters that the recoveries were given; None without any recovery.
    """
    if again is not None:
        if before is not None:
            adopt(again.model, model, before)
        dense, model = again.dense, again.model
    return Stored(dense, mapped(model, dense, removed) if any(patches(model)) else model)


def _again(model: ModelLike, **options: Any) -> Subject:
    """A model that is in memory in another precision. Its folder may be one of the cache, whose name tells nobody
    anything, so that it is not said.
    """
    with progress.task(f"loading it again in {options['dtype']}"), progress.silent():
        return open_subject(model, **options)
