"""`shallower inspect`: what a model is made of, what each part weighs, and what a removal would save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from shallower.anatomy import Anatomy
from shallower.anatomy.weigh import UnitWeight, Weights, size
from shallower.engine import prove
from shallower.errors import BudgetError, ModelError
from shallower.exporters import packaged
from shallower.exporters.native import skip_words
from shallower.packaged import LeavesOut
from shallower.plan import ModelIdentity
from shallower.surgery import cut, require_unquantized
from shallower.units import Unit, parse_units
from shallower.verbs.subject import ModelLike, Subject, open_subject


@dataclass(frozen=True)
class Inspection:
    """A model's anatomy with weights. removed: units whose removal was asked about; gone: what goes with them.

    dtype: the number format that the model is in memory in, in which bytes are counted.
    exports: by form (`shallower.forms`), what of this model can be stored in it, or why nothing can.
    """

    identity: ModelIdentity
    family: str
    dtype: str
    path: str
    parts: dict[str, tuple[str, ...]]
    weights: Weights
    removed: tuple[Unit, ...]
    gone: UnitWeight
    exports: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        weights = self.weights
        return {
            "model": asdict(self.identity),
            "family": self.family,
            "dtype": self.dtype,
            "blocks_at": self.path,
            "parts": {kind: list(names) for kind, names in self.parts.items()},
            "units": {str(unit): asdict(weight) for unit, weight in weights.units.items()},
            "all_blocks": asdict(weights.blocks),
            "whole_model": asdict(weights.model),
            "exports": self.exports,
            "removed": {"units": [str(unit) for unit in self.removed], **asdict(self.gone)},
        }


def inspect(
    model: ModelLike,
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
    subject.anatomy.require(removed)
    parts: dict[str, tuple[str, ...]] = {}
    for block in subject.anatomy.blocks:
        for kind in ("attn", "mlp"):
            names = [type(module).__name__ for module in block.modules_of(kind)]
            parts[kind] = tuple(dict.fromkeys([*parts.get(kind, ()), *names]))
    anatomy = subject.anatomy
    exports = _exports(anatomy)
    gone = _gone(subject, removed)
    return Inspection(
        subject.identity, anatomy.family, subject.dtype, anatomy.path, parts, subject.weights, removed, gone, exports
    )


def _gone(subject: Subject, removed: Sequence[Unit]) -> UnitWeight:
    """What the checkpoint lacks that `prune` writes: norms that served only a removed sublayer go with it."""
    gone = subject.weights.of(removed)
    if all(unit.kind == "block" for unit in removed):
        return gone
    try:
        parameters, stored = size((cut(subject.anatomy, removed),))
    except (BudgetError, ModelError):  # there is none
        return gone
    whole = subject.weights.model
    return replace(gone, parameters=whole.parameters - parameters, bytes=whole.bytes - stored)


def _exports(anatomy: Anatomy) -> dict[str, str]:
    """Try on one pair and on one lone sublayer what can be stored how."""
    if isinstance(anatomy.model, LeavesOut):
        return {"packaged": "as it is; nothing more can be removed"}
    middle = len(anatomy.blocks) // 2
    try:
        require_unquantized(anatomy.model)
    except ModelError as error:
        return {"ordinary": f"nothing: {error}"}
    whole = _without(anatomy, Unit(middle, "block"))
    found = {"ordinary": whole if isinstance(whole, str) else "whole blocks"}
    if not isinstance(whole, str) and isinstance(
        _without(anatomy, Unit(middle - 1, "mlp"), Unit(middle, "attn")), PreTrainedModel
    ):
        found["ordinary"] += ", and sublayers that pair up (mlp.3 with attn.4)"
    lone: PreTrainedModel | str = "no sublayers that can be told apart"
    for unit in (Unit(middle, "attn"), Unit(middle, "mlp")):
        if unit in anatomy.units:
            lone = _without(anatomy, unit, whole=False)
            break
    words = skip_words(anatomy.model)
    obeyed = " and ".join({"attn": "attentions", "mlp": "MLPs"}[kind] for kind in words)
    found["native"] = f"lone {obeyed}" if words else "none, as no class of this transformers leaves sublayers out"
    if isinstance(lone, str):
        return {**found, "packaged": lone, "padded": lone}
    try:
        found["packaged"] = " ".join(["lone sublayers.", *packaged(anatomy, (), lone).notes])
    except ModelError as error:
        found["packaged"] = f"nothing: {error}"
    return {**found, "padded": "lone sublayers, at no gain"}


def _without(anatomy: Anatomy, *units: Unit, whole: bool = True) -> PreTrainedModel | str:
    """The model without `units`, or why there is none; `whole`: only one of whole blocks will do."""
    try:
        model = cut(anatomy, units)
    except (BudgetError, ModelError) as error:
        return f"nothing: {error}"
    return "nothing: they do not pair up" if whole and isinstance(model, LeavesOut) else model
