"""Code that a user wrote, or a package has that nothing here stands on: told by its files."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from weakref import WeakKeyDictionary

FRAMEWORKS = frozenset({"torch", "transformers", "transformers_modules", "accelerate", "shallower"})
"""Packages whose code weights, configs and versions tell. The third has code that came with models."""
KNOWN = FRAMEWORKS | {"numpy", "scipy"} | sys.stdlib_module_names
_INSTALLED = frozenset({"site-packages", "dist-packages"})
# read once, as a file may be edited after it was imported; a module that is imported again has another spec
_contents: WeakKeyDictionary[ModuleType, tuple[ModuleSpec | None, bytes]] = WeakKeyDictionary()


def package_of(module: str) -> str:
    """The outermost package that a module is in."""
    return module.partition(".")[0]


def is_installed(file: str | None) -> bool:
    """Whether a file is of a package that was installed, not of one that is being written."""
    return file is not None and not _INSTALLED.isdisjoint(Path(file).parts)


def own_code(module: str) -> str | None:
    """Digest of a module's file and of those that it imports, and they in turn, but for `KNOWN` packages, as they were
    when they were first read here. An installed package is told by its version and the file itself. None where a file
    cannot be read, as of what was typed into an interpreter.

    What functions import is left out: whether they did so yet differs from one process to the next.
    """
    digests = _files(module, {}).values()
    if None in digests:
        return None
    return hashlib.sha256("".join(sorted(map(str, digests))).encode()).hexdigest()


def _files(name: str, found: dict[str, str | None]) -> dict[str, str | None]:
    """Digests by name of a module and what it imports, added to those that were found before."""
    module = sys.modules.get(name)
    source = None if module is None else _content(module)
    found[name] = None if source is None else hashlib.sha256(source).hexdigest()
    if module is None or source is None:
        return found
    if is_installed(module.__file__):
        found[name] = f"{found[name]}{getattr(sys.modules.get(package_of(name)), '__version__', '')}"
        return found
    for other in _imported(source, module.__package__ or ""):
        if other in sys.modules and other not in found and package_of(other) not in KNOWN:
            _files(other, found)
    return found


def _content(module: ModuleType) -> bytes | None:
    """A module's file; empty for a folder without `__init__.py`."""
    spec = getattr(module, "__spec__", None)
    if module not in _contents or _contents[module][0] is not spec:
        file = getattr(module, "__file__", None)
        if file is None:
            return b"" if hasattr(module, "__path__") else None
        try:
            _contents[module] = spec, Path(file).read_bytes()
        except OSError:
            return None
    return _contents[module][1]


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Names that may be of modules which a file imports when it is loaded."""
    try:
        waiting: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):  # compiled
        return
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                try:
                    base = importlib.util.resolve_name("." * node.level + base, package)
                except ImportError:  # it failed in the file, too, which had another one to try
                    continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and _is_for_checkers(node.test):
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            waiting += ast.iter_child_nodes(node)


def _is_for_checkers(test: ast.expr) -> bool:
    """Whether it is `TYPE_CHECKING`, or that of `typing`."""
    return "TYPE_CHECKING" in (getattr(test, "id", None), getattr(test, "attr", None))
