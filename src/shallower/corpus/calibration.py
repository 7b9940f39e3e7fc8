"""The calibration set: token ids that metrics, objectives and recovery read, with a digest and where they came from.

A set is text that was already tokenised, shuffled and cut. Two sets with one digest are the same bytes, however they
are batched; the digest is what plans, scores and the engine's memo name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from shallower.corpus.answers import Answers
from shallower.errors import CorpusError
from shallower.files import expanded, replacing
from shallower.plan import CalibrationIdentity
from shallower.strict_json import key_faults, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "manifest.json"
TENSORS = "calibration.safetensors"

Set = TypeVar("Set", bound="CalibrationSet")


@dataclass(frozen=True)
class SourceRecord:
    """What was read. `sha256` is of all text read from the source, `documents` counts those that entered the set.

    Unknown (None) in sets of questions and of older versions: `read` documents in all; `tokens` of the set; `weight`,
    the share of it that is the source's, of which each of its files has a part by its tokens; and how many documents
    were left out as exact and near duplicates and for their quality.
    """

    name: str
    sha256: str
    documents: int
    read: int | None = None
    tokens: int | None = None
    weight: float | None = None
    exact_duplicates: int | None = None
    near_duplicates: int | None = None
    low_quality: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


_RECORD = tuple(SourceRecord.__dataclass_fields__)


@dataclass(frozen=True)
class Batch:
    """Some sequences. input_ids: int64 [n, length]. attention_mask: int64 [n, length] of 0 and 1, None if all are 1.

    answers: for sequences that are choices of questions, always all of a question.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    answers: Answers | None = None

    @property
    def tokens(self) -> int:
        """Real tokens: padding is not counted."""
        return _real_tokens(self.input_ids, self.attention_mask)

    @property
    def with_next(self) -> Tensor:
        """Where a real token has a real next one: bool [n, length - 1]."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids[:, 1:]).bool()
        return (self.attention_mask[:, 1:] * self.attention_mask[:, :-1]).bool()


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Sequences of one length, on the CPU.

    input_ids: int64 [sequences, length]. attention_mask: the same shape and type, 1 for real tokens, all 0s at the end
    of a row; None says all are real, and a mask of only 1s becomes None. tokenizer: `sha256:…` of the ids that occur
    and the tokens they stand for (`tokens_digest`), None where that is not known. Raises CorpusError when shapes or
    types differ from this.
    """

    spec: str
    input_ids: Tensor
    attention_mask: Tensor | None
    sources: tuple[SourceRecord, ...] = ()
    tokenizer: str | None = None

    format: ClassVar[str] = "shallower.calibration/1"

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise CorpusError(
                f"calibration ids are {ids.dtype} of shape {list(ids.shape)}; they must be int64 [sequences, length]."
            )
        if mask is None:
            return
        if mask.shape != ids.shape or mask.dtype != torch.int64:
            raise CorpusError(
                f"the calibration mask is {mask.dtype} of shape {list(mask.shape)}; it must be int64 "
                f"{list(ids.shape)}, as the ids."
            )
        if (
            not bool(((mask == 0) | (mask == 1)).all())
            or bool((mask.diff(dim=1) > 0).any())
            or not bool(mask[:, 0].all())
        ):
            raise CorpusError("the calibration mask must be 1 for real tokens and 0 for padding at the end of a row.")
        if bool(mask.all()):
            object.__setattr__(self, "attention_mask", None)

    def require_next(self) -> None:
        """Raise CorpusError where no token has a next one, so that nothing is predicted."""
        if self.length < 2 or (self.attention_mask is not None and not bool(self.attention_mask[:, 1].any())):
            raise CorpusError(
                f"none of the {self.sequences:,} sequences of {self.spec} has two tokens, so no next token is "
                "predicted: read longer ones (--length 128) or longer documents."
            )

    @property
    def sequences(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[1])

    @cached_property
    def tokens(self) -> int:
        """Real tokens: padding is not counted."""
        return _real_tokens(self.input_ids, self.attention_mask)

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of the shapes and bytes of ids and mask (little-endian int64)."""
        total = hashlib.sha256(f"{self.format} {self.sequences}x{self.length}".encode())
        for tensor in self._contents().values():
            total.update(b"none" if tensor is None else tensor.contiguous().numpy().astype("<i8", copy=False).tobytes())
        return f"sha256:{total.hexdigest()}"

    def _contents(self) -> dict[str, Tensor | None]:
        """What the digest is of, and what is saved."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def identity(self) -> CalibrationIdentity:
        return CalibrationIdentity(self.spec, self.tokens, self.digest)

    def batches(self, size: int) -> Iterator[Batch]:
        """Sequences in order, `size` at a time; the last batch may be smaller."""
        if size < 1:
            raise ValueError(f"batch size {size} is not positive")
        for start in range(0, self.sequences, size):
            mask = self.attention_mask
            yield Batch(self.input_ids[start : start + size], None if mask is None else mask[start : start + size])

    def subset(self, indices: Sequence[int]) -> CalibrationSet:
        """The named sequences, in the order given. `spec` and `sources` still say where the whole set came from;
        `tokenizer`, which is of all ids, is not known of some.
        """
        rows = torch.tensor(list(indices), dtype=torch.int64)
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return CalibrationSet(self.spec, self.input_ids[rows], mask, self.sources)

    def to_json(self) -> dict[str, Any]:
        """The manifest."""
        return {
            "format": self.format,
            "spec": self.spec,
            "sequences": self.sequences,
            "length": self.length,
            "tokens": self.tokens,
            "digest": self.digest,
            **({} if self.tokenizer is None else {"tokenizer": self.tokenizer}),
            "sources": [source.to_json() for source in self.sources],
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `calibration.safetensors` and `manifest.json` into `folder`, which is made if need be.

        Raises OutputError when it cannot be written.
        """
        folder = expanded(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self._contents().items() if tensor is not None}
        with replacing(folder / TENSORS) as temporary:
            temporary.write_bytes(save_tensors(tensors))
        write_json(folder / MANIFEST, self.to_json())

    @classmethod
    def load(cls: type[Set], folder: str | os.PathLike[str]) -> Set:
        """Read a saved set, byte for byte.

        Raises CorpusError when files are missing or malformed, or the digest is not that of the manifest.
        """
        folder = expanded(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            tensors = load_tensors((folder / TENSORS).read_bytes())
        except (OSError, ValueError, RecursionError, SafetensorError) as error:  # of JSON, too
            raise CorpusError(f"{folder} cannot be read as a calibration set: {error}.") from None
        return _from_files(cls, folder, manifest, tensors)

    @classmethod
    def _made(cls: type[Set], spec: str, tensors: Mapping[str, Tensor], sources: tuple[SourceRecord, ...]) -> Set:
        return cls(spec, tensors["input_ids"], tensors.get("attention_mask"), sources)


def _real_tokens(ids: Tensor, mask: Tensor | None) -> int:
    return ids.numel() if mask is None else int(mask.sum())


def padded(rows: Sequence[Sequence[int]], filler: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and their mask, int64 [rows, width]: each row filled up to the longest one, or to `width`."""
    width = width or max(map(len, rows))
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask.to(torch.int64)


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    apart = (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(apart, min(len(one), len(other)))


def tokens_digest(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """`sha256:…` of each id that occurs with its token: equal for tokenizers that read these ids alike."""
    known = sorted(set(ids.flatten().tolist()))
    tokens = tokenizer.convert_ids_to_tokens(known)
    return f"sha256:{hashlib.sha256(json.dumps(list(zip(known, tokens, strict=True))).encode()).hexdigest()}"


def is_saved(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is what CalibrationSet.save writes."""
    # os.path: what is asked about may be a mixture that is longer than a name can be
    return all(os.path.isfile(os.path.join(folder, name)) for name in (MANIFEST, TENSORS))


def saved_spec(folder: Path) -> str:
    """The specification that a saved set was built from; empty where it does not say. Not all else in it is read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it is told
        return ""
    return str(manifest.get("spec", "")) if isinstance(manifest, dict) else ""


def _from_files(kind: type[Set], folder: Path, manifest: Any, tensors: Mapping[str, Tensor]) -> Set:
    where = str(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise CorpusError(f"{where} is not an object, but {type(manifest).__name__}: build the set again.")
    faults = key_faults(
        where, manifest, ("format", "spec", "sequences", "length", "tokens", "digest", "sources"), ("tokenizer",)
    )
    if manifest.get("format") != kind.format:
        faults.insert(0, f"{where} has format {manifest.get('format')!r}, not {kind.format!r}")
    sources = manifest.get("sources", [])
    if not isinstance(sources, list):
        faults.append(f"'sources' of {where} is {json.dumps(sources)}, not a list")
        sources = []
    for number, source in enumerate(sources):
        what = f"{where}, source {number}"
        faults += (
            key_faults(what, source, _RECORD[:3], _RECORD[3:])
            if isinstance(source, dict)
            else [f"{what} is not an object"]
        )
    if "input_ids" not in tensors:
        faults.append(f"{folder / TENSORS} has no 'input_ids'")
    if faults:
        raise CorpusError("; ".join(faults) + ".")
    records = tuple(SourceRecord(**source) for source in sources)
    loaded = replace(kind._made(manifest["spec"], tensors, records), tokenizer=manifest.get("tokenizer"))
    if loaded.digest != manifest["digest"]:
        raise CorpusError(
            f"{folder} was changed after it was saved: its digest is {loaded.digest}, the manifest says "
            f"{manifest['digest']}. "
            f"Build it again from {manifest['spec']!r}."
        )
    return loaded
