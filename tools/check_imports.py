"""Check that imports go one way.

- `LAYERS`, from the value types up: a module may import from earlier layers and from its own package, not from a
  neighbour in its layer and not from a later one.
- `NEVER`: what a package must not know although it comes earlier.
- `METHODS`: one method a file, and none imports another.
- `LIGHT`: no torch, transformers, numpy or matplotlib when imported, however indirectly, so that `--help` is quick.

Imports under `if TYPE_CHECKING:` cost nothing at run time but are knowledge all the same: only `LIGHT` ignores them.

    python tools/check_imports.py [folder of the package]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "shallower"

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(line.split())
    for line in """
    errors version progress defaults filenames
    files launched
    store units strict_json registry resources reduction
    plan budget forms
    scores exchange recipes
    packaged decoding
    anatomy checkpoint
    corpus
    engine
    metrics objectives searches
    surgery
    training
    recovery exporters
    evaluation
    timing
    studies
    reporting
    verbs
    cli
    __main__
    testing
    """.strip().splitlines()
)

METHODS = frozenset({"metrics", "objectives", "searches", "recovery", "exporters"})
HEAVY = frozenset({"torch", "transformers", "numpy", "scipy", "matplotlib", "datasets", "accelerate"})

NEVER: Mapping[str, frozenset[str]] = {
    # a search knows nothing of models
    "searches": frozenset({"torch", "transformers", "anatomy", "checkpoint", "corpus", "engine"}),
    "metrics": frozenset({"anatomy", "checkpoint", "corpus", "engine", "budget"}),
    "objectives": frozenset({"anatomy", "checkpoint", "corpus", "engine", "budget"}),
    "corpus": frozenset({"anatomy", "checkpoint"}),  # knows no model, but for the tokenizer
    "surgery": METHODS | {"registry", "scores", "budget"},  # does not know how the plan was made
    "evaluation": METHODS | {"units", "plan", "scores", "budget", "anatomy", "surgery"},  # knows nothing of pruning
    "timing": METHODS | {"units", "plan", "scores", "budget", "anatomy", "surgery"},
}
LIGHT = frozenset({PACKAGE, "cli"}.union(*LAYERS[:5]))


@dataclass(frozen=True)
class Import:
    """One imported module. at_start: it is imported as soon as the importing module is."""

    line: int
    name: str
    at_start: bool
    for_types: bool


def imports_of(path: Path, module: str, known: frozenset[str]) -> list[Import]:
    """What the file imports. Of `from package import module`, the module."""
    found: list[Import] = []

    def add(node: ast.stmt, name: str, at_start: bool, for_types: bool) -> None:
        found.append(Import(node.lineno, name, at_start and not for_types, for_types))

    def visit(node: ast.AST, at_start: bool, for_types: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(node, alias.name, at_start, for_types)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                origin = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], origin]))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                add(node, inner if inner in known else origin, at_start, for_types)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                visit(statement, at_start, True)
            for statement in node.orelse:
                visit(statement, at_start, for_types)
        else:
            inside = at_start and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                visit(child, inside, for_types)

    visit(ast.parse(path.read_text(encoding="utf-8")), True, False)
    return found


def faults(folder: Path) -> Iterator[str]:
    """One sentence for each import that should not be there."""
    files = {_module(folder, path): path for path in sorted(folder.rglob("*.py"))}
    known = frozenset(files)
    imports = {module: imports_of(path, module, known) for module, path in files.items()}
    heavy = _heavy(imports)
    for area in sorted({_area(module) for module in files} - {PACKAGE}.union(*LAYERS)):
        yield f"{folder}: {area!r} has no place yet; give it one in LAYERS of tools/check_imports.py"
    for module, path in files.items():
        area = _area(module)
        layer = _layer(area)
        for item in imports[module]:
            where = f"{path}:{item.line}: {area}"
            target = _area(item.name) if _ours(item.name) else item.name.split(".")[0]
            if target in NEVER.get(area, ()):
                yield f"{where} must not know {target}"
            elif _ours(item.name) and target != area and layer is not None:
                other = _layer(target)
                if target == PACKAGE or (other is not None and other >= layer):
                    which = "stands beside it" if other == layer else "comes after it"
                    yield f"{where} imports {target}, which {which}"
            elif area in METHODS and item.name.startswith(f"{PACKAGE}.{area}.") and path.name != "__init__.py":
                yield f"{where} are one method a file, and none imports another: not {item.name}"
            if area in LIGHT and item.at_start and (chain := _chain(item.name, heavy)):
                yield f"{where} must import quickly, but {' imports '.join([module, *chain])}"


def _heavy(imports: Mapping[str, list[Import]]) -> dict[str, str]:
    """For each of our modules that loads a heavy one, the import through which it does."""
    through: dict[str, str] = {}
    changed = True
    while changed:
        changed = False
        for module, items in imports.items():
            if module in through:
                continue
            for name in [item.name for item in items if item.at_start] + _parents(module):
                if _chain(name, through):
                    through[module] = name
                    changed = True
                    break
    return through


def _chain(name: str, heavy: Mapping[str, str]) -> list[str]:
    """How importing `name` loads something heavy; empty when it does not."""
    if name.split(".")[0] in HEAVY:
        return [name.split(".")[0]]
    for module in (name, *_parents(name)):
        if module in heavy:
            return [module, *_chain(heavy[module], heavy)]
    return []


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _module(folder: Path, path: Path) -> str:
    parts = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _ours(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def _area(module: str) -> str:
    """`engine` of `shallower.engine.trace`; the package itself for its `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def _layer(area: str) -> int | None:
    return next((number for number, layer in enumerate(LAYERS) if area in layer), None)


def main() -> int:
    """Print the faults; 1 when there are any."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "src" / PACKAGE
    found = list(dict.fromkeys(faults(folder)))
    print("\n".join(found) if found else "imports go one way")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
