"""`--repair`: candidates that are judged behind their repair."""

from __future__ import annotations

import math
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shallower.anatomy import Anatomy, dissect
from shallower.engine import Ablator
from shallower.engine.twins import Twins
from shallower.errors import CorpusError, ModelError, TooLittleText, UnknownName, UserError
from shallower.plan import PruningPlan
from shallower.recovery import Repair
from shallower.surgery import cut
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit, parse_units
from shallower.verbs import recoveries, repaired
from shallower.verbs.prune import prune
from shallower.verbs.recovery_steps import parse_recoveries
from shallower.verbs.repaired import RepairedLosses, split
from shallower.verbs.search import search
from shallower.verbs.subject import open_subject
from test_recovery import linear_block, text_of


def test_a_search_behind_repairs_keeps_to_the_memory_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int | None] = []

    def spy(kind: type) -> None:
        make = kind.__init__  # type: ignore[misc]

        def noted(self: Any, *args: Any, **more: Any) -> None:
            given.append(more.get("memory"))
            make(self, *args, **more)

        monkeypatch.setattr(kind, "__init__", noted)

    spy(Repair)
    spy(Ablator)
    model = tiny_model("llama")
    search(model, 1, calibration=sample_text(model, sequences=8), repair="low-rank", memory="1MB")
    assert len(given) > 2 * 6  # a repair and a judge for each block
    assert set(given) == {1_000_000, 500_000}  # the dense model's streams have the other half


def test_what_a_ranking_kept_in_memory_is_gone_when_candidates_are_repaired() -> None:
    model = tiny_model("llama")
    text = sample_text(model, sequences=8)
    ablator = Ablator(dissect(model), split(text).judged, memory=1_000_000, threads=1)
    asked = {"search": "one-shot,swap", "metric": "loss", "settings": {"rounds": "1"}, "repair": "low-rank"}
    search(model, 1, calibration=text, ablator=ablator, **asked)
    assert ablator.spent.tokens > 0
    assert ablator._workers._first.states.left == 500_000  # type: ignore[attr-defined]


def test_a_search_judges_candidates_behind_their_repair() -> None:
    """Block 3 is linear and large: as it is cut its loss is worst, behind a full-rank map it costs nothing."""
    matrix = 0.6 * torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    model = linear_block(tiny_model("llama"), 3, matrix)
    text = text_of(model, 32)
    judge = RepairedLosses(open_subject(model), split(text), parse_recoveries("low-rank", {"rank": "0", "ridge": "0"}))
    dense, linear, other = judge.losses([frozenset(), parse_units("block.3"), parse_units("block.2")])
    assert linear == pytest.approx(dense, abs=1e-3)
    with closing(Ablator(dissect(model), judge.judged, "nll")) as ablator:
        assert dense == pytest.approx(ablator.losses([frozenset()])[0], abs=1e-6)
        assert abs(ablator.losses([parse_units("block.3")])[0] - dense) > 0.01
    assert abs(other - dense) > 0.001
    assert judge.fitted.sequences + judge.judged.sequences == 32
    plan = search(model, 1, calibration=text, repair="low-rank")
    assert (plan.made_by.options["repair"], len(plan.remove)) == ("low-rank", 1)
    assert plan.made_by.options["exact"]
    with pytest.raises(UserError, match="drop --objective"):
        search(model, 1, calibration=text, repair="low-rank", objective="kl")


