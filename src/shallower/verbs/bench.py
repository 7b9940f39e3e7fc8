"""`shallower bench`: prefill, decoding, memory and KV cache of several models, side by side."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shallower.errors import ModelTooLarge, UserError
from shallower.reporting.wording import distinct_names, percent, plural
from shallower.surgery.silence import adds_nothing
from shallower.timing import Speed, Spread, compare_speed, devices_of, memory_source, require_counts, require_fits
from shallower.verbs.subject import (
    ModelLike,
    Subject,
    open_subject,
    path_of,
    require_computable,
    require_there,
    several,
)
from shallower.version import __version__

FORMAT = "shallower.bench/1"
HEAD_DOMINATES = 0.5
"""Share of a model's FLOPs outside its blocks from which on it is worth a note."""


@dataclass(frozen=True)
class Timed:
    """One model. attns, mlps: sublayers that it runs. dtype: its number format. speeds: one for each setting."""

    model: str
    blocks: int
    attns: int
    mlps: int
    parameters: int
    dtype: str
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Bench:
    """Models at the same settings; differences are to the first. notes: why a model is no faster, where that is known.

    dtype: the number format, all of them where models differ. memory: what the peak was read from; None where it could
    not be.
    """

    models: tuple[Timed, ...]
    notes: tuple[str, ...]
    warmup: int
    repeats: int
    dtype: str
    device: str
    threads: int
    memory: str | None

    @property
    def setting(self) -> str:
        """How it was measured, in one sentence."""
        machine = f"{self.device}, {plural(self.threads, 'thread')}, torch {torch.__version__}"
        alike = len({timed.dtype for timed in self.models}) == 1
        dtypes = self.dtype if alike else ", ".join(f"{timed.model} in {timed.dtype}" for timed in self.models)
        return (
            f"{dtypes}, {machine}; {self.models[0].speeds[0].generate} tokens decoded; medians (least to most) of "
            f"{plural(self.repeats, 'run')} in turns after {self.warmup} not counted, KV cache on."
        )

    def to_json(self) -> dict[str, Any]:
        first = self.models[0]
        return {
            "format": FORMAT,
            "models": [
                {
                    **{key: value for key, value in asdict(timed).items() if key != "speeds"},
                    "speeds": [
                        _speed_json(speed, None if timed is first else reference)
                        for speed, reference in zip(timed.speeds, first.speeds, strict=True)
                    ],
                }
                for timed in self.models
            ],
            "notes": list(self.notes),
            "warmup": self.warmup,
            "repeats": self.repeats,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "memory": self.memory,
            "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}",
            "version": __version__,
        }


