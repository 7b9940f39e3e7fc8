"""Studies: the grid, its statistics against other calculations, and a small study from file to page."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas
import pytest
import statsmodels.api
import statsmodels.formula.api
import torch

from shallower.cli import main
from shallower.corpus import CalibrationSet
from shallower.errors import ModelError, UserError
from shallower.registry import Method
from shallower.studies.agreement import agreement, jaccard, order_agreement
from shallower.studies.findings import find
from shallower.studies.grid import Study, parse_study, read_study
from shallower.studies.interval import mean_interval
from shallower.studies.result import CALIBRATION, Cell, Result
from shallower.studies.variance import RESIDUAL, decompose
from shallower.units import Unit


def block(*indices: int) -> tuple[Unit, ...]:
    return tuple(Unit(index, "block") for index in indices)


def result(order: tuple[Unit, ...], **of: Any) -> Result:
    axes = {"model": "m", "text": "a", "format": "", "sequences": 8, "length": 16, "seed": 0, "objective": "nll"}
    cell = Cell(
        **{**axes, "search": "greedy", "remove": "2", **{key: of[key] for key in of if key in Cell.__annotations__}}
    )
    return Result(cell, order, of.get("loss", 1.0), 0.5, 0.1, of.get("held_out", {}), of.get("tasks", {}))


# Statistics


def test_jaccard_counts_shared_units() -> None:
    assert jaccard(block(1, 2, 3), block(2, 3, 4, 5)) == 2 / 5
    assert jaccard((), ()) == 1.0


def test_order_agreement_of_the_same_and_the_reversed_order() -> None:
    assert order_agreement(block(1, 2, 3), block(1, 2, 3)) == pytest.approx(1)
    assert order_agreement(block(1, 2, 3), block(3, 2, 1)) == pytest.approx(-1)


def test_only_cells_that_differ_in_one_factor_are_compared() -> None:
    results = [
        result(block(1, 2), search="greedy", seed=0),
        result(block(1, 3), search="swap", seed=0),  # differs from the first in the search alone: 1/3
        result(block(1, 2), search="greedy", seed=1),  # from the first in the seed alone: 1
        result(block(7, 8), search="swap", seed=1, remove="3"),  # another ratio is never compared
    ]
    found = {item.factor: item for item in agreement(results)}
    assert {name: (item.jaccard.value, item.pairs) for name, item in found.items()} == {
        "search": (pytest.approx(1 / 3), 1),
        "seed": (1.0, 1),
    }


def test_a_factor_is_compared_among_plans_that_depend_on_it_and_each_once() -> None:
    """Greedy asks the objective; one-shot ranks by cosine, random draws by the seed alone, last reads nothing."""
    results = []
    for text, objective, search in itertools.product("ab", ("nll", "kl"), ("greedy", "one-shot", "random", "last")):
        if search == "greedy":
            order = block(1, 2 if objective == "nll" else 3, "ab".index(text) + 4)
        else:
            order = {"one-shot": block(6, 7, "ab".index(text) + 8), "random": block(0, 5, 9), "last": block(7, 8, 9)}[
                search
            ]
        numbers = {"loss": 1.0 + len(results), "held_out": {"wiki": 20.0 + sum(unit.index for unit in order)}}
        results.append(result(order, text=text, objective=objective, search=search, **numbers))
    found = {item.factor: (item.jaccard.value, item.pairs, item.groups) for item in agreement(results)}
    # 2 / 4 of greedy's units are shared by two objectives; of one-shot's it would be 1, and of the others, too
    assert found["objective"] == (pytest.approx(1 / 2), 2, 2)
    # by two texts 2 / 4, too: two pairs of greedy and one of one-shot, which has the same plan at both objectives
    assert found["text"] == (pytest.approx(1 / 2), 3, 3)
    # greedy with each of the others at 4 places, one-shot with random and last at 2, random with last once; the
    # objectives are one group, as they share one-shot's plan
    assert found["search"][1:] == (3 * 4 + 2 * 2 + 1, 2)
    for item in find(results).decompositions:
        assert {share.term for share in item.shares} <= {"text", "objective", "search", RESIDUAL} | {
            "text × objective",
            "text × search",
            "objective × search",
        }
    [of_plan] = [item for item in find(results).decompositions if item.outcome == "plan"]
    alone = [each for each in results if each.cell.objective == "nll" or each.cell.search == "greedy"]
    alone = [each for each in alone if each.cell.text == "a" or each.cell.search in ("greedy", "one-shot")]
    assert len(alone) == 8
    assert of_plan in find(alone).decompositions  # that one plan is in several cells changes no share


@pytest.mark.parametrize(
    ("how", "reads"),
    [
        ({"search": "greedy"}, {*CALIBRATION, "objective", "search"}),
        ({"search": "one-shot:loss"}, {*CALIBRATION, "objective", "search"}),
        ({"search": "one-shot"}, {*CALIBRATION, "search"}),
        ({"search": "contiguous"}, {*CALIBRATION, "search"}),
        ({"search": "one-shot:taylor"}, {*CALIBRATION, "search"}),  # by gradients of nll, whatever the objective
        ({"search": "one-shot,swap"}, {*CALIBRATION, "objective", "search"}),
        ({"search": "one-shot", "objective": "task"}, {"text", "sequences", "length", "seed", "search"}),
        ({"search": "one-shot:magnitude"}, {"search"}),
        ({"search": "random"}, {"search", "seed"}),
        ({"search": "last"}, {"search"}),
        ({"search": "greedy", "remove": "block.1,block.3"}, set()),
    ],
)
def test_what_a_plan_depends_on(how: dict[str, str], reads: set[str]) -> None:
    assert result(block(1), **how).cell.reads == reads


def test_an_order_that_depends_on_more_than_its_set_is_not_compared() -> None:
    """Milp by cosine gives one set, which losses then put in order; by loss they choose the set, too."""
    for search, kendall in (("milp:cosine", math.nan), ("milp", 1.0), ("one-shot:cosine", 1.0)):
        results = [result(block(1, 2, 3), search=search, text=text) for text in "ab"]
        [found] = agreement(results)
        assert (found.factor, found.jaccard.value, found.pairs) == ("text", 1.0, 1)
        assert found.order.value == pytest.approx(kendall, nan_ok=True), search


def test_the_interval_of_a_mean_draws_whole_groups() -> None:
    alike = [np.full(5, value) for value in (0.0, 1.0)]
    interval = mean_interval(alike)
    assert (interval.low, interval.value, interval.high) == (0.0, 0.5, 1.0)  # values one by one would be narrower


def test_shares_of_variance_equal_those_of_statsmodels() -> None:
    rng = np.random.default_rng(0)
    rows = [point for point in itertools.product("wxyz", "pq", "mno") for _ in range(2)]
    table = pandas.DataFrame(rows, columns=["A", "B", "D"])
    table["y"] = rng.normal(size=len(table)) + (table.A == "w") * 2 + (table.B == "p") * (table.D == "m")
    table = table.drop([3, 17, 20])  # an unbalanced grid, as one that is not finished
    formula = "y ~ (C(A) + C(B) + C(D)) ** 2"
    reference = statsmodels.api.stats.anova_lm(statsmodels.formula.api.ols(formula, table).fit(), typ=2).sum_sq
    total = ((table.y - table.y.mean()) ** 2).sum()
    names = {"C(A)": "A", "C(B)": "B", "C(D)": "D", "C(A):C(B)": "A × B", "C(A):C(D)": "A × D", "C(B):C(D)": "B × D"}
    names["Residual"] = RESIDUAL
    found = decompose(table.y.to_numpy(), {key: list(table[key]) for key in "ABD"})
    assert {item.term: item.share.value for item in found} == pytest.approx(
        {names[term]: value / total for term, value in reference.items()}
    )


def test_a_balanced_grid_adds_up_and_finds_what_decides() -> None:
    points = list(itertools.product("abc", (0, 1), (0, 1)))
    levels = {name: [point[number] for point in points] for number, name in enumerate(("text", "seed", "search"))}
    plans = np.array([[point[0] == "a", point[0] != "a", point[2] == 1] for point in points], dtype=float)
    shares = {item.term: item.share.value for item in decompose(plans, levels)}
    assert sum(shares.values()) == pytest.approx(1)
    text, search = 2 * (4 * 8 / 12), 12 / 4  # sums of squares of two and of one column of zeros and ones
    assert shares["text"] == pytest.approx(text / (text + search))
    assert shares["search"] == pytest.approx(search / (text + search))
    assert shares["seed"] == pytest.approx(0, abs=1e-12)


def test_a_search_that_draws_is_still_a_search() -> None:
    """Its cells have no seed, and what tells them from the others belongs to the search."""
    points = list(itertools.product("ab", (0, 1), ("greedy", "random")))
    levels: dict[str, list[Any]] = {name: [point[at] for point in points] for at, name in enumerate(("text", "seed"))}
    levels["search"] = [point[2] for point in points]
    levels["seed"] = [None if point[2] == "random" else point[1] for point in points]
    outcome = np.array([float(point[2] == "random") + 0.1 * (point[0] == "a") for point in points])
    shares = {item.term: item.share.value for item in decompose(outcome, levels)}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["search"] == pytest.approx(1 / 1.01)
    one_seed = {**levels, "seed": [None if point[2] == "random" else 0 for point in points]}
    assert "seed" not in {item.term for item in decompose(outcome, one_seed)}


def test_a_resample_without_a_value_is_not_a_zero() -> None:
    interval = mean_interval([np.array([np.nan]), np.array([-1.0]), np.array([-1.0])])
    assert (interval.value, interval.low, interval.high) == (-1, -1, -1)


def test_one_group_has_no_interval() -> None:
    for groups in ([[0.2, 0.4]], [[0.3], [np.nan]]):
        interval = mean_interval([np.array(group) for group in groups])
        assert interval.value == pytest.approx(0.3)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert interval.told("{:.1f}".format) == "0.3 [–]"


def test_a_studys_own_results_are_not_taken_for_the_demo(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "own").mkdir()
    given = 'models: [demo, own]\ntexts: {python: python}\nremove: [1]\nheld_out: {python: "python?part=held-out"}\n'
    (tmp_path / "demo.yaml").write_text(given)
    assert read_study(tmp_path / "demo.yaml").models == ("demo", str(tmp_path / "own"))


def test_intervals_of_shares_hold_their_values() -> None:
    rng = np.random.default_rng(1)
    points = list(itertools.product("abcd", range(4), range(3)))
    levels = {name: [point[number] for point in points] for number, name in enumerate(("text", "seed", "search"))}
    for noise in (0.1, 1.0, 10.0):
        outcome = np.array([ord(point[0]) % 3 for point in points]) + noise * rng.normal(size=len(points))
        shares = [item.share for item in decompose(outcome, levels)]
        assert all(share.low <= share.value <= share.high for share in shares)
        assert any(share.low < share.high for share in shares)


def test_an_outcome_that_never_varies_has_no_shares() -> None:
    found = decompose(np.ones(4), {"text": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1]})
    assert [item.share.value for item in found] == [0.0] * len(found)


def made_up(decisive: str) -> list[Result]:
    """A grid where one factor alone decides."""
    results = []
    searches = ("greedy", "swap", "one-shot", "beam")
    for text, seed, search in itertools.product("abcd", (0, 1), searches):
        level = {"text": "abcd".index(text), "search": searches.index(search)}[decisive]
        numbers = {"held_out": {"wiki": 30.0 + 10 * level}, "tasks": {"quiz": 0.5 - 0.1 * level}}
        order = block(2 * level, 2 * level + 1)
        results.append(result(order, text=text, seed=seed, search=search, loss=1.0 + level, **numbers))
    return results


def test_what_does_not_vary_is_due_to_nothing() -> None:
    from shallower.reporting.study import markdown

    still = [result(block(3), text=text, search=search) for text in "ab" for search in ("greedy", "swap")]
    findings = find(still)
    assert findings.decompositions == ()
    assert "variance" not in findings.answer
    moved = [
        result(block(3 + shift), text=text, search=search, remove="4", loss=2.0 + shift)
        for shift, (text, search) in enumerate(itertools.product("ab", ("greedy", "swap")))
    ]
    findings = find([*still, *moved])
    assert {(item.remove, item.outcome) for item in findings.decompositions} == {("4", "plan"), ("4", "loss")}
    shares = {item.term: item.share.value for item in findings.decompositions[1].shares}
    assert sum(shares.values()) == pytest.approx(1)  # not halved by the ratio at which nothing varies
    written = markdown([*still, *moved], findings)
    text, search, crossed = (f"{100 * shares[term]:.0f} %" for term in ("text", "search", "text × search"))
    assert f"| text | 33 % [–] | {text} [–] |" in written  # four cells, and as many effects
    assert (
        f"Of the variance of the calibration loss, {text} is due to calibration, 0 % to the objective, {search} to the "
        f"search, {crossed} to two of these together, and nothing can be left over. Where a grid has as many cells as"
    ) in findings.answer


def test_few_cells_do_not_say_what_changes_plans_more(tmp_path: Path) -> None:
    from shallower.reporting.study import write_pages

    def grid(texts: str, searches: Sequence[str]) -> list[Result]:
        """Plans that texts change more than searches do."""
        return [
            result(block(10 * at, 10 * at + 1, 10 * at + 2 + shift), text=text, search=search)
            for at, text in enumerate(texts)
            for shift, search in enumerate(searches)
        ]

    few, many = find(grid("ab", ("greedy", "swap"))), find(grid("abcd", ("greedy", "swap", "one-shot", "beam")))
    assert "too few sets of cells (2, where 4 are needed)" in few.answer
    assert "So here" not in few.answer
    assert "So here calibration changes the plan more" in many.answer
    alone = grid("ab", ("greedy",))
    page, numbers, tables = write_pages(tmp_path, alone, find(alone))
    [of_text] = json.loads(numbers.read_text())["agreements"]
    assert of_text["jaccard"] == {"value": 0.0, "low": "nan", "high": "nan"}
    assert "| text | 0.00 [–] | " in tables.read_text()
    assert "nan" not in re.sub("<[^>]*>", "", page.read_text())  # of words and numbers that are shown


def test_what_a_search_draws_is_no_effect_of_calibration() -> None:
    drawn = Random(0)
    results = [
        result(
            block(*drawn.sample(range(10), 3)) if search == "annealing" else block(7, 8, 9),
            text=text,
            **{"seed": seed, "search": search},
        )
        for search, seed, text in itertools.product(("annealing", "swap", "greedy"), range(4), "ab")
    ]
    for each in results:
        assert each.cell.draws == (each.cell.search == "annealing")
    findings = find(results)
    across = {item.factor: item for item in findings.agreements}
    assert across["seed"].jaccard.value == 1
    assert across["seed"].pairs == 2 * 2 * 6
    [of_plan] = [item for item in findings.decompositions if item.outcome == "plan"]
    assert of_plan.share(["seed"]) == pytest.approx(0)
    assert of_plan.share([RESIDUAL]) > 0.2
    for asked, draws in (("swap", False), ("greedy,annealing", True), ("one-shot", False), ("one-shot:shapley", True)):
        assert replace(results[0].cell, search=asked).draws == draws


def test_many_cells_of_few_plans_are_few_points() -> None:
    def plans(count: int) -> list[Result]:
        """32 cells: the better a plan for perplexity, the better for accuracy."""
        cells = itertools.product("abcd", range(8))
        return [
            result(block(plan), text=text, seed=seed, held_out={"wiki": 20.0 + plan}, tasks={"quiz": 0.5 - plan / 100})
            for text, seed in cells
            for plan in [(seed + ord(text)) % count]
        ]

    assert find(plans(3)).ranks == ()
    [rank] = find(plans(4)).ranks
    assert rank.correlation.value == pytest.approx(1)
    mixed = [
        replace(each, order=(Unit(0, "attn"), Unit(0, "mlp"))) if each.cell.seed == 0 else each for each in plans(3)
    ]
    assert find(mixed).ranks == ()  # the same model, though its plan is written otherwise
    assert "beyond doubt" not in find(plans(4)).answer
    assert "the interval is above zero in 1 of 1" in find(plans(4)).answer


def test_a_block_and_its_sublayers_are_the_same_plan() -> None:
    whole, halves = block(3, 5), (Unit(3, "attn"), Unit(3, "mlp"), Unit(5, "block"))
    assert jaccard(whole, halves) == 1
    assert jaccard(block(3), (Unit(3, "mlp"),)) == 1 / 2
    assert order_agreement(whole, halves) > 0.8  # it would be 1 but for the order of the halves
    assert math.isnan(order_agreement(block(3), (Unit(3, "attn"), Unit(3, "mlp"))))
    results = [
        result(order, text=text, search=search)
        for text, order in (("a", whole), ("b", halves))
        for search in ("greedy", "last")
    ]
    assert "plan" not in [item.outcome for item in find(results).decompositions]


@pytest.mark.parametrize(
    ("decisive", "said"), [("text", "calibration changes the plan"), ("search", "the search changes")]
)
def test_the_answer_names_what_decides(decisive: str, said: str) -> None:
    findings = find(made_up(decisive))
    assert said in findings.answer
    for what in ("plans", "the calibration loss", "perplexity on wiki", "accuracy on quiz"):
        assert f"Of the variance of {what}, " in findings.answer
    of_plan = next(item for item in findings.decompositions if item.outcome == "plan")
    assert of_plan.share([decisive]) == pytest.approx(1)
    [rank] = findings.ranks
    assert rank.correlation.value == pytest.approx(1)  # lower perplexity goes with higher accuracy


def test_a_bar_in_a_name_is_no_column() -> None:
    from shallower.reporting.study import markdown

    results = [result(block(shift), text=text) for shift, text in enumerate(("a|b", "c"))]
    assert r"| 2 | text | a\|b | – |" in markdown(results, find(results))


def test_tables_tell_several_models_apart() -> None:
    from shallower.reporting.study import markdown

    one = made_up("text")
    two = [replace(each, cell=replace(each.cell, model=model)) for model in ("a/tiny", "b/tiny") for each in one]
    for results, first in ((one, ""), (two, "| Model ")):
        told = markdown(results, find(results))
        assert f"{first}| Removed | Varied | Level |" in told
        assert f"{first}| Removed | Text | Task |" in told
    assert "| a/tiny | 2 | text | a | 30.00 | 50.0 % |" in told
    assert "| b/tiny | 2 | wiki | quiz |" in told


def test_what_is_shown_of_all_cells_is_shown_of_each_model() -> None:
    from shallower.reporting.study import markdown, spread

    one = [
        replace(each, cell=replace(each.cell, sequences=size, model="small"))
        for size in (8, 32)
        for each in made_up("text")
    ]
    other = [replace(each, cell=replace(each.cell, model="large"), held_out={"wiki": 5.0}) for each in one]
    both = [*one, *other]
    told = markdown(both, find(both))
    assert "| Model | Calibration tokens | Shared units of two seeds | Held-out perplexity | Cells |" in told
    assert "| small | 128 | 1.00 [1.00, 1.00] | 43.56 | 32 |" in told
    assert "| large | 128 | 1.00 [1.00, 1.00] | 5.00 | 32 |" in told
    assert "by its size, on average over models: 128 tokens 1.00, 512 tokens 1.00 (Jaccard)" in told
    assert "by its size: 128 tokens 1.00, 512 tokens 1.00 (Jaccard)" in find(one).answer
    for results, columns, names in ((one, 4, 0), (both, 8, 1)):
        drawn = spread(results)
        assert drawn is not None
        assert len(re.findall(">(?:greedy|swap|one-shot|beam)<", drawn)) == columns
        assert len(re.findall(">large<", drawn)) == names


def test_means_are_over_cells_that_are_there_at_every_level() -> None:
    from shallower.reporting.study import markdown

    results = [
        result(block("abcd".index(text), seed + 6), text=text, sequences=size, seed=seed, held_out={"wiki": worth})
        for text, worth in (("a", 10.0), ("b", 20.0), ("c", 40.0), ("d", 80.0))
        for size in (16, 64)
        for seed in (0, 1)
        if (text, size) != ("d", 64)  # too short
    ]
    found = find(results)
    told = markdown(results, found)
    assert "| 2 | sequences | 16 | 20.00 |\n| 2 | sequences | 64 | 20.00 |" in told
    assert "at each level: 6 where text is compared, 2 where sequences is compared." in told
    assert [(item.tokens, item.perplexity, item.cells, item.left_out) for item in found.stability] == [
        (256, pytest.approx(20), 6, 2),
        (1024, pytest.approx(20), 6, 0),
    ]
    assert "at each level: 2 where size is compared." in told
    assert found.omitted == ()


def test_cells_of_one_plan_count_once_in_means_and_draws_are_not_of_a_seed() -> None:
    """One-shot ranks by cosine, so that it has one plan at both objectives; random draws with the seed."""
    from shallower.reporting.study import markdown

    worth = {("greedy", "nll"): 10.0, ("greedy", "kl"): 10.0, ("one-shot", "nll"): 80.0, ("one-shot", "kl"): 80.0}
    results = [
        result(block(7, seed), search=search, objective=objective, sequences=size, seed=seed, held_out={"wiki": value})
        for (search, objective), value in {**worth, ("random", "nll"): 1000.0}.items()
        for size in (8, 32)
        for seed in (0, 1)
    ]
    found = find(results)
    told = markdown(results, found)
    for factor, levels in (("sequences", (8, 32)), ("seed", (0, 1))):
        for level in levels:
            assert f"| 2 | {factor} | {level} | 20.00 |" in told  # the cube root of 10 · 10 · 80
    assert [(item.perplexity, item.cells) for item in found.stability] == [(pytest.approx(20), 6)] * 2


def test_a_cell_that_lost_the_model_is_in_no_mean_and_what_it_drops_is_named() -> None:
    from shallower.reporting.study import markdown

    results = [
        replace(each, held_out={"wiki": math.inf}) if each.cell.text == "a" and each.cell.search == "swap" else each
        for each in made_up("text")
    ]
    found = find(results)
    told = markdown(results, found)
    assert "inf |" not in told
    assert "| 2 | text | a | 30.00 |" in told  # of the other three searches
    assert "| 2 | search | swap | 49.32 |" in told  # of the other three texts
    assert [(item.outcome, item.cells) for item in found.omitted] == [("wiki", 2)]
    assert {item.outcome for item in found.decompositions} == {"plan", "loss", "quiz"}
    assert "The variance of perplexity on wiki at 2 is left out: it is infinite or unknown in 2 cells." in found.answer


def test_a_task_that_overflows_takes_no_perplexity_from_a_mean() -> None:
    from shallower.reporting.study import markdown

    worth = {"a": (20.0, math.nan), "b": (80.0, 0.5), "c": (20.0, 0.25), "d": (80.0, 0.75)}
    results = [
        result(block(size), text=text, sequences=size, held_out={"wiki": perplexity}, tasks={"quiz": accuracy})
        for text, (perplexity, accuracy) in worth.items()
        for size in (8, 32)
    ]
    told = markdown(results, find(results))
    for size in (8, 32):
        assert f"| 2 | sequences | {size} | 40.00 | 50.0 % |" in told  # the accuracy of b, c and d
    assert "without a counterpart at each level: 2 where text is compared, 2 where sequences is compared." in told


def test_figures_of_a_study_have_captions_and_words_stand_left() -> None:
    from shallower.reporting.study import markdown, render

    results = [*made_up("text"), *(replace(each, cell=replace(each.cell, remove="3")) for each in made_up("search"))]
    found = find(results)
    page, tables = render(results, found), markdown(results, found)
    assert page.count('<div class="plot">') == page.count("<svg") == page.count("<figcaption>") == 3  # white, scrolls
    assert "Whiskers: 95\N{NO-BREAK SPACE}% intervals." in page
    assert "Each dot is a cell" in page
    for told in (page, tables):
        assert "geometric mean over cells and held-out texts; lower is better" in told
    assert '<td class="word">text</td><td class="word">a</td><td>' in page
    assert (
        "| Removed | Varied | Level | Held-out perplexity | Task accuracy |\n| --- | --- | --- | ---: | ---: |"
        in tables
    )


def test_what_is_left_over_is_the_last_of_the_shares() -> None:
    from shallower.reporting.study import share_rows

    noise = Random(0)
    results = [
        replace(each, loss=each.loss + noise.random(), order=block(*noise.sample(range(9), 2)))
        for each in made_up("text")
    ]
    rows = share_rows(find(results))
    assert [row[0] for row in rows].index(RESIDUAL) == len(rows) - 1 > 0


# The file


def test_all_faults_of_a_study_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_study({"models": "demo", "texts": {}, "sequence": 8, "seeds": [0, 0], "remove": [], "exact": 1}, "s.yaml")
    told = str(caught.value)
    for part in (
        "'sequence' (did you mean 'sequences'?)",
        "'texts'",
        "twice",
        "'remove' of s.yaml is empty",
        "'exact'",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1: 2", "unknown key 1"),
        ("remov: 2", "unknown key 'remov' (did you mean 'remove'?)"),
        ("objectives:", "'objectives' of {0} holds None where a word or number belongs"),
        ("protect:", "'protect' of {0} holds None"),
        ("settings: {width: }", "'settings' of {0} holds None"),
        ("settings: {width: [1, 2]}", "'settings' of {0} holds [1, 2]"),
        ("searches: [greedy, null]", "'searches' of {0} holds None"),
    ],
)
def test_what_yaml_reads_as_no_text_is_told(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(f"models: m\ntexts: {{a: x.txt}}\nremove: 10%\n{line}\n")
    with pytest.raises(UserError, match=re.escape(said.format(file))):
        read_study(file)


def test_a_grid_has_every_combination_once() -> None:
    study = Study(("m",), {"a": "a.txt", "b": "b.txt"}, ("1", "2"), sequences=(4, 8), seeds=(0, 1), searches=("x", "y"))
    assert len(study.cells) == len(set(study.cells)) == 2 * 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("text", "located"),
    [
        ("a.jsonl", "{0}/a.jsonl"),
        ("a.jsonl#body", "{0}/a.jsonl#body"),
        ("a.jsonl*0.7+ b.jsonl#body*0.3+web", "{0}/a.jsonl*0.7+{0}/b.jsonl#body*0.3+web"),
        ("a.jsonl*0.7+b.jsonl?seed=1", "{0}/a.jsonl*0.7+{0}/b.jsonl?seed=1"),
        ("a+b*2.jsonl?seed=1", "{0}/a+b*2.jsonl?seed=1"),
        ("a.jsonl+c++.jsonl*0.5?seed=1", "{0}/a.jsonl+{0}/c++.jsonl*0.5?seed=1"),
        ("c++.jsonl#body+hf:owner/name", "{0}/c++.jsonl#body+hf:owner/name"),
        ("arrow:more+rows#body", "arrow:{0}/more+rows#body"),
        ("python+a.jsonl", "python+{0}/a.jsonl"),  # the text of that name, as everywhere
        ("arrow:rows#body", "arrow:{0}/rows#body"),
        ("none.jsonl*2+hf:owner/name:train", "none.jsonl*2+hf:owner/name:train"),
        ("+".join(["a.jsonl"] * 50), "+".join(["{0}/a.jsonl"] * 50)),  # longer than a file's name can be
    ],
)
def test_every_source_of_a_text_is_relative_to_the_file(text: str, located: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "a+b*2.jsonl", "c++.jsonl", "rows", "more+rows", "python"):
        (tmp_path / name).touch()
    study = parse_study({"models": "demo", "texts": {"a": text}, "remove": 1}, "s.yaml", tmp_path)
    assert study.texts["a"] == located.format(tmp_path)


# A study from file to page


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two texts, questions, and STUDY.yaml."""
    from shallower.testing.families import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("study")
    tiny_model("llama", blocks=5).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    for name, word in (("a", "times"), ("b", "plus"), ("other", "minus")):
        lines = [f"{n} {word} {n} is what {n + 3} {word} {n} would be." for n in range(300)]
        (folder / f"{name}.txt").write_text("\n\n".join(" ".join(lines[at : at + 10]) for at in range(0, 300, 10)))
    rows = [{"question": f"What is {n} and 1?", "choices": [str(n + 1), str(n)], "gold": n % 2} for n in range(12)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "grid.yaml").write_text(
        "models: tiny\ntexts: {a: a.txt, b: b.txt}\nsequences: 4\nlength: 24\nseeds: [0, 1]\nobjectives: nll\n"
        "searches: [one-shot, greedy]\nremove: [1, 2]\nheld_out: {other: other.txt}\nheld_out_sequences: 2\n"
        "held_out_length: 32\ntasks: {quiz: quiz.jsonl}\nquestions: 8\n"
    )
    return folder