@pytest.mark.parametrize(
    ("family", "how"), [("gemma2", "greedy"), ("gemma2", "annealing"), ("gemma2", "last,swap"), ("mixtral", "beam")]
)
def test_a_search_says_why_nothing_can_be_repaired(family: str, how: str) -> None:
    """Also one that asks about one set at a time, or after another; and so do units that are named."""
    model = tiny_model(family)
    text = sample_text(model, sequences=8)
    steps = {"steps": "2"} if how == "annealing" else {}
    reason = f"^{family} has no matrix .* use emulated-update or low-rank"
    with pytest.raises(ModelError, match=reason):
        search(model, 2, search=how, calibration=text, repair="linear-fold", settings=steps)
    with pytest.raises(ModelError, match=reason):
        search(model, "block.1", calibration=text, repair="linear-fold")


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        ("linear-fold", {}),
        ("low-rank", {"aim": "cut"}),
        ("magnitude,refit", {"reach": "rest"}),  # the first changes all that is ahead of a cut
        ("refit,low-rank", {"bias": "true"}),
        ("emulated-update", {"measured": "cut"}),
    ],
)
@pytest.mark.parametrize(("depths", "share"), [(0, 1.0), (2, 0.85), (100, 0.6)])
def test_candidates_share_what_the_dense_model_computes(
    steps: str, settings: dict[str, str], depths: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of repairs that share nothing, and less is run; with memory for none, two, or all depths."""
    model = tiny_model("llama", blocks=8)
    subject, text = open_subject(model), split(sample_text(model, sequences=20))
    twins: list[Twins] = []
    make = Twins.__init__

    def noted(self: Twins, *args: Any, **more: Any) -> None:
        twins.append(self)
        make(self, *args, **more)

    monkeypatch.setattr(Twins, "__init__", noted)
    sets = (*(f"block.{index}" for index in range(1, 8)), "block.5-6", "block.3,mlp.6", "attn.3", "block.1,attn.7")
    chosen = [frozenset(parse_units(units)) for units in sets]
    memory = 2 * depths * text.fitted.input_ids.numel() * 32 * 4
    found: list[list[float]] = []
    spent: list[int] = []
    for shares in (False, True):
        twins.clear()
        judge = RepairedLosses(subject, text, parse_recoveries(steps, settings), memory=memory)
        if not shares:
            monkeypatch.setattr(judge, "_streams", None)
        found.append(judge.losses(chosen))
        spent.append(sum(pair.tokens for pair in twins))
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert len(set(found[0])) == len(chosen)
    assert spent[1] <= share * spent[0]
    batches = len(twins[0].batches)
    assert len(judge._streams._kept) <= batches * depths


@pytest.mark.parametrize("how", ["one-shot", "milp", "contiguous", "random", "last"])
def test_a_search_that_judges_nothing_is_not_judged_behind_repairs(how: str) -> None:
    model = tiny_model("llama")
    text = sample_text(model, sequences=8)
    with pytest.raises(UserError, match=rf"^search '{how}' judges no candidates.*annealing, beam.*swap\), alone"):
        search(model, 2, search=how, calibration=text, repair="low-rank")
    plan = search(model, 2, search=f"{how},swap", calibration=text, repair="low-rank")
    assert len(plan.remove) == 2


def test_options_reach_the_repair_that_judges() -> None:
    model = tiny_model("llama")
    text = sample_text(model, sequences=8)
    plans = [
        search(model, "block.2,block.4", calibration=text, repair="emulated-update,linear-fold", settings=settings)
        for settings in ({}, {"ridge": "1"}, {"ridge": "1", "measured": "cut"})
    ]
    assert len({plan.order[-1][1] for plan in plans}) == 3
    assert plans[2].made_by.options.items() >= {"ridge": 1, "measured": "cut"}.items()
    walk = {"steps": "2", "rank": "1"}
    assert search(model, 1, search="annealing", calibration=text, repair="low-rank", settings=walk)
    with pytest.raises(
        UnknownName, match=r"option 'rnk' of search 'greedy', objective 'nll' or repair 'low-rank'; .*rank"
    ):
        search(model, 1, calibration=text, repair="low-rank", settings={"rnk": "1"})


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("", (24, 8 + 2)),
        ("?length=8", (34 - 20, 20)),
        ("?sequences=16", (12, 4)),
        ("?sequences=5&length=8", (3, 2)),
    ],
)
def test_candidates_are_judged_on_other_text_than_repairs_need(
    options: str, rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Twenty sequences of eight tokens judge, in sequences as long as a repair's; more are read for the repair."""
    monkeypatch.setattr(recoveries, "REPAIR_SEQUENCES", 24)
    monkeypatch.setattr(recoveries, "REPAIR_LENGTH", 16)
    given: list[RepairedLosses] = []
    make = RepairedLosses.__init__

    def noted(self: RepairedLosses, *args: Any, **more: Any) -> None:
        given.append(self)
        make(self, *args, **more)

    monkeypatch.setattr(RepairedLosses, "__init__", noted)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} and {n * n} are words of a text." for n in range(2000)))
    asked: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "sequences": 20, "length": 8, "repair": "emulated-update"}
    plan = search(tiny_model("llama"), 1, calibration=f"{tmp_path / 'text.txt'}{options}", **asked)
    [judge] = given
    assert (judge.fitted.sequences, judge.judged.sequences) == rows
    fitted, judged = ({tuple(row.tolist()) for row in text.input_ids} for text in (judge.fitted, judge.judged))
    assert not fitted & judged
    assert plan.made_by.calibration is not None
    assert plan.made_by.calibration.tokens == judge.fitted.tokens + judge.judged.tokens
    assert plan.spent["tokens"] == 6 * judge.fitted.tokens + 7 * judge.judged.tokens
    assert plan.spent["exhaustive"] == plan.spent["tokens"]
    few = {**asked, "sequences": 10**5}
    with pytest.raises(
        TooLittleText,
        match=r"on 100000 sequences of 16 .* judged on 50000 others: write (.*\?sequences=\d+), or use more",
    ) as told:
        search(tiny_model("llama"), 1, calibration=tmp_path / "text.txt", **few)
    advised = re.search(r"write (.*\?sequences=\d+),", str(told.value))
    assert advised is not None
    assert search(tiny_model("llama"), 1, calibration=advised[1], **few).remove
    with pytest.raises(CorpusError, match=r"typo\.txt") as refused:
        search(tiny_model("llama"), 1, calibration=tmp_path / "typo.txt", **asked)
    assert "--repair" not in str(refused.value)  # it is not too little text that is wrong
    with pytest.raises(UserError, match="in two parts is for a search with a repair"):
        search(tiny_model("llama"), 1, calibration=split(sample_text(tiny_model("llama"), sequences=8)))


