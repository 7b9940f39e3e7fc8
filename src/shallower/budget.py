"""How much to remove. Knows what units cost, not what they do."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from shallower.errors import BudgetError, UnknownName
from shallower.units import DIGITS, Unit, neighbours, parse_units, shown

QUANTITIES = ("units", "blocks", "parameters", "bytes", "flops", "kv_bytes")
TOLERANCE = 1e-9  # 20 % of 30 equal blocks is 6 blocks, whatever the last bit says

_PROTECTED = re.compile(rf"(first|last):({DIGITS})|(?:block\.)?({DIGITS}(?:-{DIGITS})?)")


@dataclass(frozen=True)
class Limit:
    """Remove at least `least` of `quantity`.

    cost: what each removable unit contributes. total: the same quantity over all blocks.
    """

    quantity: str
    least: float
    total: float
    cost: Mapping[Unit, float]

    def met(self, removed: Collection[Unit]) -> bool:
        return sum(self.cost[unit] for unit in removed) >= self.least * (1 - TOLERANCE)

    @property
    def fewest(self) -> int:
        """No fewer units meet it."""
        dearest = sorted(self.cost, key=self.cost.__getitem__, reverse=True)
        return next(count for count in range(1, len(dearest) + 1) if self.met(dearest[:count]))

    def heaviest(self, weight: Mapping[Unit, float]) -> float:
        """What a set weighs at most, roughly and from above, that without some unit of it would not meet this: its cost
        is below `least` and one unit more.
        """
        room, total = self.least + max(self.cost.values()), 0.0
        of_cost = {unit: weight[unit] / cost if cost else math.inf for unit, cost in self.cost.items()}
        for unit in sorted(of_cost, key=of_cost.__getitem__, reverse=True):
            cost = self.cost[unit]
            share = min(1.0, room / cost) if cost else 1.0
            total += share * weight[unit]
            room -= share * cost
        return total

    def __str__(self) -> str:
        if self.quantity in ("units", "blocks"):
            return f"{self.least:g} {self.quantity}"
        return f"{self.least / self.total:.3g} of the {self.quantity} in blocks"


@dataclass(frozen=True)
class Budget:
    """How much to remove: every limit is to be met."""

    limits: tuple[Limit, ...]

    def met(self, removed: Collection[Unit]) -> bool:
        return all(limit.met(removed) for limit in self.limits)

    def admits(self, removed: Collection[Unit], unit: Unit) -> bool:
        """Whether `unit` can still go, and going helps.

        Nothing of it is gone, and it costs some of what is still to be removed.
        """
        if any(unit.overlaps(gone) for gone in removed):
            return False
        unmet = [limit for limit in self.limits if not limit.met(removed)]
        return any(limit.cost.get(unit) for limit in unmet or self.limits)

    def superfluous(self, removed: Collection[Unit]) -> list[Unit]:
        """Those of `removed` of which any one may stay, as the rest meets the budget; in depth order."""
        chosen = frozenset(removed)
        return [unit for unit in sorted(chosen) if self.met(chosen - {unit})]

    def heaviest(self, weight: Mapping[Unit, float]) -> float:
        """What a set weighs at most, roughly and from above, that meets the budget with no superfluous unit."""
        return min(most(weight), max(limit.heaviest(weight) for limit in self.limits))

    def __str__(self) -> str:
        return " and ".join(map(str, self.limits))


@dataclass(frozen=True)
class Amount:
    """How much a user asked to remove: `value` units, or percent of `quantity`."""

    value: float
    share: bool
    quantity: str

    def __str__(self) -> str:
        return f"{self.value:g}{'%' if self.share else ''} {'of the ' * self.share}{self.quantity}"


def parse_remove(text: str) -> tuple[Amount, ...] | tuple[Unit, ...]:
    """Read `--remove`: a list of units, or amounts that are all to be removed.

    `8` is a number of units, `25%` a share of the parameters in blocks, `33%:kv_bytes` a share of another quantity (of
    `QUANTITIES`), `20%,33%:kv_bytes` both. Of `blocks` a lone sublayer is half of one. Raises BudgetError for what
    cannot be read, is zero or negative, more than any model holds, or 100 % and more.
    """
    text = text.strip()
    if re.match(r"[a-z]", text) and "%" not in text:
        return parse_units(text)
    return tuple(_parse_amount(item.strip(), text) for item in text.split(","))


def _parse_amount(text: str, whole: str) -> Amount:
    """whole: what it is an item of, for the error."""
    match = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)(%?)(?::(\w+))?", text)
    if match is None:
        told = (
            f", as {shown(text)} is no share"
            if text.endswith("%")
            else ", as an item is empty"
            if whole and not text
            else ""
        )
        raise BudgetError(
            f"--remove {shown(whole)} cannot be read{told}: give a number of units (6), a share of the parameters in "
            "blocks (20%), a share of another quantity (33%:kv_bytes), or units (block.13,block.14 or block.13-18)."
        )
    value, share = float(match[1]), match[2] == "%"
    quantity = match[3] or ("parameters" if share else "units")
    if quantity not in QUANTITIES:
        raise UnknownName("quantity", quantity, QUANTITIES)
    if value == math.inf:
        raise BudgetError(
            f"--remove {text[:12]}… is more than any model holds; give a share (20%) or a smaller number."
        )
    if value <= 0:
        raise BudgetError(f"--remove {text} removes nothing; give a positive number.")
    if share and value >= 100:
        raise BudgetError(f"--remove {text} would remove every block; give less than 100%.")
    if quantity == "units" and not share and value != int(value):
        raise BudgetError(f"--remove {text} is not a whole number of units.")
    return Amount(value, share, quantity)


def make_limit(amount: Amount, cost: Mapping[Unit, float], total: float) -> Limit:
    """Limit over removable units, whose `cost` is in the amount's quantity; `total` is that quantity over all blocks.

    Raises BudgetError when it takes the whole model, or more than the removable units can give.
    """
    needed = amount.value / 100 * total if amount.share else amount.value
    removable = most(cost)
    if needed >= total * (1 - TOLERANCE):
        as_share = f" For a share write {amount.value:g}%." if amount.quantity == "units" and not amount.share else ""
        raise BudgetError(
            f"cannot remove {amount}: the model's blocks hold {_in_full(total)} and something must stay.{as_share}"
        )
    if math.isclose(removable, 0):
        raise BudgetError(f"the units that may go hold no {amount.quantity}; choose other --units.")
    if needed > removable * (1 + TOLERANCE):
        # beside blocks it would say the same again
        of_units = amount.share and amount.quantity != "units" and not any(unit.kind == "block" for unit in cost)
        share = f"; for a share of these units write {amount.value:g}%:units" if of_units else ""
        raise BudgetError(
            f"cannot remove {amount}: the {len(cost)} units that may go hold {_in_full(removable)} of "
            f"{_in_full(total)}. Protect fewer or remove less{share}."
        )
    return Limit(amount.quantity, needed, total, cost)


def _in_full(value: float) -> str:
    """Of parameters and bytes every digit; blocks may be halves."""
    return f"{value:,.15g}"


def require_run(units: Iterable[Unit], budget: Budget) -> None:
    """Raise BudgetError unless some run of neighbours among `units` meets the budget."""
    if not any(budget.met(line) for line in neighbours(units)):
        raise BudgetError(
            f"no run of neighbouring units that may go removes {budget}; protect fewer, remove less, use another "
            "search, or, where a block is a single sublayer, --units block."
        )


def most(costs: Mapping[Unit, float]) -> float:
    """What can go at most where no sublayer goes twice: weighted interval scheduling, place by place."""
    ending: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for unit, cost in costs.items():
        start, stop = unit.reach
        ending[stop].append((start, cost))
    best = [0.0]
    for stop in range(1, max(ending, default=0) + 1):
        best.append(max(best[-1], *(best[start] + cost for start, cost in ending[stop]), 0.0))
    return best[-1]


def parse_protect(text: str, blocks: int) -> frozenset[int]:
    """Read `--protect`: `first:4,last:2`, blocks (`block.7`, `block.4-9`), or both; returns the indices of protected
    blocks.

    Raises BudgetError for what cannot be read or does not exist.
    """
    protected: set[int] = set()
    for item, read in _protections(text):
        if isinstance(read, frozenset):
            if max(read) >= blocks:
                raise BudgetError(f"--protect {item} does not exist: the model has blocks 0 to {blocks - 1}.")
            protected |= read
            continue
        end, count = read
        if count > blocks:
            raise BudgetError(f"--protect {item} is more than the model's {blocks} blocks.")
        protected |= set(range(count) if end == "first" else range(blocks - count, blocks))
    return frozenset(protected)


def require_protect(text: str) -> None:
    """Raise BudgetError for a `--protect` that cannot be read, whatever the model."""
    for _ in _protections(text):
        pass


def _protections(text: str) -> Iterator[tuple[str, tuple[str, int] | frozenset[int]]]:
    """Each item of `--protect`, and what it says: an end and the number of blocks there, or the indices of blocks."""
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _PROTECTED.fullmatch(item)
        if match is None:
            raise BudgetError(
                f"--protect {shown(item)} cannot be read: write first:4, last:2, block.7 or block.4-9, separated by "
                "commas."
            )
        end, count, numbers = match.groups()
        yield item, (end, int(count)) if end else frozenset(unit.index for unit in parse_units(f"block.{numbers}"))
