"""How likely several models of one dense model find given tokens: many questions, asked of many sets of removed units.

The blocks before the first removal in which sets differ run once for all of them, and the head sees only the positions
whose tokens are asked for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from shallower.anatomy.dissect import Anatomy
from shallower.corpus.calibration import Batch, padded
from shallower.engine.evaluator import Evaluator, Job
from shallower.engine.head import ROW_CHUNK_BYTES, ROW_CHUNK_BYTES_ELSEWHERE, Head
from shallower.engine.routes import Route, route_of
from shallower.engine.states import States
from shallower.engine.trace import Trace, prove
from shallower.engine.workers import Threads, thread_count, usual_memory
from shallower.registry import objective as objectives
from shallower.units import Unit

TOKENS_A_BATCH = {"cpu": 1024}
TOKENS_A_BATCH_ELSEWHERE = 16384

Likelihood = tuple[float, bool]
"""The log-likelihood of some tokens in nats, and whether each of them is the likeliest."""


@dataclass(frozen=True)
class Asked:
    """ids: what the model reads. targets: the tokens that the last `len(targets)` positions should predict."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


def perplexity_of(loss: float) -> float:
    """Exponential of a mean loss in nats, infinite where it is larger than a float can be (e^709)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Likelihoods:
    """Log-likelihoods under the model without each of several sets of units."""

    def __init__(self, anatomy: Anatomy, candidates: Sequence[Collection[Unit]], *, memory: int | None = None) -> None:
        """memory: bytes that may be used besides the model, by default a quarter of what is free.

        Raises BudgetError when a candidate names a unit that the model does not have, ModelError when replay does not
        reproduce the model.
        """
        prove(anatomy, shared=True)
        self.anatomy = anatomy
        self.candidates = tuple(frozenset(candidate) for candidate in candidates)
        self.routes: list[Route] = [route_of(anatomy, candidate) for candidate in candidates]
        self.memory = usual_memory(anatomy.model) if memory is None else memory

    def of(
        self, asked: Sequence[Asked], tick: Callable[[], None] = lambda: None
    ) -> Iterator[dict[int, list[Likelihood]]]:
        """For each place in `asked` the answer of every candidate, some places at a time, in any order. What reads the
        same ids shares a row. `tick` is called for each candidate of a batch.
        """
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, one in enumerate(asked):
            rows[one.ids].append(place)
        device = self.anatomy.model.device
        budget = TOKENS_A_BATCH.get(device.type, TOKENS_A_BATCH_ELSEWHERE)
        groups: list[list[tuple[int, ...]]] = []
        for ids in sorted(rows, key=lambda ids: (-len(ids), ids)):
            if not groups or (len(groups[-1]) + 1) * len(groups[-1][0]) > budget:
                groups.append([])
            groups[-1].append(ids)
        places = [[place for ids in group for place in rows[ids]] for group in groups]
        batches = [
            _AskedBatch(
                padded(group, 0)[0],  # what is filled up stands behind the rest, where nothing looks at it
                None,
                None,
                tuple((row, asked[place]) for row, ids in enumerate(group) for place in rows[ids]),
            )
            for group in groups
        ]
        threads = thread_count(self.anatomy)
        evaluator = _Asking(
            self.anatomy,
            batches,
            objectives.get("nll"),
            {},
            states=States(0),  # nothing is asked again
            memory=self.memory // threads,
        )
        jobs = [Job(number, tuple(dict.fromkeys(self.routes))) for number in range(len(batches))]
        waiting: dict[int, dict[Route, list[Likelihood]]] = defaultdict(dict)
        with closing(Threads(evaluator, threads)) as workers:
            for done in workers.run(jobs, tick):
                found = waiting[done.job.number]  # a batch may be shared between threads
                for route, values in done.sums.items():
                    pairs = values.reshape(-1, 2)
                    found[route] = [(float(value), bool(likeliest)) for value, likeliest in pairs]
                if len(found) == len(set(self.routes)):
                    here = places[done.job.number]
                    yield {place: [found[route][at] for route in self.routes] for at, place in enumerate(here)}
                    del waiting[done.job.number]

    def batches(self, asked: Sequence[Asked]) -> int:
        """About how many batches `of` would make, each of which ticks once a candidate."""
        tokens = sum(len(ids) for ids in {one.ids for one in asked})
        budget = TOKENS_A_BATCH.get(self.anatomy.model.device.type, TOKENS_A_BATCH_ELSEWHERE)
        return -(-tokens // budget)


@dataclass(frozen=True)
class _AskedBatch(Batch):
    """asks: for each question its row."""

    asks: tuple[tuple[int, Asked], ...] = ()


class _Asking(Evaluator):
    """Measures likelihoods in place of an objective: for each question two numbers, one after the other."""

    def _scorer(self, number: int, dense: Tensor | None) -> _AskScorer:
        batch = self.batches[number]
        assert isinstance(batch, _AskedBatch)
        return _AskScorer(self._head, self._trace(number), batch.asks)


class _AskScorer:
    together = 1

    def __init__(self, head: Head | None, replay: Trace, asks: Sequence[tuple[int, Asked]]) -> None:
        self.head = head
        self.trace = replay
        places: dict[tuple[int, int], int] = {}  # a position whose token several questions ask for is scored once
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.question: list[int] = []
        for number, (row, asked) in enumerate(asks):
            first = len(asked.ids) - len(asked.targets)
            for offset, target in enumerate(asked.targets):
                self.rows.append(places.setdefault((row, first + offset), len(places)))
                self.targets.append(target)
                self.question.append(number)
        self.questions = len(asks)
        self.at = torch.tensor(list(places), dtype=torch.int64)

    def __call__(self, hiddens: Sequence[Tensor]) -> list[Tensor]:
        return [self._score(hidden) for hidden in hiddens]

    def _score(self, hidden: Tensor) -> Tensor:
        """float64 [2 * questions]: log-likelihood and 1 or 0, of each question."""
        replay, head = self.trace, self.head
        everywhere = replay.logits(hidden) if head is None else replay.head_input(hidden, head.output)
        at = self.at.to(everywhere.device)
        inputs = everywhere[at[:, 0], at[:, 1]]
        rows, targets = torch.tensor(self.rows), torch.tensor(self.targets)
        logs = torch.empty(len(rows), dtype=torch.float64)
        likeliest = torch.empty(len(rows), dtype=torch.bool)
        size = self._chunk(inputs.device.type)
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            logits = part.float() if self.head is None else self.head.logits(part)
            mine = ((rows >= start) & (rows < start + size)).nonzero()[:, 0]
            own = (rows[mine] - start).to(logits.device)
            wanted = targets[mine].to(logits.device)
            chosen = logits[own, wanted]
            logs[mine] = (chosen - torch.logsumexp(logits, dim=-1)[own]).double().cpu()
            likeliest[mine] = (logits.argmax(-1)[own] == wanted).cpu()
        question = torch.tensor(self.question)
        sums = torch.zeros(self.questions, dtype=torch.float64).index_add_(0, question, logs)
        missed = torch.zeros(self.questions, dtype=torch.float32).index_add_(0, question, (~likeliest).float())
        return torch.stack([sums, (missed == 0).double()], dim=1).flatten()

    def _chunk(self, device: str) -> int:
        vocabulary: int = self.trace.anatomy.model.get_input_embeddings().num_embeddings
        limit = ROW_CHUNK_BYTES if device == "cpu" else ROW_CHUNK_BYTES_ELSEWHERE
        return max(16, limit // (4 * vocabulary))
