"""`shallower inspect`: what a model is made of, what each part weighs, and what a removal would save."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shallower.anatomy.weigh import Weights
from shallower.engine import prove
from shallower.errors import BudgetError
from shallower.plan import ModelIdentity
from shallower.units import Unit, parse_units
from shallower.verbs.subject import Subject, open_subject


@dataclass(frozen=True)
class Inspection:
    """A model's anatomy with weights; `removed` are the units whose removal was asked about."""

    identity: ModelIdentity
    family: str
    path: str
    parts: dict[str, tuple[str, ...]]
    weights: Weights
    removed: tuple[Unit, ...]

    def to_json(self) -> dict[str, Any]:
        weights = self.weights
        return {
            "model": asdict(self.identity),
            "family": self.family,
            "blocks_at": self.path,
            "parts": {kind: list(names) for kind, names in self.parts.items()},
            "units": {str(unit): asdict(weight) for unit, weight in weights.units.items()},
            "all_blocks": asdict(weights.blocks),
            "whole_model": asdict(weights.model),
            "removed": {"units": [str(unit) for unit in self.removed], **asdict(weights.of(self.removed))},
        }


def inspect(
    model: str | Path | PreTrainedModel | Subject,
    *,
    remove: str = "",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Inspection:
    """Take a model apart and weigh it. remove: units such as `block.13-18`, to see what would be left.

    Raises ModelError when the model cannot be found, read, or proven to be understood; BudgetError for units it has
    not.
    """
    removed = parse_units(remove)
    subject = open_subject(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    prove(subject.anatomy)
    for unit in removed:
        if unit not in subject.anatomy.units:
            raise BudgetError(
                f"{unit} does not exist: {subject.identity.name} has {len(subject.anatomy.blocks)} blocks."
            )
    parts: dict[str, tuple[str, ...]] = {}
    for block in subject.anatomy.blocks:
        for kind in ("attn", "mlp"):
            part = block.part(kind)
            names = [] if part is None else [type(block.module.get_submodule(name)).__name__ for name in part.names]
            parts[kind] = tuple(dict.fromkeys([*parts.get(kind, ()), *names]))
    anatomy = subject.anatomy
    return Inspection(subject.identity, anatomy.family, anatomy.path, parts, subject.weights, removed)
