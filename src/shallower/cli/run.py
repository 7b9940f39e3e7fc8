"""`shallower run`: a recipe, step by step."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main
from typer import Argument, Option

from shallower.cli import options
from shallower.cli.output import print_json, screen
from shallower.cli.verb import AsJson, Debug, Quiet, finished
from shallower.errors import UserError
from shallower.recipes import read_recipe, shipped
from shallower.resources import parse_memory, parse_workers
from shallower.strict_json import write_json

DONE = "steps.json"

_BEHIND_NEW = ContextVar("behind_new", default=False)
"""Whether this run is a step of another with --force, and one before it was made anew: then nothing here is done."""


def run(
    recipe: Annotated[
        str, Argument(metavar="RECIPE", help=f"One of {', '.join(shipped())}, or a .yaml file of your own.")
    ],
    out: Annotated[
        Path | None,
        Option(
            "--out",
            metavar="FOLDER",
            help="Write everything here; resumes an interrupted run. Default: RECIPE-SIZE.",
        ),
    ] = None,
    size: Annotated[str, Option("--size", metavar="NAME", help="demo, or paper: the settings of the paper.")] = "demo",
    settings: Annotated[
        list[str] | None,
        Option(
            "--set", metavar="NAME=VALUE", help="A value of the recipe, such as model=…; repeatable. Default: none."
        ),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the commands and run none of them. Default: run them.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    workers: options.MeasuredBy = None,
    trust_remote_code: options.RemoteCode = False,
    force: Annotated[
        bool,
        Option(
            "--force",
            help="Begin again with the first step that is not done, or where all are with the first, and replace what "
            "it and those after it wrote. Default: refuse.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Repeat a paper's steps, on a small model or at the paper's size.

    A recipe is a list of commands of this program; --device, --dtype and --trust-remote-code are given to those that
    take them, --memory and --workers to those that search. Commands that have finished with the same options are not
    run again.
    """
    parse_memory(memory)
    parse_workers(workers)  # here, not in a step an hour later
    chosen = read_recipe(recipe)
    folder = Path(f"{Path(recipe).stem}-{size}") if out is None else out
    given = options.parse_settings(settings)
    pinned: dict[str, str | None] = {
        name: value for name, value in (("--device", device), ("--dtype", dtype)) if value != "auto"
    }
    free = {name: value for name, value in (("--memory", memory), ("--workers", workers)) if value is not None}
    # what a step is, however the folders are spelled this time, and whatever does not change what it finds
    placeless = replace(chosen, here=chosen.here.resolve())
    steps = [_pinned(step, pinned) for step in placeless.commands(size, "{out}", given)]
    behind_new = force and _BEHIND_NEW.get()
    done = [] if behind_new else _done(folder / DONE)
    pending = [step not in done for step in steps]
    if force:  # what stands after a step was made from what it wrote
        first = pending.index(True) if any(pending) else 0
        pending = [number >= first for number in range(len(steps))]
    pinned |= free | ({"--trust-remote-code": None} if trust_remote_code else {})
    commands = [
        _pinned(command, {**pinned, "--force": None} if force and waits else pinned)
        for command, waits in zip(chosen.commands(size, folder, given), pending, strict=True)
    ]
    told: dict[str, Any] = {"title": chosen.title, "source": chosen.source, "size": size, "out": str(folder)}
    console = screen()
    if not as_json:
        console.print(f"{chosen.title} ({chosen.source})\n{chosen.about}\n", soft_wrap=True, highlight=False)
    if dry_run:
        if as_json:
            print_json({**told, "steps": commands})
        else:
            console.print("\n".join(f"shallower {command}" for command in commands), soft_wrap=True, highlight=False)
        return
    found: list[Any] = []
    for number, (command, waits) in enumerate(zip(commands, pending, strict=True), 1):
        if waits:
            _require_possible(command, f"step {number} of {recipe}")
    if behind_new:  # also where it is stopped before its first step has ended
        write_json(folder / DONE, {"steps": []})
    for number, (command, step, waits) in enumerate(zip(commands, steps, pending, strict=True), 1):
        label = f"[{number}/{len(commands)}] shallower {command}"
        if not waits:
            found.append({"command": command, "done": True})
            if not as_json:
                console.print(f"{label}\nis done already.\n", soft_wrap=True, markup=False, highlight=False)
            continue
        if not as_json:
            console.print(label, soft_wrap=True, markup=False, highlight=False)
        finished.clear()
        ended = False
        before = _BEHIND_NEW.set(behind_new or any(pending[: number - 1]))
        try:
            answer = _step(command, as_json=as_json, quiet=quiet, debug=debug)
            ended = True
        finally:
            _BEHIND_NEW.reset(before)
            # a verb's work counts even where nobody reads its answer any more; within another recipe it is one of many
            if ended or (finished and not command.startswith("run ")):
                # what it replaced may be from steps of other values, which are then not done any more
                done = [*(earlier for earlier in done if not force or earlier in steps[: number - 1]), step]
                write_json(folder / DONE, {"steps": done})
        found.append({"command": command, "answer": answer})
    if as_json:
        print_json({**told, "steps": found})


