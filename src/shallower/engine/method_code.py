"""What a registered method computes, in words: results that are kept belong to it, and an edited one has none yet."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from shallower.registry import Method, instructions


def code_of(method: Method) -> str:
    """A method's code and whatever stands beside it in its file, which it may call, as they were when it was
    registered; of one that comes from elsewhere also the values that it closes over, its defaults, and the numbers,
    texts and functions that its names stand for now. Never the same again for one that is not `told`.
    """
    values = _values(method)
    if values is None:
        return f"{method.code}{uuid.uuid4().hex}"
    return f"{method.code}{values}" if values else method.code


def told(method: Method) -> bool:
    """Whether `code_of` says all that a method computes: not where it closes over what is no number, text or function,
    nor a list of these.
    """
    return _values(method) is not None


class _Untold(Exception):
    """A value that has no words."""


def _values(method: Method) -> str | None:
    """What a method's code reads besides its file; empty where that is nothing, None where it cannot be told."""
    function = inspect.unwrap(method.function, stop=lambda wrapper: not _is_torchs(wrapper))
    if not inspect.isfunction(function):
        return None
    if _package(function) == __name__.partition(".")[0]:
        return ""  # ours stand in their files whole
    try:
        found = _reads(function, {function})
    except (_Untold, RecursionError):
        return None
    if function is not inspect.unwrap(function):
        found += (instructions(function.__code__),)  # the file is that of the function it wraps
    return repr(found) if any(found) else ""


def _reads(function: FunctionType, seen: set[FunctionType]) -> tuple[Any, ...]:
    """Values of closures and defaults, all of which must be told, and those of globals that can be."""
    held = []
    for cell in function.__closure__ or ():
        try:
            held.append(_word(cell.cell_contents, function, seen))
        except ValueError:  # it is filled later
            raise _Untold from None
    defaults = [_word(value, function, seen) for value in (function.__defaults__, function.__kwdefaults__) if value]
    around = []
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            try:
                around.append((name, _word(function.__globals__[name], function, seen)))
            except _Untold:
                continue  # a class or an object: only how the file makes it is told, no change of it afterwards
    return tuple(held), tuple(defaults), tuple(around)


def _word(value: Any, function: FunctionType, seen: set[FunctionType]) -> Any:
    """A value as it is spelled in a key. Raises _Untold for one of another kind."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return [_word(item, function, seen) for item in value]
    if isinstance(value, Mapping):
        return [(_word(key, function, seen), _word(item, function, seen)) for key, item in value.items()]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, BuiltinFunctionType):
        return value.__qualname__
    if not isinstance(value, FunctionType):
        raise _Untold
    name = f"{value.__module__}.{value.__qualname__}"
    if value in seen:
        return name
    seen.add(value)
    if _package(value) != _package(function) and not hasattr(value, "__wrapped__"):
        return name  # of another package, and around nothing of this one
    return name, instructions(value.__code__), _reads(value, seen)


def _package(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__")).partition(".")[0]  # what wraps another has that one's __module__


def _is_torchs(wrapper: Any) -> bool:
    """Whether it is what `torch.no_grad` and the like make of a function; it says of itself that it is the function."""
    return str(getattr(wrapper, "__globals__", {}).get("__name__")).startswith("torch.")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
