"""From a text specification to a CalibrationSet: split, clean, format, shuffle, tokenise, join, cut, mix.

- Documents are put in an order decided by `seed` alone. Of a long document the first `max_chars` characters are read;
  packing cuts them into excerpts (8,000 characters, more for long sequences) that are shuffled separately, so no single
  book fills the set. `position` takes one excerpt of each document instead: its start, its end, or one at random, of
  eight characters for each token of a sequence.
- Packing joins documents with EOS (if the tokenizer has one) and cuts the stream into sequences without regard to
  documents. Without packing a sequence is a part of one document (its beginning, unless `position` says otherwise),
  padded at the end and masked.
- A mixture gives each source its share of the sequences (largest remainders); a sequence holds text of one source.
- Documents are tokenised without special tokens, in batches, only until there are enough.
- The order comes from hashes, not from a random generator, so the same specification gives the same bytes on any
  machine.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallower import progress
from shallower.corpus.bos import Bos, resolve_bos
from shallower.corpus.calibration import CalibrationSet, SourceRecord, is_saved, padded, tokens_digest
from shallower.corpus.clean import Dropped, worth_reading
from shallower.corpus.duplicates import Duplicates
from shallower.corpus.formats import Format, Formatted, formatted
from shallower.corpus.options import LATER, OPTIONS, BuildOptions, Position
from shallower.corpus.pieces import PIECE, pieces
from shallower.corpus.quality import scorer
from shallower.corpus.sources import Document, Source, name_digest, open_source
from shallower.corpus.specification import (
    Part,
    Term,
    in_part,
    joined,
    parse_specification,
    raise_all,
    written_out,
)
from shallower.corpus.supply import NOTHING, Supply
from shallower.defaults import BUILT_LENGTH, SEQUENCES
from shallower.errors import CorpusError, TooLittleText, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is held in memory to shuffle: all of most local sources, the beginning of a streamed one.
_BUFFER_CHARACTERS = 64_000_000
_STREAM_BUFFER_DOCUMENTS = 1_000
_TOKENISED_AT_ONCE = 100_000  # characters
_LONGEST_WORD = 100  # characters; where no blank comes sooner, there are no words to begin at


def build_calibration(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = SEQUENCES,
    length: int = BUILT_LENGTH,
    seed: int = 0,
    pack: bool = True,
    bos: Bos = "auto",
    part: Part = "all",
    max_chars: int = 100_000,
    position: Position = "auto",
    format: Format = "text",
    shots: int = 5,
    dedup: float = 0.0,
    min_quality: float = 0.0,
    quality: str = "rules",
    supply: Supply = NOTHING,
) -> CalibrationSet:
    """Build the set that `spec` describes, or load it when `spec` is a folder written by CalibrationSet.save.

    Args:
        spec: Sources with weights (see `shallower.corpus.sources`) and options after `?`, or a YAML file of the same
            (see `shallower.corpus.specification`). Options win over the arguments below. The set's own `spec` has them
            written out.
        tokenizer: The model's tokenizer.
        sequences: How many sequences.
        length: Tokens in each, BOS and EOS included.
        seed: Decides which documents come first.
        pack: Join documents and cut; otherwise one document a sequence.
        bos: `each-sequence`, `each-document`, `none`, or `auto`: each sequence if the tokenizer itself adds a BOS, else
            none.
        part: `held-out` is a tenth of the documents, by a hash of their text (of Python's own files,
            of their names), `train` the rest, `all` both.
        max_chars: How many characters of one document are read.
        position: Which part of a document: `start`, `end`, `random`, or `auto`: all of it when packing, else the start.
        format: `text`; `chat` puts rows of messages, instruction and output, or question and answer into the model's
            chat template; `few-shot` joins questions with their answers into prompts. Other rows stay text.
        shots: Solved questions before the last one of a few-shot prompt.
        dedup: Leave out a document whose five-word runs have at least this Jaccard similarity to those of an earlier
            one, also of an earlier source of a mixture, and exact duplicates. 0 keeps all.
        min_quality: Leave out documents of lower quality. 0 keeps all.
        quality: The registered scorer that says so.
        supply: What the sources `self` and `demo:` need, from later layers.

    Raises:
        CorpusError: Text is missing, not text, or too short, or an option is out of range.
        UnknownName: An option after `?`, a domain or a scorer does not exist.
    """
    parsed = parse_specification(spec, OPTIONS)
    folder = Path(os.path.expanduser(parsed.source))
    if is_saved(folder):
        return _saved(folder, parsed.options, tokenizer)
    arguments = BuildOptions(
        sequences, length, seed, pack, bos, part, max_chars, position, format, shots, dedup, min_quality, quality
    )
    options = replace(arguments, **{name: OPTIONS[name].parse(text) for name, text in parsed.options.items()})
    scorer(options.quality)  # refused before anything is read
    sources = _open(parsed.terms, replace(supply, tokens=options.length, seed=options.seed))
    shares = _shares(parsed.terms, options.sequences)
    seen = Duplicates(options.dedup) if options.dedup else None  # one, as a text may stand in several sources
    rows: list[tuple[int, list[int]]] = []
    records: list[SourceRecord] = []
    as_asked = False
    named = "sequences=" if "sequences" in parsed.options else "--sequences "
    for number, (term, source, share) in enumerate(zip(parsed.terms, sources, shares, strict=True)):
        ledger = _Ledger(share / options.sequences)
        made = _term_rows(term, source, tokenizer, replace(options, sequences=share), ledger, seen, named)
        rows += [(number, row) for row in made]
        records += ledger.records(dedup=options.dedup > 0, min_quality=options.min_quality > 0)
        as_asked = as_asked or ledger.as_asked
    if not as_asked:
        raise CorpusError(
            f"{joined(parsed.terms)} holds no row for format={options.format}: chat takes messages, instruction and "
            "output, or question and answer; few-shot takes questions with choices and gold, or an answer. Use "
            "format=text."
        )
    if len(sources) > 1:
        rows = _interleaved(rows, options.seed)
    ids, mask = padded([row for _, row in rows], pad_id(tokenizer), options.length)
    found = [
        replace(term, source=source.spec or term.source) for term, source in zip(parsed.terms, sources, strict=True)
    ]
    spec = written_out(joined(found), options, LATER)
    return CalibrationSet(spec, ids, mask, tuple(records), tokens_digest(tokenizer, ids))


def _open(terms: Sequence[Term], supply: Supply) -> list[Source]:
    """The sources of a mixture; what is wrong with any is told together."""
    sources, faults = [], []
    for term in terms:
        try:
            sources.append(open_source(term.source, supply))
        except UserError as fault:
            faults.append(fault)
    raise_all(faults)
    return sources


def _shares(terms: Sequence[Term], sequences: int) -> list[int]:
    """Sequences of each source: what is left after rounding down goes to the largest remainders, first ones first."""
    total = sum(term.weight for term in terms)
    exact = [term.weight / total * sequences for term in terms]
    shares = [math.floor(amount + 1e-9) for amount in exact]
    by_remainder = sorted(range(len(terms)), key=lambda place: (shares[place] - exact[place], place))
    for place in by_remainder[: sequences - sum(shares)]:
        shares[place] += 1
    for term, share in zip(terms, shares, strict=True):
        if not share:
            raise CorpusError(
                f"{term.source} is {term.weight / total:.2%} of {sequences} sequences, which is none: ask for more "
                "sequences, give it a greater weight, or leave it out."
            )
    return shares


def _interleaved(rows: Sequence[tuple[int, list[int]]], seed: int) -> list[tuple[int, list[int]]]:
    """Sequences of several sources in an order decided by the seed, so that any first part is a mixture, too."""
    order = [hashlib.sha256(f"{seed} {source} {place}".encode()).digest() for place, (source, _) in enumerate(rows)]
    return [rows[place] for place in sorted(range(len(rows)), key=order.__getitem__)]


def _term_rows(
    term: Term,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    ledger: _Ledger,
    seen: Duplicates | None,
    named: str,
) -> list[list[int]]:
    documents: Iterable[Document] = ledger.recorded(source.read())
    # the whole text decides the part, so that sets with another max_chars split alike
    documents = (
        document
        for document in documents
        if document.text.strip() and in_part(document.whole or document.text, options.part)
    )
    documents = worth_reading(
        documents,
        seen=seen,
        min_quality=options.min_quality,
        quality=options.quality,
        dropped=ledger.dropped,
        endless=source.endless,
    )
    texts = ledger.noticed(formatted(documents, options.format, options.shots, tokenizer))
    excerpts = _shuffled(_excerpts(texts, options), source, options.seed)
    with progress.task(f"tokens of {source.name}", total=options.sequences) as step:
        # what the model says costs more than what tokenising at once saves
        tokenised = _tokenised(excerpts, tokenizer, 1 if source.endless else _TOKENISED_AT_ONCE)
        rows = _rows(tokenised, tokenizer, options, ledger, step)
    _require_enough(rows, term.source, options, ledger, named)
    return rows


@dataclass(frozen=True)
class _Excerpt:
    """Text that is tokenised as one, and source and id of each row that it is of: rows would outgrow the buffer."""

    text: str
    id: str
    rows: tuple[tuple[str, str], ...]


class _Ledger:
    """What was read of each file or data set of a source, and what of it was used."""

    def __init__(self, weight: float) -> None:
        self.dropped = Dropped()
        self.as_asked = False
        self._weight = weight
        self._hashes: dict[str, Any] = {}
        self._read: dict[str, int] = {}
        self._used: dict[str, set[str]] = {}
        self._tokens: dict[str, int] = {}

    def recorded(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            data = document.text.encode()
            total = self._hashes.setdefault(document.source, hashlib.sha256())
            total.update(len(data).to_bytes(8, "little"))
            total.update(data)
            self._read[document.source] = self._read.get(document.source, 0) + 1
            yield document

    def noticed(self, texts: Iterable[Formatted]) -> Iterator[Formatted]:
        for text in texts:
            self.as_asked = self.as_asked or text.as_asked
            yield text

    def use(self, excerpt: _Excerpt, tokens: int) -> None:
        for source, id in excerpt.rows:
            self._used.setdefault(source, set()).add(id)
        name, _ = excerpt.rows[0]
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def records(self, *, dedup: bool, min_quality: bool) -> tuple[SourceRecord, ...]:
        """dedup, min_quality: whether documents were left out for these."""
        names = sorted(self._hashes)
        total = sum(self._tokens.values())
        records = [
            SourceRecord(
                name,
                f"sha256:{self._hashes[name].hexdigest()}",
                len(self._used.get(name, ())),
                self._read[name],
                self._tokens.get(name, 0),
                self._weight * (self._tokens.get(name, 0) / total),
            )
            for name in names
        ]
        if records:
            # counted for the source as a whole: they stand with its first file; what was not looked for is not known
            found = self.dropped
            records[0] = replace(
                records[0],
                exact_duplicates=found.exact if dedup else None,
                near_duplicates=found.near if dedup else None,
                low_quality=found.low_quality if min_quality else None,
            )
        return tuple(records)


def _excerpts(texts: Iterable[Formatted], options: BuildOptions) -> Iterator[_Excerpt]:
    limit = max(PIECE, 8 * options.length) if options.position == "auto" else 8 * options.length
    for found in texts:
        document, rows = found.document, tuple((row.source, row.id) for row in found.rows)
        text = _part_of(document.text, options.max_chars, document.id, options)
        if len(text) <= limit or not options.pack:
            yield _Excerpt(text, document.id, rows)
        elif options.position != "auto":
            yield _Excerpt(_part_of(text, limit, document.id, options), document.id, rows)
        else:
            for number, piece in enumerate(pieces(text.splitlines(keepends=True), limit)):
                yield _Excerpt(piece, f"{document.id}:{number}", rows)


def _part_of(text: str, width: int, id: str, options: BuildOptions) -> str:
    """At most `width` characters from where `position` says, from the start of a word on."""
    start = _offset(len(text) - width, id, options)
    if not start:
        return text[:width]
    found = text[start : start + width]
    blank = None if text[start - 1].isspace() else re.search(r"\s", found[:_LONGEST_WORD])
    return found if blank is None else found[blank.end() :]


def _offset(room: int, id: str, options: BuildOptions) -> int:
    """Where a part begins that may begin at 0 to `room`."""
    if room <= 0 or options.position in ("auto", "start"):
        return 0
    if options.position == "end":
        return room
    return int.from_bytes(name_digest(f"{options.seed} {id} position")[:8], "big") % (room + 1)


def _shuffled(excerpts: Iterable[_Excerpt], source: Source, seed: int) -> Iterator[_Excerpt]:
    """Excerpts by the hash of seed and id; those of a source that outgrows the buffer leave it as others come in."""
    if source.endless:
        yield from excerpts
        return
    most = _STREAM_BUFFER_DOCUMENTS if source.streamed else None
    heap: list[tuple[bytes, int, _Excerpt]] = []
    held = 0
    for number, excerpt in enumerate(excerpts):
        heapq.heappush(heap, (name_digest(f"{seed} {excerpt.id}"), number, excerpt))
        held += len(excerpt.text)
        while held > _BUFFER_CHARACTERS or (most is not None and len(heap) > most):
            first = heapq.heappop(heap)[2]
            held -= len(first.text)
            yield first
    while heap:
        yield heapq.heappop(heap)[2]


def _rows(
    tokenised: Iterable[tuple[_Excerpt, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    options: BuildOptions,
    ledger: _Ledger,
    step: progress.Step,
) -> list[list[int]]:
    """Sequences, fewer than asked for if the text runs out. Packed: a last, shorter row holds what was left."""
    where, bos = resolve_bos(tokenizer, options.bos)
    eos = tokenizer.eos_token_id
    first = [] if bos is None else [bos]
    rows: list[list[int]] = []
    if not options.pack:
        for excerpt, ids in tokenised:
            start = _offset(len(ids) - (options.length - len(first)), excerpt.id, options)
            rows.append((first + ids[start:])[: options.length])
            ledger.use(excerpt, len(rows[-1]))
            step()
            if len(rows) == options.sequences:
                break
        return rows
    opening = first if where == "each-sequence" else []
    joint = ([] if eos is None else [eos]) + (first if where == "each-document" else [])
    row, pending = list(opening), first if where == "each-document" else []
    for excerpt, ids in tokenised:
        ledger.use(excerpt, 0)
        pending = pending + ids
        while pending:
            room = options.length - len(row)
            # the BOS that opens a sequence counts for the document that it stands before
            ledger.use(excerpt, min(room, len(pending)) + (len(opening) if len(row) == len(opening) else 0))
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
    excerpts: Iterable[_Excerpt], tokenizer: PreTrainedTokenizerBase, at_once: int
) -> Iterator[tuple[_Excerpt, list[int]]]:
    waiting: list[_Excerpt] = []
    size = 0
    for excerpt in excerpts:
        waiting.append(excerpt)
        size += len(excerpt.text)
        if size >= at_once:
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


def _require_enough(rows: list[list[int]], source: str, options: BuildOptions, ledger: _Ledger, named: str) -> None:
    """named: how the number of sequences was asked for, as it is written again."""
    whole = sum(len(row) == options.length for row in rows) if options.pack else len(rows)
    if whole == options.sequences:
        return
    fewer = f"{named}{whole}, " if whole else ""
    what = f"the {options.part} part of {source}" if options.part != "all" else source
    if ledger.dropped.total:
        what += f", without {ledger.dropped.total} documents that dedup and min_quality leave out,"
    if not options.pack:
        raise TooLittleText(
            f"{what} holds {len(rows):,} documents, but {options.sequences:,} sequences were asked for without packing",
            f"use {fewer}pack=true or more text",
            whole / options.sequences,
        )
    have = sum(map(len, rows))
    raise TooLittleText(
        f"{what} holds {have:,} tokens, but {options.sequences:,} sequences of {options.length} need "
        f"{options.sequences * options.length:,}",
        f"use {fewer}a shorter length, or more text",
        whole / options.sequences,
    )


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
    progress.note(
        f"{folder.name} is a finished set: all its {loaded.sequences:,} sequences of {loaded.length:,} tokens are read."
    )
    return loaded


def require_vocabulary(loaded: CalibrationSet, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises CorpusError when ids of a set loaded from `folder` are unknown to the tokenizer or mean something else."""
    highest = int(loaded.input_ids.max())
    if highest >= len(tokenizer):
        raise CorpusError(
            f"{folder} has the token id {highest}, but this model's tokenizer ends at {len(tokenizer) - 1}: the "
            f"set was made for another model. Build it again from {loaded.spec!r}."
        )
    if loaded.tokenizer is not None and loaded.tokenizer != tokens_digest(tokenizer, loaded.input_ids):
        raise CorpusError(
            f"the token ids of {folder} stand for other tokens in this model's tokenizer: the set was made for another "
            f"model. Build it again from {loaded.spec!r}."
        )
