"""lm-eval, which defines the tasks: their prompts, their scoring, their names. This module finds tasks by name, quickly
and quietly.

lm-eval's own index parses all of its 14,000 task files, which takes most of a minute on a small machine. Here the files
are searched for names as text (under a second), and only the folders that hold what was asked for are given to lm-eval.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shallower.checkpoint.stock import quiet
from shallower.errors import UnknownName, UserError, require_package

Prepare = Callable[[dict[str, Any]], dict[str, Any]]  # a task's configuration → the one to use

_NAMED = re.compile(rb'^["\']?(task|group|tag)["\']?:[ \t]*(\S[^\n]*)?((?:\n[ \t]*- [^\n]*)*)', re.MULTILINE)
_NEAR = 5


def require_harness() -> None:
    """Raise UserError unless lm-eval is installed."""
    require_package("lm_eval", "eval", "asking tasks", UserError)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the logs and the progress bars of lm-eval, datasets and transformers, and restore them."""
    import datasets
    import lm_eval.api.task

    loggers = [logging.getLogger("lm_eval"), logging.getLogger("datasets")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    bar_of_tasks = lm_eval.api.task.tqdm  # one for each task that builds its requests; it has no switch
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = lambda items, **_: items
        with quiet():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        lm_eval.api.task.tqdm = bar_of_tasks
        if bars:
            datasets.enable_progress_bars()


def load_tasks(names: Sequence[str], prepare: Prepare) -> Any:
    """Tasks, groups and tags by name, as lm-eval's `TaskManager.load` returns them.

    prepare: changes each task's configuration before its data are read.

    Raises UnknownName for a name that lm-eval does not have, and UserError when it is not installed, or when two of the
    names hold the same task.
    """
    require_harness()
    index = _index()
    for name in names:
        if name not in index:
            near = difflib.get_close_matches(name, index, n=_NEAR, cutoff=0.5)
            hint = "These are the nearest; `lm-eval ls tasks` lists all, `shallower eval --help` the suites."
            raise UnknownName("task", name, near, hint if near else hint.removeprefix("These are the nearest; "))
    with quiet_harness():
        manager = _manager(names, index)
        _prepare_with(manager, prepare)
        try:
            return manager.load(list(dict.fromkeys(names)))
        except ValueError as error:
            if "Duplicate task" not in str(error):
                raise
            raise UserError(f"{error}; name one of the two.") from None


def _manager(names: Sequence[str], index: Mapping[str, frozenset[str]]) -> Any:
    """A TaskManager of the folders that hold the named tasks and all members of the named groups."""
    from lm_eval.tasks import TaskManager

    folders: set[str] = set()
    wanted = set(names)
    manager: Any = None
    while missing := {folder for name in wanted for folder in index.get(name, ())} - folders:
        folders |= missing
        # a later path takes precedence, but among the files of one path the first does
        manager = TaskManager(include_defaults=False, include_path=sorted(folders, reverse=True))
        for name in list(wanted):
            wanted |= _members(manager.task_index, name)
    return manager


def _members(entries: Mapping[str, Any], name: str) -> set[str]:
    """Names inside a group or tag, however deep."""
    entry = entries.get(name)
    found: set[str] = set()
    if entry is None:
        return found
    members: list[Any] = sorted(entry.tags) if entry.kind.name == "TAG" else []
    if entry.kind.name == "GROUP":
        given = (entry.cfg or {}).get("task")
        members = given if isinstance(given, list) else [given]
    for member in members:
        inner = member.get("task") or member.get("group") if isinstance(member, dict) else member
        if isinstance(inner, str) and inner != name:
            found |= {inner} | _members(entries, inner)
    return found


def _prepare_with(manager: Any, prepare: Prepare) -> None:
    """Let `prepare` see each task's whole configuration, whichever group it is in."""
    factory = manager._factory
    read = factory._load_full_config

    def prepared(entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        configuration: dict[str, Any] = read(entry, overrides)
        return configuration if entry.kind.name == "GROUP" else prepare(configuration)

    factory._load_full_config = prepared


@functools.cache
def _index() -> dict[str, frozenset[str]]:
    """Every name of a task, group or tag, and the folders of the files that have it."""
    found: dict[str, set[str]] = defaultdict(set)
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    for folder, _, files in os.walk(Path(package.origin).parent / "tasks"):
        for file in files:
            if file.endswith(".yaml"):
                for match in _NAMED.finditer((Path(folder) / file).read_bytes()):
                    first = match[2] or b""
                    values = re.split(rb"[\[\],]", first) if first.startswith(b"[") else [first]
                    if match[1] == b"tag":
                        values += [line.strip().removeprefix(b"- ") for line in match[3].splitlines()]
                    for value in values:
                        name = value.split(b" #")[0].strip().strip(b"\"'").decode(errors="replace")
                        if name and not name.startswith("!"):
                            found[name].add(folder)
    return {name: frozenset(folders) for name, folders in found.items()}
