"""Searches, told apart from models: each is asked to choose among made-up units by made-up numbers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallower.budget import Amount, Budget, Limit, make_limit
from shallower.errors import BudgetError, UserError
from shallower.exchange import exchanges, random_exchange
from shallower.plan import MadeBy, ModelIdentity
from shallower.registry import search as searches
from shallower.scores import Score, Scores
from shallower.units import KINDS, Kind, Span, Unit, require_distinct, sublayers_of
from shallower.verbs.search_methods import searches_named
from shallower.verbs.trail import removal_order, run_search

Trail = list[frozenset[Unit]]
Losses = Callable[..., list[float]]

GROWING = ["one-shot", "greedy", "contiguous", "random", "last"]
BLOCKS = tuple(Unit(index, "block") for index in range(9))
SUBLAYERS = tuple(Unit(index, kind) for index in range(6) for kind in ("attn", "mlp"))
KINDS_OF_RUNS = (("attn", "mlp"), ("attn", "mlp", "block"))
MIXED = tuple(Unit(index, kind) for index in range(4) for kind in KINDS)


def budget_of(amount: Amount, cost: Mapping[Unit, float]) -> Budget:
    return Budget((make_limit(amount, cost, math.fsum(cost.values())),))


def count(number: int, units: Sequence[Unit]) -> Budget:
    return budget_of(Amount(number, False, "units"), dict.fromkeys(units, 1.0))


def additive(value: Mapping[Unit, float], asked: list[int] | None = None) -> Losses:
    """Units that do not affect each other: the loss is a sum."""

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        if asked is not None:
            asked.append(len(candidates))
        return [math.fsum(sorted(value[unit] for unit in removed)) for removed in candidates]

    return losses


def entangled(seed: int) -> Losses:
    """Every set has a loss of its own."""

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        return [random.Random(f"{seed} {sorted(map(str, removed))}").random() for removed in candidates]

    return losses


def spans_of(units: Sequence[Unit]) -> list[Span]:
    """All spans up to the last unit, from mid-block to mid-block where there are sublayers."""
    step = 1 if all(unit.kind == "block" for unit in units) else 2
    ends = range(step * (units[-1].index + 1) + 1)
    return [Span(start / step, stop / step) for start, stop in itertools.combinations(ends, 2)]


def run(name: str, units: Sequence[Unit], budget: Budget, *, losses: Losses | None = None, **given: Any) -> Trail:
    """The trail of a search, which gets what its signature asks for."""
    method = searches.get(name)
    rng = random.Random(given.pop("seed", 0))
    supply = {
        "units": units,
        "budget": budget,
        "losses": losses or entangled(0),
        "scores": {unit: rng.random() for unit in units},
        "spans": {span: rng.random() for span in spans_of(units)},
        "start": frozenset(),
        "rng": rng,
        **given,
    }
    if "start" in method.parameters and "start" not in given:
        supply["start"] = run("random", units, budget)[-1]
    return list(method.function(**{parameter: supply[parameter] for parameter in method.parameters}))


def scored(metric: str, values: Mapping[Unit, float] | Mapping[Span, float]) -> Scores:
    """Scores of a made-up model."""
    rows = tuple(Score(of, value) for of, value in values.items())
    return Scores(ModelIdentity("made up", None, "", 9), metric, rows, MadeBy(None, None, metric, {}, 0, None, ""))


def smallest(units: Sequence[Unit], budget: Budget, value: Mapping[Unit, float]) -> float:
    """The least sum among all sets of as many units as are needed."""
    for size in range(1, len(units) + 1):
        meeting = [chosen for chosen in itertools.combinations(units, size) if budget.met(chosen)]
        if meeting:
            return min(math.fsum(sorted(value[unit] for unit in chosen)) for chosen in meeting)
    raise AssertionError


# What holds for every search


@pytest.mark.parametrize("name", [method.name for method in searches])
@pytest.mark.parametrize(
    "units",
    [BLOCKS, SUBLAYERS, SUBLAYERS[::2], SUBLAYERS[1::2], BLOCKS[2:5] + BLOCKS[6:8]],
    ids=["blocks", "sublayers", "attn", "mlp", "gaps"],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_search_meets_the_budget_with_what_may_go(name: str, units: tuple[Unit, ...], seed: int) -> None:
    budget = count(3, units)
    trail = run(name, units, budget, losses=entangled(seed), seed=seed)
    if not trail and "start" in searches.get(name).parameters:
        return  # found nothing better than what it started from
    assert budget.met(trail[-1])
    assert trail[-1] <= set(units)
    assert len(trail[-1]) == 3
    require_distinct(trail[-1])
    assert trail == run(name, units, budget, losses=entangled(seed), seed=seed)


@pytest.mark.parametrize("name", [method.name for method in searches])
def test_no_search_takes_a_block_and_its_part(name: str) -> None:
    budget = count(3, MIXED)
    for seed in range(5):
        for removed in run(name, MIXED, budget, losses=entangled(seed), seed=seed):
            require_distinct(removed)


@pytest.mark.parametrize("name", GROWING)
@given(
    costs=st.lists(st.integers(1, 5), min_size=2, max_size=9),
    percent=st.integers(1, 99),
    seed=st.integers(0, 9),
)
def test_trails_are_nested_and_stop_as_soon_as_the_budget_is_met(
    name: str, costs: list[int], percent: int, seed: int
) -> None:
    units = BLOCKS[: len(costs)]
    budget = budget_of(Amount(percent, True, "parameters"), dict(zip(units, map(float, costs), strict=True)))
    trail = run(name, units, budget, losses=entangled(seed), seed=seed)
    assert [len(removed) for removed in trail] == list(range(1, len(trail) + 1))
    assert all(before < after for before, after in itertools.pairwise(trail))
    assert [budget.met(removed) for removed in trail] == [False] * (len(trail) - 1) + [True]


# Units of different size


def uneven(percent: int, attn: float = 1.0, mlp: float = 3.0) -> Budget:
    """Grouped queries make attentions the smaller half of a block."""
    return budget_of(
        Amount(percent, True, "parameters"), {unit: attn if unit.kind == "attn" else mlp for unit in SUBLAYERS}
    )


@pytest.mark.parametrize(  # what of a run could stay lies in its middle
    "names",
    [method.name for method in searches if "spans" not in method.parameters] + ["random,swap", "greedy,annealing"],
)
@pytest.mark.parametrize("percent", [25, 40])
def test_no_search_removes_a_unit_that_could_stay(names: str, percent: int) -> None:
    budget = uneven(percent)
    for seed in range(4):
        methods = [searches.get(name) for name in names.split(",")]
        if "starts" in methods[0].traits:
            methods.insert(0, searches.get(methods[0].traits["starts"]))
        rng = random.Random(seed)
        value = {unit: rng.random() * (1.0 if unit.kind == "attn" else 0.2) for unit in SUBLAYERS}
        scores = scored("loss", value)
        for losses in (additive(value), entangled(seed)):
            trail = run_search([(method, {}) for method in methods], SUBLAYERS, budget, losses, scores, seed)
            assert budget.met(trail[-1])
            assert budget.superfluous(trail[-1]) == []


def test_what_a_search_improves_on_is_drawn_where_it_names_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {method.name: method for method in searches}
    monkeypatch.setattr(searches, "_methods", dict(known))

    @searches("shuffle")
    def shuffle(units: Sequence[Unit], budget: Budget, start: frozenset[Unit], rng: random.Random) -> Iterator[Any]:
        yield random_exchange(units, budget, start, rng)

    for names, wanted in (("shuffle", "random,shuffle"), ("greedy,shuffle", "greedy,shuffle"), ("swap", "greedy,swap")):
        methods = searches_named(names)
        assert ",".join(method.name for method in methods) == wanted
        stages = [(method, {}) for method in methods]
        assert len(run_search(stages, BLOCKS, count(3, BLOCKS), entangled(0), None, 0)[-1]) == 3


def test_what_a_search_could_keep_is_what_lowers_the_loss_most() -> None:
    """Greedy takes the two attentions, then an MLP that makes one of them needless."""
    cost = dict(zip(SUBLAYERS[:4], (1.0, 3.0, 1.0, 3.0), strict=True))
    value = dict(zip(SUBLAYERS[:4], (0.2, 0.6, 0.3, 0.5), strict=True))
    budget = budget_of(Amount(50, True, "parameters"), cost)
    attn, last = Unit(0, "attn"), Unit(1, "mlp")
    assert run("greedy", SUBLAYERS[:4], budget, losses=additive(value))[-1] == {attn, Unit(1, "attn"), last}
    trail = run_search([(searches.get("greedy"), {})], SUBLAYERS[:4], budget, additive(value), None, 0)
    assert trail == [{attn}, {attn, last}]


def test_a_search_that_measures_nothing_keeps_what_it_chose_last() -> None:
    cost = dict(zip(BLOCKS[:4], (1.0, 1.0, 1.0, 3.0), strict=True))
    scores = scored("cosine", {unit: float(unit.index) for unit in cost})
    budget = Budget((Limit("parameters", 4.0, 6.0, cost),))
    trail = run_search([(searches.get("one-shot"), {})], BLOCKS[:4], budget, entangled(0), scores, 0)
    assert trail == [{BLOCKS[0]}, {BLOCKS[0], BLOCKS[3]}]


@pytest.mark.parametrize("seed", range(3))
def test_an_order_of_removal_asks_only_for_the_best(seed: int) -> None:
    """So races may drop the others, which come back as infinity."""

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        assert keep == 1
        found = entangled(seed)(candidates)
        return [loss if loss == min(found) else math.inf for loss in found]

    order: list[Unit] = []
    while len(order) < 4:
        order.append(min(set(BLOCKS[:4]) - set(order), key=lambda unit: entangled(seed)([{*order, unit}])[0]))
    assert removal_order([frozenset(BLOCKS[:4])], losses) == order


def test_a_span_stays_whole() -> None:
    cost = dict(zip(BLOCKS[:4], (3.0, 1.0, 3.0, 9.0), strict=True))
    scores = scored("angular", {Span(start, stop): 1.0 for start, stop in itertools.combinations(range(5), 2)})
    budget = Budget((Limit("parameters", 6.0, 16.0, {unit: cost[unit] for unit in BLOCKS[:3]}),))
    trail = run_search([(searches.get("contiguous"), {})], BLOCKS[:3], budget, entangled(0), scores, 0)
    assert trail[-1] == set(BLOCKS[:3])


@given(seed=st.integers(0, 999), percent=st.integers(5, 80), attn=st.integers(1, 3), mlp=st.integers(1, 5))
def test_exchanges_remove_no_unit_that_could_stay(seed: int, percent: int, attn: int, mlp: int) -> None:
    budget = uneven(percent, attn, mlp)
    start = run("random", SUBLAYERS, budget, seed=seed)[-1]
    there = exchanges(SUBLAYERS, budget, start)
    assert len(set(there)) == len(there)
    for found in (*there, random_exchange(SUBLAYERS, budget, start, random.Random(seed))):
        assert budget.met(found)
        assert found == start or not budget.superfluous(found)


def test_exchanges_trade_one_large_for_several_small_units() -> None:
    budget = uneven(25)  # 6 of 24
    start = frozenset({Unit(0, "mlp"), Unit(1, "mlp")})
    drawn = {random_exchange(SUBLAYERS, budget, start, random.Random(seed)) for seed in range(200)}
    assert {len(found) for found in drawn} == {2, 4}
    small = frozenset(unit for unit in SUBLAYERS if unit.kind == "attn")
    assert all(len(found) == 4 for found in exchanges(SUBLAYERS, budget, small))


@given(seed=st.integers(0, 999), number=st.integers(1, 8))
def test_units_of_one_size_are_exchanged_one_for_one(seed: int, number: int) -> None:
    """Every set that differs in one unit, and one draw for each unit of the exchange."""
    budget = count(number, BLOCKS)
    start = run("random", BLOCKS, budget, seed=seed)[-1]
    assert exchanges(BLOCKS, budget, start) == [
        start - {back} | {unit} for back in sorted(start) for unit in BLOCKS if unit not in start
    ]
    mine, theirs = random.Random(seed), random.Random(seed)
    back = theirs.choice(sorted(start))
    other = theirs.choice([unit for unit in BLOCKS if unit not in start])
    assert random_exchange(BLOCKS, budget, start, mine) == start - {back} | {other}
    assert mine.random() == theirs.random()


# What each is for


@given(st.dictionaries(st.sampled_from(SUBLAYERS), st.integers(-50, 50), min_size=2), st.data())
def test_one_shot_and_greedy_find_the_best_set_where_units_do_not_interact(
    values: dict[Unit, int], data: st.DataObject
) -> None:
    units = tuple(sorted(values))
    budget = count(data.draw(st.integers(1, len(units) - 1)), units)
    best = smallest(units, budget, values)
    for trail in (
        run("greedy", units, budget, losses=additive(values)),
        run("one-shot", units, budget, scores=values),
    ):
        assert math.fsum(sorted(values[unit] for unit in trail[-1])) == best


OVERLAPPING = (*MIXED[:9], *(Unit(index, "block") for index in range(3, 6)))
"""Three blocks with their sublayers and three more blocks: a block may not go together with its parts."""


def two_budgets(parameters: Sequence[int], share: int, cache: int) -> Budget:
    """A share of the parameters of `OVERLAPPING`, and one of its caches unless that is 0."""
    costs = dict(zip(OVERLAPPING, map(float, parameters), strict=True))
    whole = math.fsum(costs.values())
    limits = [Limit("parameters", share / 100 * whole, whole, costs)]
    if cache:
        kept = {unit: float(unit.kind != "mlp") for unit in OVERLAPPING}
        limits.append(Limit("kv_bytes", cache / 100 * 6, 6.0, kept))
    return Budget(tuple(limits))


def overlapping(chosen: Sequence[Unit]) -> bool:
    return any(one.overlaps(other) for one, other in itertools.combinations(chosen, 2))


def require_least(value: dict[Unit, float], budget: Budget, allowed: Callable[[Sequence[Unit]], bool]) -> None:
    """milp's choice has the least sum of all sets that meet the budget, do not overlap and are allowed."""
    sums = [
        math.fsum(value[unit] for unit in chosen)
        for size in range(1, len(value) + 1)
        for chosen in itertools.combinations(value, size)
        if budget.met(chosen) and allowed(chosen) and not overlapping(chosen)
    ]
    if not sums:
        with pytest.raises(BudgetError):
            run("milp", tuple(value), budget, scores=value)
        return
    [chosen] = run("milp", tuple(value), budget, scores=value)
    require_distinct(chosen)
    assert budget.met(chosen)
    assert budget.superfluous(chosen) == []
    assert math.fsum(value[unit] for unit in chosen) == pytest.approx(min(sums), abs=1e-6)


