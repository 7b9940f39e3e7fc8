"""Ray workers against threads and the naive way, lost workers, and what is said of memory and workers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from transformers import AutoModelForCausalLM

from shallower import progress, registry
from shallower.anatomy import dissect
from shallower.checkpoint import load
from shallower.checkpoint import own_code as own_codes
from shallower.checkpoint.determinants import beside_weights
from shallower.checkpoint.fingerprint import checksum
from shallower.cli import main
from shallower.corpus import CalibrationSet
from shallower.engine import Ablator, ray_workers, workers
from shallower.engine.evaluator import Evaluator, Job, Measured
from shallower.engine.memo import Memo
from shallower.engine.ray_session import connect
from shallower.engine.ray_workers import Checkpoint, RayWorkers
from shallower.engine.states import States
from shallower.errors import ModelError, ModelTooLarge, UserError
from shallower.resources import cluster, parse_memory, parse_workers
from shallower.testing.conformance import sample_text
from shallower.testing.families import tiny_model, tiny_tokenizer
from shallower.units import Unit
from shallower.verbs.measuring import make_ablator
from shallower.verbs.subject import open_subject
from shallower.version import __version__


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for all tests: what asks for workers uses it."""
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    session = connect(2, torch.device("cpu"))
    assert signal.getsignal(signal.SIGTERM) is before
    yield session.ray
    session.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a text."""
    folder = tmp_path_factory.mktemp("workers")
    tiny_model("llama").save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    sentences = [f"Number {n} is followed by {n + 1}, and {n} times {n} is {n * n}." for n in range(200)]
    (folder / "text.txt").write_text("\n\n".join(" ".join(sentences[at : at + 20]) for at in range(0, 200, 20)))
    return folder


def long_text(batches: int = 6) -> CalibrationSet:
    """Each sequence is a batch of its own."""
    ids = torch.randint(3, 120, (batches, 300), generator=torch.Generator().manual_seed(1))
    return CalibrationSet("x", ids, None, ())


def all_ready(crew: RayWorkers) -> list[int]:
    """Their processes, once all have their model: the first that is ready may have measured everything by then."""
    until = time.monotonic() + 120
    while True:
        ready = [place.actor for place in crew._places if place.ready]
        if len(ready) == crew.count:
            return [crew._session.ray.get(actor.__ray_call__.remote(lambda worker: os.getpid())) for actor in ready]
        assert time.monotonic() < until
        time.sleep(0.05)
        list(crew.run([Job(0, ("......",))], lambda: None))


@pytest.mark.parametrize("objective", ["nll", "kl"])
def test_ray_threads_and_one_by_one_give_the_same_bits(ray: Any, folder: Path, objective: str) -> None:
    model = tiny_model("llama")
    anatomy, text = dissect(model), long_text()
    first = [frozenset({unit}) for unit in anatomy.units]
    second = [removed | {Unit(3, "block")} for removed in first if all(unit.index != 3 for unit in removed)]
    few = [frozenset(anatomy.of_kind("attn")[:3]), frozenset(anatomy.of_kind("mlp")[:3])]
    naive = [Ablator(anatomy, text, objective, memory=0).losses([removed])[0] for removed in first + second + few]
    with_threads = Ablator(anatomy, text, objective, threads=2)
    assert with_threads.losses(first) + with_threads.losses(second) + with_threads.losses(few) == naive

    checkpoint = Checkpoint(
        str(folder / "tiny"), "tiny", None, checksum(model), beside_weights(model), "float32", False
    )
    crews = []
    reads = objective == "nll"  # the one's workers read the checkpoint, the other's are sent the model

    def crew(evaluator: Evaluator) -> RayWorkers:
        crews.append(RayWorkers(evaluator, 2, memory=1 << 20, checkpoint=checkpoint if reads else None))
        return crews[0]

    with closing(Ablator(anatomy, text, objective, workers=crew)) as ablator:
        assert ablator.losses(first) == naive[: len(first)]
        before = all_ready(crews[0])
        doomed = before[1:]
        with killing(doomed) as ticks:  # at the first result of many
            assert ablator.losses(second) == naive[len(first) : -len(few)]
        assert sum(ticks) == len(second) * len(text.input_ids)
        assert ablator.losses(few) == naive[-len(few) :]
        after = all_ready(crews[0])
        assert after[0] == before[0]
        assert not set(doomed) & set(after)
        assert ("_model" in vars(crews[0])) != reads  # nor was the one sent it that came in another's place
        assert ablator.spent.tokens == with_threads.spent.tokens


def test_an_objective_that_only_this_process_knows_comes_along(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(target_logits: torch.Tensor, log_normalizer: torch.Tensor) -> torch.Tensor:
        return 2 * (log_normalizer - target_logits)

    monkeypatch.setattr(registry.objective, "_methods", {method.name: method for method in registry.objective})
    registry.objective("a-double")(doubled)
    anatomy, text, memo = dissect(tiny_model("llama")), long_text(1), Memo(tmp_path / "memo.sqlite")
    with closing(Ablator(anatomy, text, "a-double", memo=memo, workers=lambda own: RayWorkers(own, 1))) as far:
        far.losses([frozenset()])
    for name in ("a-double", "nll"):
        recalling = Ablator(anatomy, text, name, memo=memo)
        assert recalling.losses([frozenset()]) == Ablator(anatomy, text, name).losses([frozenset()])
        assert recalling.spent.recalled == 1


@pytest.mark.parametrize("far", [False, True], ids=["threads", "ray"])
def test_a_question_that_was_left_does_not_disturb_the_next(
    far: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Results and errors of work that was under way belong to nobody."""
    ray = request.getfixturevalue("ray") if far else None
    flag = tmp_path / "fails"

    def failing(target_logits: torch.Tensor, log_normalizer: torch.Tensor) -> torch.Tensor:
        if flag.exists():
            raise UserError("not now")
        return log_normalizer - target_logits

    method = registry.Method("objective", "failing", failing, "", {})
    evaluator = Evaluator(
        dissect(tiny_model("llama")), list(long_text(4).batches(1)), method, {}, states=States(0), memory=0
    )
    first, second = ([Job(number, routes) for number in range(4)] for routes in (("x.....",), (".x....", "...x..")))
    expected = {job.number: evaluator.measure(job).sums for job in second}

    def interrupted() -> None:
        raise KeyboardInterrupt

    with closing(RayWorkers(evaluator, 2) if far else workers.Threads(evaluator, 2)) as crew:

        def require_undisturbed() -> None:
            found = {done.job.number: done.sums for done in crew.run(second, lambda: None)}
            assert found.keys() == expected.keys()
            for number, sums in found.items():
                assert sums.keys() == expected[number].keys()
                assert all((sums[route] == expected[number][route]).all() for route in sums)

        require_undisturbed()
        if isinstance(crew, RayWorkers):
            all_ready(crew)
        with pytest.raises(KeyboardInterrupt):
            list(crew.run(first, interrupted))
        require_undisturbed()
        left: Any = crew.run(first, lambda: None)
        next(left)
        left.close()
        require_undisturbed()
        flag.touch()
        with pytest.raises(UserError, match="not now"):
            list(crew.run(first, lambda: None))
        if isinstance(crew, RayWorkers):
            pending = [place.waiting for place in crew._places if place.waiting is not None]
            assert pending
            assert ray is not None
            ray.wait(pending, num_returns=len(pending), timeout=60)
        flag.unlink()
        require_undisturbed()


