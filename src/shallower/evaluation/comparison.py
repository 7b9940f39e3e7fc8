"""Models side by side: what each reached on the same texts and items, and how sure the differences to the first are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shallower.evaluation.generation import Generation
from shallower.evaluation.pairs import Difference, paired
from shallower.evaluation.perplexity import Perplexity
from shallower.evaluation.tasks import TaskResult

FORMAT = "shallower.evaluation/1"


@dataclass(frozen=True)
class Evaluation:
    """One model, of `blocks` blocks and `parameters` parameters. model: a name that no other in the comparison has.

    perplexity: by name of the text. removed: how many units of a plan are gone, where a plan is evaluated.
    """

    model: str
    blocks: int
    parameters: int
    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)
    tasks: tuple[TaskResult, ...] = ()
    generation: Generation | None = None
    removed: int | None = None

    def task(self, name: str) -> TaskResult | None:
        return next((result for result in self.tasks if result.task == name), None)


@dataclass(frozen=True)
class Comparison:
    """Models on the same texts and items; all are compared with the first.

    notes: what the reader must know. made_by: as evaluation.json has it, everything needed to measure the same again.
    """

    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.evaluations[0].perplexity)

    def text_difference(self, other: Evaluation, text: str) -> Difference | None:
        """Difference in nats a token; None where the windows are not the same tokens."""
        first, second = self.evaluations[0].perplexity[text], other.perplexity[text]
        if other is self.evaluations[0] or self.apart(other, text):
            return None
        means = [
            [total / count for total, count in zip(side.sums, side.counts, strict=True)] for side in (first, second)
        ]
        return paired(means[0], means[1], first.counts)

    def apart(self, other: Evaluation, text: str) -> bool:
        """Whether a model read other windows of the text than the first: its tokenizer or its context is another."""
        first, second = self.evaluations[0].perplexity[text], other.perplexity[text]
        return first.counts != second.counts or first.bytes != second.bytes

    def windows_apart(self) -> Iterator[str]:
        """Sentences about texts that are not compared."""
        first = self.evaluations[0]
        for other in self.evaluations[1:]:
            for text in self.texts:
                if self.apart(other, text):
                    read = [
                        f"{measured.tokens:,} tokens ({measured.bytes:,} bytes) in {measured.windows} windows"
                        for measured in (other.perplexity[text], first.perplexity[text])
                    ]
                    yield (
                        f"{text}: {other.model} was scored on {read[0]}, {first.model} on {read[1]}, as its tokenizer "
                        "or its context is another: compare bits per byte, not perplexity."
                    )

    def overflows(self) -> Iterator[str]:
        """Sentences about scores that mean nothing: among answers that are no number lm-eval takes the first."""
        for each in self.evaluations:
            for result in each.tasks:
                lost, all_of_them = sum(map(math.isnan, result.likelihoods)), len(result.likelihoods)
                if lost:
                    yield (
                        f"{result.task}: {lost:,} of {all_of_them:,} answers of {each.model} are not a number, so its "
                        "score means nothing: it overflows in its number format, or has such weights. Try --dtype "
                        "float32."
                    )

    def prompts_cut(self) -> Iterator[str]:
        """Sentences about prompts that a model did not read whole."""
        models: dict[str, list[str]] = {}  # by what was cut, which is the same for models of one context
        for each in self.evaluations:
            cut = [result for result in each.tasks if result.cut and result.within is None]  # a group counts its tasks'
            if cut:
                told = (f"{result.cut:,} of {result.count:,} prompts of {result.task}" for result in cut)
                models.setdefault(", ".join(told), []).append(each.model)
        for told_of, names in models.items():
            whose = "each model" if 1 < len(names) == len(self.evaluations) else " and ".join(names)
            yield f"{told_of} were longer than the context of {whose}, and were cut from the left."

    def task_difference(self, other: Evaluation, task: str, metric: str) -> Difference | None:
        """Of a metric that is a mean over items, the same for both; None for another."""
        found = []
        for side in (self.evaluations[0], other):
            result = side.task(task)
            found += [each for each in result.metrics if each.name == metric] if result is not None else []
        if other is self.evaluations[0] or len(found) < 2 or not all(each.is_mean for each in found):
            return None
        return paired(found[0].items, found[1].items) if len(found[0].items) == len(found[1].items) else None

    def to_json(self) -> dict[str, Any]:
        rows = [
            {**_whose(each), "text": text, **measured.to_json()}
            for each in self.evaluations
            for text, measured in each.perplexity.items()
        ]
        tasks = [{**_whose(each), **result.to_json()} for each in self.evaluations for result in each.tasks]
        written = [{**_whose(each), **each.generation.to_json()} for each in self.evaluations if each.generation]
        told = {"format": FORMAT, "made_by": self.made_by, "evaluations": rows, "tasks": tasks, "generation": written}
        return {**told, "differences": list(self._differences()), "notes": list(self.notes)}

    def _differences(self) -> Iterator[dict[str, Any]]:
        first = self.evaluations[0].model
        for other in self.evaluations[1:]:
            pair = {"first": first, "model": other.model}
            for text in other.perplexity:
                difference = self.text_difference(other, text)
                if difference is not None:
                    yield {**pair, "text": text, "metric": "nll", **difference.to_json()}
            for result in other.tasks:
                for metric in result.metrics:
                    difference = self.task_difference(other, result.task, metric.name)
                    if difference is not None:
                        yield {**pair, "task": result.task, "metric": metric.name, **difference.to_json()}


def _whose(each: Evaluation) -> dict[str, Any]:
    told = {"model": each.model, "blocks": each.blocks, "parameters": each.parameters}
    return told if each.removed is None else {**told, "removed": each.removed}
