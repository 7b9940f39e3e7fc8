"""`shallower corpus`: build calibration sets, look at them, and clean text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from transformers import PreTrainedTokenizerBase

from shallower import files
from shallower.checkpoint.load import load_tokenizer
from shallower.corpus import (
    CalibrationSet,
    Cleaning,
    Counts,
    EvaluationRuns,
    SharedRows,
    Source,
    asks_model,
    build_calibration,
    open_source,
)
from shallower.corpus import clean as find
from shallower.corpus.calibration import MANIFEST, TENSORS
from shallower.corpus.sources import require_outside
from shallower.defaults import LENGTH, SEQUENCES
from shallower.errors import CorpusError, OutputError
from shallower.files import expanded, replacing, write_text
from shallower.progress import task
from shallower.reporting.corpus import CleanReport, cluster_png, clusters_json, render, shown_places
from shallower.strict_json import write_json
from shallower.verbs.calibrate import require_room_to_write
from shallower.verbs.subject import open_subject
from shallower.verbs.supply import supply

PAGE, FIGURE, CLUSTERS = "report.html", "clusters.png", "clusters.json"


def build(
    spec: str | Path,
    model: str,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[CalibrationSet, PreTrainedTokenizerBase]:
    """The calibration set that a specification describes, and the tokenizer that made it.

    Unless the specification says `part=…` one document in ten is left for held-out evaluation, as where a text is named
    itself. The model's weights are read only when the specification asks for `self`, the model's own text. out: a
    folder for the set; force: replace the one that is there.

    Raises CorpusError and UnknownName as `build_calibration` does, CorpusError, too, when the model's own text
    would be longer than what it can read, ModelError when MODEL cannot be used, OutputError when the set cannot be
    written.
    """
    spec = str(spec)
    if out is not None:
        _require_free(out, "--out", force=force, needed={MANIFEST, TENSORS}, what="a calibration set")
    if asks_model(spec):
        subject = open_subject(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        require_room_to_write(subject.model, spec, length)
        tokenizer, given = subject.tokenizer, supply(subject.model, subject.tokenizer)
    else:
        tokenizer, given = load_tokenizer(model, trust_remote_code=trust_remote_code)[0], supply()
    made = build_calibration(spec, tokenizer, sequences=sequences, length=length, seed=seed, part="train", supply=given)
    if out is not None:
        with _folder(out, "--out") as folder:
            made.save(folder)
    return made, tokenizer


def beginnings(text: CalibrationSet, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int = 60) -> list[str]:
    """The first `tokens` tokens of the first `count` sequences as text, on one line each."""
    return [" ".join(tokenizer.decode(row[:tokens]).split()) for row in text.input_ids[:count].tolist()]


@dataclass(frozen=True)
class Cleaned:
    """What `clean` found and wrote. overlaps: what remains in the cleaned text of evaluation sets."""

    cleaning: Cleaning
    overlaps: tuple[SharedRows, ...]
    out: Path | None
    report: Path | None

    def to_json(self) -> dict[str, Any]:
        return self.cleaning.to_json() | {"overlap": [asdict(shared) for shared in self.overlaps]}


def clean(
    text: str | Path,
    out: str | Path | None = None,
    *,
    dedup: float | None = 0.8,
    min_quality: float = 0.0,
    quality: str = "rules",
    against: tuple[str, ...] | list[str] = (),
    report: str | Path | None = None,
    force: bool = False,
) -> Cleaned:
    """Leave out duplicates and what is of low quality, and write the rest as JSON lines, rows as they were.

    text: a file, folder or data set. dedup: Jaccard similarity of five-word runs from which documents say the same;
    None keeps duplicates. min_quality: documents of lower quality leave. quality: the scorer. against: evaluation sets
    to be looked for in what stays, by runs of 13 words. report: a folder for `report.html`, `clusters.png` and
    `clusters.json`; force: replace the report that is there.

    Raises CorpusError when the text or an evaluation set cannot be read or nothing stays, UnknownName for a scorer that
    does not exist, OutputError when the result cannot be written.
    """
    if report is not None:
        _require_free(report, "--report", force=force, needed={CLUSTERS}, others={PAGE, FIGURE}, what="a report")
        if out is not None and expanded(report).resolve() in (there := expanded(out).resolve(), *there.parents):
            raise OutputError(
                f"--out {out} is, or is inside of, --report {report}, a folder that is written whole: choose another "
                "place."
            )
    if out is not None:
        require_outside(str(text), expanded(out))
    source = _source(text)
    sets = [EvaluationRuns(name, supply=supply()) for name in against]
    found = find(source, dedup=dedup, min_quality=min_quality, quality=quality)
    kept = found.kept
    _require_some(found.counts)
    quoted = shown_places(found)
    texts: dict[int, str] = {}
    with (
        task(f"writing {len(kept):,} documents", total=len(found.documents) + found.blank) as step,
        _lines(out) as write,
    ):
        for place, document in enumerate(source.read()):
            step()
            if place in quoted:
                texts[place] = document.text[:1000]
            if place in kept:
                write(document.line())
                for runs in sets:
                    runs.look(document.text)
    overlaps = tuple(runs.found() for runs in sets)
    if report is not None:
        with _folder(report, "--report") as folder:
            _write_report(folder, CleanReport(found, overlaps, texts))
    return Cleaned(
        found, overlaps, None if out is None else expanded(out), None if report is None else expanded(report)
    )


def clean_on_disk(
    text: str | Path,
    folder: str | Path,
    out: str | Path | None = None,
    *,
    dedup: float = 0.8,
    min_quality: float = 0.0,
    quality: str = "rules",
    workers: int = 1,
) -> Counts:
    """The same as `clean` for text that memory does not hold: datatrove does it, in a folder on disk.

    folder: where it works; a call that was stopped goes on with what is done there. workers: processes of this machine.
    The other arguments are those of `clean`. The folder stays; nothing needs it once `out` is written.

    Raises CorpusError when datatrove is not installed, the text cannot be read, nothing stays, or the folder holds the
    work of another call, UnknownName for a scorer that does not exist, OutputError when the folder or the result cannot
    be written.
    """
    if workers < 1:
        raise CorpusError(f"workers={workers} is not a number of processes: 1 or more.")
    from shallower.corpus.datatrove import Work

    if out is not None:
        require_outside(str(text), expanded(out))
    work = Work(
        str(text), _source(text), expanded(folder), dedup=dedup, min_quality=min_quality, quality=quality, tasks=workers
    )
    work.run(workers)
    counts = work.counts()
    _require_some(counts)
    with task(f"writing {counts.kept:,} documents", total=counts.kept) as step, _lines(out) as write:
        for line in work.lines() if out is not None else ():
            write(line)
            step()
    return counts


def _source(text: str | Path) -> Source:
    source = open_source(str(text), supply())
    if source.streamed:
        raise CorpusError(
            f"{source.name} is streamed, and cleaning reads a text twice: save it as a .jsonl file first, or use "
            "dedup=… and min_quality=… in a calibration specification, which work as the text comes in."
        )
    return source


def _require_some(counts: Counts) -> None:
    if not counts.kept:
        raise CorpusError(
            f"no document of {counts.source} stays: all have a quality below {counts.min_quality:g} by "
            f"{counts.scorer!r}. Lower --min-quality."
        )


@contextmanager
def _lines(out: str | Path | None) -> Iterator[Callable[[str], None]]:
    """Yields a writer of lines; the file gets its name when all of them are there. None: nothing is written."""
    if out is None:
        yield lambda line: None
        return
    with replacing(out) as temporary, temporary.open("x", encoding="utf-8") as file:
        yield lambda line: print(line, file=file)


def _require_free(
    folder: str | Path, option: str, *, force: bool, needed: Set[str], others: Set[str] = frozenset(), what: str
) -> None:
    """Raise OutputError unless the folder can be made, or `force` may replace it: one with the needed files, and
    perhaps the others, and nothing else.
    """

    def replaceable(there: Path) -> bool:
        inside = (PurePath(path.relative_to(there)) for path in there.rglob("*") if not path.is_dir())
        return needed <= {path.as_posix() for path in inside if not files.left_by_systems(path)} <= needed | others

    what += f" ({', '.join(sorted(needed | others))}) and nothing else"
    files.require_free(expanded(folder), f"{option} {folder}", force=force, replaceable=replaceable, what=what)


@contextmanager
def _folder(target: str | Path, option: str) -> Iterator[Path]:
    """`replacing_folder`, which raises OutputError."""
    try:
        with files.replacing_folder(expanded(target).absolute()) as made:
            yield made
    except OSError as error:
        raise OutputError(f"{option} {target} cannot be written: {error.strerror or error}.") from None


def _write_report(folder: Path, report: CleanReport) -> None:
    data = {"format": "shallower.clusters/1", **report.cleaning.to_json(), "clusters": clusters_json(report.cleaning)}
    write_json(folder / CLUSTERS, data)
    write_text(folder / PAGE, render(report))
    picture = cluster_png(report.cleaning)
    if picture is not None:
        with replacing(folder / FIGURE) as temporary:
            temporary.write_bytes(picture)
