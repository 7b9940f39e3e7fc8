"""Near-duplicates of text that memory does not hold: datatrove's MinHash stages, working in a folder on disk.

    signatures  of each document the set of its runs of words, its quality and its MinHash signature
    pairs       documents that share a band of the signature
    verified    of these, pairs that are alike on the sets themselves
    chosen      clusters, and which documents leave
    kept        the rows that stay

The first and the last stage are done in tasks that each read the whole text and take their share of its documents;
pairs are found in a task for each band, clusters in one. A task that is done leaves a mark, and is not done again.

datatrove makes signatures, finds pairs, clusters and filters. What its own way would do differently is ours, so that
the result is that of `shallower.corpus.clean`: runs of words instead of a tokenizer for each language, the verifying
(a pair of similarity 0.6 shares one of the bands for 0.8 more often than not), and the choice of what stays.

Importing this module needs datatrove: it raises CorpusError where there is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shallower import progress
from shallower.corpus.clean import Counts
from shallower.corpus.duplicates import LEAST_WORDS, SHINGLE, Hashes, Shingles, bands, fingerprint, jaccard, words_of
from shallower.corpus.quality import scorer, signals
from shallower.corpus.sources import Source, path_named, require_outside, text_files
from shallower.errors import CorpusError, OutputError
from shallower.strict_json import write_json

try:
    from datatrove.data import Document
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.binaryio import read_tuples_from_file
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer
except ImportError:
    raise CorpusError(
        "cleaning in a folder needs the package `datatrove`, which is not installed: "
        "pip install 'shallower[datatrove]'."
    ) from None

from shallower.corpus.processes import processes  # which needs a package that comes with datatrove

# it logs every task to stderr, in each process of its own, and errors with their traceback: ours are one sentence
logger.disable("datatrove")

SETTINGS, FOUND = "work.json", "found.json"
_FORMAT = "shallower.work/1"
_SHINGLES_AT_ONCE = 4_096  # times the numbers of a signature in memory
_PAIRS_AT_ONCE = 4_096

Place = tuple[int, int]  # a task, and the number of a document in its share


@dataclass(frozen=True)
class PipelineStage:
    """What any executor of datatrove can run. logs: where it has to leave its marks."""

    name: str
    pipeline: list[Any]
    tasks: int
    logs: Path


class Work:
    """The cleaning of one source in one folder."""

    def __init__(
        self,
        text: str,
        source: Source,
        folder: Path,
        *,
        dedup: float,
        min_quality: float = 0.0,
        quality: str = "rules",
        tasks: int = 1,
    ) -> None:
        """Begin in an empty folder, or go on with what the same call left in it.

        text: the specification that names `source`. tasks: shares of the text; a folder keeps those it was begun with.

        Raises CorpusError when the threshold is out of range, or the folder was begun otherwise or for text that has
        changed since; OutputError when it holds something else, is part of the text or cannot be written; UnknownName
        for a scorer that does not exist.
        """
        if not 0 < dedup <= 1:
            raise CorpusError(f"dedup={dedup} is not above 0 and at most 1, the Jaccard similarity of duplicates.")
        scorer(quality)
        require_outside(text, folder)
        self.source, self.folder = source, folder.absolute()
        self.dedup, self.min_quality, self.quality = dedup, min_quality, quality
        asked = {"text": text, "files": _stamp(text), "dedup": dedup, "min_quality": min_quality, "quality": quality}
        held = self._begin({"format": _FORMAT, **asked, "tasks": tasks})
        other = next((name for name in asked if held.get(name) != asked[name]), None)
        if other == "files":
            raise CorpusError(
                f"{text} has changed since the work in {folder} began: remove that folder, and start again."
            )
        if other is not None:
            raise CorpusError(
                f"{folder} holds the work of another call, with {other}={held.get(other)!r} and not {asked[other]!r}: "
                "name another folder, or remove that one."
            )
        self.tasks = int(held["tasks"])

    def _begin(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings that the folder was begun with, perhaps now."""
        path = self.folder / SETTINGS
        with _room(self.folder):
            if not self.folder.exists() or not any(self.folder.iterdir()):
                write_json(path, settings)
            with contextlib.suppress(FileNotFoundError, ValueError):
                held = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(held, dict) and held.get("format") == _FORMAT:
                    return held
        raise OutputError(f"{self.folder} holds other files than those of such work; name an empty or a new folder.")

    def stages(self) -> tuple[PipelineStage, ...]:
        """The work in order; a stage can start when the one before is done."""
        folder = {name: str(self.folder / name) for name in ("signatures", "pairs", "verified", "clusters", "chosen")}
        count, rows = bands(self.dedup)
        # sha1: what datatrove asks for nothing to be installed; the hashes are ours
        config = MinhashConfig(SHINGLE, count, rows, hash_config=HashConfig(precision=64, hash_fc="sha1"))
        notes = self.folder / "notes"
        chosen = self.folder / "chosen"
        pipelines: dict[str, tuple[list[Any], int]] = {
            "signatures": (
                [_Share(self.source), _Signatures(folder["signatures"], config, notes, self.quality)],
                self.tasks,
            ),
            "pairs": ([MinhashDedupBuckets(folder["signatures"], folder["pairs"], config=config)], count),
            "verified": ([_Verify(self.folder / "pairs", notes, self.folder / "verified", self.dedup)], count),
            "chosen": (
                [
                    _Clusters(folder["verified"], folder["clusters"], config=config, save_cluster_id=True),
                    _Choose(self.folder / "clusters", notes, chosen, self.tasks, self.min_quality),
                ],
                1,
            ),
            "kept": (
                [_Share(self.source), MinhashDedupFilter(folder["chosen"]), _Kept(self.folder / "kept")],
                self.tasks,
            ),
        }
        return tuple(
            PipelineStage(name, pipeline, tasks, self.folder / "logs" / name)
            for name, (pipeline, tasks) in pipelines.items()
        )

    def run(self, workers: int = 1) -> None:
        """Do what is not done yet, in so many processes of this machine.

        Raises CorpusError when another call works in the folder, CorpusError and UserError as reading and scoring do,
        OutputError when the folder cannot be written.
        """
        stages = self.stages()
        done = progress.task(f"cleaning {self.source.name} in {self.folder.name}", sum(stage.tasks for stage in stages))
        with _room(self.folder), processes(workers, self.folder) as each, done as step:
            for stage in stages:
                executor = _Executor(stage.pipeline, tasks=stage.tasks, logging_dir=str(stage.logs))
                missing = executor.get_incomplete_ranks()
                step(stage.tasks - len(missing))
                for _ in each(executor.one, missing):
                    step()

    def counts(self) -> Counts:
        """What was found, when all is done."""
        found = json.loads((self.folder / "chosen" / FOUND).read_text(encoding="utf-8"))
        sizes = {int(size): times for size, times in found.pop("cluster_sizes").items()}
        return Counts(self.source.name, self.dedup, self.min_quality, self.quality, cluster_sizes=sizes, **found)

    def lines(self) -> Iterator[str]:
        """The rows that stay, in the order of the source, as lines without their ends."""
        # the tasks took documents in turns
        for row in zip_longest(*(self._share(task) for task in range(self.tasks))):
            yield from (line for line in row if line is not None)

    def _share(self, task: int) -> Iterator[str | None]:
        """A line, or None where it left, for each document of the task."""
        left = _mapped(self.folder / "chosen" / f"{task:06d}.remove", np.dtype("<u4"))
        documents = len(_Notes(self.folder / "notes").documents(task))
        next_left = 0
        with (self.folder / "kept" / f"{task:05d}.jsonl").open(encoding="utf-8", newline="\n") as lines:
            for number in range(documents):
                if next_left < len(left) and left[next_left] == number:
                    next_left += 1
                    yield None
                else:
                    yield next(lines).removesuffix("\n")


