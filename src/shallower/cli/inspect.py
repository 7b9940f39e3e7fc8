"""`shallower inspect`: blocks, sublayers, what they weigh, and what a removal would save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Option

from shallower.cli import options
from shallower.cli.output import print_removed, say
from shallower.cli.verb import Answer, verb
from shallower.plan import Gone

if TYPE_CHECKING:
    from rich.console import Console


@verb
def inspect(
    model: options.Model,
    remove: Annotated[
        str,
        Option("--remove", metavar="UNITS", help="Also show what is left without these: block.13-18. Default: none."),
    ] = "",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Show how large each block and sublayer of a model is."""
    from shallower.reporting.tables import inspection_table
    from shallower.verbs.inspect import inspect as run

    found = run(model, remove=remove, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    def show(console: Console) -> None:
        name, blocks = found.identity.name, found.identity.blocks
        sublayers = [f"{kind}: {', '.join(found.parts[kind]) or 'none found'}" for kind in ("attn", "mlp")]
        say(
            console,
            f"{name}: {found.family} in {found.dtype}, {blocks} blocks at {found.path} ({'; '.join(sublayers)})",
        )
        console.print(inspection_table(found.weights, found.removed, found.gone))
        for form, what in found.exports.items():
            say(console, f"{form}: {what}")
        if found.removed:
            gone, weights = found.gone.parameters, found.weights
            shares = Gone(gone, weights.model.parameters, weights.blocks.parameters)
            print_removed(console, found.removed, found.identity, shares)

    return Answer(found.to_json(), show)
