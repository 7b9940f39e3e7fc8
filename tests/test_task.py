"""The objective `task` against one forward a choice; questions, their prompts, and what is said of bad ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from shallower.anatomy import dissect
from shallower.corpus import CalibrationSet, ChoiceSet, build_choices
from shallower.corpus.questions import read_questions, solved
from shallower.engine import Ablator, Racing
from shallower.engine.memo import Memo
from shallower.errors import CorpusError, UnknownName, UserError
from shallower.registry import objective
from shallower.surgery import cut
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit, parse_units
from shallower.verbs.prune import prune
from shallower.verbs.score import score
from shallower.verbs.search import search
from shallower.verbs.texts import held_out

TASKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "tasks"
SETS = ("", "block.0", "block.5", "block.1,block.2", "attn.3")
WORDS = [
    "river",
    "stone",
    "light",
    "under",
    "seven",
    "green",
    "window",
    "carries",
    "slowly",
    "between",
    "house",
    "paper",
]


def _jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def _records(count: int) -> list[dict[str, Any]]:
    """Questions with two to four choices of one to three words."""
    pick = np.random.default_rng(3)
    made = []
    for number in range(count):
        choices = [" ".join(pick.choice(WORDS, pick.integers(1, 4))) + f" {place}" for place in range(2 + number % 3)]
        asked = " ".join(pick.choice(WORDS, pick.integers(2, 7)))
        made.append({"question": f"{asked} {number}?", "choices": choices, "gold": number % len(choices)})
    return made


@pytest.fixture
def path(tmp_path: Path) -> str:
    return _jsonl(tmp_path / "questions.jsonl", _records(12))


def plain_scores(model: Any, text: ChoiceSet, normalise: str = "none") -> list[tuple[list[float], int]]:
    """For each question the scores of its choices and which is right: one forward a choice, without padding."""
    found: list[tuple[list[float], int]] = []
    answers = text.answers
    mask = torch.ones_like(text.input_ids) if text.attention_mask is None else text.attention_mask
    for row in range(text.sequences):
        ids = text.input_ids[row, : int(mask[row].sum())]
        with torch.no_grad():
            logs = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        places = [at for at in range(1, len(ids)) if answers.choice[row, at]]
        total = sum(float(logs[at - 1, ids[at]]) for at in places)
        total /= {"none": 1, "tokens": len(places), "bytes": int(answers.bytes[row])}[normalise]
        if int(answers.question[row]) == len(found):
            found.append(([], -1))
        scores, right = found[-1]
        found[-1] = ([*scores, total], len(scores) if answers.gold[row] else right)
    return found


def plain_loss(model: Any, text: ChoiceSet, of: str = "margin", normalise: str = "none") -> float:
    values = []
    for scores, right in plain_scores(model, text, normalise):
        wrong = [value for place, value in enumerate(scores) if place != right]
        values.append(max(wrong) - scores[right] if of == "margin" else float(int(np.argmax(scores)) != right))
    return float(np.mean(values))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "qwen3_next"])
def test_margins_equal_those_of_cut_models(family: str, path: str) -> None:
    anatomy = dissect(tiny_model(family))
    text = build_choices(path, tiny_tokenizer(), questions=6)
    assert text.attention_mask is not None
    candidates = [frozenset(parse_units(units)) for units in SETS]
    for candidate, loss in zip(candidates, Ablator(anatomy, text, "task").losses(candidates), strict=True):
        assert loss == pytest.approx(plain_loss(cut(anatomy, candidate), text), abs=2e-4)


@pytest.mark.parametrize("of", ["margin", "accuracy"])
@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
@pytest.mark.parametrize("order", ["depth-first", "layer-major"])
def test_every_form_and_order(of: str, normalise: str, order: Any, path: str) -> None:
    anatomy = dissect(tiny_model("llama"))
    text = build_choices(path, tiny_tokenizer(), questions=12)
    options = {"of": of, "normalise": normalise}
    ablator = Ablator(anatomy, text, "task", options, order=order)
    candidates = [frozenset({unit}) for unit in anatomy.of_kind("block")]
    for candidate, loss in zip(candidates, ablator.losses(candidates), strict=True):
        assert loss == pytest.approx(plain_loss(cut(anatomy, candidate), text, of, normalise), abs=2e-4)


def test_one_value_a_question_whatever_the_batch(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = dissect(tiny_model("llama"))
    text = build_choices(path, tiny_tokenizer(), questions=12)
    found = {}
    for tokens in (1, 300, 100_000):
        monkeypatch.setattr("shallower.engine.ablator.TOKENS_A_BATCH", {"cpu": tokens})
        ablator = Ablator(anatomy, text, "task")
        [found[tokens]] = ablator.sums([{Unit(2, "block")}])
        assert ablator.counts.tolist() == [1] * 12
    assert len(found[1]) == 12
    assert found[1] == pytest.approx(found[300], abs=1e-5)
    assert found[1] == pytest.approx(found[100_000], abs=1e-5)
    other = [4, 0, 11]
    [some] = Ablator(anatomy, text.subset(other), "task").sums([{Unit(2, "block")}])
    assert some == pytest.approx(found[1][other], abs=1e-5)


def test_batches_hold_whole_questions(path: str) -> None:
    text = build_choices(path, tiny_tokenizer(), questions=12)
    for size in (1, 5, 8, 100):
        batches = list(text.batches(size))
        seen = []
        for batch in batches:
            answers = batch.answers
            assert answers is not None
            assert answers.question[0] == 0
            assert answers.gold.sum() == answers.questions
            assert len(batch.input_ids) <= size or answers.questions == 1
            real = batch.attention_mask
            assert real is None or bool(real[:, -1].any())  # no column of nothing but padding
            assert bool(answers.choice.any(1).all())
            seen += answers.gold.tolist()
        assert seen == text.answers.gold.tolist()
    with pytest.raises(ValueError, match="not positive"):
        next(text.batches(0))


@pytest.mark.parametrize("objective", ["task", "nll"])
def test_sums_come_in_the_order_of_the_questions(path: str, objective: str) -> None:
    anatomy = dissect(tiny_model("llama"))
    text = build_choices(path, tiny_tokenizer(), questions=12)
    removed = [frozenset(parse_units("block.5"))]
    [found] = Ablator(anatomy, text, objective).sums(removed)
    alone = [Ablator(anatomy, text.subset([number]), objective).sums(removed)[0] for number in range(12)]
    assert found == pytest.approx(np.concatenate(alone), abs=1e-4)


def test_ties_overflows_and_missing_choices() -> None:
    task = objective.get("task").function
    none = -torch.inf
    scores = torch.tensor([[-1.0, -1, none], [-3, -2, -9], [torch.nan, -2, -3], [-5, -2, -2]]).double()
    ones, gold = torch.ones_like(scores), torch.tensor([0, 0, 1, 2])
    assert task(scores, ones, ones, gold).tolist()[:2] == [0, 1]
    wrong = task(scores, ones, ones, gold, of="accuracy")
    assert wrong[[0, 1, 3]].tolist() == [0, 1, 1]  # the first of equals wins
    assert wrong.isnan().tolist() == [False, False, True, False]  # a model that overflows is not right


def test_memo_knows_set_and_options(tmp_path: Path, path: str) -> None:
    anatomy = dissect(tiny_model("llama"))
    text = build_choices(path, tiny_tokenizer(), questions=6)
    other = _records(12)
    for record in other:
        record["gold"] = (record["gold"] + 1) % len(record["choices"])
    changed = build_choices(_jsonl(tmp_path / "questions.jsonl", other), tiny_tokenizer(), questions=6)
    assert torch.equal(text.input_ids, changed.input_ids)  # the same text with other answers
    memo = tmp_path / "memo.sqlite"
    first = Ablator(anatomy, text, "task", memo=Memo(memo)).losses([frozenset()])
    again = Ablator(anatomy, text, "task", memo=Memo(memo))
    assert again.losses([frozenset()]) == first
    assert again.spent.tokens == 0
    for different in (
        Ablator(anatomy, changed, "task", memo=Memo(memo)),
        Ablator(anatomy, text, "task", {"of": "accuracy"}, memo=Memo(memo)),
        Ablator(anatomy, text, "nll", memo=Memo(memo)),
    ):
        assert different.losses([frozenset()]) != first
        assert different.spent.recalled == 0


def test_races(tmp_path: Path) -> None:
    model = tiny_model("llama")
    anatomy = dissect(model)
    text = build_choices(_jsonl(tmp_path / "q.jsonl", _records(64)), tiny_tokenizer(), questions=64)
    # the dense model's own answers are right, so that questions agree on what harms
    gold = [place == int(np.argmax(scores)) for scores, _ in plain_scores(model, text) for place in range(len(scores))]
    text = replace(text, answers=replace(text.answers, gold=torch.tensor(gold)))
    candidates = [frozenset({unit}) for unit in anatomy.of_kind("block")]
    exact = Ablator(anatomy, text, "task").losses(candidates)
    fast = Ablator(anatomy, text, "task", racing=Racing())
    raced = fast.losses(candidates, keep=1)
    assert int(np.argmin(raced)) == int(np.argmin(exact))
    assert np.isinf(raced).any()
    assert fast.spent.tokens < fast.spent.exhaustive
    # right or wrong: equal answers to the first few questions prove nothing, so nobody is dropped
    options = {"of": "accuracy"}
    exact = Ablator(anatomy, text, "task", options).losses(candidates)
    assert Ablator(anatomy, text, "task", options, racing=Racing()).losses(candidates, keep=1) == exact


def test_text_objectives_read_a_set_of_questions_as_text(path: str) -> None:
    anatomy = dissect(tiny_model("llama"))
    text = build_choices(path, tiny_tokenizer(), questions=6)
    same = CalibrationSet("x", text.input_ids, text.attention_mask)
    assert Ablator(anatomy, text, "nll").dense == pytest.approx(Ablator(anatomy, same, "nll").dense, abs=1e-5)


def test_task_needs_questions(path: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(
        CorpusError, match=r"'task' reads multiple-choice questions, but random is text: calibrate on a"
    ):
        Ablator(dissect(model), sample_text(model), "task")
    with pytest.raises(CorpusError, match=r"none were given: name a \.jsonl file"):
        search(model, 1, objective="task", tokenizer=tiny_tokenizer())


def test_prompts(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"question": "Why?", "choices": ["a", "b "], "gold": 1, "answer": 1},
        {"question": "is it so", "passage": "It is.", "answer": True},
        {"goal": "open a door", "choices": ["push", "sing"], "gold": 0},
        {"ctx": "[header] How [title] Do this. he", "endings": ["[step] goes.", "x"], "gold": 0, "activity_label": "L"},
        {"context": "Once upon", "choices": ["a time", "b"], "gold": 0},
        {"sentence": "Ann met Eve as _ was late.", "choices": ["Ann", "Eve"], "gold": 0},
        {"context": "Ann ran. ", "question": "Who ran?", "choices": ["Ann", "Eve"], "gold": 0},
        {"passage": "P.", "context": "C.", "question": "Q?", "choices": ["a", "b"], "gold": 1},
        {"context": "Once upon", "question": None, "choices": ["a time", "b"], "gold": 0},
    ]
    found = [question for _, question in read_questions(Path(_jsonl(tmp_path / "q.jsonl", records)))]
    why = "Question: Why?\nAnswer:"
    assert found[0].prompts == ((why, " a"), (why, " b"))
    so = "It is.\nQuestion: is it so?\nAnswer:"
    assert (found[1].prompts, found[1].gold) == (((so, " no"), (so, " yes")), 1)
    assert found[2].prompts[0] == ("Question: open a door\nAnswer:", " push")
    assert found[3].prompts[0] == ("L: How. Do this. he", " goes.")
    assert found[4].prompts[0] == ("Once upon", " a time")
    assert found[5].prompts == (("Ann met Eve as Ann", " was late."), ("Ann met Eve as Eve", " was late."))
    assert found[6].prompts[0] == ("Ann ran.\nQuestion: Who ran?\nAnswer:", " Ann")
    assert found[7].prompts[1] == ("P.\nC.\nQuestion: Q?\nAnswer:", " b")
    assert found[8].prompts[0] == ("Once upon", " a time")
    assert solved(records[6], "here") == "Ann ran.\nQuestion: Who ran?\nAnswer: Ann"
    told = {"passage": "The sky is green.", "question": "What colour?", "answer": "green"}
    assert solved(told, "here") == "The sky is green.\nQuestion: What colour?\nAnswer: green"
    assert solved({**told, "passage": None, "context": ["x"]}, "here") == "Question: What colour?\nAnswer: green"


def test_tokens_of_choices_are_scored_and_no_others(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    records = [{"context": "The river is", "choices": ["green", "a sea"], "gold": 0}]
    path = _jsonl(tmp_path / "q.jsonl", records)
    text = build_choices(path, tokenizer, questions=1)
    scored = [tokenizer.decode(row[chosen]) for row, chosen in zip(text.input_ids, text.answers.choice, strict=True)]
    assert scored == [" green", " a sea"]
    assert text.answers.bytes.tolist() == [5, 5]
    # `an` is one token, so that a boundary within it is not one between tokens: the token is scored
    records = [{"sentence": "The pl_n is old", "choices": ["a", "o"], "gold": 0}]
    straddled = build_choices(_jsonl(tmp_path / "s.jsonl", records), tokenizer, questions=1)
    first = straddled.input_ids[0][straddled.answers.choice[0]]
    assert tokenizer.decode(first) == "an is old"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    with_bos = build_choices(path, tokenizer, questions=1)
    assert with_bos.input_ids[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert torch.equal(with_bos.answers.choice[:, 1:], text.answers.choice)


GOOD = {"question": "Q?", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "gold": 2}, r"line 2: field 'gold' is 2, but there are 2 choices: .* from 0 to 1"),
        ({**GOOD, "gold": -1}, "field 'gold' is -1"),
        ({**GOOD, "gold": "A"}, "field 'gold' is \"A\""),
        ({**GOOD, "gold": True}, "field 'gold' is true"),
        ({"question": "Q?", "choices": ["a", "b"]}, "line 2 has no field 'gold', only question, choices"),
        ({**GOOD, "choices": ["a"]}, r"field 'choices' holds \[\"a\"\]; it must be a list of at least 2"),
        ({**GOOD, "choices": {"text": []}}, "it must be a list of at least 2"),
        ({**GOOD, "choices": ["a", " "]}, "field 'choices' holds \" \", where text must stand"),
        ({"question": "Q?", "gold": 0}, "no field choices or endings, only question, gold"),
        ({"text": "T", "choices": ["a", "b"], "gold": 0}, "asks nothing: it has the fields text, choices, gold"),
        ({**GOOD, "question": None}, "field 'question' holds null"),
        ({**GOOD, "passage": None}, "field 'passage' holds null"),
        ({"sentence": "no gap", "choices": ["a", "b"], "gold": 0}, "needs a blank, _, and text after it"),
        ([1], "not a JSON object"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, message: str) -> None:
    path = _jsonl(tmp_path / "q.jsonl", [GOOD, row])
    with pytest.raises(CorpusError, match=message):
        build_choices(path, tiny_tokenizer(), questions=1)


def test_bad_files_and_options(tmp_path: Path, path: str) -> None:
    tokenizer = tiny_tokenizer()
    empty = _jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(CorpusError, match="is empty: it holds no question"):
        build_choices(empty, tokenizer)
    with pytest.raises(CorpusError, match=r"'gone\.jsonl' is no file: questions are read from one"):
        build_choices("gone.jsonl", tokenizer)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(CorpusError, match=r"is not a \.jsonl file"):
        build_choices(str(tmp_path / "notes.txt"), tokenizer)
    with pytest.raises(
        CorpusError, match=r"holds 12 questions, but questions=32 was asked for: use questions=12 \(--s"
    ):
        build_choices(path, tokenizer)
    with pytest.raises(
        CorpusError, match=r"holds 0 questions \(12 others are longer than length=9 tokens\).*greater le"
    ):
        build_choices(path, tokenizer, length=9)
    with pytest.raises(CorpusError, match="questions=0 is too small"):
        build_choices(f"{path}?questions=0", tokenizer)
    with pytest.raises(CorpusError, match="part='most' is not one of all, train, held-out"):
        build_choices(path, tokenizer, part="most")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean 'questions'"):
        build_choices(f"{path}?question=3", tokenizer)


def test_long_questions_are_left_out_and_counted(path: str, notes: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    lengths = build_choices(path, tokenizer, questions=12)
    longest = lengths.length
    notes.clear()
    fewer = build_choices(path, tokenizer, questions=11, length=longest - 1)
    assert fewer.length < longest
    assert notes == [
        f"1 of 12 questions of questions.jsonl are longer than {longest - 1} tokens and were left out; a greater "
        "length (--length) takes them in."
    ]


def test_the_same_set_again_and_saved(tmp_path: Path, path: str) -> None:
    tokenizer = tiny_tokenizer()
    text = build_choices(path, tokenizer, questions=6, seed=1)
    again = build_choices(text.spec, tokenizer)
    assert again.digest == text.digest
    assert text.spec == f"{path}?questions=6&length=128&seed=1&part=all"
    assert build_choices(path, tokenizer, questions=6).digest != text.digest
    assert text.digest != CalibrationSet("x", text.input_ids, text.attention_mask).digest
    text.save(tmp_path / "kept")
    loaded = build_choices(str(tmp_path / "kept"), tokenizer)
    assert (loaded.digest, loaded.spec, loaded.sources) == (text.digest, text.spec, text.sources)
    with pytest.raises(CorpusError, match=r"has format 'shallower\.choices/1', not 'shallower\.calibration/1'"):
        CalibrationSet.load(tmp_path / "kept")
    with pytest.raises(CorpusError, match="a finished set of questions, so seed cannot be changed"):
        build_choices(f"{tmp_path / 'kept'}?seed=2", tokenizer)


def test_parts_share_no_question(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "q.jsonl", _records(60))
    tokenizer = tiny_tokenizer()
    held_out = build_choices(path, tokenizer, questions=1, part="held-out")
    with pytest.raises(CorpusError, match="the train part of"):
        build_choices(path, tokenizer, questions=60, part="train")
    train = build_choices(path, tokenizer, questions=40, part="train")
    assert held_out.input_ids[0].tolist()[:20] not in [row[:20] for row in train.input_ids.tolist()]


def test_no_question_that_is_calibrated_on_is_held_out_text(tmp_path: Path) -> None:
    plain = _records(240)
    records = [*plain[:60], *({**row, "answer": "A"} for row in plain[60:120])]
    records += [{**row, "question": f"  {row['question']} "} for row in plain[120:180]]
    records += [{**row, "context": "Told before."} for row in plain[180:]]
    path = _jsonl(tmp_path / "q.jsonl", records)
    tokenizer = tiny_tokenizer()
    (held,) = held_out(path).values()
    with pytest.raises(CorpusError, match=r"the train part of .* holds (\d+) questions") as told:
        build_choices(path, tokenizer, questions=240, length=200, part="train")
    most = int(re.search(r"holds (\d+)", str(told.value))[1])
    train = build_choices(path, tokenizer, questions=most, length=200, part="train")
    asked = {int(re.search(r"(\d+)\?", tokenizer.decode(row))[1]) for row in train.input_ids}
    left = {int(number) for number in re.findall(r"(\d+)\?", held)}
    assert len(left) > 8
    assert not asked & left
    assert asked | left == set(range(240))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": torch.tensor([1, 1, 1, 1])}, "counted from 0"),
        ({"question": torch.tensor([0, 1, 0, 1])}, "follow each other"),
        ({"gold": torch.tensor([True, True, False, True])}, "one is right"),
        ({"question": torch.tensor([0, 0, 0, 1]), "gold": torch.tensor([True, False, False, True])}, "at least two"),
        ({"choice": torch.zeros(4, 5, dtype=torch.bool)}, "needs a token"),
        ({"bytes": torch.ones(3, dtype=torch.int64)}, "have the shapes"),
    ],
)
def test_answers_that_do_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    from shallower.corpus import Answers

    good = {
        "choice": torch.ones(4, 5, dtype=torch.bool),
        "question": torch.tensor([0, 0, 1, 1]),
        "gold": torch.tensor([True, False, False, True]),
        "bytes": torch.ones(4, dtype=torch.int64),
    }
    ids = torch.arange(3, 23).reshape(4, 5)
    ChoiceSet("x", ids, None, answers=Answers(**good))
    with pytest.raises(CorpusError, match=message):
        ChoiceSet("x", ids, None, answers=Answers(**{**good, **change}))


def test_search_score_and_prune(path: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plan = search(
        model, 2, objective="task", tokenizer=tokenizer, calibration=path, sequences=6, settings={"of": "accuracy"}
    )
    assert plan.made_by.options["of"] == "accuracy"
    assert plan.made_by.objective == "task"
    text = build_choices(path, tokenizer, questions=6, part="train")
    assert plan.made_by.calibration == text.identity
    anatomy = dissect(model)
    assert plan.dense == plain_loss(model, text, "accuracy")
    assert plan.order[-1][1] == plain_loss(cut(anatomy, plan.removed), text, "accuracy")

    given = {"normalise": "bytes"}
    arguments: dict[str, Any] = {"objective": "task", "tokenizer": tokenizer, "calibration": path, "sequences": 6}
    scored = score(model, "loss", settings=given, **arguments)
    expected = plain_loss(cut(anatomy, {Unit(3, "block")}), text, normalise="bytes") - plain_loss(
        model, text, normalise="bytes"
    )
    assert scored.units[Unit(3, "block")] == pytest.approx(expected, abs=2e-4)
    assert scored.made_by.options["normalise"] == "bytes"
    ranked = search(model, 1, search="one-shot", metric="loss", settings=given, **arguments)
    assert ranked.order[0][0] == min(scored.units, key=scored.units.__getitem__)

    # a stream metric takes such a set as text
    pruned = prune(model, 1, objective="task", tokenizer=tokenizer, calibration=text, speed=False)
    assert len(pruned.plan.remove) == 1


def test_options_that_do_not_exist(path: str) -> None:
    arguments: dict[str, Any] = {"objective": "task", "calibration": path, "tokenizer": tiny_tokenizer()}
    with pytest.raises(UnknownName, match=r"option 'off' of search 'greedy' or objective 'task'; did you mean 'of'"):
        search(tiny_model("llama"), 1, settings={"off": "accuracy"}, **arguments)
    with pytest.raises(
        UnknownName, match=r"option 'normalize' of metric 'loss' or objective 'task'; did you mean 'normalise'"
    ):
        score(tiny_model("llama"), "loss", settings={"normalize": "bytes"}, **arguments)
    with pytest.raises(UserError, match="option of='margins' does not fit: it takes margin or accuracy"):
        search(tiny_model("llama"), 1, settings={"of": "margins"}, **arguments)


@pytest.mark.skipif(not TASKS.exists(), reason="no ../shared")
@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("arc_challenge", (3, 5)),
        ("arc_easy", (3, 5)),
        ("boolq", (2, 2)),
        ("hellaswag", (4, 4)),
        ("mmlu", (4, 4)),
        ("openbookqa", (4, 4)),
        ("piqa", (2, 2)),
        ("winogrande", (2, 2)),
    ],
)
def test_real_files(name: str, choices: tuple[int, int]) -> None:
    path = TASKS / name / "validation.jsonl"
    questions = [question for _, question in read_questions(path)]
    assert {len(question.prompts) for question in questions} <= set(range(choices[0], choices[1] + 1))
    assert not any("[header]" in text for question in questions for prompt in question.prompts for text in prompt)
    text = build_choices(str(path), tiny_tokenizer(), questions=4, length=4096)
    assert text.questions == 4
