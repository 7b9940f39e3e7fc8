"""Shapley values against averages over every order of removal, on games of numbers and on a tiny model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest

from shallower.anatomy import dissect
from shallower.engine import Ablator
from shallower.errors import UserError
from shallower.metrics.shapley import enumerated, rank_agreement, sampled, shapley
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model
from shallower.units import Unit
from shallower.verbs.score import score

UNITS = [Unit(index, "block") for index in range(8)]
Removed = frozenset[Unit]
LossesOf = Callable[[Sequence[Removed]], list[float]]


def game(units: Sequence[Unit], seed: int = 0) -> LossesOf:
    """Any number at all for each set: nothing is additive, so that S matters."""
    draw = np.random.default_rng(seed)
    table: dict[Removed, float] = {}
    for size in range(len(units) + 1):
        for chosen in itertools.combinations(units, size):
            table[frozenset(chosen)] = float(draw.normal(loc=size))
    return lambda candidates: [table[candidate] for candidate in candidates]


def by_every_order(units: Sequence[Unit], losses: LossesOf, together: int) -> dict[Unit, float]:
    """The definition: every order of `together` of the units, and what each one's removal added."""
    values: dict[Unit, list[float]] = {unit: [] for unit in units}
    for order in itertools.permutations(units, together):
        trail = losses([frozenset(order[:size]) for size in range(together + 1)])
        for place, unit in enumerate(order):
            values[unit].append(trail[place + 1] - trail[place])
    return {unit: math.fsum(found) / len(found) for unit, found in values.items()}


