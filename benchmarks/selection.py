"""Time to a plan: ours against the published algorithms written plainly, same model, same tokens, same process.

The reference runs one full forward of the stock model, with its own loss, for every candidate set, as the public tools
do. It takes 2,048 tokens a forward, as SLEB and EvoPress do, or what `--reference-tokens` says. Ours asks the engine.
Both compute in the same number format. Runs alternate; the answers are compared.

    python benchmarks/selection.py --text c4.jsonl [--model demo] [--task greedy-blocks] [--json] [--tokens 4096]

The reference of `evolutionary` is EvoPress without its staged token budgets (few tokens for all children, more for the
best of them): every child is measured on all tokens.

With one repeat a task with racing takes the reference's time from the exact task before it. One line a task: seconds of
both (medians over --repeats), their ratio, tokens read by both, whether the plans are the
same, and how much higher the calibration loss of our plan is (relative). Two more tasks show what has no reference:
`memory` (what objectives take beyond the model at 16 × 2,048 tokens) and `growth` (seconds against calibration tokens).
With --json each line is an object with `task` and `threads`; that of these two has `rows` besides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from shallower.budget import Budget, parse_remove
from shallower.corpus import CalibrationSet, build_calibration
from shallower.engine import Ablator, Racing
from shallower.exchange import random_exchange
from shallower.registry import search as searches
from shallower.scores import Scores
from shallower.units import Unit
from shallower.verbs.request import budget_for
from shallower.verbs.subject import Subject, open_subject, units_of
from shallower.verbs.trail import run_search

Removed = frozenset[Unit]


@dataclass(frozen=True)
class Task:
    """A selection problem with the published algorithm for it.

    racing: whether ours may drop candidates early. tokens: of calibration, unless `--tokens` says otherwise; as many as
    the reference gets through in a quarter of an hour or so, as races need sequences.
    """

    name: str
    units: str
    remove: int
    reference: Callable[[Reference, Sequence[Unit], int], Removed]
    search: str
    racing: bool
    tokens: int


class Reference:
    """The plain way: cut the units out of the stock model, run all tokens through all of it, read its own loss."""

    def __init__(self, subject: Subject, text: CalibrationSet, tokens_a_forward: int) -> None:
        self.anatomy = subject.anatomy
        self.text = text
        self.sequences = max(1, tokens_a_forward // text.length)
        self.tokens = 0

    def loss(self, removed: Removed) -> float:
        total = 0.0
        with self._cut(removed), torch.no_grad():
            for batch in self.text.batches(self.sequences):
                output = self.anatomy.model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False)
                total += float(output.loss) * len(batch.input_ids)
        self.tokens += self.text.input_ids.numel()
        return total / self.text.sequences

    @contextmanager
    def _cut(self, removed: Removed) -> Iterator[None]:
        """Take blocks out of the model's own list, and give sublayers' projections nothing to add."""
        layers = self.anatomy.model.get_submodule(self.anatomy.path)
        assert isinstance(layers, nn.ModuleList)
        parent = self.anatomy.model.get_submodule(self.anatomy.path.rpartition(".")[0])
        name = self.anatomy.path.rpartition(".")[2]
        gone = {unit.index for unit in removed if unit.kind == "block"}
        config = self.anatomy.model.config
        count = config.num_hidden_layers
        contexts = [self.anatomy.blocks[unit.index].without(unit.kind) for unit in removed if unit.kind != "block"]
        try:
            setattr(parent, name, nn.ModuleList(layer for index, layer in enumerate(layers) if index not in gone))
            config.num_hidden_layers = count - len(gone)
            for context in contexts:
                context.__enter__()
            yield
        finally:
            for context in reversed(contexts):
                context.__exit__(None, None, None)
            setattr(parent, name, layers)
            config.num_hidden_layers = count


def shortened_llama(reference: Reference, units: Sequence[Unit], count: int) -> Removed:
    """One-shot PPL of 2402.02834: the loss without each unit, once; the lowest go."""
    losses = {unit: reference.loss(frozenset({unit})) for unit in units}
    return frozenset(sorted(units, key=lambda unit: (losses[unit], -unit.index))[:count])


def sleb(reference: Reference, units: Sequence[Unit], count: int) -> Removed:
    """Greedy of SLEB (2402.09025) and BlockPruner (2406.10594): remove, re-measure."""
    removed: Removed = frozenset()
    while len(removed) < count:
        candidates = [removed | {unit} for unit in units if unit not in removed]
        removed = min(candidates, key=reference.loss)
    return removed


GENERATIONS, OFFSPRING = 12, 16


def evopress(
    reference: Reference, units: Sequence[Unit], count: int, generations: int = GENERATIONS, seed: int = 0
) -> Removed:
    """An EvoPress-like (1 + λ) run (2410.14649): every child on all tokens, where EvoPress gives the tokens in stages;
    only the parent is remembered.
    """
    budget = _budget(units, count)
    parent = frozenset(Random(seed).sample(list(units), count))
    best = reference.loss(parent)
    rng = Random(seed)
    for _ in range(generations):
        children = [_child(units, budget, parent, rng) for _ in range(OFFSPRING)]
        losses = [reference.loss(child) for child in children]
        if min(losses) < best:
            best = min(losses)
            parent = children[losses.index(best)]
    return parent


def _child(units: Sequence[Unit], budget: Budget, parent: Removed, rng: Random) -> Removed:
    """Level switches: the smaller of two draws from 1 to 3."""
    child = parent
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        child = random_exchange(units, budget, child, rng)
    return child


TASKS = (
    Task("one-shot", "block", 8, shortened_llama, "one-shot", racing=False, tokens=4096),
    Task("greedy-blocks-exact", "block", 8, sleb, "greedy", racing=False, tokens=4096),
    Task("greedy-blocks", "block", 8, sleb, "greedy", racing=True, tokens=4096),
    Task("greedy-sublayers-exact", "sublayer", 15, sleb, "greedy", racing=False, tokens=3072),
    Task("greedy-sublayers", "sublayer", 15, sleb, "greedy", racing=True, tokens=3072),
    Task("evolutionary-exact", "block", 8, evopress, "evolutionary", racing=False, tokens=2048),
    Task("evolutionary", "block", 8, evopress, "evolutionary", racing=True, tokens=2048),
)


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    task: str
    threads: int
    ours_s: float
    reference_s: float
    speedup: float
    tokens_ours: int
    tokens_reference: int
    same_plan: bool
    loss_gap: float


def run(
    task: Task,
    subject: Subject,
    text: CalibrationSet,
    repeats: int,
    tokens_a_forward: int,
    known: dict[str, tuple[float, int, Removed]],
    threads: int,
) -> Row:
    """Time one task; the reference of a task that only differs in racing is run once for both."""
    units = units_of(subject, task.units)
    budget = budget_for(
        subject, [amount for amount in parse_remove(str(task.remove)) if not isinstance(amount, Unit)], units
    )
    ours, theirs = [], []
    key = f"{task.reference.__name__} {task.units} {text.digest}"
    for _ in range(repeats):
        start = time.perf_counter()
        ablator = Ablator(subject.anatomy, text, racing=Racing() if task.racing else None)
        chosen = _ours(task, subject, units, budget, ablator)
        ours.append(time.perf_counter() - start)
        if key not in known or repeats > 1:
            plain = Reference(subject, text, tokens_a_forward)
            start = time.perf_counter()
            found = task.reference(plain, units, task.remove)
            theirs.append(time.perf_counter() - start)
            known[key] = (statistics.median(theirs), plain.tokens, found)
    reference_s, reference_tokens, found = known[key]
    spent = ablator.spent.tokens
    mine, best = ablator.losses([chosen, found])
    return Row(
        task.name,
        threads,
        statistics.median(ours),
        reference_s,
        reference_s / statistics.median(ours),
        spent,
        reference_tokens,
        chosen == found,
        mine / best - 1,
    )


def _ours(task: Task, subject: Subject, units: Sequence[Unit], budget: Budget, ablator: Ablator) -> Removed:
    method = searches.get(task.search)
    if task.search == "one-shot":
        values = dict(zip(units, ablator.losses([frozenset({unit}) for unit in units]), strict=True))
        trail: list[Removed] = list(method.function(scores=values, budget=budget))
        return trail[-1]
    options = {"generations": GENERATIONS, "offspring": OFFSPRING, "patience": GENERATIONS}
    stages = [(method, options if task.search == "evolutionary" else {})]
    if method.traits.get("starts"):
        stages.insert(0, (searches.get(method.traits["starts"]), {}))
    no_scores: Scores | None = None
    return run_search(stages, units, budget, ablator.losses, no_scores, 0)[-1]


def _budget(units: Sequence[Unit], count: int) -> Budget:
    from shallower.budget import Limit

    return Budget((Limit("units", float(count), float(len(units)), dict.fromkeys(units, 1.0)),))


def head_memory(subject: Subject, source: str) -> Iterator[dict[str, float]]:
    """Peak of resident memory while 16 sequences of 2,048 tokens are measured without a block, by objectives of text.

    `hidden-cosine` needs no head. No streams are kept between questions, nor the dense model's logits, so that what
    shows is the work itself.
    """
    text = build_calibration(source, subject.tokenizer, sequences=16, length=2048)
    whole = 4 * text.input_ids.numel() * subject.model.get_input_embeddings().num_embeddings / 1e6
    _peak_megabytes()
    before = _peak_megabytes()  # resident now: nothing ran since the line above
    middle = subject.anatomy.of_kind("block")[len(subject.anatomy.blocks) // 2]
    peaks = {}
    for objective in ("hidden-cosine", "nll", "kl", "js", "logit-l2", "top1"):
        ablator = Ablator(subject.anatomy, text, objective, memory=0)
        _peak_megabytes()
        ablator.losses([frozenset({middle})])
        peaks[f"above_model_{objective}_mb"] = round(_peak_megabytes() - before)
        ablator.close()
    yield {"model_mb": round(before), **peaks, "logits_in_float32_would_be_mb": round(whole)}


def _peak_megabytes() -> float:
    """Highest resident memory of this process since this was last asked (Linux)."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1e3


