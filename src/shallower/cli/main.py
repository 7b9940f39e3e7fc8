"""The entry point: which verbs there are, and what becomes of whatever goes wrong.

Exit codes: 0 done · 1 not the user's fault (a defect, a failed verification) · 2 the user's mistake, or a full disk ·
130 interrupted (Ctrl-C) · 141 the reader of the output, such as `head`, had seen enough · 143 terminated.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer
import typer.main

from shallower.cli import (
    bench,
    corpus,
    demo,
    eval,
    inspect,
    methods,
    plan,
    prune,
    recover,
    report,
    score,
    search,
    study,
)
from shallower.cli import run as run_verb
from shallower.errors import ShallowerError, out_of_memory
from shallower.version import __version__

# Newer versions of typer carry a copy of click; its exceptions are found through typer in all of them.
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]

_SAVERS = {
    "--memory": "less --memory",
    "--train-sequences": "a smaller --set at_once=… or --set recompute=true in training",
    "--prompt": "a smaller --prompt",
    "--batch": "a smaller --batch",
    "--length": "a smaller --length",
    "--window": "a smaller --window",
    "--dtype": "another --dtype",
    "--device": "another --device",
}
"""By a verb's option what to give when memory does not suffice."""

_HEEDED_WITH = {
    ("score", "--memory"): {"--memory"},
    ("prune", "--memory"): {"--remove", "--memory"},
    ("prune", "--train-sequences"): {"--recover"},
    ("recover", "--memory"): {"--memory"},
    ("eval", "--memory"): {"--plan"},
    ("eval", "--batch"): {"--batch"},
    ("eval", "--window"): {"--text"},
}
"""By verb and option those that it is heeded with. One that is among its own is heeded where it was given and not
refused.
"""

RESUME = "nothing half-written. Run the same command again: it goes on with what was kept"
ANEW = "nothing half-written. Run the same command again: it begins anew"
_KEEP_NOTHING = {"inspect", "bench", "report", "methods", "build", "show", "cut"}  # also of `corpus` and `plan`

