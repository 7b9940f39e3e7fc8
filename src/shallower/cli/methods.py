"""`shallower methods`: the registered metrics, objectives, searches and recoveries, with papers and options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from shallower import registry
from shallower.cli.output import say
from shallower.cli.verb import Answer, verb
from shallower.errors import UnknownName
from shallower.registry import Method

if TYPE_CHECKING:
    from rich.console import Console

ROLES = {
    "metric": "Metrics rank units; higher means keep (--metric)",
    "objective": "Objectives judge the whole model; lower is better (--objective)",
    "search": "Searches choose what goes (--search)",
    "recovery": "Recoveries repair what a cut broke (--with, --recover)",
    "quality": "Scorers of text quality, from 0 to 1 (quality=… in a calibration specification)",
}


@verb
def methods(
    name: Annotated[
        str | None, Argument(metavar="[NAME]", help="A method, to see its description and options. Default: list all.")
    ] = None,
) -> Answer:
    """List the methods of every kind, or describe one."""
    everything = [method for kind in registry.REGISTRIES for method in kind]
    if name is None:
        return Answer(_as_data(everything), lambda console: _list(console, everything))
    found = [method for method in everything if method.name == name]
    found = found or [method for method in everything if method.is_published_as(name)]
    if not found:
        raise UnknownName("method", name, sorted({method.name for method in everything}))
    return Answer(_as_data(found), lambda console: _describe(console, found))


def paper_links(source: str) -> list[str]:
    """Addresses of the papers that a source names."""
    return [f"https://arxiv.org/abs/{number}" for number in re.findall(r"arXiv:([\d.]+\d)", source)]


def _as_data(found: Sequence[Method]) -> dict[str, Any]:
    return {
        "methods": [
            {
                "kind": method.kind,
                "name": method.name,
                "summary": method.summary,
                "description": inspect.getdoc(method.function) or "",
                "source": method.source,
                "links": paper_links(method.source),
                "options": [
                    {"name": option.name, "takes": option.takes, "default": option.default}
                    for option in method.options.values()
                ],
            }
            for method in found
        ]
    }


def unbroken(text: str) -> str:
    """A docstring with each paragraph, item of a list and explained option (`lr, clip: …`) on one line."""
    lines = [""]
    for line in text.splitlines():
        item = re.match(r"\s*(-|\d+\.|\w+(, \w+)*:) ", line)
        if item or not line.strip() or not lines[-1]:
            lines.append(line)
        else:
            lines[-1] += f" {line.strip()}"
    return "\n".join(lines[1:])


def _written(default: object) -> str:
    """A default as `--set` takes it."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return str(default) or "empty"


def _list(console: Console, found: Sequence[Method]) -> None:
    from rich.table import Table

    width = max(len(method.name) for method in found)
    for kind, role in ROLES.items():
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(min_width=width + 2, no_wrap=True, style="bold")
        table.add_column(ratio=1)
        table.add_column(no_wrap=True)
        for method in found:
            if method.kind == kind:
                table.add_row(f"  {method.name}", method.summary, method.source.replace(", ", "\n"))
        console.print(f"{role}:", style="bold")
        console.print(table)
        console.print()
    console.print("'shallower methods NAME' tells more. arXiv:2403.17887 is at https://arxiv.org/abs/2403.17887.")


def _describe(console: Console, found: Sequence[Method]) -> None:
    for method in found:
        console.print(f"{method.kind} {method.name}", style="bold")
        say(console, unbroken(inspect.getdoc(method.function) or "No description."))
        console.print()
        told = {f"--set {option.name}=…": option for option in method.options.values()}
        for flag, option in told.items():
            column = flag.ljust(max(map(len, told)))
            console.print(f"  {column}  {option.takes}; default {_written(option.default)}", soft_wrap=True)
        if not method.options:
            console.print("It has no options.")
        for link in paper_links(method.source) or [method.source or "this package; no paper"]:
            console.print(f"Source: {link}", soft_wrap=True)
        console.print()
