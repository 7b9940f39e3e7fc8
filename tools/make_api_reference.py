"""Write docs/api.md from the public functions and their docstrings; a test compares the two.

python tools/make_api_reference.py
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import shallower

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"

INTRODUCTION = """\
# Python: the public functions

<!-- Made by tools/make_api_reference.py; do not edit. -->

    import shallower

Importing takes no torch; a function brings in what it needs when it is first used. MODEL, below `model`, is what the
command line takes (a Hub name, a folder, a `.gguf` file, `demo`), or a `PreTrainedModel`, or a `Subject` (see
`open_subject`). A model in memory needs `tokenizer=` wherever text is read, unless calibration is a `CalibrationSet`;
otherwise it takes the place of the one that the model came with. A model in memory is put into evaluation mode and
stays so: call `model.train()` again to go on training it. Change no weights while a function runs; between two, they
may be changed.

Arguments are called as the command line's options, with `_` for `-`: `--train-sequences` is `train_sequences`. These
differ:

| command line | Python |
|---|---|
| `--set name=value`, repeated | `settings={"name": "value"}`, values as text |
| `--distill 0.9` (`prune`, `recover`) | `settings={"distill": "0.9"}` |
| `--text`, repeated | `texts=[…]` |
| `--windows` | `max_windows` |
| `recover --with` | `methods`, the second argument |
| `search --for` | `target` |
| `prune --stock` | `form="padded"` |
| `eval` | `evaluate`; with `--plan` it is `ratio_curve` |
| `eval --suite`, repeated | `suites=[…]` |
| `eval --tasks a,b` | `tasks=["a", "b"]` |
| `eval --fewshot` | `shots` |
| `eval --generate` | `generation=True` (but `bench --generate` is `generate`) |
| `eval --chat-template` | `chat=True` |
| `eval --at 1,2,4` | `at=[1, 2, 4]` of `ratio_curve` |
| `eval --memory` | `memory` of `ratio_curve` |
| `score --metric` | `metric` of `score`, `names` of `score_many` (several, or `all`) |
| `score --out`, `search --out`, `bench --out`, each with `--force` | none: `.save(path)` of `Scores`, `ScoreSheet` and `PruningPlan`, `.to_json()` of `Bench` |
| `study --dry-run`; `--json`, `--quiet`, `--debug` | none |