app = typer.Typer(
    name="shallower",
    rich_markup_mode=None,  # importing rich takes longer than everything else that --help does
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.inspect)
app.command("score")(score.score)
app.command("search")(search.search)
app.command("prune")(prune.prune)
app.command("recover")(recover.recover)
app.command("eval")(eval.evaluate)
app.command("bench")(bench.bench)
app.command("study")(study.study)
app.command("run")(run_verb.run)
app.command("report")(report.report)
app.command("methods")(methods.methods)
app.command("demo")(demo.demo)
app.add_typer(plan.app, name="plan")
app.add_typer(corpus.app, name="corpus")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shallower {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def shallower(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make a language model shallower: find the blocks it can do without, cut them out, and show what it cost.

    Try 'shallower demo', or 'shallower prune MODEL --remove 25% --out FOLDER'.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


class Terminated(BaseException):
    """A signal asked the process to end; not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        self.number = number


def main() -> None:
    """Run the command line on this process's arguments, and exit."""
    # Threads that wait by spinning take the cores from those that work as soon as anything else runs: 3 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _terminate)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; an error becomes a sentence on stderr."""
    arguments = [_as_a_word_of_its_own(word) for word in arguments]
    debug = "--debug" in arguments or os.environ.get("SHALLOWER_DEBUG", "0") not in ("", "0")
    command = typer.main.get_command(app)
    try:
        with command.make_context("shallower", arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as leave:
        return leave.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + int(getattr(signal, "SIGPIPE", 13))
    except BaseException as error:
        if isinstance(error, (SystemExit, GeneratorExit)):
            raise
        if debug:
            traceback.print_exc()
        keeps = _keeps(command, arguments)
        sentence, code = explain(error, debug=debug, savers=_savers(command, arguments), keeps=keeps)
        print(f"shallower: {' '.join(sentence.split())}", file=sys.stderr)
        return code


def _as_a_word_of_its_own(word: str) -> str:
    """`--out=~/x` with the home folder spelled out, which shells do for `--out ~/x` only."""
    name, sign, value = word.partition("=")
    return name + sign + os.path.expanduser(value) if name.startswith("--") and value.startswith("~") else word


def verb_of(command: Any, words: Sequence[str]) -> Any:
    """The verb that the words begin with; None where there is none. command: of all verbs."""
    verb, rest = command, iter(words)
    while commands := getattr(verb, "commands", None):  # of `corpus`, too
        verb = commands.get(next(rest, None))
    return verb


def options_of(verb: Any) -> set[str]:
    """Such as `--out`."""
    return {name for option in getattr(verb, "params", ()) for name in option.opts}


def _savers(command: Any, arguments: Sequence[str]) -> list[str]:
    """What would save memory, of the options of the verb that ran and heeds them. command: of all verbs."""
    verb = verb_of(command, [word for word in arguments if not word.startswith("-")])
    there = options_of(verb)
    given = {word.partition("=")[0] for word in arguments if word.startswith("-")}
    idle = {name for (of, name), other in _HEEDED_WITH.items() if of == getattr(verb, "name", "") and not other & given}
    return [saver for name, saver in _SAVERS.items() if name in there - idle]


def _keeps(command: Any, arguments: Sequence[str]) -> bool:
    """Whether the verb keeps what it has done before it ends. command: of all verbs."""
    verb = getattr(verb_of(command, [word for word in arguments if not word.startswith("-")]), "name", "")
    if verb == "clean":
        return any(word.partition("=")[0] == "--datatrove" for word in arguments)
    return verb not in _KEEP_NOTHING


def explain(
    error: BaseException, *, debug: bool = False, savers: Sequence[str] = (), keeps: bool = True
) -> tuple[str, int]:
    """What to tell the user, and the exit code. savers: what would save memory. keeps: whether the verb that ran goes
    on where it was.
    """
    again = RESUME if keeps else ANEW
    if isinstance(error, ShallowerError):
        return str(error), error.exit_code
    if isinstance(error, _ClickException):
        return _usage(error), 2
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return f"interrupted; {again}.", 130
    if isinstance(error, Terminated):
        return f"terminated; {again}.", 128 + error.number
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):  # pathlib's words
        return "a path begins with ~ and the name of a user that this machine does not know; write the whole path.", 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{_where(error)}; {again}. Free some room first, or choose another place.", 2
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}{_where(error)}; choose another place or change its permissions.", 2
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{error.strerror}{_where(error)}; choose another name.", 2
    if (type(error).__module__, type(error).__name__) == ("sqlite3", "OperationalError"):
        what = f"measurements cannot be kept in the cache ({error})"
        return f"{what}; free some room, or set SHALLOWER_CACHE to a folder that can be written.", 2
    if out_of_memory(error):
        *others, last = savers or ("a smaller model", "less text")
        return f"out of memory; give {', '.join(others)}{' or ' if others else ''}{last}.", 2
    what = f"this is a defect in shallower {__version__}, not your mistake: {type(error).__name__}: {_brief(error)}"
    if debug:
        return f"{what}. Please report it with the traceback above.", 1
    return f"{what}. The traceback is in {_keep_traceback(error)}; please report it.", 1


def _usage(error: BaseException) -> str:
    """What click says of a wrong command line, as a sentence with what to type next."""
    message = error.format_message().replace("Value error, ", "").strip().rstrip(".")  # type: ignore[attr-defined]
    if bound := _BOUND.match(message):
        message = _bounded(bound, error)
    message = re.sub(r"( Did you mean [^?]*\?)\1", r"\1", message)  # some pairs of typer and click both ask
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "shallower"
    return f"{message[:1].lower()}{message[1:]}{'' if message.endswith('?') else '.'} See '{command} --help'."


_BOUND = re.compile(r"^Invalid value for '(--[\w-]+)': Input should be (greater|less) than or equal to (\S+)$")


def _bounded(found: re.Match[str], error: BaseException) -> str:
    """A number out of bounds, with the value that was given, which pydantic's words lack."""
    flag, side, bound = found.groups()
    given = [fault["input"] for fault in getattr(error.__cause__, "errors", list)()]
    return f"{' '.join([flag, *map(str, given)])}: give {bound} or {'more' if side == 'greater' else 'less'}"


def _where(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _brief(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")[:200]


def _keep_traceback(error: BaseException) -> str:
    """Write the traceback to a file of its own and return its path."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="shallower-traceback-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    return file.name


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)