def _require_possible(command: str, label: str) -> None:
    """Raise UserError where a command line asks for recoveries that there are not, with options out of range, or for
    recoveries or tasks without their packages: what else is wrong it says itself.
    """
    from shallower.evaluation.harness import require_harness
    from shallower.verbs.recovery_steps import named_recoveries, parse_recoveries

    if (asked := _asked(command, "prune", "recover", "eval")) is None:
        return
    try:
        if asked.get("tasks") or asked.get("suite"):
            require_harness()
        if names := asked.get("recover") or asked.get("methods"):
            theirs = {option for method in named_recoveries(names) for option in method.options}
            given = options.parse_settings(asked.get("settings"))
            parse_recoveries(names, {name: text for name, text in given.items() if name in theirs}, elsewhere=theirs)
    except UserError as error:
        raise UserError(f"{label} cannot run: {error}") from None


def _pinned(command: str, options_given: Mapping[str, str | None]) -> str:
    """The command line with what is given of the options that its verb has; None for one that takes no value."""
    from shallower.cli import main

    if not options_given:
        return command
    there = main.options_of(main.verb_of(typer.main.get_command(main.app), shlex.split(command)))
    unread = _unread(command) if {"--memory", "--workers"} & options_given.keys() else ()
    pairs = ((name, value) for name, value in options_given.items() if name in there and name not in unread)
    added = [word for pair in pairs for word in pair if word is not None]
    return f"{command} {shlex.join(added)}" if added else command


def _unread(command: str) -> set[str]:
    """Of --memory and --workers those that the command's verb would refuse, as they would change nothing there."""
    asked = _asked(command, "search", "prune", "study", "run")
    if asked is None or asked.get("plan"):
        return {"--memory", "--workers"}
    return {"--workers"} if asked.get("repair") or asked.get("stream_blocks") else set()


def _asked(command: str, *verbs: str) -> Mapping[str, Any] | None:
    """What a command line asks of its verb; None for another verb than these."""
    from shallower.cli import main

    words = shlex.split(command)
    if not words or words[0] not in verbs:
        return None
    verb = main.verb_of(typer.main.get_command(main.app), words)
    asked: Mapping[str, Any] = verb.make_context(words[0], words[1:], resilient_parsing=True).params
    return asked


def _step(command: str, *, as_json: bool, quiet: bool, debug: bool) -> Any:
    """Run one command line; with `as_json` what it prints is read, not shown. Raises Exit when it fails."""
    from shallower.cli import main

    common = {"--json": as_json, "--quiet": quiet, "--debug": debug}
    words = shlex.split(command) + [name for name, wanted in common.items() if wanted]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if as_json else contextlib.nullcontext():
        code = main.run(words)
    if code:
        raise typer.Exit(code)
    return json.loads(printed.getvalue()) if as_json else None


def _done(ledger: Path) -> list[str]:
    """Command lines that were run to their end before."""
    try:
        return [str(step) for step in json.loads(ledger.read_text(encoding="utf-8"))["steps"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{ledger} cannot be read ({error!r}); move it away to begin anew.") from None
