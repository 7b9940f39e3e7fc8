"""Cleaning on disk with datatrove, beside the same in memory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from shallower.cli import main
from shallower.corpus import open_source
from shallower.errors import CorpusError, OutputError, UnknownName
from shallower.verbs.corpus import clean, clean_on_disk

installed = pytest.mark.skipif(not (find_spec("datatrove") and find_spec("datasketch")), reason="needs both packages")
WORDS = [f"{one}{two}" for one in ("stone", "river", "cloud", "paper", "light") for two in "abcdefghijklmnop"]
PROSE = "It was said that the house by the river had been built for a man who was not of this town. "


def _corpus(path: Path, seed: int = 0) -> str:
    """Documents that differ, near ones (a word of 80 changed), copies in capitals, short ones, and one of none."""
    pick = random.Random(seed)
    texts = ["A date line.", "a DATE line", "A date line of more", "???", "???", "  "]
    for number in range(24):
        words = [pick.choice(WORDS) for _ in range(80)]
        texts.append(" ".join(words))
        if number % 2:
            words[pick.randrange(80)] = "changed"
            texts.append(" ".join(words) + " it was the end of it" * (number % 4 == 1))
        if number % 3 == 0:
            texts.append(" ".join(words).upper() + "!")
    texts.append(
        PROSE * 3 + "He left it to his children, and they were not in the town at that time, but it had a garden."
    )
    pick.shuffle(texts)
    rows = [{"id": f"d{number}", "text": text, "more": [number]} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@installed
@pytest.mark.parametrize(("min_quality", "threshold"), [(0.0, 0.8), (0.01, 0.8), (0.0, 1.0), (0.0, 0.3)])
def test_what_stays_is_what_stays_in_memory(tmp_path: Path, min_quality: float, threshold: float) -> None:
    text = _corpus(tmp_path / "a.jsonl")
    given = {"dedup": threshold, "min_quality": min_quality}
    wanted = clean(text, tmp_path / "memory.jsonl", **given)
    found = clean_on_disk(text, tmp_path / "work", tmp_path / "disk.jsonl", **given)
    assert found.to_json() == wanted.cleaning.to_json()
    assert (tmp_path / "disk.jsonl").read_bytes() == (tmp_path / "memory.jsonl").read_bytes()
    assert 0 < found.kept < found.documents - found.blank
    assert found.exact_duplicates >= 8


@installed
def test_documents_are_shared_among_processes_and_put_together_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed in range(2):
        _corpus(folder / f"{seed}.jsonl", seed)
    out, memory = tmp_path / "disk.jsonl", tmp_path / "memory.jsonl"
    command = ["corpus", "clean", str(folder), "--datatrove", str(tmp_path / "work"), "--workers", "2", "--quiet"]
    assert main.run([*command, "--out", str(out)]) == 0
    clean(folder, memory)
    assert out.read_bytes() == memory.read_bytes()
    assert sorted(path.name for path in (tmp_path / "work" / "kept").iterdir()) == ["00000.jsonl", "00001.jsonl"]


@installed
def test_more_tasks_than_documents(tmp_path: Path) -> None:
    from shallower.corpus.datatrove import Work

    text = tmp_path / "a.jsonl"
    text.write_text(json.dumps({"text": PROSE}) + "\n" + json.dumps({"text": PROSE.upper()}) + "\n")
    work = Work(str(text), open_source(str(text)), tmp_path / "work", dedup=0.8, tasks=3)
    work.run()
    assert [json.loads(line) for line in work.lines()] == [{"text": PROSE}]


@installed
def test_pairs_that_share_a_band_by_chance_stay(tmp_path: Path) -> None:
    """At 0.8 a pair of similarity 0.6 shares one of 25 bands of 5 with probability 0.87: the sets decide."""
    pick = random.Random(0)
    rows = []
    for _ in range(20):
        words = [pick.choice(WORDS) for _ in range(80)]
        rows += [" ".join(words), " ".join([*words[:60], *(pick.choice(WORDS) for _ in range(20))])]
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    assert clean_on_disk(text, tmp_path / "work").kept == 40
    pairs = sum(path.stat().st_size for path in (tmp_path / "work" / "pairs").glob("*.dups"))
    assert pairs, "candidates there are"


@installed
def test_work_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shallower.corpus import datatrove

    text, work, out = _corpus(tmp_path / "a.jsonl"), tmp_path / "work", tmp_path / "out.jsonl"
    real = datatrove._Verify._connecting
    with monkeypatch.context() as patch:
        patch.setattr(datatrove._Verify, "_connecting", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            clean_on_disk(text, work, out)
    assert datatrove._Verify._connecting is real
    assert not out.exists()
    done = {name: time for name, time in _files(work).items() if name.startswith(("signatures", "pairs", "notes"))}
    assert done
    clean_on_disk(text, work, out, workers=1)
    assert done.items() <= _files(work).items(), "what was done is not done again"
    clean(text, tmp_path / "memory.jsonl")
    assert out.read_bytes() == (tmp_path / "memory.jsonl").read_bytes()
    everything = _files(work)
    assert clean_on_disk(text, work, out, workers=7).kept == len(out.read_text().splitlines())
    assert _files(work) == everything


AT_WORK = """
import os, sys, time
from pathlib import Path
from shallower.corpus.processes import processes

