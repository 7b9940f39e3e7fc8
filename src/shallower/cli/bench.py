"""`shallower bench`: how fast are several models, and what do they hold in memory?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from shallower.cli import options
from shallower.cli.output import print_written, require_free, say
from shallower.cli.verb import Answer, verb
from shallower.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


@verb
def bench(
    models: Annotated[
        list[str],
        Argument(
            metavar="MODEL...",
            help="Models to compare with the first: Hub names, local folders, .gguf files, or 'demo'. All are in "
            "memory at once.",
        ),
    ],
    prompt: Annotated[
        str, Option("--prompt", metavar="N,N", help="Tokens in each prompt; several sizes: 128,1024.")
    ] = "128",
    generate: Annotated[int, Option("--generate", metavar="N", min=1, help="Tokens decoded after each prompt.")] = 32,
    batch: Annotated[str, Option("--batch", metavar="N,N", help="Sequences at once; several sizes: 1,8.")] = "1",
    repeats: Annotated[
        int,
        Option(
            "--repeats",
            metavar="N",
            min=1,
            help="Measured runs of each model; fewer than 4 say little of a difference.",
        ),
    ] = 5,
    warmup: Annotated[int, Option("--warmup", metavar="N", min=0, help="Runs of each before, not measured.")] = 1,
    out: Annotated[
        Path | None, Option("--out", metavar="FILE", help="Write all figures here, as JSON. Default: only show them.")
    ] = None,
    force: options.Force = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Compare models by speed and memory.

    Times prefill and decoding, and shows peak memory and KV cache. Runs of the models alternate in one process, with
    the KV cache on and outputs of equal length.
    """
    require_free(out, force=force)
    prompts, batches = _sizes("--prompt", prompt), _sizes("--batch", batch)
    from shallower.reporting.tables import bench_table
    from shallower.strict_json import write_json
    from shallower.verbs.bench import bench as run

    found = run(
        models,
        prompt=prompts,
        generate=generate,
        batch=batches,
        repeats=repeats,
        warmup=warmup,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    data = found.to_json()
    if out is not None:
        write_json(out, data)

    def show(console: Console) -> None:
        console.print(bench_table({timed.model: timed.speeds for timed in found.models}, found.setting))
        source = found.memory and f"weights, and the most that {found.memory} grew in a run that was not timed"
        say(console, f"Peak memory: {source or 'not measured, as this machine has no way to'}.")
        for note in found.notes:
            say(console, f"Note: {note}")
        print_written(console, out, "the figures")

    return Answer(data, show)


def _sizes(option: str, text: str) -> list[int]:
    """Read `128,1024`. Raises UserError for what is no list of positive whole numbers."""
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item.isdecimal() or int(item) < 1:
            raise UserError(
                f"{option} {text!r} cannot be read: write whole numbers from 1 on, separated by commas, as in 128,1024."
            )
    return [int(item) for item in items]