class _Forgetful:
    """Workers of another version, which measure fewer objectives."""

    count = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def run(self, jobs: Sequence[Job], tick: Callable[[], None]) -> Iterator[Measured]:
        for done in map(self._evaluator.measure, jobs):
            yield replace(done, sums={route: sums[:-1] for route, sums in done.sums.items()})

    def close(self) -> None: ...


def test_results_that_do_not_match_what_was_asked_are_not_remembered(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "memo.sqlite")
    far = Ablator(dissect(tiny_model("llama")), long_text(1), "kl", memo=memo, workers=_Forgetful)
    with pytest.raises(UserError, match=r"another shape \(rows: 1, asked for: 2\); install the same version"):
        far.losses([frozenset()])


@contextmanager
def killing(victims: list[int]) -> Iterator[list[int]]:
    """Inside the `with`, the first step of progress kills processes; yields all steps."""
    ticks: list[int] = []

    def step(count: int = 1) -> None:
        ticks.append(count)
        if sum(ticks) == 1:
            for victim in victims:
                os.kill(victim, signal.SIGKILL)

    @contextmanager
    def listener(description: str, total: int | None) -> Iterator[progress.Step]:
        yield step

    with progress.listening(listener):
        yield ticks


def test_workers_that_die_again_and_again_are_an_error(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fatal(hidden: torch.Tensor) -> torch.Tensor:
        os._exit(1)

    monkeypatch.setattr(ray_workers, "MOST_DEATHS", 1)
    method = registry.Method("objective", "fatal", fatal, "", {})
    anatomy = dissect(tiny_model("llama"))
    batches = list(long_text(1).batches(1))
    evaluator = Evaluator(anatomy, batches, method, {}, states=States(0), memory=0)
    with closing(RayWorkers(evaluator, 1)) as crew:
        for _ in range(2):  # who asks again gets new workers
            with pytest.raises(UserError, match="every worker died 1 times in a row"):
                list(crew.run([Job(0, ("......",))], lambda: None))


@pytest.mark.parametrize("name", ["OutOfMemoryError", "NodeDiedError", "ObjectLostError", "RayActorError"])
def test_a_worker_lost_in_whatever_way_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("ray").exceptions
    lost = getattr(exceptions, name)
    error = lost("00", None, "") if name == "ObjectLostError" else lost("00")

    def get(reference: str) -> bool:
        if reference == "dead":
            raise error
        raise exceptions.RayTaskError("measure", "traceback", UserError("no such unit"))

    started = []
    monkeypatch.setattr(RayWorkers, "_start", lambda self, place: started.append(place))
    evaluator = Evaluator(
        dissect(tiny_model("llama")), [], registry.objective.get("nll"), {}, states=States(0), memory=0
    )
    crew = RayWorkers(evaluator, 1)
    crew.__dict__["_session"] = SimpleNamespace(ray=SimpleNamespace(exceptions=exceptions, get=get))
    place = ray_workers._Place(actor="actor", waiting="dead", ready=True, job=Job(0, ("......",)))
    assert crew._receive(place) is None
    assert started == [place]
    assert [job.number for job in place.queue] == [0]
    asked = []
    monkeypatch.setattr(RayWorkers, "_prepare", lambda self, place: asked.append(place))
    for place.ready in (True, False):
        place.waiting, place.job = "raised", Job(0, ("......",)) if place.ready else None
        with pytest.raises(UserError, match="no such unit"):  # what the worker raised is not a loss
            crew._receive(place)
    assert asked == [place], "one that had no room for the model is asked again"


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("groups", "names", "limits", "free"),
    [
        ("0::/", V2, {"": (1000, 900, 300)}, 400),
        ("0::/", V2, {"": (1000, 900, 0)}, 100),
        ("0::/", V2, {"": ("max", 900, 300)}, 5000),
        ("0::/", V2, {}, 5000),
        ("1:cpu:/\n0::/job/step", V2, {"job": (1000, 900, 0), "job/step": ("max", 900, 0), "other": (9, 9, 0)}, 100),
        ("0::/job/step", V2, {"job": (2000, 900, 0), "job/step": (1000, 900, 50)}, 150),
        ("4:cpu,memory:/job", V1, {"memory/job": (1000, 900, 300), "memory": (1 << 63, 2000, 0)}, 400),
        ("4:memory:/docker/of/the/host", V1, {"memory": (1000, 900, 0)}, 100),
    ],
)
def test_what_limits_leave_is_free_and_so_are_files_that_were_read(
    groups: str,
    names: tuple[str, str, str],
    limits: dict[str, tuple[int | str, int, int]],
    free: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for group, (limit, used, files) in limits.items():
        folder = tmp_path / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 500\n{names[2]} {files}\n")
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(workers, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(workers, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(workers, "_available", lambda: 5000)
    assert workers.free_memory(torch.device("cpu")) == free


def test_what_torch_holds_unused_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("mem_get_info", (100, 1000)), ("memory_reserved", 700), ("memory_allocated", 400)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert workers.free_memory(torch.device("cuda:1")) == 400


def test_the_fullest_device_bounds_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 5000, "meta": 300}
    monkeypatch.setattr(workers, "free_memory", lambda device: free[device.type])
    spread = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    assert workers.free_beside(spread) == 300
    assert workers.free_beside(spread[0]) == 5000
    meta = torch.device("meta")
    assert [workers.place_for(needed, meta).type for needed in (300, 301)] == ["meta", "cpu"]


def test_each_worker_has_its_share_of_the_memory_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0, "CPU": 8.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": {"GPU": 2.0, "CPU": 8.0}, "Alive": True}])
    monkeypatch.setattr(ray, "init", lambda **how: None)
    monkeypatch.setattr(workers, "free_beside", lambda model: 4000)
    model = tiny_model("llama")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for asked, device, told, free in (
        (1, cuda, 1000, 1000),
        (2, cuda, 500, 1000),
        (3, cuda, 333, 500),  # two on the first GPU
        ("auto", cuda, 500, 1000),
        (2, cpu, 500, 500),
        ("auto:4", cpu, 250, 250),
    ):
        session = connect(asked, device)
        of_one = partial(
            ray_workers.Setup,
            batches=[],
            objective=registry.objective.get("nll"),
            options={},
            order=None,
            device=device.type,
            threads=1,
            neighbours=session.neighbours,
            sharing=session.sharing,
        )
        assert of_one(memory=1000).memory_of_one(model) == told
        assert of_one(memory=None).memory_of_one(model) == free
        together = session.placement.get("num_gpus", 1.0) * session.sharing
        assert together == 1.0 or device == cpu
    with pytest.raises(UserError, match=r"--device cuda:1 with --workers 1: Ray decides which GPU .*_DEVICES=1\)"):
        connect(1, torch.device("cuda:1"))


def test_jobs_go_to_the_home_of_their_batch() -> None:
    anatomy = dissect(tiny_model("llama"))
    evaluator = Evaluator(anatomy, [], registry.objective.get("nll"), {}, states=States(0), memory=0)

    def assigned(jobs: list[Job], workers: int) -> list[list[int]]:
        crew = RayWorkers(evaluator, workers)
        crew._places = [ray_workers._Place() for _ in range(workers)]
        crew._assign(jobs)
        return [[job.number for job in place.queue] for place in crew._places]

    routes = tuple("." * at + "x" + "." * (5 - at) for at in range(6))
    assert assigned([Job(number, routes) for number in (1, 2, 3, 4, 5)], 2) == [[2, 4], [1, 3, 5]]
    assert assigned([Job(0, routes), Job(1, routes)], 4) == [[0], [1], [0], [1]]
    assert assigned([Job(6, routes)], 4) == [[6], [6], [6], [6]]


def test_the_command_line_gives_the_same_plan_with_ray(
    ray: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> Any:
        monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path / "-".join(["cache", *more])))  # else nothing is measured
        asked = ["search", str(folder / "tiny"), "--remove", "2", "--calibration", str(folder / "text.txt"), "--exact"]
        asked += ["--sequences", "8", "--length", "64", "--device", "cpu", "--dtype", "float32", "--json"]
        capsys.readouterr()
        assert main.run([*asked, *more]) == 0
        return json.loads(capsys.readouterr().out)

    assert run("--workers", "1", "--memory", "64MB") == run() == run("--memory", "0")


def test_score_and_prune_take_both_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["score"], ["prune", "--remove", "2", "--out", "out"], ["search", "--remove", "2"]):
        for option, value, told in (
            ("--memory", "much", "--memory 'much' cannot be read: write bytes, as in 4GB, 500MB or 4GiB."),
            ("--workers", "0", "--workers '0' cannot be read: write how many"),
        ):
            assert main.run([*verb, str(folder / "tiny"), option, value]) == 2
            assert capsys.readouterr().err.startswith(f"shallower: {told}")


