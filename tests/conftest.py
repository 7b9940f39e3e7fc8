"""Tests run offline, on one thread, from the same seed; only tests marked `model` see the user's cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
# Code of the folders that tests load is copied here, once for all tests: Python keeps what it imported from where.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="shallower-modules-")

import hypothesis
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests, and pytest-xdist, may have set a width."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tests marked `model` share the user's cache, so that the demo model is fetched once; no other may touch it."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path_factory.getbasetemp() / "shallower-cache"))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture
def notes() -> Iterator[list[str]]:
    """What a test's own process notes of its work (`shallower.progress`), sentence by sentence."""
    from shallower import progress

    told: list[str] = []
    with progress.listening(lambda *_: nullcontext(lambda *_: None), told.append):
        yield told


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A small model as `dense` and `pruned` checkpoints, the plan between them, and a text."""
    from shallower.anatomy import dissect
    from shallower.plan import MadeBy, PruningPlan
    from shallower.surgery import cut, save
    from shallower.testing.families import tiny_model, tiny_tokenizer
    from shallower.units import parse_units
    from shallower.verbs.subject import open_subject

    model = tiny_model("llama")
    save(model, tmp_path / "dense", plan=None, tokenizer=tiny_tokenizer())
    removed = parse_units("block.2-3")
    made = MadeBy(None, None, None, {}, 0, None, "0")
    plan = PruningPlan(open_subject(model).identity, removed, tuple((unit, None) for unit in removed), None, made)
    plan.save(tmp_path / "plan.json")
    save(cut(dissect(model), removed), tmp_path / "pruned", plan=plan, tokenizer=tiny_tokenizer())
    rows = [{"text": f"The {n} cat sat on the mat and said that {n * 7} is more than {n}. " * 24} for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


# A job started in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def start_together() -> Callable[..., list[tuple[int, str, str]]]:
    """Runs a command in two processes, with what `accelerate launch --cpu --num_processes 2` sets: for each its exit
    code, output and errors. extra: further variables.
    """

    def run(*command: str, **extra: str) -> list[tuple[int, str, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **both, "ACCELERATE_USE_CPU": "true", **extra, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        ]
        said = [process.communicate(timeout=600) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]

    return run
