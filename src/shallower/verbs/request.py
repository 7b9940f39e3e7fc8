"""What `--remove`, `--units` and `--protect` mean for one model: units that are named, or a budget and what may go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shallower.anatomy import Block
from shallower.budget import Amount, Budget, Limit, make_limit, most, parse_protect, parse_remove, require_run
from shallower.errors import BudgetError, ModelError
from shallower.units import Unit, sublayers_of
from shallower.verbs.search_methods import searches_named
from shallower.verbs.subject import Subject, units_of


@dataclass(frozen=True)
class Request:
    """What `--remove` means for one model. budget: None when the user named the `units`; else they are what may go."""

    units: tuple[Unit, ...]
    budget: Budget | None


def resolve(
    subject: Subject,
    remove: str | int,
    search: str = "greedy",
    *,
    units: str = "block",
    ordinary: bool = False,
    protect: str = "",
) -> Request:
    """Refuse what is wrong with this model, before anything is measured.

    Raises BudgetError for units that it has not, that are protected, or an amount that it cannot give, and ModelError
    for `ordinary` with a family whose sublayers do not pair up.
    """
    asked = parse_remove(str(remove))
    protected = parse_protect(protect, len(subject.anatomy.blocks))
    named = _explicit(subject, asked, protected)
    if named is not None:
        return Request(tuple(named), None)
    methods = searches_named(search)
    if any(method.traits.get("keeps_last_block") for method in methods):
        protected |= {len(subject.anatomy.blocks) - 1}
    removable = _whole(subject, protected) if ordinary else units_of(subject, units, protected)
    budget = budget_for(subject, [item for item in asked if isinstance(item, Amount)], removable)
    if any("spans" in method.parameters for method in methods):
        require_run(removable, budget)
    return Request(removable, budget)


def budget_for(subject: Subject, amounts: Sequence[Amount], units: Sequence[Unit]) -> Budget:
    """The budget that `--remove` asks for, over the units that may go."""
    return Budget(tuple(_limit(subject, amount, units) for amount in amounts))


def _limit(subject: Subject, amount: Amount, units: Sequence[Unit]) -> Limit:
    if amount.quantity == "units":
        kinds = {unit.kind for unit in units}
        everything = subject.anatomy.of_kind(*({"block"} if "block" in kinds and amount.share else kinds - {"pair"}))
        return make_limit(amount, dict.fromkeys(units, 1.0), most(dict.fromkeys(everything, 1.0)))
    return make_limit(
        amount, _cost(subject, amount.quantity, units), float(getattr(subject.weights.blocks, amount.quantity))
    )


def _cost(subject: Subject, quantity: str, units: Iterable[Unit]) -> dict[Unit, float]:
    """How much of a quantity each unit holds; it may be a pair."""
    known = subject.weights.units
    return {unit: float(getattr((subject.pairs if unit.kind == "pair" else known)[unit], quantity)) for unit in units}


def parameters_left(subject: Subject, request: Request) -> int:
    """How many parameters stay: at least, where it is for a search to say what goes."""
    cost = _cost(subject, "parameters", request.units)
    gone = sum(cost.values()) if request.budget is None else request.budget.heaviest(cost)
    return subject.weights.model.parameters - round(gone)


def _explicit(
    subject: Subject, asked: tuple[Amount, ...] | tuple[Unit, ...], protected: frozenset[int]
) -> list[Unit] | None:
    """The units that the user named, checked; None when amounts were given."""
    units = [item for item in asked if isinstance(item, Unit)]
    if not units:
        return None
    blocks = len(subject.anatomy.blocks)
    subject.anatomy.require(units)
    for unit in units:
        if unit.index in protected:
            raise BudgetError(f"{unit} is both to be removed and protected.")
    if takes_all(subject, units):
        raise BudgetError(f"--remove names all {blocks} blocks, whole or by their sublayers; something must stay.")
    return units


def takes_all(subject: Subject, units: Iterable[Unit]) -> bool:
    """Whether nothing of any block would stay."""
    gone = sublayers_of(units)
    return all(_is_empty(block, gone) for block in subject.anatomy.blocks)


def _is_empty(block: Block, gone: frozenset[Unit]) -> bool:
    """Whether no matrix of a block stays; one may have only one half (Mamba)."""
    halves = gone.intersection(Unit(block.index, "block").sublayers)
    taken = {id(one) for half in halves for module in block.modules_of(half.kind) for one in module.parameters()}
    matrices = [parameter for parameter in block.module.parameters() if parameter.dim() >= 2]
    return len(halves) == 2 or (bool(halves) and all(id(matrix) in taken for matrix in matrices))


def _whole(subject: Subject, protected: frozenset[int]) -> tuple[Unit, ...]:
    """Blocks and pairs: what can go one after another and always leave an ordinary model.

    Raises ModelError when the family's sublayers do not pair up.
    """
    blocks = units_of(subject, "block", protected)
    pairs = [pair for pair in subject.pairs if not {pair.index, pair.index + 1} & protected]
    if not subject.pairs:
        raise ModelError(
            f"sublayers of this {subject.anatomy.family} model do not pair up to ordinary blocks (an MLP and the "
            "attention after it cannot go together exactly): drop --ordinary, and use --units block for an ordinary "
            "checkpoint."
        )
    return tuple(sorted([*blocks, *pairs]))