class _Executor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's executor, of which single tasks are called.

    Its own `run` starts processes anew for each stage, waits for ever for one that was killed, and leaves one behind
    when it is killed itself.
    """

    def one(self, rank: int) -> None:
        """Do a task and mark it as done."""
        own = copy(self)
        own.pipeline = deepcopy(self.pipeline)  # steps count what they did
        own._run_for_rank(rank, rank)


# --- what is noted of documents ------------------------------------------------------------------------------------

_NOTE = np.dtype([("end", "<u8"), ("fingerprint", "<u8"), ("characters", "<u8"), ("quality", "<f8")])
_RUN = np.dtype("<u8")


class _Notes:
    """Of the documents of each task the sets of runs, one after the other, and where they end; read where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._documents: dict[int, npt.NDArray[Any]] = {}
        self._runs: dict[int, Hashes] = {}

    def paths(self, task: int) -> tuple[Path, Path]:
        return self.folder / f"{task:05d}.documents", self.folder / f"{task:05d}.runs"

    def documents(self, task: int) -> npt.NDArray[Any]:
        if task not in self._documents:
            self._documents[task] = _mapped(self.paths(task)[0], _NOTE)
        return self._documents[task]

    def runs(self, place: Place) -> Hashes:
        task, number = place
        if task not in self._runs:
            self._runs[task] = _mapped(self.paths(task)[1], _RUN)
        ends = self.documents(task)["end"]
        return self._runs[task][ends[number - 1] if number else 0 : ends[number]]


