"""What later layers know and text sources need: the model's own text, and texts that are fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

START = ("auto", "bos", "token")
"""How a model's own text begins: with its BOS, with a random first token, or with what suits its tokenizer."""


class Sampler(Protocol):
    """Samples texts of a model, without end."""

    def __call__(self, start: str, *, tokens: int, seed: int) -> Iterator[str]:
        """start: one of START. tokens: of each text at most. The same seed gives the same texts."""
        ...


@dataclass(frozen=True)
class Supply:
    """sample: the model's own text, of `tokens` tokens each, by `seed` (both are set from the specification).
    texts: by name, functions that fetch a .jsonl file and return its path.
    """

    sample: Sampler | None = None
    texts: Mapping[str, Callable[[], Path]] = field(default_factory=dict)
    tokens: int = 512
    seed: int = 0


NOTHING = Supply()
