"""Run searches one after another to a trail of growing sets, and put what was chosen in an order."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from shallower.budget import Budget
from shallower.errors import BudgetError, UserError
from shallower.registry import Configured, Method
from shallower.scores import Scores, importance
from shallower.searches import Losses, best
from shallower.units import Unit, of_one_sublayer, plain, require_distinct

Trail = Sequence[frozenset[Unit]]


def run_search(
    stages: Sequence[Configured],
    units: Sequence[Unit],
    budget: Budget,
    losses: Losses,
    scores: Scores | None,
    seed: int,
) -> Trail:
    """Run registered searches one after another, each with what its signature asks for; returns the last one's trail.

    losses: the question that they may ask, of sets of plain units.
    A search that finds nothing better than what it started from leaves the trail of the one before. Whatever a search
    chose, no unit goes without which the budget would be met, too, but for those in the middle of a run.
    Raises BudgetError when it ends without meeting the budget.
    """

    def of_plain(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        return losses([frozenset(plain(removed)) for removed in candidates], keep, race=race)

    trail: list[frozenset[Unit]] = []
    for method, options in stages:
        supply: dict[str, object] = {
            "units": units,
            "budget": budget,
            "losses": of_plain,
            "start": trail[-1] if trail else frozenset(),
            "rng": random.Random(seed),
            "scores": _scores_for(method, scores, units) if scores else {},
            "spans": {span: importance(value) for span, value in scores.spans.items()} if scores else {},
        }
        trail = list(method.function(**{name: supply[name] for name in method.parameters}, **options)) or trail
        if not trail or not budget.met(trail[-1]):
            what = f"search {method.name!r} could not remove {budget} from the {len(units)} units that may go"
            if any(unit.kind == "pair" for unit in units):
                what += ", as single sublayers were left between pairs; remove less, or use --search milp"
            raise BudgetError(f"{what}.")
        trail = _without_superfluous(trail, budget, method, of_plain)
    require_distinct(trail[-1])
    return trail


def _without_superfluous(trail: Trail, budget: Budget, method: Method, losses: Losses) -> list[frozenset[Unit]]:
    """The trail with those units kept that its last set need not remove, such as small ones chosen before a large one.

    A search that measures keeps the one whose return lowers the loss most, and so on; another keeps what it chose last.
    A run stays whole: without a unit in its middle it would be none.
    """
    chosen = trail[-1]
    while "spans" not in method.parameters and (spare := budget.superfluous(chosen)):
        if "losses" in method.parameters:
            measured = losses([chosen - {unit} for unit in spare], keep=1)
            chosen -= {best(spare, measured)}
        else:
            chosen -= {max(spare, key=lambda unit: sum(unit not in removed for removed in trail))}
    back = trail[-1] - chosen
    before = dict.fromkeys(removed - back for removed in trail[:-1])
    return [*(removed for removed in before if removed and removed != chosen), chosen] if back else list(trail)


def _scores_for(method: Method, scores: Scores, units: Sequence[Unit]) -> dict[Unit, float]:
    """Importance of the units that may go, for a search that ranks them."""
    return _importance(scores, units) if _ranks_units(method, units) else {}


def _ranks_units(method: Method, units: Sequence[Unit]) -> bool:
    """Whether a search ranks units, rather than the spans that it could have instead."""
    return "scores" in method.parameters and ("spans" not in method.parameters or of_one_sublayer(units))


def require_covered(stages: Sequence[Configured], scores: Scores, units: Sequence[Unit]) -> None:
    """Raise UserError, for searches that rank units, when one of those that may go was not scored."""
    if any(_ranks_units(method, units) for method, _ in stages):
        _importance(scores, units)


def _importance(scores: Scores, units: Sequence[Unit]) -> dict[Unit, float]:
    """The scores of the units that may go. Among pairs, each unit counts the sum of its two sublayers' scores: scores
    of blocks and of sublayers cannot be compared.

    Raises UserError when one was not scored.
    """
    values = {unit: importance(value) for unit, value in scores.units.items()}
    paired = any(unit.kind == "pair" for unit in units)
    parts = {unit: unit.sublayers if paired else (unit,) for unit in units}
    wanted = {part for needed in parts.values() for part in needed}
    if missing := sorted(wanted - values.keys()):
        kinds = {part.kind for part in wanted}
        which = next(iter(kinds)) if len(kinds) == 1 else "all" if "block" in kinds else "sublayer"
        raise UserError(
            f"the scores by {scores.metric} do not cover what may go: {missing[0]} (one of {len(missing)}) has no "
            f"score; score with --units {which}."
        )
    return {unit: sum(values[part] for part in needed) for unit, needed in parts.items()}


def removal_order(trail: Trail, losses: Losses) -> list[Unit]:
    """The units of the trail's last set in removal order, each pair as its two sublayers.

    That is the trail's own order when each of its sets adds one unit to the one before. Otherwise each unit in turn is
    the one that costs least, measured.
    """
    order: list[Unit] = []
    before: Collection[Unit] = frozenset()
    for removed in trail:
        added = sorted(removed - frozenset(before))
        if len(added) != 1 or not removed.issuperset(before):
            break
        order += added
        before = removed
    else:
        return plain(order)
    left, order = set(trail[-1]), []
    while left:
        candidates = sorted(left)
        measured = losses([frozenset(plain([*order, unit])) for unit in candidates], keep=1)
        order.append(best(candidates, measured))
        left.remove(order[-1])
    return plain(order)
