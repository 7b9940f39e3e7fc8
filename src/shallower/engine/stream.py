"""One pass of the dense model past every metric that compares the residual stream before and after a unit or span.

The model's own forward runs once a batch, up to its head; hooks see the stream at the ends of each block and between
its sublayers. All metrics, all units and all spans of one run share that pass, and what their signatures ask for is
worked out once for all of them:

    before, after                           the stream itself, float32 [tokens, hidden], for one unit or span at a time
    dot, before_l2, after_l2, change_l2     scalar product and Euclidean norms, float64 [tokens, units or spans]
    before_l1, after_l1, change_l1          sums of absolute values, the same
    before_before, before_after,            centred second moments over tokens, float64 [width, width], for one unit or
    after_after                             span at a time, of the stream projected to the metric's option `width`

The scalar products of all pairs of depths come from one product of matrices a token: N (N + 1) / 2 spans for little
more than the blocks alone. Where both kinds of sublayers are scored and no blocks, spans begin and end between these,
too: 4 times as many.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shallower import progress
from shallower.anatomy.dissect import Anatomy
from shallower.corpus.calibration import Batch, CalibrationSet
from shallower.engine.crossing import Crossing, Midpoint, crossings, find_midpoints, run_to_head
from shallower.engine.moments import require_tokens
from shallower.engine.trace import prove
from shallower.registry import Method
from shallower.scores import Score
from shallower.units import Span, Unit

Positions = Literal["all", "last"]
Of = Unit | Span

PAIR = frozenset({"before", "after"})
EUCLIDEAN = frozenset({"dot", "before_l2", "after_l2", "change_l2"})
ABSOLUTE = frozenset({"before_l1", "after_l1", "change_l1"})
MOMENTS = frozenset({"before_before", "before_after", "after_after"})
STREAM = PAIR | EUCLIDEAN | ABSOLUTE | MOMENTS

# The stream at every depth is held for one batch, and compared a few tokens at a time, so that these stay in a core's
# cache: 32 tokens at 31 depths of 576 numbers are 2 MB in float32.
TOKENS_A_BATCH = {"cpu": 512}
TOKENS_A_BATCH_ELSEWHERE = 2048
TOKENS_TOGETHER = {"cpu": 32}
TOKENS_TOGETHER_ELSEWHERE = 256


@dataclass(frozen=True)
class StreamStatistic:
    """A stream metric with what to apply it to.

    positions: every real token, or only the last real one of each sequence. spans: every span of blocks, besides the
    units; of sublayers, where both kinds of them are the units.
    """

    metric: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "all"
    spans: bool = False

    def width(self, hidden: int) -> int:
        """In how many directions of a stream of width `hidden` second moments are taken."""
        width = int(self.metric.option("width", self.options) or 0)
        return width if 0 < width < hidden else hidden


def reads_stream(metric: Method) -> bool:
    """Whether a metric compares the residual stream before and after a unit."""
    return not STREAM.isdisjoint(metric.parameters)


def mean_and_error(totals: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float | None]:
    """Mean over tokens and its standard error over sequences, from sums and counts of each sequence.

    The error is None for a single sequence.
    """
    tokens = counts.sum()
    mean = totals.sum() / tokens
    sequences = len(counts)
    if sequences < 2:
        return float(mean), None
    variance = ((totals - mean * counts) ** 2).sum() * sequences / (sequences - 1)
    return float(mean), float(np.sqrt(variance) / tokens)


def stream_scores(
    anatomy: Anatomy, calibration: CalibrationSet, statistics: Sequence[StreamStatistic], units: Sequence[Unit]
) -> list[tuple[Score, ...]]:
    """Scores of `units` (and of all spans where asked) by each statistic, from one forward pass without the head.

    Raises ModelError when the model's blocks do not pass one residual stream on, CorpusError when a map that a metric
    fits has as many inputs as there are tokens.
    """
    for statistic in statistics:
        _require_tokens(statistic, calibration, anatomy.model.config.get_text_config().hidden_size)
    device = anatomy.model.device
    tokens = TOKENS_A_BATCH.get(device.type, TOKENS_A_BATCH_ELSEWHERE)
    batches = list(calibration.batches(max(1, tokens // calibration.length)))
    prove(anatomy, batches[0])
    midpoints = find_midpoints(anatomy) if any(unit.kind != "block" for unit in units) else {}
    tallies = [
        _Moments(statistic) if MOMENTS & set(statistic.metric.parameters) else _Means(statistic, calibration.sequences)
        for statistic in statistics
    ]
    counts: dict[Positions, list[NDArray[np.int64]]] = {"all": [], "last": []}
    first = 0
    with progress.task("reading the residual stream", len(batches)) as step, torch.no_grad():
        for batch in batches:
            view = _View(batch, device, first)
            counts["all"].append(view.counts)
            counts["last"].append(np.ones_like(view.counts))
            _read_batch(anatomy, batch, midpoints, tallies, frozenset(units), view)
            first += len(view.counts)
            step()
    joined = {positions: np.concatenate(parts) for positions, parts in counts.items()}
    return [_rows(tally, joined[tally.statistic.positions], units) for tally in tallies]


def span_ends(anatomy: Anatomy) -> list[float]:
    """Where spans of sublayers begin and end, ascending: between blocks, and in those whose sublayers follow each
    other.
    """
    middles = [index + 0.5 for index in _divided(find_midpoints(anatomy), frozenset(anatomy.units))]
    return sorted([*range(len(anatomy.blocks) + 1), *middles])


def _divided(midpoints: Mapping[int, Midpoint], units: frozenset[Unit]) -> frozenset[int]:
    """The blocks whose sublayers follow each other and are both among the units."""
    return frozenset(
        index
        for index, midpoint in midpoints.items()
        if not midpoint.parallel and units.issuperset(Unit(index, "block").sublayers)
    )


def _require_tokens(statistic: StreamStatistic, calibration: CalibrationSet, hidden: int) -> None:
    if MOMENTS.isdisjoint(statistic.metric.parameters):
        return
    last = statistic.positions == "last"
    others = ["read every position (--positions all)"] if last else []
    others += ["set a smaller width (--set width=8)"] if "width" in statistic.metric.options else []
    require_tokens(
        calibration.sequences if last else calibration.tokens,
        statistic.width(hidden),
        least=f"the map of {statistic.metric.name}",
        instead="".join(f", or {other}" for other in others),
    )


def _read_batch(
    anatomy: Anatomy,
    batch: Batch,
    midpoints: Mapping[int, Midpoint],
    tallies: Sequence[_Tally],
    units: frozenset[Unit],
    view: _View,
) -> None:
    """Run the model on one batch, and let each tally read its units while it runs and its spans in the end."""
    last = len(anatomy.blocks) - 1
    depths: dict[Positions, list[Tensor]] = {
        tally.statistic.positions: [] for tally in tallies if tally.statistic.spans
    }
    ends: list[float] = []
    divided = _divided(midpoints, units) if all(unit.kind != "block" for unit in units) else ()

    def visit(crossing: Crossing) -> None:
        here = crossing.block.index
        points: list[tuple[float, Tensor]] = [(here, crossing.before)]
        if here in divided:
            assert crossing.between is not None
            points.append((here + 0.5, crossing.between))
        if here == last:
            points.append((here + 1, crossing.after.clone()))
        ends.extend(end for end, _ in points)
        for positions, stream in depths.items():
            stream.extend(view.select(positions, point) for _, point in points)
        changes = {unit: change for unit, change in crossing.changes().items() if unit in units}
        _read(tallies, _pairs_of(changes), view, spans=False)
        sublayers = {unit: change for unit, change in changes.items() if unit.kind != "block"}
        _read(tallies, _pairs_of(sublayers), view, spans=True)  # a block is a span of one, which is read in the end

    with crossings(anatomy, midpoints, visit):
        run_to_head(anatomy, batch)
    for positions, stream in depths.items():
        stacked = torch.stack(stream, 1)
        stream.clear()
        among = [tally for tally in tallies if tally.statistic.spans and tally.statistic.positions == positions]
        _read_points(among, _spans(tuple(ends)), stacked, view.sequences(positions))


def _read(tallies: Sequence[_Tally], pairs: tuple[_Pairs, list[Tensor]], view: _View, *, spans: bool) -> None:
    """Let the tallies that have spans, or those that have none, read units."""
    names, points = pairs
    among = [tally for tally in tallies if tally.statistic.spans == spans]
    for positions in {tally.statistic.positions for tally in among} if points else ():
        stacked = torch.stack([view.select(positions, point) for point in points], 1)
        readers = [tally for tally in among if tally.statistic.positions == positions]
        _read_points(readers, names, stacked, view.sequences(positions))


def _read_points(tallies: Sequence[_Tally], pairs: _Pairs, points: Tensor, sequences: Tensor) -> None:
    """points: [tokens, points, hidden] in any float type. sequences: of which sequence each token is."""
    few = TOKENS_TOGETHER.get(points.device.type, TOKENS_TOGETHER_ELSEWHERE)
    at_once = [tally for tally in tallies if tally.whole]
    in_chunks = [tally for tally in tallies if not tally.whole]
    for readers, size in ((at_once, len(points)), (in_chunks, few)):
        for start in range(0, len(points) if readers else 0, max(size, 1)):
            chunk = _Chunk(points[start : start + size], pairs)
            for tally in readers:
                tally.read(chunk, sequences[start : start + size])


@dataclass(frozen=True, eq=False)
class _Pairs:
    """What is compared: for each unit or span the points before and after it, in order of `before`. One object for one
    content, so that it can be a key.
    """

    names: tuple[Of, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """int64 [pairs] each."""
        return torch.tensor(self.before), torch.tensor(self.after)

    @cached_property
    def stops(self) -> dict[int, list[int]]:
        """For each point before, the points after it, ascending."""
        found: dict[int, list[int]] = {}
        for before, after in zip(self.before, self.after, strict=True):
            found.setdefault(before, []).append(after)
        return found


@cache
def _pairs(names: tuple[Of, ...], before: tuple[int, ...], after: tuple[int, ...]) -> _Pairs:
    return _Pairs(names, before, after)


def _pairs_of(changes: Mapping[Unit, tuple[Tensor, Tensor]]) -> tuple[_Pairs, list[Tensor]]:
    """Units of one block, and the tensors that they share as points."""
    points: list[Tensor] = []

    def place(tensor: Tensor) -> int:
        for number, point in enumerate(points):
            if point is tensor:
                return number
        points.append(tensor)
        return len(points) - 1

    found = sorted((place(before), place(after), unit) for unit, (before, after) in changes.items())
    before, after, units = zip(*found, strict=True) if found else ((), (), ())
    return _pairs(units, before, after), points


@cache
def _spans(ends: tuple[float, ...]) -> _Pairs:
    """ends: where each point lies, ascending."""
    before, after = zip(*itertools.combinations(range(len(ends)), 2), strict=True)
    spans = tuple(Span(ends[start], ends[stop]) for start, stop in zip(before, after, strict=True))
    return _Pairs(spans, before, after)


class _View:
    """Which positions of a batch are real, and which is the last of each sequence. first: number of its sequence 0."""

    def __init__(self, batch: Batch, device: torch.device, first: int) -> None:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        self._real = None if batch.attention_mask is None else mask.bool().to(device)
        self.counts: NDArray[np.int64] = mask.sum(1).cpu().numpy().astype(np.int64)
        self._rows = torch.arange(len(mask), device=device)
        self._last = torch.as_tensor(self.counts - 1, device=device)
        self._first = first

    def select(self, positions: Positions, hidden: Tensor) -> Tensor:
        """[sequences, length, hidden], on the device of any block, to [tokens, hidden] on that of the view."""
        hidden = hidden.to(self._rows.device)
        if positions == "last":
            return hidden[self._rows, self._last]
        return hidden.flatten(0, 1) if self._real is None else hidden[self._real]

    def sequences(self, positions: Positions) -> Tensor:
        """Number of the sequence that each token is of: int64 [tokens]."""
        numbers = self._rows + self._first
        if positions == "all":
            counts = torch.as_tensor(self.counts, device=numbers.device)
            numbers = numbers.repeat_interleave(counts)
        return numbers


class _Chunk:
    """The stream at several points for some tokens, and what metrics ask of pairs of points; worked out once."""

    def __init__(self, stream: Tensor, pairs: _Pairs) -> None:
        """stream: [tokens, points, hidden] in any float type."""
        self.stream = stream
        self.pairs = pairs

    @cached_property
    def points(self) -> Tensor:
        """float32 [tokens, points, hidden]."""
        return self.stream.float()

    def supply(self, name: str) -> Tensor:
        """float64 [tokens, pairs]."""
        return self._euclidean[name] if name in EUCLIDEAN else self._absolute[name]

    def _ends(self, of_points: Tensor) -> tuple[Tensor, Tensor]:
        before, after = (end.to(of_points.device) for end in self.pairs.ends)
        return of_points.index_select(1, before), of_points.index_select(1, after)

    @cached_property
    def _euclidean(self) -> dict[str, Tensor]:
        # Float64: where a unit changes little, its change is the small difference of large squares
        exact = self.points.double()
        products = exact @ exact.mT
        square_before, square_after = self._ends(products.diagonal(dim1=1, dim2=2))
        before, after = self.pairs.ends
        dot = products.flatten(1).index_select(1, (before * exact.shape[1] + after).to(exact.device))
        change = (square_before + square_after - 2 * dot).clamp_min_(0).sqrt_()
        return {"dot": dot, "before_l2": square_before.sqrt(), "after_l2": square_after.sqrt(), "change_l2": change}

    @cached_property
    def _absolute(self) -> dict[str, Tensor]:
        before, after = self._ends(self.points.abs().sum(-1).double())
        changes = []
        for start, stops in self.pairs.stops.items():
            low, high = min(stops), max(stops) + 1
            sums = (self.points[:, low:high] - self.points[:, start : start + 1]).abs_().sum(-1)
            changes.append(sums if len(stops) == high - low else sums[:, [stop - low for stop in stops]])
        return {"before_l1": before, "after_l1": after, "change_l1": torch.cat(changes, 1).double()}


class _Tally(Protocol):
    """What one statistic has read so far. whole: it reads a batch at once rather than a few tokens."""

    statistic: StreamStatistic
    whole: bool

    def read(self, chunk: _Chunk, sequences: Tensor) -> None:
        """Take in some tokens. sequences: int64 [tokens]."""

    def scores(self, counts: NDArray[np.int64]) -> dict[Of, Score]:
        """counts: tokens of each sequence."""


class _Means:
    """A metric that has one value a token: sums for each sequence, so that a mean and its standard error exist."""

    def __init__(self, statistic: StreamStatistic, sequences: int) -> None:
        self.statistic = statistic
        self.asked = statistic.metric.parameters
        self.whole = not PAIR.isdisjoint(self.asked)
        self.sequences = sequences
        self.totals: dict[tuple[Of, ...], Tensor] = {}

    def read(self, chunk: _Chunk, sequences: Tensor) -> None:
        values = (
            self._pairwise(chunk) if self.whole else self._values(**{name: chunk.supply(name) for name in self.asked})
        )
        names = chunk.pairs.names
        if names not in self.totals:
            self.totals[names] = torch.zeros(self.sequences, len(names), dtype=torch.float64, device=values.device)
        self.totals[names].index_add_(0, sequences, values)

    def _values(self, **supply: Tensor) -> Tensor:
        values: Tensor = self.statistic.metric.function(**supply, **self.statistic.options)
        return values.double()

    def _pairwise(self, chunk: _Chunk) -> Tensor:
        pairs = zip(chunk.pairs.before, chunk.pairs.after, strict=True)
        stream = [{"before": chunk.points[:, before], "after": chunk.points[:, after]} for before, after in pairs]
        return torch.stack([self._values(**{name: ends[name] for name in self.asked}) for ends in stream], 1)

    def scores(self, counts: NDArray[np.int64]) -> dict[Of, Score]:
        return {
            of: Score(of, *mean_and_error(column, counts))
            for names, totals in self.totals.items()
            for of, column in zip(names, totals.cpu().numpy().T, strict=True)
        }


class _Moments:
    """A metric of second moments over all tokens: sums of products of every point with itself and with later ones."""

    whole = True

    def __init__(self, statistic: StreamStatistic) -> None:
        self.statistic = statistic
        self.sums: dict[_Pairs, Tensor] = {}
        self.products: dict[_Pairs, list[Tensor]] = {}
        self.tokens: dict[_Pairs, int] = {}

    def read(self, chunk: _Chunk, sequences: Tensor) -> None:
        points = self._project(chunk.stream).double()
        tokens, count, width = points.shape
        flat = points.flatten(1)
        pairs = chunk.pairs
        if pairs not in self.sums:
            self.sums[pairs] = flat.new_zeros(count, width)
            self.products[pairs] = [flat.new_zeros(width, (count - point) * width) for point in range(count)]
            self.tokens[pairs] = 0
        self.sums[pairs] += points.sum(0)
        self.tokens[pairs] += tokens
        for point, total in enumerate(self.products[pairs]):
            total.addmm_(points[:, point].T, flat[:, point * width :])

    def _project(self, stream: Tensor) -> Tensor:
        """The stream in `width` directions that are orthogonal and drawn at random, always the same; all if 0."""
        hidden = stream.shape[-1]
        width = self.statistic.width(hidden)
        if width == hidden:
            return stream
        directions = _directions(hidden, width).to(stream.device)
        few = TOKENS_TOGETHER.get(stream.device.type, TOKENS_TOGETHER_ELSEWHERE)
        return torch.cat([part.float() @ directions for part in torch.split(stream, few)])

    def scores(self, counts: NDArray[np.int64]) -> dict[Of, Score]:
        found = {}
        for pairs, sums in self.sums.items():
            for of, before, after in zip(pairs.names, pairs.before, pairs.after, strict=True):
                moments = {
                    "before_before": self._moment(pairs, sums, before, before),
                    "before_after": self._moment(pairs, sums, before, after),
                    "after_after": self._moment(pairs, sums, after, after),
                }
                given = {name: moments[name] for name in self.statistic.metric.parameters}
                found[of] = Score(of, float(self.statistic.metric.function(**given, **self.statistic.options)))
        return found

    def _moment(self, pairs: _Pairs, sums: Tensor, first: int, second: int) -> Tensor:
        """Covariance of two points, float64 [width, width]. Of one block's units the point after may come first."""
        if second < first:
            return self._moment(pairs, sums, second, first).T
        width = sums.shape[1]
        columns = slice((second - first) * width, (second - first + 1) * width)
        tokens = self.tokens[pairs]
        mean_of_product: Tensor = self.products[pairs][first][:, columns] / tokens
        return mean_of_product - torch.outer(sums[first] / tokens, sums[second] / tokens)


@cache
def _directions(hidden: int, width: int) -> Tensor:
    """float32 [hidden, width], orthonormal columns."""
    drawn = torch.randn(hidden, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q
    return orthonormal.float()


def _rows(tally: _Tally, counts: NDArray[np.int64], units: Sequence[Unit]) -> tuple[Score, ...]:
    """Units in order of depth, then spans."""
    found = tally.scores(counts)
    rows = []
    for unit in sorted(units, key=lambda unit: (unit.index, unit.kind)):
        same = found.get(unit) or found[Span(unit.index, unit.index + 1)]
        rows.append(Score(unit, same.value, same.error))
    return (*rows, *(found[of] for of in sorted(of for of in found if isinstance(of, Span))))
