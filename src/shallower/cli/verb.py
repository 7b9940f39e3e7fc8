"""What all verbs have in common: `--json`, `--quiet`, `--debug`, progress while they work, one answer at the end."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from shallower.cli.output import print_json, screen
from shallower.cli.progress import working
from shallower.launched import leads

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, Option("--json", help="Print one JSON document and nothing else. Default: tables.")]
Quiet = Annotated[bool, Option("--quiet", help="Show no progress. Default: progress on stderr.")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error. Default: one sentence.")]

finished: list[str] = []
"""Names of the verbs of this process whose work is done, though it may not be shown yet."""

_COMMON = {"as_json": AsJson, "quiet": Quiet, "debug": Debug}


@dataclass(frozen=True)
class Answer:
    """What a verb found. data: for `--json`. show: prints it for a person."""

    data: Mapping[str, Any]
    show: Callable[[Console], None]


def verb(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a command of a function that returns an Answer, and give it the options that every verb has.

    Progress runs, and stray prints go to stderr, until the function returns; its answer alone is on stdout.
    """

    @functools.wraps(function)
    def command(**given: Any) -> None:
        as_json, quiet, _ = (given.pop(name) for name in _COMMON)  # main looks for --debug when something fails
        with working(quiet=quiet or as_json or not leads()):
            answer = function(**given)
        finished.append(function.__name__)
        if not leads():
            return
        if as_json:
            print_json(answer.data)
        else:
            answer.show(screen())

    own = inspect.signature(function, eval_str=True)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _COMMON.items()
    ]
    whole = own.replace(parameters=[*own.parameters.values(), *common], return_annotation=None)
    command.__signature__ = whole  # type: ignore[attr-defined]
    command.__annotations__ = {name: parameter.annotation for name, parameter in whole.parameters.items()}
    return command