def write(number):
    path = Path(sys.argv[1]) / f"{number}.pid"
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)
    time.sleep(300)

if __name__ == "__main__":
    with processes(2, Path(sys.argv[1])) as each:
        list(each(write, [0, 1]))
"""


@installed
def test_processes_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    from shallower.corpus.processes import processes

    script, work = tmp_path / "at_work.py", tmp_path / "work"
    script.write_text(AT_WORK)
    work.mkdir()
    command = subprocess.Popen([sys.executable, str(script), str(work)])
    places = [work / "0.pid", work / "1.pid"]
    workers: list[int] = []
    try:
        _wait(lambda: all(place.exists() for place in places), 60)
        workers += [int(place.read_text()) for place in places]
        os.kill(workers[0], signal.SIGSTOP)
        command.kill()
        command.wait()
        _wait(lambda: not _runs(workers[1]), 10)
        with pytest.raises(CorpusError, match=r"another command works in .*work: wait"), processes(1, work):
            pass  # the process that was stopped could write yet
        os.kill(workers[0], signal.SIGCONT)
        _wait(lambda: not _runs(workers[0]), 10)
        with processes(1, work):
            pass
    finally:
        command.kill()
        command.wait()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def _wait(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(process: int) -> bool:
    """Whether it is there, and not only its number, which its next parent has not asked for yet."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(shown.strip()) and not shown.startswith("Z")


@installed
def test_a_folder_is_for_one_command_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from shallower.corpus.processes import processes

    text, work = _corpus(tmp_path / "a.jsonl"), tmp_path / "work"
    work.mkdir()
    command = ["corpus", "clean", text, "--datatrove", str(work), "--quiet"]
    assert main.run(command) == 0
    with processes(1, work):
        assert main.run(command) == 2
    assert f"another command works in {work}: wait until it has ended" in capsys.readouterr().err
    assert main.run(command) == 0


@installed
def test_a_folder_is_for_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, work = _corpus(tmp_path / "a.jsonl"), tmp_path / "work"
    clean_on_disk(text, work)
    with pytest.raises(CorpusError, match=r"with dedup=0\.8 and not 0\.9: name another folder"):
        clean_on_disk(text, work, dedup=0.9)
    os.utime(text, (0, 0))
    with pytest.raises(CorpusError, match=r"a\.jsonl has changed since the work in .* began"):
        clean_on_disk(text, work)
    with pytest.raises(OutputError, match="holds other files"):
        clean_on_disk(text, tmp_path)
    with pytest.raises(OutputError, match=r"cannot work in .*: Not a directory"):
        clean_on_disk(text, text)
    with pytest.raises(UnknownName, match="did you mean 'rules'"):
        clean_on_disk(text, tmp_path / "new", quality="rule")
    with pytest.raises(CorpusError, match=r"dedup=0 is not above 0"):
        clean_on_disk(text, tmp_path / "new", dedup=0)
    with pytest.raises(CorpusError, match="workers=0 is not"):
        clean_on_disk(text, tmp_path / "new", workers=0)
    with pytest.raises(CorpusError, match=r"no document of a\.jsonl stays"):
        clean_on_disk(text, tmp_path / "new", min_quality=1.0)
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": "one"}\n[]\n')
    assert main.run(["corpus", "clean", str(broken), "--datatrove", str(tmp_path / "b"), "--quiet"]) == 2
    assert capsys.readouterr().err == (
        f'shallower: {broken}, line 2 is [], not a JSON object: write {{"text": …}} on each line.\n'
    )


@installed
def test_a_folder_of_text_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    text = str(tmp_path / "texts")
    _corpus(tmp_path / "texts" / "a.jsonl")
    for work, out in ((tmp_path / "texts/work", None), (tmp_path / "work", tmp_path / "texts/deep/out.jsonl")):
        with pytest.raises(OutputError, match=r"is in .*texts, where it would be read as text the next time"):
            clean_on_disk(text, work, out)
        assert not work.exists()
    found = clean_on_disk(text, tmp_path / "work", tmp_path / "out.jsonl")
    (tmp_path / "texts" / "notes.md").write_text("This is not read.")
    (tmp_path / "texts" / ".b.jsonl").write_text("Nor is this.")
    assert clean_on_disk(text, tmp_path / "work", tmp_path / "out.jsonl") == found
    _corpus(tmp_path / "texts" / "b.jsonl", seed=1)
    with pytest.raises(CorpusError, match="has changed since"):
        clean_on_disk(text, tmp_path / "work")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2"], "--workers are processes of --datatrove FOLDER"),
        (["--datatrove", "w", "--against", "x.jsonl"], "--against is not there with --datatrove"),
        (["--datatrove", "w", "--report", "r"], "--report is not there with --datatrove"),
        (["--datatrove", "w", "--dedup", "0"], "--dedup 0 looks for no duplicates"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(["corpus", "clean", _corpus(tmp_path / "a.jsonl"), *options, "--quiet"]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_without_the_package_there_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "datatrove"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.delitem(sys.modules, "shallower.corpus.datatrove", raising=False)
    text = _corpus(tmp_path / "a.jsonl")
    assert main.run(["corpus", "clean", text, "--datatrove", str(tmp_path / "work"), "--quiet"]) == 2
    assert "`datatrove`, which is not installed: pip install 'shallower[datatrove]'" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
