"""Write docs/cli.md from the command line itself; a test compares the two.

python tools/make_cli_reference.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import typer.main

from shallower.cli.main import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"

INTRODUCTION = """\
# The command line

<!-- Made by tools/make_cli_reference.py; do not edit. -->

Exit codes: 0 done, 1 not your fault (a bug, or a written model that fails verification), 2 your mistake or a full
disk, 130 interrupted, 143 terminated, 129 hung up, 141 if the reader of the output (`| head`) stopped reading.
An error is one sentence on stderr; nothing is left half-written.
"""
SHARED = "Options that several verbs take"


def reference() -> str:
    """The page as Markdown."""
    program = typer.main.get_command(app)
    shared = _shared(program)
    verbs = (line for name, verb in _verbs(program) for line in _command(f"shallower {name}", verb, shared))
    return "\n".join([INTRODUCTION, *_command("shallower", program), f"## {SHARED}\n", *shared, "", *verbs])


def _shared(program: Any) -> list[str]:
    """The line of each option that several verbs describe alike: where some describe it otherwise, the commonest."""
    told: dict[str, Counter[str]] = {}
    for _, verb in _verbs(program):
        for parameter in _parameters(verb):
            if parameter.param_type_name == "option":
                told.setdefault(parameter.opts[0], Counter())[_parameter(parameter)] += 1
    commonest = (lines.most_common(1)[0] for lines in told.values())
    return [line for line, verbs in commonest if verbs > 1]


def _verbs(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Those below the command, and below these, with what one types for each."""
    for name, verb in getattr(command, "commands", {}).items():
        yield f"{path}{name}", verb
        yield from _verbs(verb, f"{path}{name} ")


def _parameters(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.name != "help"]


def _command(path: str, command: Any, shared: Collection[str] = ()) -> Iterator[str]:
    """Of a command alone, without the verbs below it. shared: lines that the page has elsewhere."""
    parameters = _parameters(command)
    words = [parameter.metavar for parameter in parameters if parameter.param_type_name == "argument"]
    required = [parameter for parameter in parameters if parameter.param_type_name == "option" and parameter.required]
    words += [f"{parameter.opts[0]} {parameter.metavar}" for parameter in required]
    words += ["VERB"] if getattr(command, "commands", {}) else []
    if path != "shallower":
        yield f"## `{path}`\n"
    yield f"    {' '.join([path, *words])} [OPTIONS]\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield f"{' '.join(paragraph.split())}\n"
    own = [line for parameter in parameters if (line := _parameter(parameter)) not in shared]
    yield from own
    if own:
        yield ""
    if named := [f"`{parameter.opts[0]}`" for parameter in parameters if _parameter(parameter) in shared]:
        yield f"[As above](#{SHARED.lower().replace(' ', '-')}): {', '.join(named)}.\n"


def _parameter(parameter: Any) -> str:
    flags = " / ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        return f"- `{parameter.metavar}`: {parameter.help}"
    if parameter.metavar:
        flags = f"`{parameter.opts[0]} {parameter.metavar}`"
    return f"- {flags}: {parameter.help}{_default(parameter)}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return " Required."
    if "Default:" in parameter.help or not isinstance(parameter.default, (bool, int, float, str, Path)):
        return ""
    if isinstance(parameter.default, bool):
        return f" Default: {'on' if parameter.default else 'off'}." if parameter.secondary_opts else ""
    return f" Default: {parameter.default}."


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