def growth(subject: Subject, source: str) -> Iterator[dict[str, float]]:
    """Seconds of leave-one-out over all blocks as the calibration set doubles."""
    for sequences in (8, 16, 32, 64):
        text = build_calibration(source, subject.tokenizer, sequences=sequences, length=64)
        start = time.perf_counter()
        Ablator(subject.anatomy, text).losses([frozenset({unit}) for unit in subject.anatomy.of_kind("block")])
        seconds = time.perf_counter() - start
        tokens = text.input_ids.numel()
        yield {"tokens": tokens, "seconds": round(seconds, 2), "microseconds_a_token": round(seconds / tokens * 1e6)}


ALONE: dict[str, Callable[[Subject, str], Iterator[dict[str, float]]]] = {"memory": head_memory, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True, help="calibration text, such as c4.jsonl")
    parser.add_argument("--tokens", type=int, help="of calibration; default: as many as suit the task")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--reference-tokens", type=int, default=2048, help="tokens a forward of the reference takes")
    parser.add_argument("--dtype", default="auto", help="number format of both sides; auto: what is fastest here")
    parser.add_argument("--task", action="append", choices=[*(task.name for task in TASKS), *ALONE])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    subject = open_subject(given.model, dtype=given.dtype)
    warm_up = build_calibration(given.text, subject.tokenizer, sequences=16, length=given.length)
    Reference(subject, warm_up, given.reference_tokens).loss(frozenset())
    Ablator(subject.anatomy, warm_up).losses([frozenset()])
    threads = torch.get_num_threads()
    for name in given.task or ALONE:
        if name in ALONE and given.json:
            told = {"task": name, "threads": threads, "rows": list(ALONE[name](subject, given.text))}
            print(json.dumps(told), flush=True)
        elif name in ALONE:
            for line in ALONE[name](subject, given.text):
                print(f"{name:24} {line}", flush=True)
    if not given.json:
        print(
            f"sequences of {given.length} tokens, {subject.model.dtype}, "
            f"{threads} threads, reference {given.reference_tokens} tokens a forward"
        )
        print(
            f"{'task':24} {'text':>6} {'ours s':>8} {'plain s':>8} {'ratio':>6} {'tokens':>10} {'plain':>10} "
            "same plan  loss gap"
        )
    known: dict[str, tuple[float, int, Removed]] = {}
    for task in TASKS:
        if given.task and task.name not in given.task:
            continue
        tokens = given.tokens or task.tokens
        text = build_calibration(given.text, subject.tokenizer, sequences=tokens // given.length, length=given.length)
        row = run(task, subject, text, given.repeats, given.reference_tokens, known, threads)
        if given.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(
                f"{row.task:24} {text.input_ids.numel():6,} {row.ours_s:8.1f} {row.reference_s:8.1f} "
                f"{row.speedup:6.2f} {row.tokens_ours:10,} "
                f"{row.tokens_reference:10,} {row.same_plan!s:>9}  {row.loss_gap:+.3%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
