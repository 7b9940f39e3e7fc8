"""From a text specification to a CalibrationSet: split, shuffle, tokenise, join, cut.

- Documents are put in an order decided by `seed` alone. Of a long document the first `max_chars` characters are read;
  packing cuts them into excerpts (8,000 characters, more for long sequences) that are shuffled separately, so no single
  book fills the set.
- Packing joins documents with EOS (if the tokenizer has one) and cuts the stream into sequences without regard to
  documents. Without packing a sequence is the beginning of one document, padded at the end and masked.
- Documents are tokenised without special tokens, in batches, only until there are enough.
- The order comes from hashes, not from a random generator, so the same specification gives the same bytes on any
  machine.
"""

from __future__ import annotations

import hashlib
import heapq
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shallower import progress
from shallower.corpus.bos import Bos, resolve_bos
from shallower.corpus.calibration import CalibrationSet, SourceRecord, is_saved
from shallower.corpus.sources import PIECE, Document, Source, open_source, pieces
from shallower.corpus.specification import Part, check_options, in_part, parse_specification, written_out
from shallower.errors import CorpusError
from shallower.registry import Option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is held in memory to shuffle: all of most local sources, the beginning of a streamed one.
_BUFFER_CHARACTERS = 64_000_000
_STREAM_BUFFER_DOCUMENTS = 1_000
_TOKENISED_AT_ONCE = 100_000  # characters


@dataclass(frozen=True)
class BuildOptions:
    """What may stand after the `?` of a specification."""

    sequences: int = 32
    length: int = 512
    seed: int = 0
    pack: bool = True
    bos: Bos = "auto"
    part: Part = "all"
    max_chars: int = 100_000

    def __post_init__(self) -> None:
        check_options(self, _OPTIONS, {"sequences": 1, "length": 2, "seed": 0, "max_chars": 1})


_OPTIONS: Mapping[str, Option] = {
    name: Option(name, kind, getattr(BuildOptions, name)) for name, kind in typing.get_type_hints(BuildOptions).items()
}


def build_calibration(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = 32,
    length: int = 512,
    seed: int = 0,
    pack: bool = True,
    bos: Bos = "auto",
    part: Part = "all",
    max_chars: int = 100_000,
) -> CalibrationSet:
    """Build the set that `spec` describes, or load it when `spec` is a folder written by CalibrationSet.save.

    Args:
        spec: A source (see `shallower.corpus.sources`) and options after `?`, which win over the arguments below. The
        set's
            own `spec` has all of them written out.
        tokenizer: The model's tokenizer.
        sequences: How many sequences.
        length: Tokens in each, BOS and EOS included.
        seed: Decides which documents come first.
        pack: Join documents and cut; otherwise one document a sequence.
        bos: `each-sequence`, `each-document`, `none`, or `auto`: each sequence if the tokenizer itself adds a BOS, else
        none. part: `held-out` is a tenth of the documents, by a hash of their text, `train` the rest, `all` both.
        max_chars: How many characters of one document are read.

    Raises:
        CorpusError: Text is missing, not text, or too short, or an option is out of range.
        UnknownName: An option after `?` does not exist.
    """
    parsed = parse_specification(spec, _OPTIONS)
    if is_saved(Path(parsed.source).expanduser()):
        return _saved(Path(parsed.source).expanduser(), parsed.options, tokenizer)
    given: dict[str, Any] = {name: _OPTIONS[name].parse(text) for name, text in parsed.options.items()}
    options = replace(BuildOptions(sequences, length, seed, pack, bos, part, max_chars), **given)
    source = open_source(parsed.source)
    ledger = _Ledger()
    documents = ledger.recorded(source.read())
    excerpts = _shuffled(_excerpts(documents, options), source, options.seed)
    with progress.task(f"tokens of {source.name}", total=options.sequences) as step:
        rows = _rows(excerpts, tokenizer, options, ledger, step)
    _require_enough(rows, parsed.source, options)
    ids = torch.tensor([row + [pad_id(tokenizer)] * (options.length - len(row)) for row in rows], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(options.length)[None, :] < lengths[:, None]).to(torch.int64)
    return CalibrationSet(written_out(parsed.source, options), ids, mask, ledger.records())


@dataclass(frozen=True)
class _Excerpt:
    """Text that is tokenised as one."""

    text: str
    id: str
    document: Document