def bench(
    models: ModelLike | Sequence[ModelLike] | Mapping[str, PreTrainedModel | Subject],
    *,
    prompt: int | Sequence[int] = 128,
    generate: int = 32,
    batch: int | Sequence[int] = 1,
    repeats: int = 5,
    warmup: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Bench:
    """Time models in turns (A B A B …) in one process, at every batch size with every prompt size.

    All models are in memory at once: that is what taking turns costs. Each prefills `prompt` random tokens in each of
    `batch` sequences and then decodes `generate` tokens, one at a time, never stopping early. Memory is seen in one
    more run, which is not timed.

    models: what `open_subject` takes, one or several, or models by the name to show. warmup: runs of each that are not
    counted. repeats: runs that are.

    Raises UserError for sizes that are impossible or longer than a model's context, and ModelError for a model that
    cannot be used or has no KV cache.
    """
    sizes = list(itertools.product(_sizes("batch", batch), _sizes("prompt", prompt)))
    given = list(models.values()) if isinstance(models, Mapping) else several(models)
    if not given:
        raise UserError("there is no model to time: name at least one.")
    for size, length in sizes:
        require_counts(prompt=length, generate=generate, batch=size, warmup=warmup, repeats=repeats)
    require_there(given)
    require_computable(given, device, dtype)
    subjects: list[Subject] = []
    for model in given:
        try:
            subjects.append(open_subject(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code))
        except ModelTooLarge as error:
            if not subjects:
                raise
            raise ModelTooLarge(
                f"{error} All {len(given)} models are held at once, to be timed in turns: time each of them alone."
            ) from error
    if isinstance(models, Mapping):
        names = list(models)
    else:
        names = distinct_names([subject.loaded.name for subject in subjects], [path_of(model) for model in given])
    named = {name: subject.model for name, subject in zip(names, subjects, strict=True)}
    require_fits(named, max(length for _, length in sizes), generate)
    found = [
        compare_speed(named, prompt=length, generate=generate, batch=size, warmup=warmup, repeats=repeats, memory=True)
        for size, length in sizes
    ]
    timed = tuple(
        Timed(
            name,
            len(subject.anatomy.blocks),
            len(subject.anatomy.of_kind("attn")),
            len(subject.anatomy.of_kind("mlp")),
            subject.weights.model.parameters,
            subject.dtype,
            tuple(speeds[name] for speeds in found),
        )
        for name, subject in zip(names, subjects, strict=True)
    )
    devices = list(dict.fromkeys(device for subject in subjects for device in devices_of(subject.model)))
    sources = [memory_source(devices_of(subject.model)) for subject in subjects]
    return Bench(
        timed,
        tuple(_notes(timed, subjects)),
        warmup,
        repeats,
        ", ".join(dict.fromkeys(each.dtype for each in timed)),
        ", ".join(map(str, devices)) if len(devices) > 1 else devices[0].type,
        torch.get_num_threads(),
        ", ".join(dict.fromkeys(filter(None, sources))) or None,
    )


def _sizes(name: str, given: int | Sequence[int]) -> list[int]:
    sizes = [given] if isinstance(given, int) else list(given)
    if not sizes:
        raise UserError(f"no {name} size is given: name at least one.")
    return list(dict.fromkeys(sizes))


def _speed_json(speed: Speed, first: Speed | None) -> dict[str, Any]:
    """A speed with what follows from it, and the differences to the first model's."""
    data = asdict(speed) | {
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "peak_bytes": speed.peak_bytes,
    }
    if first is not None:
        data["prefill_faster"] = _difference(speed.prefill_s, first.prefill_s)
        data["decode_faster"] = _difference(speed.decode_s, first.decode_s)
        data["kv_cache_percent"] = 100 * (speed.kv_cache_bytes / first.kv_cache_bytes - 1)
    return data


def _difference(mine: Spread, first: Spread) -> dict[str, Any]:
    return {"percent": mine.faster_than(first), "significant": mine.differs_from(first)}


def _notes(timed: Sequence[Timed], subjects: Sequence[Subject]) -> Iterator[str]:
    """Why a pruned model may be no faster: nothing is gone, or what is gone was not what takes the time."""
    first = timed[0]
    for mine, subject in zip(timed[1:], subjects[1:], strict=True):
        if (mine.blocks, mine.attns, mine.mlps) != (first.blocks, first.attns, first.mlps):
            continue
        empty = [unit for unit in subject.anatomy.of_kind("attn", "mlp") if adds_nothing(subject.anatomy, unit)]
        if empty:
            yield (
                f"{mine.model}: {plural(len(empty), 'sublayer')} of {mine.attns + mine.mlps} have a matrix of zeros (a "
                "padded checkpoint). They add nothing, but are computed and cached like all others: no time and no "
                "memory is saved."
            )
        elif (mine.parameters, mine.dtype) == (first.parameters, first.dtype):
            yield (
                f"{mine.model} runs as many sublayers as {first.model} ({mine.attns} attention, {mine.mlps} MLP): "
                "nothing is gone that would make it faster."
            )
    for mine, subject in zip(timed, subjects, strict=True):
        whole, blocks = subject.weights.model.flops, subject.weights.blocks.flops
        if whole - blocks >= HEAD_DOMINATES * whole:
            yield (
                f"{mine.model}: {percent(whole - blocks, whole)} of the FLOPs of a token are outside the blocks (the "
                "head over the vocabulary); removing blocks does not touch them."
            )
