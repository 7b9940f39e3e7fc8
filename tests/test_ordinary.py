"""`--ordinary`: plans whose sublayers pair up, by every search, against trying everything on tiny models."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import shallower
from shallower.anatomy import Anatomy, dissect
from shallower.budget import Amount, Budget, Limit, make_limit
from shallower.cli import main
from shallower.corpus import CalibrationSet, build_calibration
from shallower.engine import Ablator
from shallower.errors import BudgetError, ModelError, UserError
from shallower.plan import PruningPlan
from shallower.registry import search as searches
from shallower.surgery import cut, leftovers, re_pair, skipping
from shallower.surgery.ordinary_pairs import exact_pairs
from shallower.testing.conformance import sample_text
from shallower.testing.families import BLOCKS, tiny_model, tiny_tokenizer
from shallower.units import Kind, Span, Unit, plain, require_distinct
from shallower.verbs.ratio_curve import ratio_curve
from shallower.verbs.subject import Subject, open_subject

KINDS: tuple[Kind, ...] = ("block", "attn", "mlp", "pair")
EVERYTHING = [Unit(index, kind) for index in range(4) for kind in KINDS]
SEARCHES = [method.name for method in searches]
IDS = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))


def halves(units: Iterable[Unit]) -> list[str]:
    """The sublayers of units, written out: an own account of what a pair is."""
    found = []
    for unit in units:
        kind, index = str(unit).split(".")
        if kind in ("block", "attn"):
            found.append(f"attn.{index}")
        if kind in ("block", "mlp", "pair"):
            found.append(f"mlp.{index}")
        if kind == "pair":
            found.append(f"attn.{int(index) + 1}")
    return found


def is_ordinary(blocks: int, removed: Collection[str]) -> bool:
    """Whether what is left is attention, MLP, attention, MLP, …"""
    left = [kind for index in range(blocks) for kind in ("attn", "mlp") if f"{kind}.{index}" not in removed]
    return left == ["attn", "mlp"] * (len(left) // 2)


def dominoes(blocks: int) -> tuple[Unit, ...]:
    pairs = [Unit(index, "pair") for index in range(blocks - 1)]
    return tuple(sorted([*pairs, *(Unit(index, "block") for index in range(blocks))]))


@functools.lru_cache
def subject(family: str = "llama", blocks: int = BLOCKS) -> Subject:
    return open_subject(tiny_model(family, blocks=blocks), tiny_tokenizer())


@functools.lru_cache
def anatomy(blocks: int) -> Anatomy:
    return subject(blocks=blocks).anatomy


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Number {n} is followed by {n + 1}, and its square is {n * n}." for n in range(200)))
    return build_calibration(str(path), tiny_tokenizer(), sequences=4, length=24)


# Units


@given(st.sampled_from(EVERYTHING), st.sampled_from(EVERYTHING))
def test_units_overlap_where_they_share_a_sublayer(one: Unit, other: Unit) -> None:
    assert one.overlaps(other) == bool(set(halves([one])) & set(halves([other])))
    assert [str(part) for part in one.sublayers] == halves([one])


@given(st.sets(st.sampled_from(EVERYTHING), max_size=6))
def test_overlapping_units_are_not_distinct(units: set[Unit]) -> None:
    parts = halves(units)
    if len(set(parts)) < len(parts):
        with pytest.raises(BudgetError, match="only one of the two"):
            require_distinct(units)
    else:
        require_distinct(units)


def test_a_pair_is_no_word_for_users() -> None:
    with pytest.raises(BudgetError, match="not a unit"):
        Unit.parse("pair.3")


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_ordinary_sets_are_made_of_blocks_and_pairs_in_one_way(blocks: int) -> None:
    sublayers = halves(Unit(index, "block") for index in range(blocks))
    wanted = {
        frozenset(removed)
        for size in range(len(sublayers) + 1)
        for removed in itertools.combinations(sublayers, size)
        if is_ordinary(blocks, removed)
    }
    made = [
        frozenset(halves(units))
        for size in range(blocks + 1)
        for units in itertools.combinations(dominoes(blocks), size)
        if len(set(halves(units))) == 2 * size
    ]
    assert set(made) == wanted
    assert len(set(made)) == len(made)


@given(costs=st.dictionaries(st.sampled_from(EVERYTHING), st.integers(0, 9), min_size=1, max_size=8))
def test_the_most_that_can_go(costs: dict[Unit, int]) -> None:
    most = max(
        sum(costs[unit] for unit in chosen)
        for size in range(len(costs) + 1)
        for chosen in itertools.combinations(costs, size)
        if len(set(halves(chosen))) == len(halves(chosen))
    )
    cost = {unit: float(value) for unit, value in costs.items()}
    if most == 0:
        return
    assert make_limit(Amount(most, False, "parameters"), cost, 1000.0).least == most
    with pytest.raises(BudgetError, match="cannot remove"):
        make_limit(Amount(most + 1, False, "parameters"), cost, 1000.0)


# Searches on made-up numbers


def count(number: int, units: Sequence[Unit]) -> Budget:
    return Budget((make_limit(Amount(number, False, "units"), dict.fromkeys(units, 1.0), len(units)),))


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("seed", range(4))
def test_no_search_lets_pairs_overlap(name: str, seed: int) -> None:
    units, budget = dominoes(8), count(5, dominoes(8))

    def losses(candidates: Sequence[frozenset[Unit]], keep: int | None = None, *, race: bool = True) -> list[float]:
        for removed in candidates:
            require_distinct(removed)
        return [random.Random(f"{seed} {sorted(map(str, removed))}").random() for removed in candidates]

    def run(name: str, start: frozenset[Unit]) -> list[frozenset[Unit]]:
        method = searches.get(name)
        scores = {unit: random.Random(f"{seed} {unit}").random() for unit in units}
        supply = {"units": units, "budget": budget, "losses": losses, "scores": scores}
        ends = itertools.combinations(range(17), 2)
        spans = {Span(first / 2, last / 2): random.Random(f"{seed} {first} {last}").random() for first, last in ends}
        supply |= {"start": start, "rng": random.Random(seed), "spans": spans}
        return list(method.function(**{parameter: supply[parameter] for parameter in method.parameters}))

    start = run("greedy", frozenset())[-1]
    trail = run(name, start)
    for removed in trail:
        assert is_ordinary(8, halves(removed))
        assert not any(layer.leftover for layer in re_pair(anatomy(8), plain(removed)))
    if name not in ("swap", "annealing", "evolutionary"):  # these may find nothing better than their start
        assert len(trail[-1]) == 5


@given(
    scores=st.lists(st.integers(0, 40), min_size=9, max_size=9),
    costs=st.lists(st.integers(1, 5), min_size=9, max_size=9),
)
def test_milp_is_the_best_of_all_sets(scores: list[int], costs: list[int]) -> None:
    units = dominoes(5)
    value = dict(zip(units, map(float, scores), strict=True))
    cost = dict(zip(units, map(float, costs), strict=True))
    budget = Budget((Limit("parameters", 6.0, 100.0, cost),))
    allowed = [
        math.fsum(value[unit] for unit in chosen)
        for size in range(1, 6)
        for chosen in itertools.combinations(units, size)
        if budget.met(chosen) and is_ordinary(5, halves(chosen)) and len(set(halves(chosen))) == 2 * size
    ]
    milp = searches.get("milp").function
    if not allowed:
        with pytest.raises(BudgetError):
            list(milp(scores=value, budget=budget))
        return
    [chosen] = milp(scores=value, budget=budget)
    assert is_ordinary(5, halves(chosen))
    assert math.fsum(value[unit] for unit in chosen) == pytest.approx(min(allowed), abs=1e-6)


# Searches on models


def ordinary(
    text: CalibrationSet, remove: str | int, search: str = "greedy", blocks: int = BLOCKS, **options: Any
) -> PruningPlan:
    options = {"units": "sublayer", "exact": True, **options}
    return shallower.search(subject(blocks=blocks), remove, search=search, ordinary=True, calibration=text, **options)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("units", ["sublayer", "all"])
def test_every_plan_pairs_up(text: CalibrationSet, search: str, units: str) -> None:
    quick = {"annealing": {"steps": "20"}, "evolutionary": {"generations": "4"}}
    plan = ordinary(text, 3, search, units=units, settings=quick.get(search))
    assert plan.made_by.options["ordinary"] is True
    assert is_ordinary(BLOCKS, halves(plan.remove))
    assert len(halves(plan.remove)) == 6
    layers = re_pair(subject().anatomy, plan.remove)
    assert not any(layer.leftover for layer in layers)
    assert len(layers) == BLOCKS - 3
    model = cut(subject().anatomy, plan.remove)
    assert not leftovers(model)
    assert model.config.num_hidden_layers == BLOCKS - 3
    # the halves of a pair go one after the other, so that every prefix that does not part them is ordinary
    order = [unit for unit, _ in plan.order]
    ends = [len(halves(order[:size])) % 2 == 0 for size in range(len(order) + 1)]
    assert sum(ends) == 4
    for size, whole in enumerate(ends):
        assert is_ordinary(BLOCKS, halves(order[:size])) == whole


def test_losses_in_the_plan_are_those_of_the_cut_model(text: CalibrationSet) -> None:
    plan = ordinary(text, 3, "random", seed=5)
    assert {unit.kind for unit in plan.remove} >= {"attn", "mlp"}  # else another seed shows more
    for size in (2, len(plan.order)):
        model = cut(subject().anatomy, [unit for unit, _ in plan.order[:size]])
        with torch.no_grad():
            logits = model(input_ids=text.input_ids, use_cache=False).logits[:, :-1]
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), text.input_ids[:, 1:].flatten())
        assert plan.order[size - 1][1] == pytest.approx(float(wanted), abs=1e-5)


def oracle(text: CalibrationSet, blocks: int, number: int) -> tuple[frozenset[str], float]:
    """The best of all sets of sublayers whose removal leaves an ordinary model."""
    model = anatomy(blocks)
    sublayers = [Unit(index, kind) for index in range(blocks) for kind in ("attn", "mlp")]
    allowed = [
        frozenset(removed)
        for removed in itertools.combinations(sublayers, 2 * number)
        if is_ordinary(blocks, halves(removed))
    ]
    losses = Ablator(model, text).losses(allowed)
    best = min(range(len(allowed)), key=losses.__getitem__)
    return frozenset(map(str, allowed[best])), losses[best]


@pytest.mark.parametrize(("blocks", "number"), [(4, 2), (5, 2), (5, 3)])
def test_exhaustive_finds_the_best_of_all(text: CalibrationSet, blocks: int, number: int) -> None:
    best, loss = oracle(text, blocks, number)
    plan = ordinary(text, number, "exhaustive", blocks)
    assert frozenset(halves(plan.remove)) == best
    assert plan.order[-1][1] == pytest.approx(loss, abs=1e-5)
    wide = ordinary(text, number, "beam", blocks, settings={"width": "1000"})
    assert frozenset(halves(wide.remove)) == best
    for search in ("greedy,swap", "evolutionary"):
        found = ordinary(text, number, search, blocks).order[-1][1]
        assert found is not None
        assert found >= loss - 1e-5


def test_ranking_sums_the_scores_of_both_sublayers(text: CalibrationSet) -> None:
    scored = shallower.score(subject(), "cosine", units="sublayer", calibration=text)
    value = {str(unit): score for unit, score in scored.units.items()}
    sums = {unit: sum(value[half] for half in halves([unit])) for unit in dominoes(BLOCKS)}
    chosen: list[Unit] = []
    for unit in sorted(sums, key=lambda unit: (sums[unit], -unit.index)):
        if len(chosen) < 2 and not any(unit.overlaps(other) for other in chosen):
            chosen.append(unit)
    for ranked in ({"metric": "cosine"}, {"scores": scored}):
        plan = ordinary(text, 2, "one-shot", **ranked)
        assert set(halves(plan.remove)) == set(halves(chosen))
    with pytest.raises(UserError, match="has no score; score with --units sublayer"):
        ordinary(text, 2, "one-shot", scores=shallower.score(subject(), "cosine", units="attn", calibration=text))


def test_protected_blocks_lose_neither_half(text: CalibrationSet) -> None:
    for seed in range(6):
        plan = ordinary(text, 2, "random", protect="first:1,block.3", seed=seed)
        assert not {unit.index for unit in plan.remove} & {0, 3}


# What a pair weighs


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe", "gpt2", "opt", "granite"])
def test_a_pair_weighs_what_the_model_gets_smaller(family: str) -> None:
    opened = subject(family)
    sizes = [sum(p.numel() for p in opened.model.parameters())]
    assert list(opened.pairs) == [Unit(index, "pair") for index in range(BLOCKS - 1)]
    for pair, weight in opened.pairs.items():
        smaller = cut(opened.anatomy, plain([pair]))
        assert weight.parameters == sizes[0] - sum(p.numel() for p in smaller.parameters())
        assert weight.bytes == 4 * weight.parameters
        assert weight.blocks == 1
        assert weight.kv_bytes == opened.weights.units[Unit(pair.index + 1, "attn")].kv_bytes
        assert weight.flops == sum(opened.weights.units[half].flops for half in plain([pair]))


@pytest.mark.parametrize(
    ("remove", "number"), [("33.3%", 2), ("33.4%", 3), ("33.3%:kv_bytes", 2), ("50%:flops", 3), ("2:blocks", 2)]
)
def test_budgets_count_a_pair_as_a_block(text: CalibrationSet, remove: str, number: int) -> None:
    for seed in range(4):
        plan = ordinary(text, remove, "random", seed=seed)
        assert len(halves(plan.remove)) == 2 * number


@pytest.mark.parametrize("remove", ["1.5:blocks", "20%:blocks"])
def test_of_a_budget_in_blocks_a_lone_sublayer_is_half_a_block(text: CalibrationSet, remove: str) -> None:
    for units, number in (("sublayer", 3), ("attn", 3), ("block", 2)):
        plan = shallower.search(subject(blocks=6), remove, search="random", units=units, calibration=text)
        assert len(plan.remove) == number


# Families, and what is refused


@pytest.mark.parametrize("family", ["gpt_neox", "cohere", "opt_post_norm", "olmo_hybrid"])
def test_a_family_that_does_not_pair_is_refused_up_front(
    family: str, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exact_pairs(dissect(tiny_model(family))) == ()
    monkeypatch.setattr("shallower.verbs.search.calibrate", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(ModelError, match=r"do not pair up to ordinary blocks.*use --units block"):
        shallower.search(subject(family), 2, units="sublayer", ordinary=True, calibration=text)


def test_a_plan_that_the_config_cannot_describe_is_refused(text: CalibrationSet) -> None:
    """ERNIE says which blocks are routed by a period, so not every set of pairs leaves a config."""
    with pytest.raises(ModelError, match=r"config of this ernie4_5_moe model cannot describe what is left"):
        shallower.search(
            subject("ernie4_5_moe_interval"),
            1,
            search="random",
            seed=next(seed for seed in range(99) if random.Random(seed).sample(dominoes(BLOCKS), 11)[0].kind == "pair"),
            units="sublayer",
            ordinary=True,
            calibration=text,
        )


def test_what_surgery_refuses_among_pairs_comes_with_advice(
    text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise ModelError("No.")

    monkeypatch.setattr("shallower.verbs.search.cut", refused)
    with pytest.raises(ModelError, match=r"the best that was found, without .*, cannot be cut: No\. Remove less"):
        ordinary(text, 1, "last")


def test_a_curve_leaves_out_what_would_part_a_pair(text: CalibrationSet, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat and said so. " * 20)
    plan = ordinary(text, 3, "random", seed=5)
    lengths = [count for count in range(1, len(plan.order) + 1) if _is_plan(plan, count)]
    assert len(lengths) < len(plan.order)
    asked = {"texts": str(tmp_path / "text.txt"), "tokenizer": tiny_tokenizer(), "window": 32, "max_windows": 1}
    found = ratio_curve(tiny_model("llama"), plan, **asked)  # type: ignore[arg-type]
    assert [each.removed for each in found.evaluations] == [0, *lengths]


def _is_plan(plan: PruningPlan, count: int) -> bool:
    (last, _), (following, _) = (*plan.order, (Unit(99, "block"), None))[count - 1 : count + 1]
    return (last.kind, following) != ("mlp", Unit(last.index + 1, "attn"))


@pytest.mark.parametrize(
    ("remove", "options", "complaint"),
    [
        (2, {"units": "block"}, "--ordinary needs --units sublayer or all, not block"),
        (2, {"units": "attn"}, "not attn"),
        ("block.1", {}, "--remove block.1 names the units"),
        (6, {}, "cannot remove 6 units"),
    ],
)
def test_what_is_refused(text: CalibrationSet, remove: str | int, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ordinary(text, remove, **options)


def test_a_search_that_runs_into_a_dead_end_says_so(text: CalibrationSet) -> None:
    told = []
    for seed in range(12):
        try:
            plan = ordinary(text, 5, "random", seed=seed)
        except BudgetError as error:
            told.append(str(error))
        else:
            assert len(halves(plan.remove)) == 10
    assert told
    assert "single sublayers were left between pairs" in told[0]
    assert "use --search milp" in told[0]
    assert len(halves(ordinary(text, 5, "milp").remove)) == 10


# Saving


def test_a_plan_of_pairs_becomes_a_stock_checkpoint(tmp_path: Path, text: CalibrationSet) -> None:
    plan = ordinary(text, 3, "random", seed=5)
    assert any(unit.kind == "mlp" for unit in plan.remove)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    sentences = [f"Number {n} is followed by {n + 1}." for n in range(400)]
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": " ".join(sentences[n : n + 20])}) for n in range(0, 400, 20))
    )
    words = [
        *("prune", tmp_path / "dense", "--remove", 3, "--units", "sublayer", "--ordinary", "--search", "random"),
        *("--seed", 5, "--out", tmp_path / "out", "--calibration", tmp_path / "text.jsonl", "--sequences", 4),
        *("--length", 24, "--window", 32, "--no-speed", "--device", "cpu", "--dtype", "float32", "--json"),
    ]
    assert main.run([str(word) for word in words]) == 0
    saved = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert saved["remove"] == [str(unit) for unit in plan.remove]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.config.num_hidden_layers == BLOCKS - 3
    assert not hasattr(loaded.config, "auto_map")
    dense = subject()
    with torch.no_grad(), skipping(dense.anatomy, plan.removed):
        wanted = dense.model(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        found = loaded(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_halves_of_pairs_are_scored_as_they_may_go() -> None:
    model = tiny_model("llama")
    text = sample_text(model, padded=False)
    told = {"units": "sublayer", "ordinary": True, "calibration": text, "speed": False}
    [influence] = shallower.prune(model, 1, tokenizer=tiny_tokenizer(), max_windows=1, **told).report.influence
    assert {unit.kind for unit in influence.units} == {"block", "attn", "mlp"}
