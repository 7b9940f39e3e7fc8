"""`shallower eval`: perplexity of several models on several texts, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from shallower.cli import options
from shallower.cli.verb import Answer, verb

if TYPE_CHECKING:
    from rich.console import Console


@verb
def evaluate(
    models: Annotated[
        list[str],
        Argument(
            metavar="MODEL...",
            help="Models to compare with the first: Hub names, local folders, .gguf files, or 'demo'.",
        ),
    ],
    text: Annotated[
        list[str],
        Option(
            "--text", metavar="TEXT", help="Text to read: a .txt or .jsonl file, a folder, hf:owner/name; repeatable."
        ),
    ],
    window: options.Window = 1024,
    stride: Annotated[
        int | None,
        Option(
            "--stride", metavar="N", min=1, help="Tokens from one window to the next. Default: windows side by side."
        ),
    ] = None,
    windows: Annotated[
        int | None,
        Option("--windows", metavar="N", min=1, help="Windows of each text, from its start. Default: all."),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> Answer:
    """Compare models by their perplexity on the same texts."""
    from shallower.reporting.tables import PerplexityRow, perplexity_table
    from shallower.reporting.wording import distinct_names
    from shallower.verbs.evaluate import evaluate as run
    from shallower.verbs.evaluate import text_name

    found = run(
        models,
        text,
        window=window,
        stride=stride,
        max_windows=windows,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    data = {"evaluations": [evaluation.to_json() for evaluation in found]}
    columns = distinct_names([text_name(name) for name in text], text)
    by_model = [found[start : start + len(text)] for start in range(0, len(found), len(text))]
    labels = distinct_names([each[0].model for each in by_model], models)
    rows = [
        PerplexityRow(
            label,
            each[0].blocks,
            each[0].parameters,
            {column: evaluation.perplexity.perplexity for column, evaluation in zip(columns, each, strict=True)},
        )
        for label, each in zip(labels, by_model, strict=True)
    ]

    def show(console: Console) -> None:
        console.print(perplexity_table(rows))
        for column, evaluation in zip(columns, by_model[0], strict=True):
            measured = evaluation.perplexity
            console.print(f"{column}: {measured.tokens:,} tokens scored in {measured.windows} windows.")

    return Answer(data, show)