@given(
    scores=st.lists(st.integers(0, 40), min_size=12, max_size=12),
    parameters=st.lists(st.integers(1, 9), min_size=12, max_size=12),
    share=st.integers(5, 60),
    cache=st.integers(0, 60),
)
@settings(max_examples=25, deadline=None)
def test_milp_finds_what_trying_everything_finds_under_two_budgets(
    scores: list[int], parameters: list[int], share: int, cache: int
) -> None:
    value = dict(zip(OVERLAPPING, map(float, scores), strict=True))
    require_least(value, two_budgets(parameters, share, cache), lambda chosen: True)


@given(
    scores=st.lists(st.integers(-20, 20), min_size=12, max_size=12),
    parameters=st.lists(st.integers(1, 9), min_size=12, max_size=12),
    share=st.integers(5, 60),
    cache=st.integers(0, 60),
)
@settings(max_examples=40, deadline=None)
def test_milp_takes_negative_scores_for_what_they_are(
    scores: list[int], parameters: list[int], share: int, cache: int
) -> None:
    """The best of all sets without a unit that could stay."""
    value = dict(zip(OVERLAPPING, map(float, scores), strict=True))
    budget = two_budgets(parameters, share, cache)
    require_least(value, budget, lambda chosen: not budget.superfluous(chosen))


