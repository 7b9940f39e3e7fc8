"""What a registered method computes, in words: results that are kept belong to it, and an edited one has none yet."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from shallower.checkpoint.own_code import KNOWN, is_installed, own_code, package_of
from shallower.registry import Method, instructions


def code_of(method: Method) -> str:
    """A method's code and whatever stands beside it in its file, which it may call, as they were when it was
    registered; of one that comes from elsewhere also the values that it closes over, its defaults, and what its names
    stand for now: numbers, texts and functions, and of modules, classes and objects the files that make them. Never the
    same again for one that is not `is_fully_known`.
    """
    values = _values(method)
    if values is None:
        return f"{method.code}{uuid.uuid4().hex}"
    return f"{method.code}{values}" if values else method.code


def is_fully_known(method: Method) -> bool:
    """Whether `code_of` says all that a method computes: not where it closes over what is no number, text or function,
    nor a list of these, or uses a module or class that has no file.
    """
    return _values(method) is not None


def is_ours(method: Method) -> bool:
    """Whether a method was written in this package."""
    return inspect.isfunction(method.function) and package_of(_home(method.function)) == package_of(__name__)


class _Untold(Exception):
    """A value that has no words."""


def _values(method: Method) -> str | None:
    """What a method's code reads besides its file; empty where that is nothing, None where it cannot be told."""
    function = inspect.unwrap(method.function, stop=lambda wrapper: not _is_torchs(wrapper))
    if not inspect.isfunction(function):
        return None
    home = _home(function)
    if package_of(home) == package_of(__name__):
        return ""  # ours stand in their files whole
    try:
        found = _reads(function, home, {function})
    except (_Untold, RecursionError):
        return None
    if function is not inspect.unwrap(function):
        found += (instructions(function.__code__),)  # the file is that of the function it wraps
    return repr(found) if any(found) else ""


def _reads(function: FunctionType, home: str, seen: set[FunctionType]) -> tuple[Any, ...]:
    """Values of closures and defaults, and of globals, as `_word` has them. home: the method's module, whose file is
    told already.
    """
    held = []
    for cell in function.__closure__ or ():
        try:
            held.append(_word(cell.cell_contents, home, seen))
        except ValueError:  # it is filled later
            raise _Untold from None
    defaults = [_word(value, home, seen) for value in (function.__defaults__, function.__kwdefaults__) if value]
    around: list[Any] = []
    names = sorted(set(_names(function.__code__)))
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, value in found.items():
        try:
            around.append((name, _word(value, home, seen)))
        except _Untold:  # a class or an object: only how a file makes it is told, no change of it afterwards
            around += [(name, code) for code in _files(value)]
    waiting = [value for value in found.values() if isinstance(value, ModuleType)]
    met = [*waiting]
    while waiting:  # of `package.part.function` the part, too
        module = waiting.pop()
        if package_of(module.__name__) not in KNOWN:
            parts = [vars(module).get(name) for name in names]
            new = [part for part in parts if isinstance(part, ModuleType) and part not in met]
            around += [_word(part, home, seen) for part in new]
            waiting += new
            met += new
    return tuple(held), tuple(defaults), tuple(around)


def _word(value: Any, home: str, seen: set[FunctionType]) -> Any:
    """A value as it is spelled in a key. Raises _Untold for one of another kind."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return [_word(item, home, seen) for item in value]
    if isinstance(value, Mapping):
        return [(_word(key, home, seen), _word(item, home, seen)) for key, item in value.items()]
    if isinstance(value, ModuleType):
        return value.__name__, _files(value)
    if isinstance(value, BuiltinFunctionType):
        return value.__qualname__
    if not isinstance(value, FunctionType):
        raise _Untold
    name, its = f"{value.__module__}.{value.__qualname__}", _home(value)
    if value in seen:
        return name
    seen.add(value)
    if not hasattr(value, "__wrapped__"):  # which may be around something of the method's own
        if package_of(its) in KNOWN:
            return name
        if package_of(its) != package_of(home) and is_installed(value.__globals__.get("__file__")):
            return name, _files(value)
    return name, instructions(value.__code__), _reads(value, home, seen)


def _files(value: Any) -> list[str]:
    """Digests of the files that make a module, function, class or object. Of one in the method's own file, too, as what
    that imports may be called. Raises _Untold where there is none.
    """
    if isinstance(value, ModuleType):
        module = value.__name__
    elif isinstance(value, FunctionType):
        module = _home(value)
    else:
        module = (value if isinstance(value, type) else type(value)).__module__
    if package_of(module) in KNOWN:
        return []
    if (code := own_code(module)) is None:
        raise _Untold
    return [code]


def _home(function: FunctionType) -> str:
    """The module that it was written in: what wraps another says of itself that it is in that one's."""
    return str(function.__globals__.get("__name__"))


def _is_torchs(wrapper: Any) -> bool:
    """Whether it is what `torch.no_grad` and the like make of a function; it says of itself that it is the function."""
    return str(getattr(wrapper, "__globals__", {}).get("__name__")).startswith("torch.")


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
