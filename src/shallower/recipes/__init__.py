"""Recipes: what a paper did, as command lines that can be run at the paper's size or at one that runs anywhere.

    title: Shortened LLaMA
    source: arXiv:2402.02834
    about: One-shot selection of blocks by perplexity.
    steps:
      - score {model} --metric loss --out {out}/scores.json
      - prune {model} --remove {remove} --search one-shot --out {out}/smaller
    sizes:
      demo: {model: demo, remove: 20%}
      paper: {model: lmsys/vicuna-7b-v1.3, remove: 20%}

A step is what stands after `shallower` on a command line. `{out}` is the folder of the run, `{here}` that of the
recipe; every other name in braces has a value in each size, which `--set name=value` replaces. What a name stands for
is part of one word, whatever spaces it holds.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallower.errors import UnknownName, UserError
from shallower.strict_json import key_faults, read_yaml

SUFFIX = ".yaml"
_NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PaperRecipe:
    """See the module.

    steps: command lines with names in braces. here: the recipe's folder. sizes: values of these names, by size.
    """

    title: str
    source: str
    about: str
    steps: tuple[str, ...]
    here: Path
    sizes: Mapping[str, Mapping[str, str]]

    def commands(self, size: str, out: str | os.PathLike[str], given: Mapping[str, str]) -> list[str]:
        """The command lines of a size, with quotes where words need them; `given` replaces values.

        Raises UnknownName for a size or a name that the recipe has not.
        """
        if size not in self.sizes:
            raise UnknownName("size", size, self.sizes, of=repr(self.title))
        values = self.sizes[size]
        for name in given:
            if name not in values:
                raise UnknownName("value", name, values, of=repr(self.title))
        values = {**values, **given, "out": os.fspath(out), "here": str(self.here)}
        return [
            shlex.join(_NAME.sub(lambda match: values[match[1]], word) for word in shlex.split(step))
            for step in self.steps
        ]


def shipped() -> dict[str, Path]:
    """The recipes that come with this package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob(f"*{SUFFIX}"))}


def read_recipe(name: str) -> PaperRecipe:
    """A recipe that comes with this package, or a file. Raises UserError that lists all faults at once."""
    path = shipped().get(name, Path(name))
    if path.suffix != SUFFIX and not path.exists():
        raise UnknownName("recipe", name, shipped(), f"A file of your own ends in {SUFFIX}.")
    data = read_yaml(path, "recipe", f"those shipped are {', '.join(shipped())}")
    faults = [*key_faults(str(path), data, ("title", "source", "about", "steps", "sizes")), *_faults(str(path), data)]
    if faults:
        raise UserError("; ".join(faults) + ".")
    sizes = {
        str(size): {str(key): str(value) for key, value in values.items()} for size, values in data["sizes"].items()
    }
    about = str(data["about"]).strip()
    return PaperRecipe(data["title"], str(data["source"]), about, tuple(data["steps"]), path.parent, sizes)


def _faults(where: str, data: Mapping[str, Any]) -> list[str]:
    steps, sizes = data.get("steps", ["-"]), data.get("sizes", {"-": {}})
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        return [f"'steps' of {where} is not a list of command lines"]
    if not isinstance(sizes, dict) or not sizes or not all(isinstance(values, dict) for values in sizes.values()):
        return [f"'sizes' of {where} is not a list of sizes with values each"]
    for number, step in enumerate(steps, 1):
        try:
            shlex.split(step)
        except ValueError as error:
            return [f"step {number} of {where} cannot be split into words ({str(error).lower()})"]
    wanted = {name for step in steps for name in _NAME.findall(step)} - {"out", "here"}
    if "steps" not in data or "sizes" not in data:
        return []
    faults = []
    for size, values in sizes.items():
        faults += [f"size {size!r} of {where} gives no value for {name!r}" for name in sorted(wanted - set(values))]
        faults += [f"size {size!r} of {where} has {name!r}, which no step uses" for name in set(values) - wanted]
    return faults