class _Ledger:
    """What was read from each source and which of its documents were used."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}
        self._used: dict[str, set[str]] = {}

    def recorded(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            data = document.text.encode()
            total = self._hashes.setdefault(document.source, hashlib.sha256())
            total.update(len(data).to_bytes(8, "little"))
            total.update(data)
            yield document

    def use(self, document: Document) -> None:
        self._used.setdefault(document.source, set()).add(document.id)

    def records(self) -> tuple[SourceRecord, ...]:
        return tuple(
            SourceRecord(name, f"sha256:{total.hexdigest()}", len(self._used.get(name, ())))
            for name, total in sorted(self._hashes.items())
        )


def _excerpts(documents: Iterable[Document], options: BuildOptions) -> Iterator[_Excerpt]:
    limit = max(PIECE, 8 * options.length)
    for document in documents:
        # the whole text decides the part, so that sets with another max_chars split alike
        if not document.text.strip() or not in_part(document.text, options.part):
            continue
        text = document.text[: options.max_chars]
        if len(text) <= limit or not options.pack:
            yield _Excerpt(text, document.id, document)
            continue
        for number, piece in enumerate(pieces(text.splitlines(keepends=True), limit)):
            yield _Excerpt(piece, f"{document.id}:{number}", document)


def _shuffled(excerpts: Iterable[_Excerpt], source: Source, seed: int) -> Iterator[_Excerpt]:
    """Excerpts by the hash of seed and id; those of a source that outgrows the buffer leave it as others come in."""
    most = _STREAM_BUFFER_DOCUMENTS if source.streamed else None
    heap: list[tuple[bytes, int, _Excerpt]] = []
    held = 0
    for number, excerpt in enumerate(excerpts):
        heapq.heappush(heap, (hashlib.sha256(f"{seed} {excerpt.id}".encode()).digest(), number, excerpt))
        held += len(excerpt.text)
        while held > _BUFFER_CHARACTERS or (most is not None and len(heap) > most):
            first = heapq.heappop(heap)[2]
            held -= len(first.text)
            yield first
    while heap:
        yield heapq.heappop(heap)[2]


def _rows(
    excerpts: Iterable[_Excerpt],
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    ledger: _Ledger,
    step: progress.Step,
) -> list[list[int]]:
    """Sequences, fewer than asked for if the text runs out. Packed: a last, shorter row holds what was left."""
    where, bos = resolve_bos(tokenizer, options.bos)
    eos = tokenizer.eos_token_id
    first = [] if bos is None else [bos]
    tokenised = _tokenised(excerpts, tokenizer)
    rows: list[list[int]] = []
    if not options.pack:
        for excerpt, ids in tokenised:
            rows.append((first + ids)[: options.length])
            ledger.use(excerpt.document)
            step()
            if len(rows) == options.sequences:
                break
        return rows
    opening = first if where == "each-sequence" else []
    joint = ([] if eos is None else [eos]) + (first if where == "each-document" else [])
    row, pending = list(opening), first if where == "each-document" else []
    for excerpt, ids in tokenised:
        ledger.use(excerpt.document)
        pending = pending + ids
        while pending:
            room = options.length - len(row)
            row, pending = row + pending[:room], pending[room:]
            if len(row) < options.length:
                break
            rows.append(row)
            row = list(opening)
            step()
            if len(rows) == options.sequences:
                return rows
        pending = joint
    return [*rows, row] if len(row) > len(opening) else rows


def _tokenised(
    excerpts: Iterable[_Excerpt], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[_Excerpt, list[int]]]:
    waiting: list[_Excerpt] = []
    size = 0
    for excerpt in excerpts:
        waiting.append(excerpt)
        size += len(excerpt.text)
        if size >= _TOKENISED_AT_ONCE:
            yield from _with_ids(waiting, tokenizer)
            waiting, size = [], 0
    yield from _with_ids(waiting, tokenizer)


def _with_ids(excerpts: list[_Excerpt], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[_Excerpt, list[int]]]:
    if not excerpts:
        return
    texts = [excerpt.text for excerpt in excerpts]
    # verbose=False: a text longer than the model's context is cut afterwards, so the tokenizer's warning is wrong here
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    yield from ((excerpt, ids) for excerpt, ids in zip(excerpts, encoded, strict=True) if ids)


def _require_enough(rows: list[list[int]], source: str, options: BuildOptions) -> None:
    whole = sum(len(row) == options.length for row in rows) if options.pack else len(rows)
    if whole == options.sequences:
        return
    what = f"the {options.part} part of {source}" if options.part != "all" else source
    if not options.pack:
        raise CorpusError(
            f"{what} holds {len(rows)} documents, but sequences={options.sequences} was asked for without packing: "
            f"use {_fewer(whole)}pack=true or more text."
        )
    have = sum(map(len, rows))
    raise CorpusError(
        f"{what} holds {have:,} tokens, but {options.sequences} sequences of {options.length} need "
        f"{options.sequences * options.length:,}: use {_fewer(whole)}a shorter length, or more text."
    )


def _fewer(whole: int) -> str:
    return f"sequences={whole}, " if whole else ""


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a short row up; the mask hides it, so any token will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def _saved(folder: Path, options: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> CalibrationSet:
    if options:
        raise CorpusError(
            f"{folder} is a finished calibration set, so {', '.join(options)} cannot be changed: leave options out."
        )
    loaded = CalibrationSet.load(folder)
    require_vocabulary(loaded, folder, tokenizer)
    return loaded


def require_vocabulary(loaded: CalibrationSet, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CorpusError when a set loaded from `folder` has ids that the tokenizer does not have."""
    highest = int(loaded.input_ids.max())
    if highest >= len(tokenizer):
        raise CorpusError(
            f"{folder} has the token id {highest}, but this model's tokenizer ends at {len(tokenizer) - 1}: the "
            f"set was made for another model. Build it again from {loaded.spec!r}."
        )
