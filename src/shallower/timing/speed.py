"""Prefill and decode speed with the KV cache, after a warm-up, with equal output lengths.

Decoding is a loop over the model's own forward and the cache that its config calls for, choosing the likeliest token
and never stopping early. When models are compared their runs alternate, so that whatever else the machine does hits
them alike.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shallower import progress
from shallower.checkpoint.stock import evaluating
from shallower.decoding import with_cache
from shallower.errors import ModelError, UserError
from shallower.evaluation.perplexity import context_limit
from shallower.timing.memory import devices_of, peak_above

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FEWEST_RUNS = 4
"""Below it the ranges of two equally fast models are often apart by chance: with probability 2 / C(2n, n) for n runs of
each, which is 1, 1/3, 1/10 and, from here on, less than 3 %."""


@dataclass(frozen=True)
class Spread:
    """Median, least and most of so many repeated runs."""

    median: float
    least: float
    most: float
    runs: int

    def overlaps(self, other: Spread) -> bool:
        """Whether the ranges have anything in common."""
        return self.least <= other.most and other.least <= self.most

    def differs_from(self, other: Spread) -> bool | None:
        """Whether the difference of the medians is significant: the ranges have nothing in common. None where there are
        too few runs to tell.
        """
        return None if min(self.runs, other.runs) < FEWEST_RUNS else not self.overlaps(other)

    def faster_than(self, other: Spread) -> float:
        """How many percent more is done in a second than by `other`; negative for less."""
        return 100 * (other.median / self.median - 1)


@dataclass(frozen=True)
class Speed:
    """Seconds are for a whole run of `prompt` (prefill) or `generate` (decode) tokens in each of `batch` sequences.

    kv_cache_bytes: every tensor of the cache after the run, for all `batch` sequences. parameter_bytes: tied weights
    once. working_bytes: what a run holds at its most above the weights (activations and cache), from one more run that
    is not timed; None where it was not asked for or the machine cannot tell.
    """

    prefill_s: Spread
    decode_s: Spread
    kv_cache_bytes: int
    parameter_bytes: int
    working_bytes: int | None
    prompt: int
    generate: int
    batch: int

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt * self.batch / self.prefill_s.median

    @property
    def decode_tokens_per_s(self) -> float:
        return self.generate * self.batch / self.decode_s.median

    @property
    def prefill_range(self) -> tuple[float, float]:
        """Tokens a second in the slowest and the fastest run."""
        tokens = self.prompt * self.batch
        return tokens / self.prefill_s.most, tokens / self.prefill_s.least

    @property
    def decode_range(self) -> tuple[float, float]:
        """Tokens a second in the slowest and the fastest run."""
        tokens = self.generate * self.batch
        return tokens / self.decode_s.most, tokens / self.decode_s.least

    @property
    def peak_bytes(self) -> int | None:
        """Weights and what a run holds above them."""
        return None if self.working_bytes is None else self.parameter_bytes + self.working_bytes


def measure_speed(
    model: PreTrainedModel,
    *,
    prompt: int = 128,
    generate: int = 32,
    batch: int = 1,
    warmup: int = 1,
    repeats: int = 3,
    seed: int = 0,
) -> Speed:
    """Time one model; see compare_speed for the arguments and errors."""
    named = {"": model}
    return compare_speed(
        named, prompt=prompt, generate=generate, batch=batch, warmup=warmup, repeats=repeats, seed=seed
    )[""]


def compare_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt: int = 128,
    generate: int = 32,
    batch: int = 1,
    warmup: int = 1,
    repeats: int = 3,
    seed: int = 0,
    memory: bool = False,
) -> dict[str, Speed]:
    """Time models in turns (A B A B …); all get the same random tokens where their vocabularies allow.

    Args:
        models: By name; they are left in the mode they were in.
        prompt: Tokens in a prompt.
        generate: Decoding steps, one token each, after the prompt.
        batch: Sequences at once.
        warmup: Runs of each model that are not counted.
        repeats: Runs that are.
        seed: Of the random token ids.
        memory: Run each model once more, untimed, to see what it holds at its most.

    Raises:
        UserError: A count is out of range, or prompt and generated tokens do not fit a model's positions.
        ModelError: A model has no KV cache.
    """
    require_counts(prompt=prompt, generate=generate, batch=batch, warmup=warmup, repeats=repeats)
    require_fits(models, prompt, generate)
    ids = {name: _random_ids(model, (batch, prompt), seed) for name, model in models.items()}
    runs: dict[str, list[_Run]] = {name: [] for name in models}
    working: dict[str, int | None] = dict.fromkeys(models)
    total = (warmup + repeats + memory) * len(models)
    with progress.task(f"timing prompt {prompt}, generate {generate}, batch {batch}", total) as step:
        for turn in range(warmup + repeats):
            for name, model in models.items():
                run = _run(model, ids[name], generate)
                if turn >= warmup:
                    runs[name].append(run)
                step()
        for name, model in models.items() if memory else ():
            working[name] = peak_above(devices_of(model), partial(_run, model, ids[name], generate))
            step()
    return {
        name: Speed(
            _spread([run.prefill_s for run in runs[name]]),
            _spread([run.decode_s for run in runs[name]]),
            runs[name][-1].cache_bytes,
            sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            working[name],
            prompt,
            generate,
            batch,
        )
        for name, model in models.items()
    }


def require_counts(*, prompt: int, generate: int, batch: int, warmup: int, repeats: int) -> None:
    """Raise UserError for a count that is out of range."""
    counts = {"prompt": prompt, "generate": generate, "batch": batch, "repeats": repeats}
    for name, value in {**counts, "warmup": warmup + 1}.items():
        if value < 1:
            raise UserError(
                f"{name}={counts.get(name, warmup)} is too small: it must be at least {int(name != 'warmup')}."
            )


def require_fits(models: Mapping[str, PreTrainedModel], prompt: int, generate: int) -> None:
    """Raise UserError when there is no model, or one that has not as many positions."""
    if not models:
        raise UserError("there is no model to time: name at least one.")
    for name, model in models.items():
        limit = context_limit(model)
        if limit is not None and prompt + generate > limit:
            raise UserError(
                f"prompt={prompt} and generate={generate} need {prompt + generate} positions, but the model {name} "
                f"has {limit}: use fewer."
            )


def cache_bytes(cache: object) -> int:
    """Bytes of all tensors that a cache object holds, whatever its class; a tensor reached twice counts once."""
    found: dict[int, Tensor] = {}
    _collect(cache, found, set())
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


@dataclass(frozen=True)
class _Run:
    prefill_s: float
    decode_s: float
    cache_bytes: int


def _run(model: PreTrainedModel, ids: Tensor, generate: int) -> _Run:
    # as generate() does: of the prompt only the last position's logits are needed
    last_only: dict[str, Any] = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    with evaluating(model), torch.inference_mode():
        started = _now(model.device)
        output, cache = with_cache(model, ids, **last_only)
        chosen = output.logits[:, -1:].argmax(dim=-1)
        prefilled = _now(model.device)
        for past in range(ids.shape[1], ids.shape[1] + generate):
            output, cache = with_cache(model, chosen, cache, past=past, **last_only)
            chosen = output.logits[:, -1:].argmax(dim=-1)
        ended = _now(model.device)
    held = cache_bytes(cache)
    if not held:
        raise ModelError(f"{type(model).__name__} keeps no KV cache, so decoding cannot be timed fairly.")
    return _Run(prefilled - started, ended - prefilled, held)


def _random_ids(model: PreTrainedModel, shape: tuple[int, int], seed: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    return ids.to(model.device)


def _now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _collect(value: object, found: dict[int, Tensor], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found, seen)
    elif type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
        _collect(vars(value), found, seen)


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))
