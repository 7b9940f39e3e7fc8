"""Domains of text by name: a Hub data set where the Hub can be reached, else what is here without it.

The names below `hub` are public data sets; what is read of them is in `source` of the set's manifest, and the set's
written-out specification names the source that was found, not the domain, so that it means the same on any day.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shallower import progress
from shallower.corpus.supply import Supply
from shallower.errors import CorpusError, UnknownName, first_line


@dataclass(frozen=True)
class Domain:
    """hub: the specification of a Hub data set. local: of a text without a hub, if there is one."""

    hub: str
    local: str | None = None


DOMAINS: Mapping[str, Domain] = {
    "web": Domain("hf:allenai/c4:en:train"),
    "wiki": Domain("hf:wikimedia/wikipedia:20231101.en:train", "demo:wiki"),
    "books": Domain("hf:emozilla/pg19:train"),
    "code": Domain("hf:codeparrot/codeparrot-clean-valid:train#content", "python:source"),
    "math": Domain("hf:openai/gsm8k:main:train"),
    "instructions": Domain("hf:tatsu-lab/alpaca:train"),
    "science": Domain("hf:allenai/sciq:train#support", "demo:science"),
}


def resolve(name: str, supply: Supply) -> str:
    """The source that stands for a domain now.

    Raises UnknownName for another name, CorpusError when the Hub cannot be reached and nothing else is here.
    """
    if name not in DOMAINS:
        raise UnknownName("domain", name, DOMAINS)
    domain = DOMAINS[name]
    why = _unreachable(domain.hub)
    if why is None:
        return domain.hub
    local = domain.local
    if local is not None and local.startswith("demo:") and local.removeprefix("demo:") not in supply.texts:
        local = None
    if local is None:
        here = ", ".join(key for key, other in DOMAINS.items() if other.local)
        raise CorpusError(
            f"domain {name!r} is {domain.hub} of the Hugging Face hub, which cannot be reached ({why}): name a file of "
            f"such text instead. Without a hub there are {here}."
        )
    progress.note(f"Domain {name} is {local} here: {domain.hub} cannot be reached ({why}).")
    return local


def _unreachable(spec: str) -> str | None:
    """Why a data set cannot be reached; None when it can."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "0").lower() in ("1", "true", "yes", "on"):
            return f"{name} is set"
    try:
        import datasets  # noqa: F401
        from huggingface_hub import HfApi
    except ImportError:
        return "the package `datasets` is not installed"
    try:
        HfApi().dataset_info(spec.removeprefix("hf:").partition("#")[0].partition(":")[0], timeout=10)
    # whatever the network or the Hub client raises, it means the same here
    except Exception as error:
        name, reason = type(error).__name__, first_line(error).rstrip(".")
        return name if reason == name else f"{name}: {reason}"
    return None
