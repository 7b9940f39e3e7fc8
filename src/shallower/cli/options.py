"""Arguments and options that several verbs share, and what their texts mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

from shallower.budget import parse_remove
from shallower.defaults import REPAIR_LENGTH, REPAIR_SEQUENCES, TRAIN_SEQUENCES
from shallower.errors import UserError
from shallower.units import Unit

Units = Literal["block", "attn", "mlp", "sublayer", "all"]


def _shipped(package: str) -> str:
    """Names of the methods in a folder of this package: their files bear them, so that nothing needs importing."""
    files = (Path(__file__).parents[1] / package).glob("[!_]*.py")
    return ", ".join(sorted(file.stem.replace("_", "-") for file in files))


RECOVERIES = _shipped("recovery")
ScoredBy = Annotated[
    str,
    Option(
        "--metric",
        metavar="NAMES",
        help=f"What to measure: {_shipped('metrics')}, several of them (cosine,taylor), or all: every metric computed "
        "on the dense model, plus loss, but not shapley.",
    ),
]
Model = Annotated[
    str,
    Argument(
        metavar="MODEL", help="A Hub name (owner/name or owner/name@revision), a local folder, a .gguf file, or 'demo'."
    ),
]
PlanFile = Annotated[Path, Argument(metavar="PLAN", help="A plan file, as 'shallower search --out' writes it.")]

Metric = Annotated[
    str | None,
    Option(
        "--metric",
        metavar="NAME",
        help=f"Metric to rank by, in searches that rank: {_shipped('metrics')}. Default: angular for contiguous, "
        "loss for milp, cosine for one-shot.",
    ),
]
_REMOVE = Option(
    "--remove",
    metavar="AMOUNT",
    help="How much to remove: a number of units (6), a share of the parameters in blocks (25%) or of another quantity "
    "(33%:kv_bytes; also bytes, flops, blocks, where a sublayer is half a block, and units, of which --units says the "
    "kind), several of these (20%,33%:kv_bytes), or the units themselves (block.13-18,attn.22).",
)
Remove = Annotated[str, _REMOVE]
RemoveOrPlan = Annotated[str | None, _REMOVE]
Search = Annotated[
    str,
    Option(
        "--search",
        metavar="NAME",
        help=f"How to choose: {_shipped('searches')}, or several in turn, each starting from what the previous one "
        "found (greedy,swap).",
    ),
]
Objective = Annotated[
    str,
    Option("--objective", metavar="NAME", help=f"What to minimise: {_shipped('objectives')}."),
]
Kinds = Annotated[
    Units, Option("--units", metavar="KIND", help="Which parts: block, attn, mlp, sublayer (attn and mlp) or all.")
]
Ordinary = Annotated[
    bool,
    Option(
        "--ordinary",
        help="With --units sublayer or all: search only plans that give an ordinary checkpoint. These remove whole "
        "blocks, and MLPs together with the attention after them; each counts as one unit. Default: any plan.",
    ),
]
Protect = Annotated[
    str,
    Option("--protect", metavar="BLOCKS", help="Blocks to keep: first:4,last:2 or block.4-9. Default: none."),
]
_TEXT = (
    "a .txt, .jsonl or .parquet file, a folder, hf:owner/name, python:docs, a domain such as wiki, a mixture "
    "(a.jsonl*0.7+b.jsonl*0.3), a .yaml specification, a set from 'shallower corpus build', or self (the model's own)"
)
_DEFAULT = "python (the documentation and code of this Python)"
Calibration = Annotated[
    str | None,
    Option(
        "--calibration",
        metavar="TEXT",
        help=f"Text to measure on: {_TEXT}; for the objective task, a .jsonl file of questions. Default: {_DEFAULT}.",
    ),
]
PruneText = Annotated[
    str | None,
    Option(
        "--calibration",
        metavar="TEXT",
        help=f"Text to measure on: {_TEXT}; for the objective task, a .jsonl file of questions. Default: {_DEFAULT}; "
        "with --plan, the text that the plan was made with, if it has not changed.",
    ),
]
RepairText = Annotated[
    str | None,
    Option(
        "--calibration",
        metavar="TEXT",
        help=f"Text to repair and train on: {_TEXT}. Default: the text that "
        f"the plan was made with, or {_DEFAULT} if there was none; if it has changed, name one.",
    ),
]
Sequences = Annotated[int, Option("--sequences", metavar="N", min=1, help="Calibration sequences, or questions.")]
TextSequences = Annotated[int, Option("--sequences", metavar="N", min=1, help="Sequences of text.")]
Length = Annotated[int, Option("--length", metavar="N", min=2, help="Tokens in each sequence.")]
Quality = Annotated[
    str, Option("--quality", metavar="NAME", help=f"What scores quality: {_shipped('corpus/quality')}.")
]
Settings = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set an option of a chosen method; repeatable. 'shallower methods NAME' lists them. Default: none.",
    ),
]
Exact = Annotated[
    bool,
    Option(
        "--exact",
        help="Choose by all of the text: a candidate is dropped only when the rest of it could not help any more. "
        "Default: races, which drop those that are clearly worse after part of it; the winner of a race is more than "
        "0.2 % worse than the best with a probability of at most 5 %.",
    ),
]
ScoresFile = Annotated[
    Path | None,
    Option(
        "--scores",
        metavar="FILE",
        help="Rank by the scores in this file, from 'shallower score --out'; --metric picks one of several metrics. "
        "Default: score now.",
    ),
]
Recover = Annotated[
    str,
    Option(
        "--recover",
        metavar="NAME",
        help=f"Repair the cut model with one recovery or several in turn: {RECOVERIES}. Default: no repair.",
    ),
]
TrainSequences = Annotated[
    int | None,
    Option(
        "--train-sequences",
        metavar="N",
        min=1,
        help="Sequences of the calibration text, or conversations, for recoveries that train (full, lora, qlora, "
        f"low-rank-trained). Default: {TRAIN_SEQUENCES}, or all of a shorter text.",
    ),
]
Instructions = Annotated[
    Path | None,
    Option(
        "--instructions",
        metavar="FILE",
        help="Train on the answers of this .jsonl file (instruction, input, output; or messages): the first "
        "--train-sequences conversations that are not longer than --length. Default: the calibration text.",
    ),
]
Distill = Annotated[
    float | None,
    Option(
        "--distill",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="In recoveries that train (full, lora, qlora), distil from the dense model: the share of its "
        "probabilities in the loss; the same as --set distill=SHARE. Default: 0, the text alone.",
    ),
]
RepairBy = Annotated[
    str,
    Option(
        "--repair",
        metavar="NAME",
        help="Changes only what is chosen; the model itself is not repaired (prune --recover does that). Every "
        "candidate is repaired by this recovery (linear-fold), and judged by its loss on the calibration text. The "
        f"recovery is fitted on other text, at least {REPAIR_SEQUENCES} sequences of {REPAIR_LENGTH} tokens, which "
        "takes long. Runs no races. Default: judge it as cut.",
    ),
]
Texts = Annotated[
    list[str] | None,
    Option(
        "--text",
        metavar="TEXT",
        help="Held-out text for perplexity; repeatable. A .txt with wikitext in its name is joined as for published "
        "results. Default: held-out documents of the calibration text.",
    ),
]
WindowLength = Annotated[int, Option("--window", metavar="N", min=2, help="Tokens in a window of held-out text.")]
Seed = Annotated[int, Option("--seed", metavar="N", min=0, help="Decides every random choice.")]
SeedOrPlans = Annotated[
    int | None,
    Option(
        "--seed",
        metavar="N",
        min=0,
        help="Decides every random choice. Default: 0; for a plan's text, the seed that the plan was made with.",
    ),
]
Memory = Annotated[
    str | None,
    Option(
        "--memory",
        metavar="BYTES",
        help="Memory for what is kept besides the model: 4GB, 500MB, 4GiB. Default: a quarter of the free memory.",
    ),
]
MeasuredBy = Annotated[
    str | None,
    Option(
        "--workers",
        metavar="WHO",
        help="Measure with Ray: a number of workers on this machine, auto (the cluster that RAY_ADDRESS names or that "
        "runs here, with one worker and one copy of the model for each of its processors or GPUs), auto:4 (at most 4 "
        "of these workers) or host:port. Default: threads of this process.",
    ),
]
Device = Annotated[str, Option("--device", metavar="DEVICE", help="auto (the best available), cpu, cuda or cuda:1.")]
Dtype = Annotated[
    str,
    Option(
        "--dtype",
        metavar="TYPE",
        help="auto (what the device multiplies fastest; on a processor measured once, and kept in the cache's folder "
        "dtype), float32, bfloat16 or float16.",
    ),
]
RemoteCode = Annotated[
    bool,
    Option("--trust-remote-code", help="Run code that comes with the model; read it first. Default: refuse."),
]
StreamBlocks = Annotated[
    bool,
    Option(
        "--stream-blocks",
        help="For a model larger than the device: leave its blocks on the processor (mapped from their files where "
        "--dtype is as stored), and bring each to the device only while it runs: once for all candidates, which do not "
        "race then. Default: load all of it.",
    ),
]
Force = Annotated[bool, Option("--force", help="Replace what --out names if it exists. Default: refuse.")]


def count_or_all(text: str | int) -> int | None:
    """None for all. Raises BadParameter for what is no number from 1 up."""
    if text == "all":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise BadParameter(f"{text!r} is not 1 or more, or all")
    return number


Windows = Annotated[
    int | None,
    Option(
        "--windows",
        metavar="N",
        parser=count_or_all,
        help="Windows to evaluate of each text, from its start, or all.",
    ),
]


def require_reader(given: Mapping[str, object], reader: str) -> None:
    """Raise UserError when an option was given, which is not None here, that nothing reads without `reader`."""
    named = [name for name, value in given.items() if value is not None]
    if named:
        told = f"{', '.join(named[:-1])} and {named[-1]} are" if len(named) > 1 else f"{named[0]} is"
        raise UserError(f"{told} read only with {reader}: name one, or leave {'them' if named[1:] else 'it'} out.")


def with_distill(settings: dict[str, str], share: float | None, recoveries: str) -> dict[str, str]:
    """The settings with what `--distill` says.

    Raises UserError when they say something else, or none of the recoveries learns from the dense model.
    """
    if share is None:
        return settings
    if not recoveries:
        raise UserError(
            f"--distill {share:g} is for a recovery that trains: add one, as in --recover full, or drop it."
        )
    from shallower.verbs.recovery_steps import parse_recoveries

    if not any("distill" in method.options for method, _ in parse_recoveries(recoveries, {})):
        raise UserError(
            f"--distill {share:g} is for full, lora and qlora, and {recoveries} has none of them: add one, as in "
            f"{recoveries},full, or drop --distill."
        )
    said = settings.get("distill", str(share))
    try:
        same = float(said) == share
    except ValueError:
        same = False
    if not same:
        raise UserError(f"--distill {share:g} and --set distill={said} differ: drop one of the two.")
    return settings | {"distill": str(share)}


def require_amount(
    remove: str,
    searched: Mapping[str, bool],
    *,
    search: str,
    objective: str,
    metric: str | None,
    settings: Mapping[str, str],
    recoveries: Sequence[str] = (),
) -> None:
    """Raise UserError where `remove` names the units, and something was given that only a search among others heeds.

    searched: such flags, and whether each was given. settings: the texts of `--set`, of which the objective's and those
    of `recoveries` are heeded all the same.
    """
    if not isinstance(parse_remove(remove)[0], Unit):
        return
    from shallower.registry import objective as objectives
    from shallower.verbs.recovery_steps import named_recoveries
    from shallower.verbs.search_methods import settable

    heeding = [
        objectives.get(objective),
        *(method for names in recoveries if names for method in named_recoveries(names)),
    ]
    heeded = {option for method in heeding for option in method.options}
    idle_ones = settable(search, objective, metric) - heeded
    given = {**searched, "--set": any(name in idle_ones for name in settings)}
    if idle := [flag for flag, there in given.items() if there]:
        them = "it" if len(idle) == 1 else "them"
        raise UserError(f"--remove {remove} names what goes, so {', '.join(idle)} would change nothing; drop {them}.")


def parse_settings(given: Sequence[str] | None) -> dict[str, str]:
    """Read the texts of `--set`. Raises UserError for one that is not name=value, or names an option twice."""
    settings: dict[str, str] = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set {item!r} cannot be read: write name=value, as in --set width=4.")
        name = name.strip().replace("-", "_")
        if name in settings:
            raise UserError(f"--set names {name!r} twice ({settings[name]} and {value}); give it once.")
        settings[name] = value.strip()
    return settings
