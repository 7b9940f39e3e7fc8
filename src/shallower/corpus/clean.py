"""Which documents of a text are worth reading once: duplicates, near-duplicates and quality.

A pass over the source judges every document and finds clusters; its texts are not kept. The best of a cluster stays:
the one of highest quality, of those the longest, of those the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shallower import progress
from shallower.corpus.duplicates import Duplicates, words_of
from shallower.corpus.quality import Signals, scorer, signals
from shallower.corpus.sources import Document, Source
from shallower.errors import CorpusError

_IN_VAIN = 1_000  # documents in a row that are left out, after which a source without an end is given up


@dataclass(frozen=True)
class Judged:
    """A document without its text. id: the row's own `id`, else its place. place: counted from 0 in the source."""

    place: int
    id: str
    characters: int
    signals: Signals
    quality: float


@dataclass(frozen=True)
class Member:
    """One document of a cluster. alike: its Jaccard similarity to the member that brought it in, the one at place `to`;
    of the first one 1, and None.
    """

    document: Judged
    alike: float
    exact: bool
    to: int | None = None


@dataclass(frozen=True)
class Cluster:
    """Documents that say the same, in reading order; `kept` is the place of the best one: the others leave for it, and
    it stays unless its quality is too low.
    """

    members: tuple[Member, ...]
    kept: int


@dataclass(frozen=True)
class Counts:
    """How many documents stay, and why the others leave. cluster_sizes: how many clusters have which size.

    documents: all that were read. threshold: None when no duplicates were looked for. duplicates: those left out for a
    better one of their cluster; exact_duplicates: of a cluster's members, those with the words of one before them.
    """

    source: str
    threshold: float | None
    min_quality: float
    scorer: str
    documents: int
    blank: int
    kept: int
    duplicates: int
    exact_duplicates: int
    low_quality: int
    cluster_sizes: Mapping[int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "dedup": self.threshold,
            "min_quality": self.min_quality,
            "quality": self.scorer,
            "documents": self.documents,
            "blank": self.blank,
            "kept": self.kept,
            "duplicates": self.duplicates,
            "exact_duplicates": self.exact_duplicates,
            "low_quality": self.low_quality,
            "cluster_sizes": {str(size): times for size, times in self.cluster_sizes.items()},
        }


@dataclass(frozen=True)
class Cleaning:
    """What a pass found. clusters: of two documents and more, the largest first. blank: documents without text."""

    source: str
    threshold: float | None
    min_quality: float
    scorer: str
    documents: tuple[Judged, ...]
    clusters: tuple[Cluster, ...]
    blank: int

    @cached_property
    def duplicates(self) -> frozenset[int]:
        """Places of documents that leave because a better one of their cluster stays."""
        return frozenset(
            member.document.place
            for cluster in self.clusters
            for member in cluster.members
            if member.document.place != cluster.kept
        )

    @cached_property
    def poor(self) -> frozenset[int]:
        """Places of documents that are no duplicates and leave for their quality."""
        below = {judged.place for judged in self.documents if judged.quality < self.min_quality}
        return frozenset(below - self.duplicates)

    @cached_property
    def kept(self) -> frozenset[int]:
        return frozenset(judged.place for judged in self.documents) - self.duplicates - self.poor

    @cached_property
    def sizes(self) -> dict[int, int]:
        """How many clusters have which size; documents that are alone have size 1."""
        found = Counter(len(cluster.members) for cluster in self.clusters)
        alone = len(self.documents) - sum(size * times for size, times in found.items())
        return dict(sorted((found + Counter({1: alone})).items()))

    @cached_property
    def counts(self) -> Counts:
        return Counts(
            source=self.source,
            threshold=self.threshold,
            min_quality=self.min_quality,
            scorer=self.scorer,
            documents=len(self.documents) + self.blank,
            blank=self.blank,
            kept=len(self.kept),
            duplicates=len(self.duplicates),
            exact_duplicates=sum(member.exact for cluster in self.clusters for member in cluster.members),
            low_quality=len(self.poor),
            cluster_sizes=self.sizes,
        )

    def to_json(self) -> dict[str, Any]:
        return self.counts.to_json()