def run(*words: object) -> int:
    return main.run([*map(str, words), "--quiet", "--dtype", "float32"])


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_a_study_measures_every_cell_and_writes_its_page(
    root: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("study", place / "grid.yaml", "--out", place / "out") == 0
    rows = lines_of(place / "out")
    assert len(rows) == 16
    assert all(set(row["held_out"]) == {"other"} and 0 <= row["tasks"]["quiz"] <= 1 for row in rows)
    [how] = {json.dumps(row["made_by"] | {"calibration": None}) for row in rows}
    how = json.loads(how)
    assert (how["units"], how["protect"], how["settings"], how["exact"]) == ("block", "", {}, False)
    assert (how["dtype"], how["held_out_sequences"], how["held_out_length"], how["questions"]) == ("float32", 2, 32, 8)
    assert set(how["judged_on"]) == {"other", "quiz"}
    assert len({row["made_by"]["calibration"]["spec"] for row in rows}) == 4
    assert (place / "out" / "grid.yaml").read_text() == (place / "grid.yaml").read_text()
    told_of = (root / "docs" / "files.md").read_text().partition("## cells.jsonl")[2].partition("\n## ")[0]
    assert [key for key in (*rows[0], *how, *rows[0]["cell"]) if f"`{key}`" not in told_of] == []
    page = (place / "out" / "study.html").read_text()
    assert "The answer" in page
    assert "<svg" in page
    told = json.loads((place / "out" / "findings.json").read_text())
    assert told["cells"] == 16
    assert told["answer"] in " ".join(capsys.readouterr().out.split())
    # perplexity and plan are those that the verbs give

    from shallower.corpus import build_calibration
    from shallower.engine import Ablator
    from shallower.verbs.search import search
    from shallower.verbs.subject import open_subject

    subject = open_subject(str(place / "tiny"), dtype="float32")
    row = next(row for row in rows if row["cell"]["search"] == "greedy" and row["cell"]["remove"] == "2")
    spec = str(place / f"{row['cell']['text']}.txt")
    plan = search(subject, "2", calibration=spec, sequences=4, length=24, seed=row["cell"]["seed"])
    assert [str(unit) for unit, _ in plan.order] == row["order"]
    text = build_calibration(str(place / "other.txt"), subject.tokenizer, sequences=2, length=32)
    loss = Ablator(subject.anatomy, text).losses([plan.removed])[0]
    assert row["held_out"]["other"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert how["judged_on"]["other"] == text.digest
    assert how["model"]["fingerprint"] == plan.model.fingerprint
    assert torch.is_grad_enabled()


def test_a_study_that_is_beside_its_results_is_not_copied_onto_itself(place: Path, tmp_path: Path) -> None:
    for name in ("tiny", "a.txt", "other.txt"):
        (tmp_path / name).symlink_to(place / name)
    given = (
        "models: tiny\ntexts: {a: a.txt}\nsequences: 2\nlength: 24\nobjectives: nll\nsearches: one-shot\nremove: 1\n"
    )
    (tmp_path / "s.yaml").write_text(
        f"{given}held_out: {{other: other.txt}}\nheld_out_sequences: 1\nheld_out_length: 32\n"
    )
    before = (tmp_path / "s.yaml").stat()
    assert run("study", tmp_path / "s.yaml", "--out", tmp_path) == 0
    after = (tmp_path / "s.yaml").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_search_may_rank_by_another_metric_than_its_own(place: Path) -> None:
    from shallower.verbs.search import search

    kept = [line for line in (place / "grid.yaml").read_text().splitlines() if not line.startswith("searches:")]
    lines = [*kept, "searches: [one-shot, 'one-shot:loss', 'one-shot:relative-l2']", "settings: {below: before}"]
    (place / "ranked.yaml").write_text("\n".join(lines))
    assert run("study", place / "ranked.yaml", "--out", place / "ranked") == 0
    rows = [row for row in lines_of(place / "ranked") if row["cell"]["remove"] == "2" and row["cell"]["seed"] == 0]
    assert len(rows) == 6
    for row in rows:
        plan = search(
            str(place / "tiny"),
            "2",
            search="one-shot",
            metric=(metric := row["cell"]["search"].partition(":")[2] or "cosine"),
            settings={"below": "before"} if metric == "relative-l2" else {},
            calibration=str(place / f"{row['cell']['text']}.txt"),
            sequences=4,
            length=24,
            dtype="float32",
        )
        assert [str(unit) for unit, _ in plan.order] == row["order"]


@pytest.mark.parametrize(
    ("calibration", "part"),
    [("a.jsonl", "all"), ("b.jsonl?seed=1", "held-out"), ("a.jsonl*0.5+b.jsonl*0.5", "held-out")],
)
def test_a_held_out_text_has_nothing_of_what_calibration_mixes(
    place: Path, tmp_path: Path, calibration: str, part: str
) -> None:
    from shallower.verbs.study import judging_texts
    from shallower.verbs.subject import open_subject

    for name in ("a", "b"):
        rows = [{"text": f"{name} has {n} and {n + 1}, and so on until {n * n}."} for n in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"models": "m", "texts": {"text": calibration}, "remove": 1, "held_out": {"b": "b.jsonl"}}
    study = parse_study({**data, "held_out_sequences": 2, "held_out_length": 32}, "s.yaml", tmp_path)
    text = judging_texts(open_subject(str(place / "tiny"), dtype="float32"), study)["b"]
    assert f"part={part}&" in text.spec


@pytest.mark.parametrize(
    ("calibration", "judging"),
    [
        ("t.jsonl", "{place}/t.jsonl"),
        ("t.jsonl", "fold/../t.jsonl"),
        ("t.jsonl", "t.jsonl#text"),
        ("t.jsonl", "link.jsonl"),
        ("fold", "fold/t.jsonl"),
        ("fold/t.jsonl", "fold/"),
        ("saved", "t.jsonl"),
        ("python:docs", "python"),
    ],
)
def test_a_text_is_the_same_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: str, judging: str
) -> None:
    from shallower.verbs.runnable import require_runnable, shared_texts

    _texts_to_judge_on(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = {"models": "tiny", "texts": {"a": calibration, "apart": "apart.jsonl"}, "remove": 1}
    study = parse_study({**data, "held_out": {"h": judging.format(place=tmp_path)}}, "s.yaml", Path())
    assert shared_texts(study, study.held_out["h"]) == ["a"]
    (tmp_path / "tiny").mkdir()
    with pytest.raises(UserError) as refused:
        require_runnable(study)  # the model has no files
    assert "judged" not in str(refused.value)


def test_a_copy_of_a_calibration_text_that_judges_is_told(place: Path, tmp_path: Path, notes: list[str]) -> None:
    from shallower.verbs.study import study

    _texts_to_judge_on(tmp_path)
    shutil.copy(tmp_path / "t.jsonl", tmp_path / "copy.jsonl")
    data = {"models": str(place / "tiny"), "texts": {"a": "t.jsonl"}, "remove": 1, "searches": "one-shot"}
    data |= {"sequences": 40, "length": 24, "held_out": {"h": "copy.jsonl"}}
    sizes = {"held_out_sequences": 16, "held_out_length": 24}
    study(parse_study({**data, **sizes}, "s.yaml", tmp_path), tmp_path / "out", dtype="float32")
    [line] = [line for line in notes if "runs of 13 tokens" in line]
    assert re.fullmatch(r"h shares \d+ of \d+ runs of 13 tokens with what calibrates a 40×24 seed 0: what .*", line)


@pytest.mark.parametrize("name", ["plan", "loss"])
@pytest.mark.parametrize("kind", ["held_out", "tasks"])
def test_no_text_takes_the_name_of_an_outcome_that_every_study_has(kind: str, name: str) -> None:
    from shallower.verbs.runnable import require_runnable

    study = parse_study({"models": "m", "texts": {"a": "python"}, "remove": 1, kind: {name: "python"}}, "s", Path())
    with pytest.raises(UserError, match=f"'{name}' names a held-out text or task, and is what every study calls"):
        require_runnable(study)


@pytest.mark.parametrize(
    ("calibration", "judging"),
    [
        ("t.jsonl?part=all", "t.jsonl"),
        ("t.jsonl?part=held-out", "t.jsonl"),
        ("t.jsonl", "t.jsonl?part=all"),
        ("t.jsonl", "t.jsonl?part=train"),
        ("all", "t.jsonl"),
    ],
)
def test_a_study_does_not_judge_on_a_part_that_it_calibrates_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: str, judging: str
) -> None:
    from shallower.verbs.runnable import require_runnable

    _texts_to_judge_on(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = {"models": "tiny", "texts": {"a": calibration}, "remove": 1, "sequences": 4, "length": 24}
    with pytest.raises(UserError, match="plans are judged on 'h', which reads part="):
        require_runnable(parse_study({**data, "held_out": {"h": judging}}, "s.yaml", Path()))


def _texts_to_judge_on(folder: Path) -> None:
    """One text in several places, as finished sets of two parts, and another text."""
    (folder / "fold").mkdir()
    for path in ("t.jsonl", "fold/t.jsonl", "apart.jsonl"):
        rows = [{"text": f"{path} has {n} and {n + 1}, and so on until {n * n}."} for n in range(100)]
        (folder / path).write_text("\n".join(map(json.dumps, rows)))
    (folder / "link.jsonl").symlink_to(folder / "t.jsonl")
    for name, part in (("saved", "train"), ("all", "all")):
        ids = torch.arange(96).reshape(4, 24)
        CalibrationSet(f"t.jsonl?sequences=4&length=24&part={part}", ids, None).save(folder / name)


@pytest.mark.parametrize(
    ("data", "fits"),
    [
        ({"texts": {"a": "a.txt?sequences=8&length=32"}, "sequences": 8, "length": 32}, True),
        ({"texts": {"a": "a.txt?seed=7&dedup=0.8"}}, True),
        ({"texts": {"a": "a.txt?format=chat"}, "format": "chat"}, True),
        ({"texts": {"a": "a.txt?format=chat"}, "format": "text"}, False),
        ({"texts": {"a": "a.txt?format=chat"}, "format": ["text", "chat"]}, False),
        ({"texts": {"a": "a.txt?length=32"}, "length": [32, 64]}, False),
        ({"texts": {"a": "quiz.jsonl?questions=8"}, "sequences": [8, 16], "objectives": "task"}, False),
    ],
)
def test_a_text_may_say_itself_what_the_study_says_too(place: Path, data: dict[str, Any], fits: bool) -> None:
    from shallower.verbs.runnable import require_runnable

    study = parse_study({"models": "tiny", "remove": 1, **data}, "s.yaml", place)
    with nullcontext() if fits else pytest.raises(UserError, match="but the study asks for"):
        require_runnable(study)


def test_no_question_that_calibration_reads_is_judged_on(place: Path, tmp_path: Path) -> None:
    from shallower.corpus.questions import read_questions
    from shallower.corpus.specification import in_part
    from shallower.verbs.study import calibration_of, judging_texts
    from shallower.verbs.subject import open_subject

    rows = [{"question": f"What is {n} and 1?", "choices": [str(n + 1), str(n)], "gold": n % 2} for n in range(80)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    held = sum(in_part(question.text, "held-out") for _, question in read_questions(tmp_path / "quiz.jsonl"))
    data = {"models": "m", "texts": {"quiz": "quiz.jsonl"}, "remove": 1, "tasks": {"own": "quiz.jsonl"}}
    subject = open_subject(str(place / "tiny"), dtype="float32")
    study = parse_study({**data, "objectives": "task", "sequences": 60, "questions": held}, "s.yaml", tmp_path)
    read = calibration_of(subject, study, ("m", "quiz", "", 60, 128, 0), "task")
    judged = judging_texts(subject, study)["own"]
    texts = [set(subject.tokenizer.batch_decode(each.input_ids, skip_special_tokens=True)) for each in (read, judged)]
    assert [len(text) for text in texts] == [2 * 60, 2 * held]
    assert held > 0
    assert not texts[0] & texts[1]
    shots = {**data, "format": "few-shot", "questions": held}  # no objective reads questions, but calibration does
    assert "part=held-out" in judging_texts(subject, parse_study(shots, "s.yaml", tmp_path))["own"].spec
    apart = {**data, "texts": {"a": str(place / "a.txt")}, "questions": 80}
    assert "part=all" in judging_texts(subject, parse_study(apart, "s.yaml", tmp_path))["own"].spec


def test_a_model_that_is_lost_has_an_infinite_perplexity(place: Path, tmp_path: Path) -> None:
    from shallower.testing.families import tiny_model, tiny_tokenizer

    loud = tiny_model("llama", blocks=3)
    with torch.no_grad():
        loud.get_output_embeddings().weight.mul_(3e3)  # thousands of nats a token
    loud.save_pretrained(place / "loud")
    tiny_tokenizer().save_pretrained(place / "loud")
    grid = (
        (place / "grid.yaml").read_text().replace("models: tiny", "models: loud").replace("remove: [1, 2]", "remove: 1")
    )
    (place / "loud.yaml").write_text(grid.replace("seeds: [0, 1]", "seeds: 0"))
    for _ in range(2):  # the second time from disk
        assert run("study", place / "loud.yaml", "--out", tmp_path / "out") == 0
        [told, *_] = lines_of(tmp_path / "out")
        assert told["held_out"] == {"other": "inf"}
    written = (tmp_path / "out" / "findings.json").read_text()
    for text in (written, *(tmp_path / "out" / "cells.jsonl").read_text().splitlines()):
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_place_that_cannot_be_written_is_told_first(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.verbs import study as studies

    monkeypatch.setattr(studies, "open_subject", lambda *given, **how: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert run("study", place / "grid.yaml", "--out", out) == 2
    assert f"{out} cannot be written: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err


def test_searches_share_an_ablator_and_refuse_another_ones(place: Path) -> None:
    import torch

    from shallower.engine import Ablator
    from shallower.verbs.calibrate import calibrate
    from shallower.verbs.score import score_many
    from shallower.verbs.search import search
    from shallower.verbs.subject import open_subject

    subject = open_subject(str(place / "tiny"), dtype="float32")
    text = calibrate(subject, str(place / "a.txt"), sequences=4, length=24, seed=0)
    other = calibrate(subject, str(place / "b.txt"), sequences=4, length=24, seed=0)
    shared = Ablator(subject.anatomy, text)
    alone = search(subject, "2", calibration=text, exact=True)
    plan = search(subject, "2", calibration=text, exact=True, ablator=shared)
    assert (plan.order, plan.dense) == (alone.order, alone.dense)
    told = search(subject, "1", calibration=text, exact=False, ablator=shared).made_by.options
    assert (told["exact"], told["dtype"]) == (True, "float32")  # this ablator runs no races
    spent = shared.spent.tokens
    assert search(subject, "1", calibration=text, exact=True, ablator=shared).order == plan.order[:1]
    assert shared.spent.tokens == spent  # all of it was measured before
    for what, wrong in [("calibration", {"calibration": other}), ("objective", {"objective": "kl"})]:
        given = {"calibration": text, "ablator": shared, **wrong}
        with pytest.raises(UserError, match=f"made for another {what}"):
            search(subject, "2", **given)
        with pytest.raises(UserError, match=f"made for another {what}"):
            score_many(subject, "loss", **given)
    with pytest.raises(UserError, match="made for another model"):
        search(str(place / "tiny"), "2", calibration=text, ablator=shared)
    with torch.no_grad():
        subject.model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(UserError, match="before its weights were changed; make a new one"):
        search(subject, "2", calibration=text, ablator=shared)


def test_one_crew_of_workers_is_there_at_a_time(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shallower.engine.evaluator import Evaluator, Job, Measured
    from shallower.verbs import measuring
    from shallower.verbs import study as studies

    pytest.importorskip("ray")
    there: list[object] = []
    most: list[int] = []
    connected: list[str] = []

    class Crew:
        """Workers that take all there is, as those of `--workers auto` do."""

        count = 1

        def __init__(self, evaluator: Evaluator, *, asked: int | str, memory: int | None, checkpoint: object) -> None:
            assert (asked, memory) == ("auto", 1 << 20)
            self.evaluator = evaluator

        def run(self, jobs: Sequence[Job], tick: Callable[[], None]) -> Iterator[Measured]:
            there.extend([self] if jobs and self not in there else [])
            most.append(len(there))
            yield from (self.evaluator.measure(job, tick) for job in jobs)

        def close(self) -> None:
            there[:] = [other for other in there if other is not self]

    class Session:
        def __init__(self, asked: int | str, device: object) -> None:
            connected.append("open")

        def close(self) -> None:
            connected.append("closed")

    monkeypatch.setattr(measuring, "RayWorkers", Crew)
    monkeypatch.setattr(studies, "connect", Session)
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "cache"))  # else nothing is measured
    file = place / "few.yaml"
    file.write_text((place / "grid.yaml").read_text().replace("seeds: [0, 1]", "seeds: 0").replace(", greedy", ""))
    told = [
        studies.study(file, tmp_path / out, memory=memory, workers=workers, dtype="float32").results
        for out, memory, workers in (("crews", "1MiB", "auto"), ("threads", None, None), ("crews", "1MiB", "auto"))
    ]
    assert max(most) == 1
    assert not there
    assert connected == ["open", "closed"] * 2  # once a calibration set; the second time all is on disk
    assert [result.order for result in told[0]] == [result.order for result in told[1]]
    assert told[0] == told[2]


def test_a_study_that_was_killed_goes_on(place: Path) -> None:
    assert run("study", place / "grid.yaml", "--out", place / "whole") == 0
    out = place / "killed"
    program = "import sys; from shallower.cli.main import run; sys.exit(run(sys.argv[1:]))"
    words = ["study", place / "grid.yaml", "--out", out, "--quiet", "--dtype", "float32"]
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], env=os.environ)
    while not (out / "cells.jsonl").exists() or not (out / "cells.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / "cells.jsonl").open("a") as file:
        file.write('{"key": "cut sho')  # what a kill in the middle of a write leaves
    before = (out / "cells.jsonl").read_text().splitlines()[:-1]
    rows = [json.loads(line) for line in before]
    before = [json.dumps({name: row[name] for name in row if name != "made_by"}) for row in rows]  # as it once was
    (out / "cells.jsonl").write_text("".join(f"{line}\n" for line in [*before, '{"key": "cut sho'])[:-1])
    assert run("study", place / "grid.yaml", "--out", out) == 0
    after = (out / "cells.jsonl").read_text().splitlines()
    assert after[: len(before)] == before  # nothing was measured again
    assert len(after) == 16
    plans = [{row["key"]: row["order"] for row in lines_of(place / name)} for name in ("whole", "killed")]
    assert plans[0] == plans[1]


def test_cells_of_a_model_that_differs_in_one_weight_its_config_or_code_are_not_recalled(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.checkpoint.fingerprint import fingerprint
    from shallower.checkpoint.load import load_model

    first = load_model(str(place / "tiny"), dtype="float32").model
    before = fingerprint(first)
    with torch.no_grad():
        first.get_submodule("model.layers.2.mlp.down_proj").weight.view(-1)[1] += 1
    assert fingerprint(first) == before  # a sample, which does not read this one
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    for name in ("a", "other"):
        shutil.copy(place / f"{name}.txt", tmp_path)
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "models: tiny\ntexts: {a: a.txt}\nsequences: 4\nlength: 24\nobjectives: nll\nsearches: one-shot\nremove: [1]\n"
        "held_out: {other: other.txt}\nheld_out_sequences: 2\nheld_out_length: 32\n"
    )
    assert run("study", grid, "--out", tmp_path / "out") == 0
    first.save_pretrained(tmp_path / "tiny")
    assert run("study", grid, "--out", tmp_path / "out") == 0
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert run("study", grid, "--out", tmp_path / "out") == 0  # the same weights, but they compute something else
    rows = lines_of(tmp_path / "out")
    assert len({row["key"] for row in rows}) == 3
    assert len({str(row["held_out"]) for row in rows}) == 3
    with monkeypatch.context() as other:
        other.setattr("shallower.checkpoint.determinants.transformers.__version__", "0.0")
        assert run("study", grid, "--out", tmp_path / "out") == 0
    for edited in ("one-shot", "cosine", "nll", "greedy"):  # the last is none that this study runs

        def code(method: Method, edited: str = edited) -> str:
            return f"{method.name} {method.name == edited}"

        with monkeypatch.context() as other:
            other.setattr("shallower.verbs.study.code_of", code)
            assert run("study", grid, "--out", tmp_path / "out") == 0
    keys = [row["key"] for row in lines_of(tmp_path / "out")]
    assert len(set(keys)) == 8


def test_a_cell_that_cannot_be_measured_costs_no_other(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.verbs import study as studies
    from shallower.verbs.search import search

    def overflowing(subject: object, remove: str, **how: Any) -> object:
        if (how["search"], remove) == ("greedy", "2") and len(failed) < 2:
            failed.append(remove)
            raise ModelError("without block.1 the model gives no finite nll: remove less.")
        return search(subject, remove, **how)  # type: ignore[arg-type]

    failed: list[str] = []
    monkeypatch.setattr(studies, "search", overflowing)
    file, out = place / "some.yaml", tmp_path / "out"
    grid = (
        (place / "grid.yaml")
        .read_text()
        .replace("seeds: [0, 1]", "seeds: 0")
        .replace("{a: a.txt, b: b.txt}", "{a: a.txt}")
    )
    file.write_text(grid.replace("sequences: 4", "sequences: [4, 5000]"))
    assert run("study", file, "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"].startswith("3 cells were measured, 5 could not be.")
    assert [(row["cell"]["search"], row["cell"]["remove"]) for row in lines_of(out)] == [
        ("one-shot", "1"),
        ("one-shot", "2"),
        ("greedy", "1"),
    ]
    assert sorted(failure["cell"]["sequences"] for failure in told["failures"]) == [4, *[5000] * 4]
    for page in ("study.md", "study.html"):
        written = (out / page).read_text()
        assert "What could not be measured" in written
        assert "without block.1 the model gives no finite nll" in written
    failed.extend(["2"] * 2)  # the next time nothing overflows
    assert run("study", file, "--out", out) == 0
    assert len(lines_of(out)) == 4
    assert "4 cells were measured, 4 could not be." in " ".join(capsys.readouterr().out.split())
    assert run("study", file, "--out", tmp_path / "dry", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["failing"] == 4
    file.write_text(grid.replace("sequences: 4", "sequences: 5000"))
    assert run("study", file, "--out", tmp_path / "none") == 2
    assert "no cell of the study could be measured; the first of 4: " in capsys.readouterr().err
    assert not (tmp_path / "none" / "study.html").exists()


def test_a_text_on_which_the_model_overflows_costs_no_other(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.verbs import study as studies
    from shallower.verbs.measuring import make_ablator

    def overflowing(subject: object, text: Any, *how: Any, **more: Any) -> object:
        if "b.txt" in text.spec:
            raise ModelError("the model gives logits that are not finite.")
        return make_ablator(subject, text, *how, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(studies, "make_ablator", overflowing)
    (place / "two.yaml").write_text((place / "grid.yaml").read_text().replace("seeds: [0, 1]", "seeds: 0"))
    assert run("study", place / "two.yaml", "--out", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {failure["cell"]["text"] for failure in told["failures"]} == {"b"}
    assert len(lines_of(tmp_path / "out")) == 4


def test_runs_that_cannot_be_are_told_before_anything_is_measured(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.verbs import study as studies

    monkeypatch.setattr(studies, "build_calibration", lambda *given, **how: pytest.fail("a text was read"))
    file = place / "run.yaml"
    grid = (
        (place / "grid.yaml").read_text().replace("one-shot", "contiguous").replace("remove: [1, 2]", "remove: [2, 3]")
    )
    file.write_text(f"{grid}protect: block.2\n")
    assert run("study", file, "--out", tmp_path / "out") == 2
    assert "no run of neighbouring units that may go removes 3 units" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_are_all_looked_at_first_and_one_is_in_memory_at_a_time(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.testing.families import tiny_model, tiny_tokenizer
    from shallower.verbs import study, study_cost
    from shallower.verbs.subject import Subject, open_subject

    for name, blocks in (("small", 3), ("twin", 5)):
        tiny_model("llama", blocks=blocks).save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    grid = (place / "grid.yaml").read_text().replace("seeds: [0, 1]", "seeds: 0").replace(", greedy", "")
    file = place / "models.yaml"
    file.write_text(grid.replace("models: tiny", "models: [tiny, small]").replace("remove: [1, 2]", "remove: 4"))
    assert run("study", file, "--out", tmp_path / "out") == 2
    assert "cannot remove 4 units" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    there: list[weakref.ref[object]] = []

    def opened(*model: Any, **how: Any) -> Subject:
        gc.collect()
        assert not any(model() is not None for model in there)
        subject = open_subject(*model, **how)
        there.append(weakref.ref(subject.model))
        return subject

    for module in (study, study_cost):
        monkeypatch.setattr(module, "open_subject", opened)
    file.write_text(grid.replace("models: tiny", "models: [tiny, twin]"))
    assert run("study", file, "--out", tmp_path / "out", "--dry-run") == 0
    assert run("study", file, "--out", tmp_path / "out") == 0
    assert len(there) == 2 + 3
    assert json.loads((tmp_path / "out" / "findings.json").read_text())["cells"] == 8


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--memory", "4XB"), "--memory '4XB' cannot be read"),
        (("--workers", "0"), "--workers '0' cannot be read"),
        (("--memory", "4GB", "--dry-run"), "leave --memory and --workers out"),
    ],
)
def test_what_measures_is_read_before_models_are(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: tuple[str], said: str
) -> None:
    monkeypatch.setattr("shallower.verbs.study.open_subject", lambda *_, **__: pytest.fail("was loaded"))
    assert run("study", place / "grid.yaml", "--out", place / "none", *asked) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_measures_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("study", place / "grid.yaml", "--out", place / "none", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert not (place / "none").exists()
    assert (told["cells"], told["done"]) == (16, 0)
    # 4 calibration sets: the dense model, 5 single removals, then 4 pairs; one-shot adds at most a pair of its own
    assert 4 * 10 <= told["candidates"] <= 4 * 11
    assert told["alone"] > told["seconds"] > 0
    both = (place / "grid.yaml").read_text().replace("objectives: nll", "objectives: [nll, kl]")
    (place / "both.yaml").write_text(both)
    assert run("study", place / "both.yaml", "--out", place / "none", "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cells"] == 32
    assert told["candidates"] <= 4 * (11 + 5)  # single removals by nll are at hand from kl's pass


@pytest.mark.parametrize(
    ("asked", "units", "remove", "sets"),
    [
        ("one-shot", "block", "3", 1 + 3),  # what the plan tells: the dense model and every prefix
        ("one-shot:loss", "block", "3", 1 + 4 + 2),  # the protected block is not taken away
        ("one-shot:shapley", "block", "2", 1 + 4 + 6 + 4 + 1),
        ("greedy", "block", "2", 1 + 4 + 3),
        ("milp", "block", "3", 1 + 4 + 2 + 1),  # one set, whose units are put in an order
        ("random", "block", "3", 1 + 3),
        ("one-shot", "block", "block.1,block.3", 1 + 2),
        ("contiguous", "block", "3", 1 + 3),
        ("contiguous", "sublayer", "3", 1 + 3),
        ("contiguous", "attn", "3", 1 + 3),
    ],
)
def test_a_dry_run_counts_every_set_that_is_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, units: str, remove: str, sets: int
) -> None:
    from shallower.verbs.search import search
    from shallower.verbs.study_cost import estimate

    name, _, metric = asked.partition(":")
    data = {"models": "tiny", "texts": {"a": "a.txt"}, "sequences": 4, "length": 24, "searches": asked, "exact": True}
    study = parse_study(
        {**data, "objectives": "nll", "units": units, "remove": [remove], "protect": "block.0"}, "s.yaml", place
    )
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))  # else it was measured before
    plan = search(
        str(place / "tiny"),
        remove,
        search=name,
        metric=metric or None,
        units=units,
        calibration=str(place / "a.txt"),
        sequences=4,
        length=24,
        protect="block.0",
        exact=True,
        dtype="float32",
    )
    assert plan.spent["tokens"] == sets * 4 * 24
    assert estimate(study, tmp_path / "out", dtype="float32").candidates == sets


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("searches: greedi", "greedy"),
        ("searches: 'greedy:loss'", "takes no --metric"),
        ("searches: 'contiguous:loss'", "spans"),
        ("searches: 'one-shot:lss'", "loss"),
        ("remove: 9", "9"),
        ("settings: {width: 2}", "width"),
        ("settings: {order: 2}", "none of the study's searches, metrics and objectives has an option 'order'"),
        ("held_out: {quiz: other.txt}", "quiz"),
        ("tasks: {quiz: nowhere.jsonl}", "task 'quiz' reads nowhere.jsonl, which does not exist"),
        ("models: [tiny, tniy]", "there is no model at 'tniy'"),
        ("texts: {a: a.txt, b: a.txt*0.5+bb.txt*0.5}", "no text at 'bb.txt'"),
        ("texts: {a: aa.txt, b: 'bb.txt?seed=1'}", "(2) no text at 'bb.txt'"),
        ("held_out: {other: othr.txt}", "no text at 'othr.txt'"),
        ("texts: {a: 'a.txt?seed=7'}", "text 'a' says seed=7, but the study asks for seed 0, 1: leave it out"),
        ("texts: {a: 'a.txt?sequences=8'}", "text 'a' says sequences=8, but the study asks for sequences 4"),
        (
            "texts: {a: a.txt, s: saved}",
            "text 's' is a finished set with sequences=3, but the study asks for sequences 4",
        ),
        (
            "texts: {s: fits}",
            "is a finished set with a seed of its own, but the study asks for seed 0, 1: name the text",
        ),
    ],
)
def test_a_study_that_cannot_run_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    key = line.partition(":")[0]
    kept = [old for old in (place / "grid.yaml").read_text().splitlines() if not old.startswith(f"{key}:")]
    for name, sequences in (("saved", 3), ("fits", 4)):
        CalibrationSet("x", torch.ones((sequences, 24), dtype=torch.int64), None).save(place / name)
    file = place / f"wrong-{key}-{len(line)}.yaml"
    file.write_text("\n".join([*kept, line]))
    assert run("study", file, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
