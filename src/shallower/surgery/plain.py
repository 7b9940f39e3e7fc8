"""Whether a cut model is only cut: that nothing was repaired of it, or trained."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shallower.anatomy.dissect import Anatomy
from shallower.surgery.cut import cut
from shallower.units import Unit


def is_plain(student: PreTrainedModel, dense: Anatomy, removed: Collection[Unit]) -> bool:
    """Whether the student's parameters are those that are left of the dense model's, also where one of the two was
    rounded, or is on another device.

    Raises ModelError when the units cannot be cut out.
    """
    own, plain = dict(student.named_parameters()), dict(cut(dense, removed).named_parameters())
    return own.keys() == plain.keys() and all(_alike(own[name], parameter) for name, parameter in plain.items())


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two parameters are the same in the narrower of their number formats."""
    narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return equal(one.to(other.device, narrow), other.to(narrow))


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two parameters are the same, in one storage or read from checkpoints of their own."""
    if one.data_ptr() == other.data_ptr():
        return True
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)