def clean(source: Source, *, dedup: float | None = 0.8, min_quality: float = 0.0, quality: str = "rules") -> Cleaning:
    """Judge every document of a source and find what says the same.

    dedup: Jaccard similarity of five-word runs from which two documents say the same; a cluster is whatever such pairs
    connect. None looks for no duplicates. min_quality: scores below it leave. quality: a registered scorer.

    Raises UnknownName for a scorer that does not exist, CorpusError for a threshold out of range or unreadable text.
    """
    judge = scorer(quality)
    seen = None if dedup is None else Duplicates(dedup)
    connected = _Connected()
    documents: list[Judged] = []
    at: dict[int, int] = {}
    alike: dict[int, tuple[float, bool, int]] = {}
    blank = 0
    with progress.task(f"cleaning {source.name}") as step:
        for place, document in enumerate(source.read()):
            step()
            if not document.text.strip():
                blank += 1
                continue
            found = signals(document.text)
            own = (document.record or {}).get("id", document.id)
            judged = Judged(place, str(own), len(document.text), found, judge(document.text, found))
            at[place] = len(documents)
            documents.append(judged)
            if seen is not None:
                _connect(seen, place, document.text, connected, alike)
    clusters = [
        _cluster([documents[at[place]] for place in places], alike) for places in connected.groups() if len(places) > 1
    ]
    clusters.sort(key=lambda cluster: (-len(cluster.members), cluster.members[0].document.place))
    return Cleaning(source.name, dedup, min_quality, quality, tuple(documents), tuple(clusters), blank)


@dataclass
class Dropped:
    """How many documents `worth_reading` left out."""

    exact: int = 0
    near: int = 0
    low_quality: int = 0

    @property
    def total(self) -> int:
        return self.exact + self.near + self.low_quality


def worth_reading(
    documents: Iterable[Document],
    *,
    seen: Duplicates | None,
    min_quality: float,
    quality: str,
    dropped: Dropped,
    endless: bool = False,
) -> Iterator[Document]:
    """The documents without those below `min_quality` and without those that say what one before them says.

    In contrast to `clean` this does not wait for the end: of duplicates the first stays. seen: what was read before, to
    which this is added; None looks for no duplicates. endless: the documents have no end.

    Raises CorpusError for endless documents of which none stays any more.
    """
    judge = scorer(quality) if min_quality else None
    before = dropped.total
    for document in documents:
        if judge is not None and judge(document.text, signals(document.text)) < min_quality:
            dropped.low_quality += 1
        elif seen is None or not _said_before(document.text, seen, dropped):
            yield document
            before = dropped.total
        if endless and dropped.total - before == _IN_VAIN:
            options = [] if seen is None else [f"dedup={seen.threshold:g}"]
            options += [] if judge is None else [f"min_quality={min_quality:g}"]
            raise CorpusError(
                f"{' and '.join(options)} left out the last {_IN_VAIN:,} documents of {document.source}, which has no "
                "end: do without, or name another text."
            )


def _said_before(text: str, seen: Duplicates, dropped: Dropped) -> bool:
    """Whether it is a duplicate, which is counted; else it is one of those that are seen."""
    number, words = seen.different, words_of(text)
    if seen.exact(number, words, text) is not None:
        dropped.exact += 1
    elif next(seen.near(words), None) is not None:
        dropped.near += 1
    else:
        seen.add(number)
        return False
    return True


def _connect(
    seen: Duplicates, place: int, text: str, connected: _Connected, alike: dict[int, tuple[float, bool, int]]
) -> None:
    connected.add(place)
    words = words_of(text)
    first = seen.exact(place, words, text)
    if first is not None:
        connected.join(first, place)
        alike[place] = (1.0, True, first)
        return
    # one comparison for each cluster is enough: a thousand copies of a template cost a thousand, not a million
    for other, similarity in seen.near(words, skip=lambda other: connected.root(other) == connected.root(place)):
        connected.join(other, place)
        alike.setdefault(place, (similarity, False, other))
    seen.add(place)


def _cluster(members: Sequence[Judged], alike: dict[int, tuple[float, bool, int]]) -> Cluster:
    best = max(members, key=lambda judged: (judged.quality, judged.characters, -judged.place))
    alone = (1.0, False, None)
    return Cluster(tuple(Member(judged, *alike.get(judged.place, alone)) for judged in members), best.place)


class _Connected:
    """Union-find with path halving; the smallest place is the root."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def add(self, place: int) -> None:
        self._parent[place] = place

    def root(self, place: int) -> int:
        parent = self._parent
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    def join(self, one: int, two: int) -> None:
        small, large = sorted((self.root(one), self.root(two)))
        self._parent[large] = small

    def groups(self) -> Iterator[list[int]]:
        """Places in order, by their roots."""
        found: dict[int, list[int]] = {}
        for place in self._parent:
            found.setdefault(self.root(place), []).append(place)
        yield from found.values()