def test_prune_searches_behind_the_repair_that_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As search does, on the same text; an option that the repair shares with the recovery is for both."""
    monkeypatch.setattr(recoveries, "REPAIR_SEQUENCES", 24)
    monkeypatch.setattr(recoveries, "REPAIR_LENGTH", 16)
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} and {n * n} are words of a text." for n in range(2000)))
    model, text = tiny_model("llama"), tmp_path / "text.txt"
    asked: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "calibration": text, "sequences": 20, "length": 8}
    asked |= {"repair": "low-rank", "settings": {"rank": "2", "aim": "cut"}}
    done = prune(model, 1, recover="refit", speed=False, window=16, max_windows=1, **asked)
    assert done.plan == search(model, 1, protect="first:1", **asked)  # as nothing in front could be refitted
    assert done.plan.made_by.options.items() >= {"repair": "low-rank", "rank": 2, "aim": "cut"}.items()
    assert {**done.report.recovery[1].options}["aim"] == "cut"
    plan = PruningPlan(done.plan.model, done.plan.remove, done.plan.order, None, done.plan.made_by)
    with pytest.raises(UserError, match=r"--repair low-rank would change nothing: drop it, or .*--recover low-rank"):
        prune(model, plan=plan, repair="low-rank")


@pytest.mark.parametrize(("recover_by", "warned"), [("", True), ("refit", False)])
def test_that_a_repair_only_judges_is_said_before_anything_is_loaded(
    recover_by: str, warned: bool, notes: list[str]
) -> None:
    with pytest.raises(ModelError):
        prune("nowhere", 1, repair="low-rank", recover=recover_by)
    assert ["not repaired: add --recover low-rank" in note for note in notes] == [True] * warned


def test_a_set_that_cannot_be_repaired_is_only_passed_over() -> None:
    model = tiny_model("llama")
    text = split(sample_text(model, sequences=8))
    judge = RepairedLosses(open_subject(model), text, parse_recoveries("linear-fold", {"ridge": "1"}))
    first, second = parse_units("block.0"), parse_units("block.1")
    assert judge.losses([first]) == [math.inf]  # one alone may be a step of a walk
    assert math.isfinite(judge.losses([first, second])[1])
    assert judge.losses([first, first]) == [math.inf] * 2
    third = parse_units("block.2")
    assert judge.losses([[*first, *third], [*first, *third, *second]])[0] == math.inf  # a parent and its only child
    with pytest.raises(ModelError, match=r"in front of block\.0"):
        judge.require_possible(first)
    judge.require_possible(second)


def test_a_set_without_room_for_its_repair_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    judge = RepairedLosses(open_subject(model), split(sample_text(model, sequences=8)), parse_recoveries("refit", {}))
    monkeypatch.setattr(sys.modules[cut.__module__], "cached_logits", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        judge.losses([parse_units("block.2")])


def test_a_search_behind_repairs_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    asked: list[frozenset[Unit]] = []

    def run(until: int = 100, repair: str = "low-rank", **changed: Any) -> PruningPlan:
        def noted(dense: Anatomy, removed: frozenset[Unit]) -> PreTrainedModel:
            if len(asked) == until:
                raise KeyboardInterrupt
            asked.append(removed)
            return cut(dense, removed)

        asked.clear()
        monkeypatch.setattr(repaired, "cut", noted)
        model = changed.pop("model", tiny_model("llama"))
        text = sample_text(model, sequences=changed.pop("sequences", 8))
        return search(model, 2, calibration=text, repair=repair, **changed)

    with pytest.raises(KeyboardInterrupt):
        run(until=7)
    first = list(asked)
    plan = run()
    assert len(first) == 7
    assert set(first).isdisjoint(asked)
    assert len(first) + len(asked) == 1 + 6 + 5
    assert run() == plan
    assert asked == []
    for other in (
        {"model": tiny_model("llama", seed=1)},
        {"sequences": 12},
        {"repair": "emulated-update"},
        {"dtype": "bfloat16", "model": tiny_model("llama").bfloat16()},
    ):
        run(**other)
        assert len(asked) == 1 + 6 + 5