def test_a_plan_leaves_nothing_for_workers_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["prune", str(folder / "tiny"), "--plan", "p.json", "--out", "out", "--workers", "2"]) == 2
    assert "so --workers would change nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("500 mb", 500_000_000),
        ("4GiB", 4 << 30),
        ("1.5k", 1500),
        ("12b", 12),
        ("0", 0),
        (" 1234 ", 1234),
        (77, 77),
        (None, None),
    ],
)
def test_memory(text: str | int | None, expected: int | None) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", -1, "4 GB more", "1e9", "4PB", "4iB", "nan", "a quarter"])
def test_memory_that_cannot_be_read(text: str | int) -> None:
    with pytest.raises(UserError, match=r"cannot be read: write bytes, as in 4GB"):
        parse_memory(text)


def test_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for given, expected in (
        ("4", 4),
        (3, 3),
        (None, None),
        ("auto", "auto"),
        ("auto:4", "auto:4"),
        (" auto:04 ", "auto:04"),
        ("head:6379", "head:6379"),
        ("ray://head:10001", "ray://head:10001"),
    ):
        assert parse_workers(given) == expected
    for wrong in ("0", -1, "four", "http://head:80", "head", "1.5", "", "auto:", "auto:0", "auto:-1", "auto:x"):
        with pytest.raises(UserError, match=r"cannot be read: write how many .* auto:4 \(at most 4 workers there\)"):
            parse_workers(wrong)
    assert [cluster(asked) for asked in ("auto", "auto:4", "auto:04", "head:6379", "ray://head:10001")] == [
        ("auto", None),
        ("auto", 4),
        ("auto", 4),
        ("head:6379", None),
        ("ray://head:10001", None),
    ]


