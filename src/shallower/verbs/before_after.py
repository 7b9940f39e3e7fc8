"""The dense and the pruned model side by side: size, perplexity, tasks, speed, and the seconds that it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from shallower.evaluation.perplexity import context_limit
from shallower.reporting.data import Side
from shallower.reporting.wording import plural
from shallower.timing.speed import Speed, compare_speed
from shallower.verbs.questions import Questions, TaskScores, task_scores
from shallower.verbs.subject import Subject
from shallower.verbs.texts import perplexities, values

PROMPT, GENERATE = 128, 32  # tokens, where speed is timed
REPEATS = 5  # runs of each model, of which fewer would show a difference by chance


class Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)


@dataclass(frozen=True)
class BeforeAfter:
    """Both models, in what was asked for. of_tasks, of_speed: what is to be known of these."""

    dense: Side
    pruned: Side
    speed_setting: str
    of_tasks: tuple[str, ...]
    of_speed: tuple[str, ...]


def before_after(
    dense: Subject,
    pruned: Subject,
    held_out: Mapping[str, str],
    asked: Questions | None,
    clock: Clock,
    window: int,
    max_windows: int | None,
    *,
    speed: bool,
    known: Mapping[str, float] | None = None,
) -> BeforeAfter:
    """Measure both models on at most `max_windows` windows of each held-out text, by the questions, and, if asked to,
    in time. known: perplexities of the pruned model, where it was measured on these already.
    """
    with clock("perplexity"):
        before = perplexities(dense, held_out, window, max_windows, label="of the dense model on")
        if known is None:
            known = values(perplexities(pruned, held_out, window, max_windows, label="of the pruned model on"))
    tokens = {name: found.tokens for name, found in before.items()}
    scores = TaskScores()
    if asked is not None:
        with clock("tasks"):
            scores = task_scores(dense, pruned, asked)
    with clock("speed"):
        speeds, untimed = _speeds(dense, pruned) if speed else ({}, ())
    return BeforeAfter(
        _side(dense, values(before), tokens, speeds.get("dense"), scores.dense),
        _side(pruned, known, tokens, speeds.get("pruned"), scores.pruned),
        _setting(speeds["dense"], dense) if speeds else "",
        scores.notes,
        untimed,
    )


def _side(
    subject: Subject,
    perplexity: Mapping[str, float],
    tokens: Mapping[str, int],
    speed: Speed | None,
    tasks: Mapping[str, float],
) -> Side:
    whole = subject.weights.model
    return Side(
        blocks=len(subject.anatomy.blocks),
        parameters=whole.parameters,
        bytes=whole.bytes,
        flops=whole.flops,
        kv_bytes=whole.kv_bytes,
        perplexity=perplexity,
        perplexity_tokens=tokens,
        prefill_tokens_per_s=None if speed is None else speed.prefill_tokens_per_s,
        decode_tokens_per_s=None if speed is None else speed.decode_tokens_per_s,
        prefill_range=None if speed is None else speed.prefill_range,
        decode_range=None if speed is None else speed.decode_range,
        tasks=tasks,
    )


def _speeds(subject: Subject, smaller: Subject) -> tuple[dict[str, Speed], tuple[str, ...]]:
    """Of both models, behind as long a prompt as their positions allow; or none, and why."""
    limit = context_limit(subject.model)
    prompt = PROMPT if limit is None else min(PROMPT, limit - GENERATE)
    if prompt < 1:
        return {}, (
            f"Speed was not timed: {GENERATE} tokens are decoded behind a prompt, and the model has {limit} positions.",
        )
    models = {"dense": subject.model, "pruned": smaller.model}
    return compare_speed(models, prompt=prompt, generate=GENERATE, repeats=REPEATS), ()


def _setting(speed: Speed, subject: Subject) -> str:
    return (
        f"prompt {speed.prompt}, generate {speed.generate}, batch {speed.batch}, {subject.dtype}, "
        f"{subject.model.device.type}, {plural(torch.get_num_threads(), 'thread')}; "
        f"medians of {speed.decode_s.runs} alternating runs"
    )
