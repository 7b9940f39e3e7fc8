"""Write docs/cli.md from the command line itself; a test compares the two.

python tools/make_cli_reference.py
"""

from __future__ import annotations

from collections.abc import Iterator
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


def reference() -> str:
    """The page as Markdown."""
    return "\n".join([INTRODUCTION, *_command("shallower", typer.main.get_command(app))])


def _command(path: str, command: Any) -> Iterator[str]:
    parameters = [parameter for parameter in command.params if parameter.name != "help"]
    verbs = getattr(command, "commands", {})
    words = [parameter.metavar for parameter in parameters if parameter.param_type_name == "argument"]
    required = [parameter for parameter in parameters if parameter.param_type_name == "option" and parameter.required]
    words += [f"{parameter.opts[0]} {parameter.metavar}" for parameter in required]
    words += ["VERB"] if verbs else []
    if path != "shallower":
        yield f"## `{path}`\n"
    yield f"    {' '.join([path, *words])} [OPTIONS]\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield f"{' '.join(paragraph.split())}\n"
    for parameter in parameters:
        yield _parameter(parameter)
    if parameters:
        yield ""
    for name, verb in verbs.items():
        yield from _command(f"{path} {name}", verb)


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
