"""What every closed-form recovery gives on every plan: held-out perplexity, parameters added, tokens and seconds.

    python benchmarks/recovery.py --calibration c4.jsonl --text wikitext2.test.txt [--plan block.13-18]
        [--recovery refit --recovery "low-rank:rank=64,sinks=0"] [--sequences 128] [--length 256] [--windows 40]

A recovery is a name, with options after a colon; several joined by `+` run one after another. `--plan` takes units or
a plan file. One line each. The same calibration tokens and the same windows of text for all; windows are spread evenly
over the text when fewer than all are asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel
from windows import evenly

from shallower.anatomy import dissect
from shallower.corpus import CalibrationSet, build_calibration
from shallower.engine import Ablator
from shallower.evaluation import perplexity, read_evaluation_text
from shallower.plan import PruningPlan
from shallower.recovery import Repair
from shallower.registry import Configured, recovery
from shallower.surgery import cut
from shallower.units import KINDS, Kind, Span, Unit, listed, parse_units
from shallower.verbs.recovery_steps import require_order
from shallower.verbs.repaired import RepairedLosses, split
from shallower.verbs.subject import Subject, open_subject

PLANS = ("block.13-18", "block.4-5,block.12-18")
RECOVERIES = ("emulated-update", "magnitude", "linear-fold", "low-rank", "refit", "refit:reach=rest")


@dataclass(frozen=True)
class Row:
    """One repaired model; of the cut and the dense model `recovery` says so, and only perplexity means something."""

    plan: str
    recovery: str
    perplexity: float
    share: float  # of the cut model's perplexity
    parameters: int
    tokens: int
    seconds: float


def steps_of(recipe: str) -> Sequence[Configured]:
    """The recoveries of `refit:ridge=0.1+low-rank` with their options."""
    steps = list[Configured]()
    for part in filter(None, recipe.split("+")):
        name, _, settings = part.partition(":")
        method = recovery.get(name)
        steps.append((method, method.parse_options(dict(item.split("=", 1) for item in settings.split(",") if item))))
    require_order(steps)
    return steps


def removed_by(plan: str) -> frozenset[Unit]:
    return PruningPlan.load(plan).removed if Path(plan).is_file() else frozenset(parse_units(plan))


def run(
    subject: Subject, removed: frozenset[Unit], recipe: str, text: CalibrationSet, seed: int
) -> tuple[PreTrainedModel, int, int, float]:
    """The repaired model, parameters added, tokens read and seconds."""
    student = cut(subject.anatomy, removed)
    size = sum(parameter.numel() for parameter in student.parameters())
    tokens = 0
    start = time.perf_counter()
    for method, options in steps_of(recipe):
        repair = Repair(dissect(student), subject.anatomy, removed, text, seed)
        method.function(repair, **options)
        tokens += repair.tokens
    seconds = time.perf_counter() - start
    return student, sum(parameter.numel() for parameter in student.parameters()) - size, tokens, seconds


def choose(subject: Subject, text: CalibrationSet, count: int, kind: Kind, recipe: str) -> list[tuple[str, str]]:
    """What is best as it is cut, and what is best behind the repair, both judged on the same sequences.

    Of blocks the best span of `count`, of sublayers the `count` that are best when each goes alone.
    """
    judge = RepairedLosses(subject, split(text), steps_of(recipe))
    blocks = len(subject.anatomy.blocks)
    alone = kind != "block"
    starts = range(blocks) if alone else range(1, blocks - count)
    candidates = [
        frozenset({Unit(start, kind)}) if alone else frozenset(Span(start, start + count).units) for start in starts
    ]
    with closing(Ablator(subject.anatomy, judge.judged, "nll")) as ablator:
        plain = ablator.losses(candidates)
    start = time.perf_counter()
    repaired = judge.losses(candidates)
    what = f"{blocks} {kind}" if alone else f"{len(candidates)} spans of {count} blocks"
    print(f"# {what}: loss as cut, and behind {recipe}", flush=True)
    for removed, before, after in zip(candidates, plain, repaired, strict=True):
        print(f"#   {listed(removed)}  {before:.4f}  {after:.4f}", flush=True)
    print(f"# rank correlation (Spearman) of the two: {spearmanr(plain, repaired).statistic:.3f}", flush=True)
    print(f"# {judge.spent.tokens:,} tokens read, {time.perf_counter() - start:.0f} s", flush=True)
    plans = []
    for how, losses in (("chosen as cut", plain), ("chosen behind the repair", repaired)):
        ranked = sorted(range(len(candidates)), key=losses.__getitem__)
        chosen = frozenset[Unit]().union(*(candidates[index] for index in ranked[: count if alone else 1]))
        plans.append((how, listed(chosen)))
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--plan", action="append")
    parser.add_argument("--recovery", action="append")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--choose", type=int, metavar="COUNT", help="compare what is chosen without and with the repair"
    )
    parser.add_argument("--units", default="block", choices=KINDS, help="what --choose chooses")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    subject = open_subject(asked.model, dtype=asked.dtype)
    tokenizer = subject.tokenizer
    held_out = read_evaluation_text(asked.text)
    ids = torch.tensor(tokenizer(held_out, add_special_tokens=False, verbose=False).input_ids)
    ids = evenly(ids, asked.windows, asked.window)
    text = build_calibration(
        asked.calibration, tokenizer, sequences=asked.sequences, length=asked.length, seed=asked.seed, part="train"
    )

    def measure(model: PreTrainedModel) -> float:
        return perplexity(model, tokenizer, ids, window=asked.window).perplexity

    def show(row: Row) -> None:
        if asked.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(
                f"| {row.plan} | {row.recovery} | {row.perplexity:.2f} | {row.share:.3f} | {row.parameters:,} | "
                f"{row.tokens:,} | {row.seconds:.0f} |",
                flush=True,
            )

    if not asked.json:
        print(f"{ids.numel():,} tokens of {Path(asked.text).name}, {subject.model.dtype}, calibration {text.spec}")
        print("| plan | recovery | perplexity | of the cut | parameters added | tokens read | seconds |")
        print("|---|---|---:|---:|---:|---:|---:|")
    if asked.choose:
        recipe = (asked.recovery or ["refit"])[0]
        asked.plan = []
        for how, plan in choose(subject, text, asked.choose, asked.units, recipe):
            print(f"# {how}: {plan}")
            asked.plan.append(plan)
    for plan in asked.plan or PLANS:
        removed = removed_by(plan)
        broken = measure(cut(subject.anatomy, removed))
        show(Row(plan, "cut", broken, 1.0, 0, 0, 0.0))
        for recipe in asked.recovery or RECOVERIES:
            student, added, tokens, seconds = run(subject, removed, recipe, text, asked.seed)
            found = measure(student)
            show(Row(plan, recipe, found, found / broken, added, tokens, round(seconds, 1)))


if __name__ == "__main__":
    main()