class EveryOrder(Random):
    """Draws each order once, in turn, instead of at random."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__(0)
        self.orders = itertools.permutations(units)

    def sample(self, population, k, *, counts=None):  # type: ignore[no-untyped-def]
        assert len(population) == k
        return list(next(self.orders))


@pytest.mark.parametrize("together", [1, 2, 3, 4])
def test_enumeration_is_the_mean_over_every_order(together):
    losses = game(UNITS[:4])
    found = enumerated(UNITS[:4], losses, together)
    assert found == pytest.approx(by_every_order(UNITS[:4], losses, together), abs=1e-12)


@pytest.mark.parametrize("together", [1, 2, 4])
def test_all_orders_give_the_exact_value(together):
    units = UNITS[:4]
    values = sampled(units, game(units), EveryOrder(units), math.factorial(4), together, 0.0)
    assert values.shape == (24, 4)
    expected = by_every_order(units, game(units), together)
    assert dict(zip(units, values.mean(axis=0).tolist(), strict=True)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("together", [3, 5, 8])
def test_sampling_is_unbiased_and_its_errors_are_honest(together):
    """3 and 5 do not divide 8: the last group is filled up, and some units are in two."""
    losses = game(UNITS)
    exact = np.array(list(by_every_order(UNITS, losses, together).values()) if together < 8 else exact_of_eight(losses))
    scaled = []
    for seed in range(60):
        values = sampled(UNITS, losses, Random(seed), 24, together, 0.0)
        scaled.append((values.mean(axis=0) - exact) / (values.std(axis=0, ddof=1) / math.sqrt(24)))
    assert abs(np.mean(scaled)) < 0.15  # 480 values, of which those of one seed are not independent
    assert np.abs(np.mean(scaled, axis=0)).max() < 0.5
    assert 0.8 < np.sqrt(np.mean(np.square(scaled))) < 1.2


def exact_of_eight(losses: LossesOf) -> list[float]:
    return list(enumerated(UNITS, losses, 8).values())


def test_values_sum_to_what_removing_everything_costs():
    losses = game(UNITS)
    whole, nothing = losses([frozenset(UNITS), frozenset()])
    for values in sampled(UNITS, losses, Random(0), 5, 8, 0.0):  # of each single order already
        assert values.sum() == pytest.approx(whole - nothing, abs=1e-12)


def test_backwards_cancels_what_depends_on_the_order_alone():
    """With interactions of pairs only, forwards and backwards give the exact value from any one order."""
    draw = np.random.default_rng(0)
    pairs = {frozenset(pair): float(draw.normal()) for pair in itertools.combinations(UNITS, 2)}

    def losses(candidates: Sequence[Removed]) -> list[float]:
        return [math.fsum(value for pair, value in pairs.items() if pair <= gone) for gone in candidates]

    exact = exact_of_eight(losses)
    assert sampled(UNITS, losses, Random(3), 1, 8, 0.0)[0] == pytest.approx(exact, abs=1e-12)


def test_it_stops_when_ranks_are_stable():
    asked: list[int] = []

    def additive(candidates: Sequence[Removed]) -> list[float]:
        asked.append(len(candidates))
        return [float(sum(unit.index for unit in gone)) for gone in candidates]

    many = [Unit(index, "block") for index in range(20)]
    found = shapley(many, additive, Random(0), samples=100, max_removed=4)
    assert found == {unit: (pytest.approx(unit.index), pytest.approx(0)) for unit in many}
    assert len(asked) == 2
    noise = game(UNITS)
    assert len(sampled(UNITS, noise, Random(0), 40, 4, 0.99)) > len(sampled(UNITS, noise, Random(0), 40, 4, 0.1)) == 8
    assert len(sampled(many, additive, Random(0), 10, 4, 0.0)) == 10


def test_agreement_is_between_halves():
    values = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 2.0, 4.0], [5.0, 2.0, 1.0]])
    assert rank_agreement(values) == pytest.approx(-1)
    assert rank_agreement(np.array([[1.0, 2.0, 4.0], [0.1, 5.0, 7.0]])) == pytest.approx(1)


def test_an_overflow_is_infinite_importance_and_no_nan():
    def losses(candidates: Sequence[Removed]) -> list[float]:
        return [math.inf if UNITS[2] in gone else float(len(gone)) for gone in candidates]

    for samples in (1, 8, 100):  # an order, several, and all sets
        found = shapley(UNITS, losses, Random(0), samples=samples, max_removed=6, stable=0)
        assert found[UNITS[2]][0] == math.inf
        assert all(math.isfinite(value) for unit, (value, _) in found.items() if unit != UNITS[2])
        assert all(error is None or math.isfinite(error) for _, error in found.values())


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("max_removed", 0), ("stable", 1.5), ("stable", -0.1)])
def test_options_out_of_range_are_refused_before_a_model_is_loaded(option, value):
    with pytest.raises(UserError, match=rf"option {option}='{value}' does not fit"):
        score("nowhere", "shapley", settings={option: str(value)})


def test_eight_blocks_of_a_model_against_every_order():
    """All 40,320 orders, and all eight blocks may be missing at once."""
    model = tiny_model("llama", blocks=8)
    text = sample_text(model)
    ablator = Ablator(dissect(model), text)
    sets = [frozenset(chosen) for size in range(9) for chosen in itertools.combinations(UNITS, size)]
    table = dict(zip(sets, ablator.losses(sets), strict=True))

    def losses(candidates: Sequence[Removed]) -> list[float]:
        return [table[candidate] for candidate in candidates]

    exact = by_every_order(UNITS, losses, 8)
    assert math.fsum(exact.values()) == pytest.approx(table[frozenset(UNITS)] - table[frozenset()], abs=1e-9)

    few = score(model, "shapley", calibration=text, settings={"samples": "12", "max_removed": "8", "stable": "0"})
    assert all(row.error is not None and row.error > 0 for row in few.rows)
    for row in few.rows:
        assert row.error is not None
        assert isinstance(row.of, Unit)
        assert abs(row.value - exact[row.of]) <= 3 * row.error + 1e-6
    assert sum(few.units.values()) == pytest.approx(sum(exact.values()), abs=1e-6)

    enough = score(model, "shapley", calibration=text, settings={"samples": "16", "max_removed": "8"})
    assert enough.units == pytest.approx(exact, abs=1e-6)
    assert {row.error for row in enough.rows} == {0.0}


def test_leave_one_out_is_the_shapley_value_of_one_unit_at_a_time():
    model = tiny_model("llama")
    text = sample_text(model)
    alone = score(model, "shapley", units="sublayer", calibration=text, settings={"max_removed": "1"})
    assert alone.units == pytest.approx(score(model, "loss", units="sublayer", calibration=text).units, abs=1e-9)


def test_seeds_differ_and_repeat():
    model = tiny_model("llama")
    given = {"units": "sublayer", "calibration": sample_text(model), "settings": {"samples": "2"}}
    first, again, other = (score(model, "shapley", seed=seed, **given) for seed in (0, 0, 1))
    assert first.rows == again.rows
    assert first.units != other.units
