"""What can go wrong, as a tree.

    ShallowerError
    ├── UserError               the user's mistake: one sentence, exit code 2
    │   ├── UnknownName         a method, unit, or key that does not exist; knows the nearest one
    │   ├── ModelError          MODEL cannot be found, read, or is of a kind that cannot be pruned
    │   │   └── ModelTooLarge   MODEL does not fit into memory
    │   ├── CorpusError         calibration or evaluation text is missing, too short, or not text
    │   │   └── TooLittleText   there is text, but less than what was asked for
    │   ├── PlanError           a plan that is malformed or was made for another model
    │   ├── BudgetError         --remove / --protect ask for something impossible
    │   └── OutputError         the place to write to is taken, full, or not writable
    └── VerificationError       what was computed or written does not reproduce the model (exit code 1)

A message says what was wrong, the value seen, what is allowed, and what to do next.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable

_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "_status_alloc_failed",  # cuBLAS, cuDNN: no room for their workspace
)


class ShallowerError(Exception):
    """Root of every exception that shallower raises on purpose."""

    exit_code = 1


class UserError(ShallowerError):
    """The user's mistake. The command line prints the message alone and exits with 2."""

    exit_code = 2


class UnknownName(UserError):
    """A name that is not among the known ones."""

    def __init__(
        self, what: str, name: str, known: Iterable[str], hint: str = "", *, of: str = "", meant: str = ""
    ) -> None:
        """what: it should be one of, such as `option`, `of` what has them. meant: which of the known ones is published
        under that name; by default the nearest is proposed.
        """
        self.name = name
        self.known = tuple(known)
        near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        message = f"unknown {what} {name!r}" + (f" of {of}" if of else "")
        if meant:
            message += f", which is called {meant!r} here."
        else:
            message += f"; did you mean {near[0]!r}?" if near else "."
        message += (
            f" Known: {', '.join(self.known)}." if self.known else " There is none." if of else " None is registered."
        )
        super().__init__(f"{message} {hint}".strip())


class ModelError(UserError):
    """MODEL cannot be found, read, or is of a kind that cannot be pruned."""


class ModelTooLarge(ModelError):
    """MODEL does not fit into memory."""


class CorpusError(UserError):
    """Text is missing, too short, or not text."""


class TooLittleText(CorpusError):
    """There is text, but less than what was asked for: `share` of its sequences.

    fault: the message without what to do, for those who know better what that is.
    """

    def __init__(self, fault: str, advice: str = "", share: float = 0.0) -> None:
        super().__init__(f"{fault}: {advice}." if advice else fault)
        self.fault, self.share = fault, share


class PlanError(UserError):
    """A plan that is malformed or was made for another model."""


class BudgetError(UserError):
    """A removal that is impossible: nothing, everything, or units that do not exist."""


class OutputError(UserError):
    """The place to write to is taken, full, or not writable."""


class VerificationError(ShallowerError):
    """A replay, a cut, or a written checkpoint that does not reproduce the model it stands for."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory does not suffice, on any device: on a CPU torch raises a RuntimeError."""
    if isinstance(error, (MemoryError, ModelTooLarge)) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, ended by a full stop; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0].rstrip('.:')}." if lines else f"{type(error).__name__}."


def require_package(package: str, extra: str, what: str, error: type[UserError] = CorpusError) -> None:
    """Raise `error` unless the package is installed, with one of shallower's extras. what: needs it."""
    found = importlib.util.find_spec(package)
    # a folder of that name, such as one of data sets where a command is started, counts as a package without a file
    if found is None or (found.origin is None and found.submodule_search_locations is not None):
        name = package.replace("_", "-")
        raise error(f"{what} needs the package `{name}`, which is not installed: pip install 'shallower[{extra}]'.")