Only Python has `tokenizer`, `ablator`, and `tasks`, `task_items` and `task_data` of `prune`. The verbs `corpus`,
`plan`, `methods` and `run` are no functions here.
"""  # noqa: E501  (the rows of a table)

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "The verbs": (
        *("inspect", "score", "score_many", "search", "prune", "recover", "evaluate", "ratio_curve", "bench", "study"),
        *("demo", "report"),
    ),
    "Models, cutting, saving": ("load", "open_subject", "dissect", "cut", "save"),
    "Text, and losses of candidate sets": ("build_calibration", "CalibrationSet", "Ablator"),
    "Values": ("Unit", "Span", "PruningPlan", "Scores", "ScoreSheet"),
    "Errors, and the version": ("ShallowerError", "UserError", "__version__"),
    "Methods of your own": ("metric", "objective"),
}

# What is got, and how it is used, as far as docstrings do not say it
USE: Mapping[str, str] = {
    "inspect": "Gives an `Inspection`: `.weights`, `.parts`, `.exports`, `.to_json()`.",
    "score": "Gives `Scores`: `.units` and `.spans` are dictionaries, `.ranked()` lists units from least important on.",
    "score_many": "Gives a `ScoreSheet`.",
    "search": "Gives a `PruningPlan`. `ablator`: one that several searches share.",
    "prune": "Gives a `Pruned`: `.model`, `.plan`, `.report`, `.folder`. Give `remove` or `plan`.",
    "recover": "Gives a `Recovered`: `.model`, `.dense` (its perplexity), `.stages` with that behind each, `.folder`.",
    "evaluate": "Gives a `Comparison`: `.evaluations`, `.text_difference(…)`, `.task_difference(…)`, `.to_json()`.",
    "bench": "Gives a `Bench`: `.to_json()`.",
    "study": "Gives a `Finished`: `.results`, `.findings`. The command line writes the pages ([study.md](study.md)).",
    "demo": "Gives a `Pruned`.",
    "open_subject": "Gives a `Subject`: `.model`, `.tokenizer`, `.anatomy`, `.weights`, `.identity`. Open it once "
    "where several verbs work on the same model.",
    "dissect": "Gives an `Anatomy`: `.units`, `.blocks`.",
    "build_calibration": "Specifications: [corpus.md](corpus.md). The verbs use other defaults for `part` (`train`) "
    "and `length` than this function does.",
    "CalibrationSet": "`.digest`, `.tokens`, `.batches(n)`, `.subset(rows)`, `.save(path)`, `.load(path)`.",
    "Ablator": "`.losses(candidates)` is the objective without each set of units, `.differences(candidates)` the "
    "rise over the dense model with its standard error. Without `racing` it is exact. Call `.close()` when done.",
    "Unit": '`Unit(7, "attn")`, or `Unit.parse("attn.7")`; kinds are `block`, `attn` and `mlp`.',
    "Span": "`Span(13, 19)` is blocks 13 to 18; `Span(13.5, 19)` begins with the MLP of block 13.",
    "PruningPlan": "`.remove`, `.order`, `.made_by`; `.at(n)` is its first n removals; `.save(path)`, "
    "`PruningPlan.load(path)`. The file: [files.md](files.md).",
    "Scores": "`.save(path)`, `Scores.load(path)`.",
    "ScoreSheet": "`.pick(metric)`, `.save(path)`, `ScoreSheet.load(path)`.",
    "UserError": "`shallower.errors` has the finer kinds.",
    "__version__": "The version, as text.",
    "metric": "A decorator that registers a metric, with its `traits`. See [CONTRIBUTING.md](../CONTRIBUTING.md).",
    "objective": "A decorator that registers an objective. Those of searches and recoveries: `shallower.registry`.",
}


def reference() -> str:
    """The page as Markdown."""
    missing = set(shallower.__all__) ^ {name for names in SECTIONS.values() for name in names}
    if missing:
        raise ValueError(f"{sorted(missing)} must be in SECTIONS and in shallower.__all__, once")
    lines = [INTRODUCTION]
    for title, names in SECTIONS.items():
        lines.append(f"## {title}\n")
        for name in names:
            lines += _entry(name)
    return "\n".join(lines)


def _entry(name: str) -> Iterator[str]:
    thing = getattr(shallower, name)
    yield f"### `{name}`\n"
    if callable(thing) and not (isinstance(thing, type) and issubclass(thing, Exception)):
        yield textwrap.indent("\n".join(textwrap.wrap(signature(name), 110, subsequent_indent="    ")), "    ") + "\n"
    if inspect.isroutine(thing) or isinstance(thing, type):
        yield _prose(inspect.getdoc(thing) or "") + "\n"
    if name in USE:
        yield USE[name] + "\n"


def signature(name: str) -> str:
    """Names and simple defaults."""
    shown, only_by_name = [], False
    for parameter in inspect.signature(getattr(shallower, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not only_by_name:
            shown.append("*")
            only_by_name = True
        plain = isinstance(parameter.default, (str, int, float, tuple, type(None)))
        default = f"={parameter.default!r}" if plain else "=…"
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        shown.append(stars + parameter.name + ("" if parameter.default is parameter.empty else default))
    return f"{name}({', '.join(shown)})"


def _prose(text: str) -> str:
    """A docstring as Markdown: arguments under `Args:` and errors under `Raises:` become list items."""

    def listed(found: re.Match[str]) -> str:
        items = re.sub(r"^    (\w+): ", r"- `\1`: ", found[2], flags=re.MULTILINE)
        return f"{found[1]}:\n\n" + re.sub(r"^ {6,}", "  ", items, flags=re.MULTILINE)

    return re.sub(r"^(Args|Raises|Returns):\n((?:    .*\n?|\n(?=    ))+)", listed, text, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