def test_a_running_cluster_is_used_as_far_as_it_may(ray: Any) -> None:
    cpu = torch.device("cpu")
    for asked, count in (("auto", 2), ("auto:1", 1), ("auto:2", 2), ("auto:9", 2)):
        session = connect(asked, cpu)
        assert (session.count, session.neighbours, session.threads, session.ours) == (count, count, 1, False)
        assert session.placement == {"num_cpus": 1.0}
        session.close()
        assert ray.is_initialized()
    with pytest.raises(UserError, match=r"--workers auto:2: the Ray cluster has no GPU; choose another --device"):
        connect("auto:2", torch.device("cuda"))


def test_without_ray_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main.run(["search", "no/such/model", "--remove", "2", "--workers", "2"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--workers needs Ray, which is not installed: pip install 'shallower[ray]'" in line
    assert parse_workers(None) is None


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    asked: list[dict[str, Any]] = []

    def init(**how: Any) -> None:
        asked.append(how)
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    evaluator = partial(Evaluator, batches=[], objective=registry.objective.get("nll"), options={})
    for given in ("auto", "auto:4"):
        crew = RayWorkers(evaluator(dissect(tiny_model("llama")), states=States(0), memory=0), given)
        told = rf"{given}: Ray cannot be reached \(Could not find any running Ray instance\)\. Start"
        with pytest.raises(UserError, match=told):
            _ = crew.count
        assert asked.pop()["address"] == "auto"
        crew.close()


def test_a_worker_with_other_code_is_refused(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(
        dissect(tiny_model("llama", blocks=2)),
        list(long_text(1).batches(1)),
        registry.objective.get("nll"),
        {},
        states=States(0),
        memory=0,
    )
    monkeypatch.setattr(ray_workers, "__version__", "0.0")
    with closing(RayWorkers(evaluator, 1)) as crew:
        for _ in range(2):
            with pytest.raises(UserError, match=rf"other code than this process \(shallower {__version__}\): install"):
                list(crew.run([Job(0, ("..",))], lambda: None))


@pytest.mark.parametrize("edited", ["mine", "helper"])
def test_a_worker_with_another_file_of_an_objective_is_refused(
    edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "its_helper.py").write_text("FACTOR = 1.0\n")
    (tmp_path / "its_mine.py").write_text(
        "from its_helper import FACTOR\n\n\ndef mine(target_logits, log_normalizer):\n"
        "    return FACTOR * (log_normalizer - target_logits)\n"
    )
    own = importlib.import_module("its_mine").mine
    method = registry.Method("objective", "mine", own, "", {}, code=registry.source_of(own))
    model, batches = tiny_model("llama", blocks=2), list(long_text(1).batches(1))
    crew = RayWorkers(Evaluator(dissect(model), batches, method, {}, states=States(0), memory=0), 1)
    expected = crew._expected()
    setup = ray_workers.Setup(batches, method, {}, None, "cpu", torch.get_num_threads(), 0, 1, 1)
    assert set(ray_workers.Worker().prepare(setup, model) or ()) == set(expected)
    file = tmp_path / f"its_{edited}.py"
    file.write_text(file.read_text().replace("1.0", "2.0").replace("FACTOR * ", "2 * FACTOR * "))
    monkeypatch.setattr(own_codes, "_contents", WeakKeyDictionary())  # as another process has read none
    [other] = {*(ray_workers.Worker().prepare(setup, model) or ())} - {*expected}
    assert other.startswith("mine ")


@pytest.mark.parametrize("how", ["autocast", "hook on all modules"])
def test_what_holds_in_this_process_alone_is_refused_with_workers(how: str) -> None:
    subject = open_subject(tiny_model("llama", blocks=2))
    text = sample_text(subject.model)
    with ExitStack() as stack:
        if how == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        else:
            hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
            stack.callback(hook.remove)
        with pytest.raises(ModelError, match=r"holds in this process alone, and workers \(--workers 2\)"):
            make_ablator(subject, text, "nll", workers=2)
    subject.model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)  # goes with the model
    make_ablator(subject, text, "nll", workers=2).close()


def test_products_are_as_exact_in_workers_as_here(ray: Any) -> None:
    anatomy, text = dissect(tiny_model("llama", blocks=2)), long_text(1)
    before = torch.get_float32_matmul_precision()
    seen: list[Any] = []
    try:
        torch.set_float32_matmul_precision("medium")

        def told(hidden: torch.Tensor) -> torch.Tensor:
            return torch.full(hidden.shape[:1], float(torch.get_float32_matmul_precision() == "medium"))

        method = registry.Method("objective", "told", told, "", {})
        evaluator = Evaluator(anatomy, list(text.batches(1)), method, {}, states=States(0), memory=0)
        with closing(RayWorkers(evaluator, 1)) as crew:
            [done] = crew.run([Job(0, ("..",))], lambda: None)
            seen.append(done.sums[".."].sum())
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [text.length - 1]


def test_a_checkpoint_of_another_model_is_not_taken(folder: Path) -> None:
    model = tiny_model("llama")
    mine = Checkpoint(str(folder / "tiny"), "tiny", None, checksum(model), beside_weights(model), "float32", False)
    assert mine.load("cpu") is not None
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    model.config.rms_norm_eps *= 2  # read by a forward, in some families
    others = (
        replace(mine, config=beside_weights(eager)),
        replace(mine, checksum="sha256:0"),
        replace(mine, folder=str(folder / "gone")),
        replace(mine, config=beside_weights(model)),
    )
    assert [other.load("cpu") for other in others] == [None] * 4


@pytest.mark.parametrize(
    ("device", "holds"), [("cpu", ": give fewer"), ("cuda", ", and the first GPU also holds that of")]
)
def test_a_checkpoint_that_does_not_fit_is_not_sent_instead(
    device: str, holds: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load, "parse_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_room)
    mine = Checkpoint(str(folder / "tiny"), "tiny", None, "sha256:0", "", "float32", False)
    with pytest.raises(ModelTooLarge, match=rf"do not fit into memory.* Each worker holds a copy{holds}"):
        mine.load(device)