@pytest.mark.parametrize("costs", ["caches", "multiples", "any"])
def test_milp_counts_no_worthless_unit_for_its_negative_score(costs: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The solver takes integers within a millionth, which beside all costs could pass for a missed budget."""
    units = [Unit(index, kind) for index in range(4) for kind in ("attn", "block", "mlp")]
    draw = random.Random(0)
    for _ in range(20):
        each = {"caches": (1.0, 0.0), "multiples": (1.0, 3.0), "any": (draw.uniform(0.5, 1), draw.uniform(1, 3))}[costs]
        attention, mlp = each
        cost = {unit: {"attn": attention, "mlp": mlp, "block": attention + mlp}[unit.kind] for unit in units}
        value = {
            unit: draw.choice([draw.gauss(0.1, 0.1), draw.uniform(-0.1, 0.3), 50 * draw.random()]) for unit in units
        }
        least = draw.choice([0.15, 0.25, 0.33, 0.5]) * 4 * sum(each)
        budget = Budget((Limit("parameters", least, 4 * sum(each), cost),))
        require_least(value, budget, lambda chosen, budget=budget: not budget.superfluous(chosen))
    assert capfd.readouterr() == ("", "")  # where the solver is unsure, it prints


@pytest.mark.parametrize("outlier", [1e3, 1e5, 1e8])
@pytest.mark.parametrize("lowest", [0.5, -0.5])  # below 0, what could stay is no part of the cheapest set
def test_milp_is_exact_beside_an_outlier(outlier: float, lowest: float) -> None:
    """Also where one is that large beside another."""
    for seed in range(12):
        draw = random.Random(seed)
        value = {unit: draw.uniform(lowest, 1.5) for unit in BLOCKS} | {BLOCKS[0]: outlier, BLOCKS[5]: outlier**2}
        cost = {unit: float(draw.randint(5, 9)) for unit in BLOCKS}
        budget = Budget((Limit("parameters", 20.0, sum(cost.values()), cost),))
        require_least(value, budget, lambda chosen, budget=budget: not budget.superfluous(chosen))


def test_milp_says_that_no_set_meets_a_budget_whose_units_must_stay() -> None:
    attention, mlp = Unit(0, "attn"), Unit(0, "mlp")
    parameters = Limit("parameters", 1.0, 4.0, {attention: 1.0, mlp: 3.0})
    caches = Limit("kv_bytes", 1.0, 1.0, {attention: 1.0, mlp: 0.0})
    with pytest.raises(BudgetError, match="no set of"):
        run("milp", [attention, mlp], Budget((parameters, caches)), scores={attention: math.inf, mlp: 1.0})


def test_milp_leaves_units_that_must_stay() -> None:
    value = {unit: math.inf if unit.index < 6 else 1.0 for unit in BLOCKS}
    assert run("milp", BLOCKS, count(3, BLOCKS), scores=value) == [frozenset(BLOCKS[6:])]
    with pytest.raises(BudgetError, match=r"no set of the 3 units .*without 6 more the model overflows.* remove less"):
        run("milp", BLOCKS, count(4, BLOCKS), scores=value)
    with pytest.raises(BudgetError, match="no set of the 0 units"):
        run("milp", BLOCKS, count(4, BLOCKS), scores=dict.fromkeys(BLOCKS, math.inf))


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_what_overflows_goes_last(missing: float) -> None:
    for index in range(4):
        values = {unit: missing if unit.index == index else 1.0 + unit.index for unit in BLOCKS[:4]}
        spans = {
            Span(start, stop): missing if start <= index < stop else float(stop)
            for start, stop in itertools.combinations(range(5), 2)
        }
        for name, scores in (
            ("one-shot", scored("cosine", values)),
            ("milp", scored("loss", values)),
            ("contiguous", scored("angular", spans)),
        ):
            written = Scores.from_json(scores.to_json())
            for read in (scores, written):
                trail = run_search([(searches.get(name), {})], BLOCKS[:4], count(1, BLOCKS[:4]), entangled(0), read, 0)
                assert BLOCKS[index] not in trail[-1]
                if read.units:
                    assert read.ranked()[-1] == BLOCKS[index]


def test_milp_removes_no_more_than_was_asked_for() -> None:
    """Scores so small that the solver takes their sums for equal."""
    scores = {unit: 1e-9 * unit.index for unit in BLOCKS}
    for number in range(1, len(BLOCKS)):
        assert run("milp", BLOCKS, count(number, BLOCKS), scores=scores)[-1] <= set(BLOCKS)
        assert len(run("milp", BLOCKS, count(number, BLOCKS), scores=scores)[-1]) == number


@pytest.mark.parametrize("size", [1.0, 1_140_858_880.0, 9.87e14])
def test_milp_knows_an_exact_set_whatever_the_last_bit_says(size: float, capfd: pytest.CaptureFixture[str]) -> None:
    """22 of 40 blocks of a large model are 55 % of it, though their sum in bytes may be a bit less; the solver, which
    prints what it is unsure of, says nothing beside a --json.
    """
    units = [Unit(index, "block") for index in range(40)]
    budget = budget_of(Amount(55, True, "bytes"), dict.fromkeys(units, size))
    for seed in range(8):
        rng = random.Random(seed)
        value = {unit: rng.random() for unit in units}
        assert run("milp", units, budget, scores=value) == [frozenset(sorted(units, key=value.__getitem__)[:22])]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["swap", "evolutionary"])
def test_a_race_that_calls_a_worse_set_a_tie_is_not_believed(name: str) -> None:
    budget = count(3, BLOCKS)
    start = frozenset(BLOCKS[:3])  # the best there is

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        exact = [1 + 1e-4 * sum(unit.index for unit in removed) for removed in candidates]
        if keep is None:
            return exact
        return [math.inf if removed == start else loss for removed, loss in zip(candidates, exact, strict=True)]

    assert run(name, BLOCKS, budget, losses=losses, start=start) == []


def test_annealing_walks_through_worse_sets_to_the_best_that_it_saw() -> None:
    budget, method = count(3, BLOCKS), searches.get("annealing")
    for seed, hot in itertools.product(range(3), (0.3, 1e-9)):
        asked: list[frozenset[Unit]] = []
        told: list[float] = []

        def losses(
            candidates: Sequence[frozenset[Unit]],
            keep: int | None = None,
            seed: int = seed,
            asked: list[frozenset[Unit]] = asked,
            told: list[float] = told,
            *,
            race: bool = True,
        ) -> list[float]:
            found = entangled(seed)(candidates)
            asked.extend(candidates)
            told.extend(found)
            return found

        given = {"units": BLOCKS, "budget": budget, "losses": losses, "start": frozenset(BLOCKS[:3])}
        trail = list(method.function(**given, rng=random.Random(seed), steps=150, hot=hot, cold=hot / 10))
        assert len(asked) == 1 + 150
        lowest = list(itertools.accumulate(told, min))
        better = [place for place in range(1, len(asked)) if told[place] < lowest[place - 1]]
        assert trail == [asked[place] for place in better]
        assert entangled(seed)(trail[-1:]) == [min(told)]
        # who takes nothing worse asks for sets that are an exchange away from the best so far, and for no others
        best_so_far = [asked[told.index(loss)] for loss in lowest]
        beside_best = [len(one ^ other) == 2 for one, other in zip(best_so_far, asked[1:], strict=False)]
        assert all(beside_best) == (hot < 0.3)


def test_evolution_ends_after_its_generations_or_when_it_has_no_patience_left() -> None:
    budget, method, start = count(3, BLOCKS), searches.get("evolutionary"), frozenset(BLOCKS[:3])

    def generations(better: int, **options: int) -> tuple[int, int]:
        """How many are asked for, and how many better sets are found; children of the generation `better` are."""
        known, asked = {start: 0.0}, []

        def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
            if keep is not None:
                asked.append(len(candidates))
            return [known.setdefault(removed, -1.0 if len(asked) == better else 1.0) for removed in candidates]

        given = {"units": BLOCKS, "budget": budget, "losses": losses, "start": start, "rng": random.Random(0)}
        trail = list(method.function(**given, **options))
        assert max(asked) <= 1 + options.get("offspring", 16)
        return len(asked), len(trail)

    assert generations(0, patience=4) == (4, 0)
    assert generations(0, generations=3, patience=4) == (3, 0)
    assert generations(3, patience=4) == (3 + 4, 1)  # counted in a row
    assert generations(3, generations=3, patience=4, offspring=5) == (3, 1)


def test_swap_makes_no_more_exchanges_than_it_has_rounds() -> None:
    value = {unit: float(unit.index) for unit in BLOCKS}
    for options, exchanged, asked_for in (
        ({}, 3, [19, 2, 19, 2, 19, 2, 19]),  # the last finds none that gains
        ({"rounds": 2}, 2, [19, 2, 19, 2]),
    ):
        asked: list[int] = []
        given = {"units": BLOCKS, "budget": count(3, BLOCKS), "losses": additive(value, asked)}
        trail = list(searches.get("swap").function(**given, start=frozenset(BLOCKS[6:]), **options))
        assert len(trail) == exchanged
        assert asked == asked_for


def test_beam_does_not_leave_its_choice_to_a_race() -> None:
    """A race that ends early tells the sets in hand from the rest, but not from each other."""

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        exact = [float(sum(unit.index for unit in removed)) for removed in candidates]
        if keep is None:
            return exact
        least = sorted(exact)[keep - 1]
        return [-loss if loss <= least else math.inf for loss in exact]

    assert run("beam", BLOCKS, count(1, BLOCKS), losses=losses) == [{BLOCKS[0]}]


def test_exhaustive_runs_no_race() -> None:
    """Else it would be no oracle: a race may call a tie what is a little worse."""
    value = {unit: 1.0 + 0.001 * unit.index for unit in BLOCKS}

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        measured = additive(value)(candidates)
        return [math.inf] * (len(candidates) - 1) + [0.0] if race and keep is not None else measured

    chosen = run("exhaustive", BLOCKS, count(2, BLOCKS), losses=losses)[-1]
    assert chosen == set(sorted(BLOCKS, key=value.__getitem__)[:2])


def test_greedy_asks_for_all_single_additions_at_once() -> None:
    asked: list[int] = []
    run("greedy", BLOCKS, count(3, BLOCKS), losses=additive(dict.fromkeys(BLOCKS, 1.0), asked))
    assert asked == [9, 8, 7]


def test_greedy_measures_the_rest_again() -> None:
    """Blocks 0 and 1 are the cheapest alone, and ruinous together."""

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        value = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}
        ruin = frozenset(BLOCKS[:2])
        return [sum(value[unit.index] for unit in removed) + 9 * (removed >= ruin) for removed in candidates]

    units = BLOCKS[:4]
    assert run("greedy", units, count(2, units), losses=losses)[-1] == {BLOCKS[0], BLOCKS[2]}
    assert run("one-shot", units, count(2, units), scores={u: u.index for u in units})[-1] == {BLOCKS[0], BLOCKS[1]}


def test_exhaustive_does_not_walk_where_no_set_is() -> None:
    """Of 200 units 198: few sets, most of whose beginnings lead nowhere."""
    many = tuple(Unit(index, "block") for index in range(200))
    budget = count(198, many)
    asked: list[int] = []
    value = {unit: float(unit.index) for unit in many}
    assert run("exhaustive", many, budget, losses=additive(value, asked))[-1] == set(many[:198])
    assert asked == [math.comb(200, 2)]
    with pytest.raises(BudgetError, match="more than 20,000 sets of 200 units remove 100 units"):
        run("exhaustive", many, count(100, many))
    asked.clear()
    uneven = budget_of(Amount(98, True, "parameters"), {unit: 1.0 + unit.index % 2 for unit in many[:20]})
    assert run("exhaustive", many[:20], uneven, losses=additive(value, asked))[-1] == set(many[:20])
    assert asked == [1]


@given(costs=st.lists(st.integers(1, 4), min_size=3, max_size=8), percent=st.integers(1, 99), alike=st.booleans())
def test_exhaustive_tries_every_set_that_just_meets_the_budget(costs: list[int], percent: int, alike: bool) -> None:
    units = BLOCKS[: len(costs)]
    sizes = [costs[0]] * len(costs) if alike else costs
    budget = budget_of(Amount(percent, True, "parameters"), dict(zip(units, map(float, sizes), strict=True)))
    subsets = [frozenset(chosen) for size in range(len(units) + 1) for chosen in itertools.combinations(units, size)]
    tried: list[frozenset[Unit]] = []

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        tried.extend(candidates)
        return [0.0] * len(candidates)

    run("exhaustive", units, budget, losses=losses)
    assert len(set(tried)) == len(tried)
    assert set(tried) == {chosen for chosen in subsets if budget.met(chosen) and not budget.superfluous(chosen)}


def test_greedy_ends_when_nothing_can_go() -> None:
    units = (Unit(0, "block"), Unit(0, "attn"), Unit(1, "block"))
    budget = budget_of(Amount(9, False, "parameters"), {units[0]: 5.0, units[1]: 1.0, units[2]: 5.0})
    cheap = {units[0]: 5.0, units[1]: 0.0, units[2]: 1.0}
    trail = run("greedy", units, budget, losses=additive(cheap))
    assert trail[-1] == {units[1], units[2]}
    assert not budget.met(trail[-1])


def test_one_shot_takes_the_deeper_of_equals() -> None:
    trail = run("one-shot", BLOCKS, count(3, BLOCKS), scores=dict.fromkeys(BLOCKS, 0.5))
    assert [removed == set(BLOCKS[-size:]) for size, removed in enumerate(trail, 1)] == [True] * 3


@given(
    costs=st.lists(st.integers(1, 4), min_size=3, max_size=9),
    percent=st.integers(5, 60),
    protected=st.sets(st.integers(0, 8), max_size=2),
    data=st.data(),
)
def test_contiguous_finds_the_best_of_the_shortest_runs(
    costs: list[int], percent: int, protected: set[int], data: st.DataObject
) -> None:
    depth = len(costs)
    units = tuple(unit for unit in BLOCKS[:depth] if unit.index not in protected)
    cost = {unit: float(costs[unit.index]) for unit in units}
    everything = [(start, stop) for start in range(depth) for stop in range(start + 1, depth + 1)]
    spans = {Span(start, stop): float(data.draw(st.integers(0, 20))) for start, stop in everything}
    try:
        budget = Budget((make_limit(Amount(percent, True, "parameters"), cost, float(sum(costs))),))
    except BudgetError:
        return
    meeting = {
        (start, stop)
        for start, stop in everything
        if set(BLOCKS[start:stop]) <= set(units) and budget.met(BLOCKS[start:stop])
    }
    shortest = meeting - {
        (start, stop) for start, stop in meeting if (start + 1, stop) in meeting or (start, stop - 1) in meeting
    }
    if not shortest:
        with pytest.raises(BudgetError, match="no run of neighbouring units"):
            run("contiguous", units, budget, spans=spans)
        return
    trail = run("contiguous", units, budget, spans=spans)
    chosen = sorted(unit.index for unit in trail[-1])
    assert chosen == list(range(chosen[0], chosen[-1] + 1))
    assert (chosen[0], chosen[-1] + 1) in shortest
    assert spans[Span(chosen[0], chosen[-1] + 1)] == min(spans[Span(*ends)] for ends in shortest)
    for removed in trail:
        indices = sorted(unit.index for unit in removed)
        assert indices == list(range(indices[0], indices[-1] + 1))


@given(
    percent=st.integers(5, 60),
    protected=st.sets(st.integers(0, 5), max_size=2),
    kinds=st.sampled_from(KINDS_OF_RUNS),
    seed=st.integers(0, 99),
)
def test_contiguous_finds_the_best_run_of_sublayers(
    percent: int, protected: set[int], kinds: tuple[str, ...], seed: int
) -> None:
    """Written down apart: places 0, 1, 2, … are attn.0, mlp.0, attn.1, …; a run of them begins and ends anywhere."""
    cost = {Unit(index, kind): 2.0 if kind == "attn" else 3.0 for index in range(6) for kind in ("attn", "mlp")}
    cost |= {Unit(index, "block"): 5.5 for index in range(6)}  # norms go with the whole block
    units = tuple(unit for unit in sorted(cost) if unit.kind in kinds and unit.index not in protected)
    spans = {span: float(random.Random(f"{seed} {span}").randint(0, 20)) for span in spans_of([Unit(5, "mlp")])}
    needed = percent / 100 * 30
    budget = Budget((Limit("parameters", needed, 30.0, {unit: cost[unit] for unit in units}),))
    free = [place // 2 not in protected for place in range(12)]
    norm = 0.5 if "block" in kinds else 0.0

    def weight(start: int, stop: int) -> float:
        whole = stop // 2 - (start + 1) // 2
        return sum((2.0, 3.0)[place % 2] for place in range(start, stop)) + norm * max(whole, 0)

    meeting = {
        (start, stop)
        for start, stop in itertools.combinations(range(13), 2)
        if all(free[start:stop]) and weight(start, stop) >= needed
    }
    shortest = [(start, stop) for start, stop in meeting if not {(start + 1, stop), (start, stop - 1)} & meeting]
    if not shortest:
        with pytest.raises(BudgetError, match="no run of neighbouring units"):
            run("contiguous", units, budget, spans=spans)
        return
    trail = run("contiguous", units, budget, spans=spans)
    assert all(
        not removed.issuperset(Unit(index, "block").sublayers) for removed in trail for index in range(6) if norm
    )  # where whole blocks may go, they do
    places = [sorted(unit.reach[0] for unit in sublayers_of(removed)) for removed in trail]
    assert all(taken == list(range(taken[0], taken[-1] + 1)) for taken in places)
    assert all(before < after for before, after in itertools.pairwise(trail))
    assert [len(removed) for removed in trail] == list(range(1, len(trail) + 1))
    chosen = places[-1][0], places[-1][-1] + 1
    assert chosen in shortest
    value = {(start, stop): spans[Span(start / 2, stop / 2)] for start, stop in shortest}
    assert value[chosen] == min(value.values())


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_a_run_of_one_kind_of_sublayer_counts_the_sum_of_its_scores(kind: Kind) -> None:
    units = tuple(Unit(index, kind) for index in (0, 1, 2, 3, 5, 6, 7))
    scores = dict(zip(units, (0.1, 9.0, 0.1, 3.0, 1.0, 2.0, 0.5), strict=True))  # 3 and 5 are no neighbours
    trail = run("contiguous", units, count(2, units), scores=scores, spans={})
    assert trail == [{Unit(7, kind)}, {Unit(6, kind), Unit(7, kind)}]
    with pytest.raises(BudgetError, match="no run of neighbouring units that may go removes 5 units"):
        run("contiguous", units, count(5, units), scores=scores, spans={})
    given = scored("taylor", {unit: scores[unit] for unit in units[1:]} | {Unit(0, "block"): 0.0})
    with pytest.raises(UserError, match=rf"{kind}.0 \(one of 1\) has no score; score with --units {kind}"):
        run_search([(searches.get("contiguous"), {})], units, count(2, units), entangled(0), given, 0)


def test_a_run_takes_a_block_whose_halves_cannot_go_alone_as_a_whole() -> None:
    """As in hybrids, where `--units all` has both."""
    units = tuple(
        Unit(*unit) for unit in ((0, "attn"), (0, "mlp"), (0, "block"), (1, "block"), (2, "attn"), (2, "mlp"))
    )
    spans = {Span(*ends): 5.0 for ends in itertools.combinations((0, 0.5, 1, 2, 2.5, 3), 2)}
    spans |= {Span(0.5, 2): 4.0, Span(1, 2): 1.0, Span(1, 2.5): 4.5, Span(0.5, 2.5): 0.1}
    removed = run("contiguous", units, count(3, units), spans=spans)
    assert removed == [
        {Unit(1, "block")},
        {Unit(0, "mlp"), Unit(1, "block")},
        {*map(Unit, (0, 1, 2), ("mlp", "block", "attn"))},
    ]
    alone = tuple(unit for unit in units if unit.kind != "block")
    with pytest.raises(BudgetError, match="no run of neighbouring units"):
        run("contiguous", alone, count(3, alone), spans=spans)


def test_a_run_of_pairs() -> None:
    units = (*BLOCKS[:4], *(Unit(index, "pair") for index in range(3)))
    spans = dict.fromkeys(spans_of([Unit(3, "mlp")]), 5.0) | {
        Span(0.5, 2.5): 1.0,
        Span(1.5, 2.5): 0.5,
        Span(1, 2.5): 0.0,
    }
    assert run("contiguous", units, count(2, units), spans=spans) == [
        {Unit(1, "pair")},
        {Unit(0, "pair"), Unit(1, "pair")},
    ]


def test_where_sublayers_stand_side_by_side_a_run_grows_by_both_of_a_block() -> None:
    """Only the ends of blocks are seen there. The trail is the order, so nothing has to be measured."""
    spans = {Span(*ends): float(ends != (2, 4)) for ends in itertools.combinations(range(7), 2)}
    trail = run("contiguous", SUBLAYERS, count(3, SUBLAYERS), spans=spans)
    assert [len(removed) for removed in trail] == [1, 2, 3]
    assert trail[-1] < {Unit(index, kind) for index in (2, 3) for kind in ("attn", "mlp")}  # one may stay
    order = removal_order(trail, lambda *_, **__: pytest.fail("a set was measured"))
    assert {order[0].index, order[1].index} == {2} or {order[0].index, order[1].index} == {3}


def test_contiguous_with_scores_of_some_spans_only() -> None:
    with pytest.raises(BudgetError, match="none of the spans that have a score removes"):
        run("contiguous", BLOCKS[:5], count(3, BLOCKS[:5]), spans={Span(0, 1): 0.5, Span(1, 3): 0.1})


def test_contiguous_grows_by_the_better_shorter_span() -> None:
    spans = {Span(start, stop): 1.0 for start in range(5) for stop in range(start + 1, 6)}
    spans |= {Span(1, 4): 0.5, Span(2, 4): 0.2, Span(3, 4): 0.1}
    trail = run("contiguous", BLOCKS[:5], count(3, BLOCKS[:5]), spans=spans)
    assert [sorted(unit.index for unit in removed) for removed in trail] == [[3], [2, 3], [1, 2, 3]]


def test_random_draws_by_seed_and_reaches_every_set() -> None:
    budget = count(2, BLOCKS[:4])
    drawn = {run("random", BLOCKS[:4], budget, seed=seed)[-1] for seed in range(60)}
    assert drawn == {frozenset(pair) for pair in itertools.combinations(BLOCKS[:4], 2)}


def test_last_takes_the_deepest_and_its_paper_keeps_the_last_block() -> None:
    assert run("last", BLOCKS[:-1], count(3, BLOCKS[:-1]))[-1] == {BLOCKS[5], BLOCKS[6], BLOCKS[7]}
    assert run("last", SUBLAYERS, count(3, SUBLAYERS))[-1] == {Unit(5, "attn"), Unit(5, "mlp"), Unit(4, "mlp")}
    assert searches.get("last").traits["keeps_last_block"] is True


def test_contiguous_takes_scores_of_some_spans() -> None:
    """Its trail is then shorter."""
    spans = {Span(start, start + 2): float(start != 3) for start in range(5)}
    assert run("contiguous", BLOCKS, count(2, BLOCKS), spans=spans) == [frozenset(Span(3, 5).units)]
    longer = {Span(start, start + 3): float(start != 3) for start in range(5)}
    assert run("contiguous", BLOCKS, count(2, BLOCKS), spans=longer) == [frozenset(Span(3, 6).units)]


def test_beam_leaves_a_set_that_overflows_to_be_told_of() -> None:
    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        return [math.inf] * len(candidates)

    assert len(run("beam", BLOCKS, count(2, BLOCKS), losses=losses)[-1]) == 2