# --- steps, as datatrove calls them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """Reads every so many documents of the source, blank ones as well: their numbers have to stay the same."""

    source: Source

    def __call__(self, data: None, rank: int, world_size: int) -> Iterator[Any]:
        for document in islice(self.source.read(), rank, None, world_size):
            yield Document(text=document.text, id=document.id, metadata={"document": document})


class _Signatures(MinhashDedupSignature):  # type: ignore[misc]
    """datatrove's signatures, of our runs of words; notes the sets, and what decides which of a cluster stays."""

    def __init__(self, output_folder: str, config: Any, notes: Path, quality: str) -> None:
        # the tokenizer is never asked; English, the default, would need spaCy
        super().__init__(output_folder, config, WhitespaceTokenizer())
        self.notes = notes
        self.quality = quality

    def run(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> None:
        self.notes.mkdir(parents=True, exist_ok=True)
        self._shingles, self._judge, self._end = Shingles(), scorer(self.quality), 0
        documents, runs = _Notes(self.notes).paths(rank)
        with documents.open("wb") as self._documents_file, runs.open("wb") as self._runs_file:
            super().run(data, rank, world_size)
        del self._documents_file, self._runs_file

    def get_shingles(self, text: str) -> Hashes:
        """The set of runs, uint64 [runs, 1]: none of a blank text, and of a short one all of it as a single run."""
        words = words_of(text)
        own = np.frombuffer(fingerprint(words, text), dtype=_RUN, count=1)
        found = own if text.strip() else own[:0]
        if len(words) >= LEAST_WORDS:
            found = self._shingles.of(words)
        self._end += len(found)
        quality = self._judge(text, signals(text)) if len(found) else 0.0
        self._documents_file.write(np.array((self._end, own[0], len(text), quality), dtype=_NOTE).tobytes())
        self._runs_file.write(found.astype(_RUN).tobytes())
        return found.reshape(-1, 1)

    def get_signature(self, shingles: Hashes) -> list[list[int]]:
        whole = super().get_signature
        least: Any = np.min(
            [
                whole(shingles[start : start + _SHINGLES_AT_ONCE])
                for start in range(0, len(shingles), _SHINGLES_AT_ONCE)
            ],
            axis=0,
        )
        signature: list[list[int]] = least.tolist()
        return signature


@dataclass(frozen=True)
class _Verify:
    """Of the documents that share a band, pairs that are alike: as many as it takes to connect all that are."""

    pairs: Path
    notes: Path
    out: Path
    threshold: float

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        name = f"{rank:05d}_00.dups"
        notes = _Notes(self.notes)
        with (self.pairs / name).open("rb") as given, (self.out / name).open("wb") as out:
            for members in _groups(read_tuples_from_file(given, "4I", lines_to_buffer=_PAIRS_AT_ONCE)):
                for one, two in self._connecting(members, notes):
                    out.write(struct.pack("<4I", *one, *two))

    def _connecting(self, members: Iterable[Place], notes: _Notes) -> Iterator[tuple[Place, Place]]:
        clusters: list[list[Place]] = []
        for member in members:
            own = [member]
            apart = []
            runs = notes.runs(member)
            # one pair for each cluster is enough: a thousand copies of a template cost a thousand comparisons
            for cluster in clusters:
                other = next((other for other in cluster if self._alike(notes.runs(other), runs)), None)
                if other is None:
                    apart.append(cluster)
                else:
                    yield other, member
                    cluster.extend(own)
                    own = cluster
            clusters = [*apart, own]

    def _alike(self, one: Hashes, two: Hashes) -> bool:
        short, long = sorted((len(one), len(two)))
        return short >= self.threshold * long and jaccard(one, two) >= self.threshold


class _Clusters(MinhashDedupCluster):  # type: ignore[misc]
    """datatrove's clusters, without its bar."""

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            super().run(data, rank, world_size)


@dataclass(frozen=True)
class _Choose:
    """Writes for each task the numbers of documents that leave, as datatrove's filter reads them, and counts them."""

    clusters: Path
    notes: Path
    out: Path
    tasks: int
    min_quality: float

    def __call__(self, data: None, rank: int, world_size: int) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        notes = _Notes(self.notes)
        members = [self._members(task, notes) for task in range(self.tasks)]
        task, number, cluster, place, characters, quality, prints = (
            np.concatenate(each) for each in zip(*members, strict=True)
        )
        # as in memory: of a cluster the highest quality stays, then the longest, then the first
        order = np.lexsort((place, -characters, -quality, cluster))
        worse = order[1:][cluster[order][1:] == cluster[order][:-1]]
        counts = {"documents": 0, "blank": 0, "kept": 0, "duplicates": len(worse), "low_quality": 0}
        for share in range(self.tasks):
            documents = notes.documents(share)
            blank = np.diff(documents["end"], prepend=np.uint64(0)) == 0
            duplicate = np.zeros(len(documents), dtype=bool)
            duplicate[number[worse][task[worse] == share]] = True
            poor = ~blank & ~duplicate & (documents["quality"] < self.min_quality)
            leaves = blank | duplicate | poor
            np.flatnonzero(leaves).astype("<u4").tofile(self.out / f"{share:06d}.remove")
            counts["documents"] += len(documents)
            counts["blank"] += int(blank.sum())
            counts["low_quality"] += int(poor.sum())
            counts["kept"] += int((~leaves).sum())
        sizes, times = np.unique(np.unique(cluster, return_counts=True)[1], return_counts=True)
        alone = counts["documents"] - counts["blank"] - len(cluster)
        write_json(
            self.out / FOUND,
            counts
            | {"exact_duplicates": len(prints) - len(np.unique(prints))}
            | {"cluster_sizes": {"1": alone} | {str(size): int(n) for size, n in zip(sizes, times, strict=True)}},
        )

    def _members(self, task: int, notes: _Notes) -> tuple[npt.NDArray[Any], ...]:
        """Of the task's documents that are in clusters: task, number, cluster, place and what was noted."""
        path = self.clusters / f"{task:06d}.clusters"
        found = (np.fromfile(path, "<u4") if path.exists() else np.zeros(0, "<u4")).reshape(-1, 2).astype(np.int64)
        noted = notes.documents(task)[found[:, 0]]
        characters = noted["characters"].astype(np.int64)
        place = found[:, 0] * self.tasks + task
        tasks = np.full(len(found), task)
        return tasks, found[:, 0], found[:, 1], place, characters, noted["quality"], noted["fingerprint"]


@dataclass(frozen=True)
class _Kept:
    """Writes what stays of a share."""

    out: Path

    def __call__(self, data: Iterable[Any], rank: int, world_size: int) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / f"{rank:05d}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for document in data:
                file.write(document.metadata["document"].line() + "\n")


def _groups(pairs: Iterable[tuple[int, int, int, int]]) -> Iterator[list[Place]]:
    """Documents with one signature in the band: datatrove lists them as a chain of neighbours."""
    members: list[Place] = []
    for task, number, next_task, next_number in pairs:
        if not members or members[-1] != (task, number):
            if members:
                yield members
            members = [(task, number)]
        members.append((next_task, next_number))
    if members:
        yield members


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The numbers of a file, read as they are used."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _stamp(text: str) -> str:
    """Changes when a file that the specification names does; empty where it names none."""
    path = path_named(text)
    arrow = text.startswith("arrow:")
    files = [path] if not os.path.isdir(path) else sorted(path.glob("*.arrow")) if arrow else text_files(path)
    stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files if os.path.isfile(file)]
    told = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.blake2b(os.fsencode(told), digest_size=16).hexdigest() if told else ""


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot work in {folder}: {error.strerror or error}. Free some room, or name another folder; what is done "
            "is kept."
        ) from error
