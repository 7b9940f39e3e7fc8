"""Everything that a study's results say, as numbers and in one plain paragraph."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from shallower.studies.agreement import Agreement, agreement
from shallower.studies.interval import RESAMPLES, Interval, percentiles
from shallower.studies.result import CALIBRATION, FACTORS, Cell, Failure, Result, counterparts, distinct, grouped
from shallower.studies.variance import RESIDUAL, Share, decompose

FEWEST = 4  # cells, sets of them, or distinct plans, below which a share, a comparison or a correlation says nothing
OWN_OUTCOMES = ("plan", "loss")  # names that no held-out text or task may have


@dataclass(frozen=True)
class Decomposition:
    """Shares of the variance of one outcome in one stratum, in which it varies. outcome: `plan`, `loss`, or a text or
    task.
    """

    model: str
    remove: str
    outcome: str
    shares: tuple[Share, ...]

    def share(self, factors: Sequence[str]) -> float:
        """What main effects of these factors, and interactions among them alone, explain together."""
        return sum(item.share.value for item in self.shares if _among(item, factors))

    @property
    def saturated(self) -> bool:
        """Whether terms are as many as cells, so that nothing can be left over."""
        return any(math.isnan(item.share.low) for item in self.shares)

    @property
    def together(self) -> float:
        """What interactions explain, but for those that are calibration's alone."""
        crossed = [item for item in self.shares if " × " in item.term and not _among(item, CALIBRATION)]
        return sum(item.share.value for item in crossed)


def _among(item: Share, factors: Sequence[str]) -> bool:
    """Whether a share's term has no other factors."""
    return set(item.term.split(" × ")) <= set(factors)


@dataclass(frozen=True)
class Omitted:
    """An outcome in one stratum whose variance has no shares, as it is infinite or unknown in `cells` of them."""

    model: str
    remove: str
    outcome: str
    cells: int


@dataclass(frozen=True)
class RankAgreement:
    """Spearman's rank correlation over distinct plans between perplexity on a text (low is good) and accuracy on a
    task.
    """

    model: str
    remove: str
    text: str
    task: str
    correlation: Interval


@dataclass(frozen=True)
class Stability:
    """Plans of one model and calibration sets of one size that differ in their seed only: how alike, and how good they
    are. Cells that depend on the size and have a counterpart at every other; those with one plan count once.

    tokens: sequences × length. perplexity: geometric mean over cells and held-out texts; nan without any. left_out:
    cells of this size that have no such counterpart, or no finite perplexity themselves.
    """

    model: str
    tokens: int
    jaccard: Interval
    perplexity: float
    cells: int
    left_out: int


@dataclass(frozen=True)
class Findings:
    """What a study found; `answer` says it in words. cells: that were measured; failures: those that could not be."""

    cells: int
    failures: tuple[Failure, ...]
    agreements: tuple[Agreement, ...]
    decompositions: tuple[Decomposition, ...]
    omitted: tuple[Omitted, ...]
    ranks: tuple[RankAgreement, ...]
    stability: tuple[Stability, ...]
    answer: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find(results: Sequence[Result], failures: Sequence[Failure] = (), seed: int = 0) -> Findings:
    """Run every statistic that the results allow. seed: of the resampling."""
    agreements = tuple(agreement(results, seed=seed))
    decompositions, omitted = _decompositions(results, seed)
    ranks = tuple(_ranks(results, seed))
    stability = tuple(_stability(results, seed))
    words = _answer(results, failures, agreements, decompositions, omitted, ranks, stability)
    return Findings(len(results), tuple(failures), agreements, decompositions, omitted, ranks, stability, words)


def _strata(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    return {group[0].cell.stratum: group for group in grouped(results, lambda result: result.cell.stratum).values()}


def outcomes(results: Sequence[Result]) -> dict[str, Callable[[Result], float]]:
    """Numbers that all of the results have: loss, log perplexities, accuracies."""
    found: dict[str, Callable[[Result], float]] = {"loss": lambda result: result.loss}
    for text in results[0].held_out:
        found[text] = lambda result, text=text: math.log(result.held_out[text])  # type: ignore[misc]
    for task in results[0].tasks:
        found[task] = lambda result, task=task: result.tasks[task]  # type: ignore[misc]
    return found


def _decompositions(results: Sequence[Result], seed: int) -> tuple[tuple[Decomposition, ...], tuple[Omitted, ...]]:
    found, omitted = [], []
    for (model, remove), cells in _strata(results).items():
        plans = distinct(cells)
        parts = sorted({part for result in plans for part in result.sublayers})
        of_plans = np.array([[float(part in result.sublayers) for part in parts] for result in plans])
        measured = {"plan": (plans, of_plans)}
        for name, value in outcomes(cells).items():
            if name == "loss" and len({result.cell.objective for result in cells}) > 1:
                continue  # losses of different objectives cannot be compared
            group = cells if name == "loss" else plans  # the loss of one plan depends on the text
            measured[name] = (group, np.array([value(result) for result in group]))
        for name, (group, values) in measured.items():
            if len(group) < FEWEST:
                continue
            if lost := len(values) - int(np.isfinite(values.reshape(len(values), -1)).all(1).sum()):
                omitted.append(Omitted(model, remove, name, lost))
                continue
            levels = {factor: [_level(result.cell, factor, name) for result in group] for factor in FACTORS}
            shares = tuple(decompose(values, levels, seed))
            if any(item.share.value for item in shares):  # what does not vary is due to nothing
                found.append(Decomposition(model, remove, name, shares))
    return tuple(found), tuple(omitted)


def _level(cell: Cell, factor: str, outcome: str) -> Hashable:
    """The level of a factor, None where the outcome does not depend on it; of the seed none where a search draws with
    it: what it draws is then left over.
    """
    if factor == "seed" and cell.draws:
        return None
    return getattr(cell, factor) if outcome == "loss" else cell.level(factor)


def _ranks(results: Sequence[Result], seed: int) -> list[RankAgreement]:
    found = []
    for (model, remove), group in _strata(results).items():
        plans = list({result.sublayers: result for result in group}.values())  # what several cells found is one point
        for text in group[0].held_out:
            for task in group[0].tasks:
                pairs = [(result.held_out[text], result.tasks[task]) for result in plans]
                told = np.array([pair for pair in pairs if not math.isnan(pair[1])]).reshape(-1, 2)
                perplexities, accuracies = told[:, 0], told[:, 1]
                if len(told) >= FEWEST and len(set(perplexities)) > 1 and len(set(accuracies)) > 1:
                    found.append(RankAgreement(model, remove, text, task, _spearman(-perplexities, accuracies, seed)))
    return found


def _spearman(first: Any, second: Any, seed: int) -> Interval:
    drawn = np.random.default_rng(seed).integers(len(first), size=(RESAMPLES, len(first)))
    values = [
        float(spearmanr(first[rows], second[rows]).statistic)
        for rows in drawn
        if len(set(first[rows])) > 1 and len(set(second[rows])) > 1
    ]
    return Interval(float(spearmanr(first, second).statistic), *percentiles(np.array(values)))


def _stability(results: Sequence[Result], seed: int) -> list[Stability]:
    found = []
    for of_model in grouped(results, lambda result: result.cell.model).values():
        sizes: dict[int, list[Result]] = {}
        for result in of_model:
            if "sequences" in result.cell.reads:
                sizes.setdefault(result.cell.sequences * result.cell.length, []).append(result)
        for tokens, group in sorted(counterparts(sizes, "held_out", "sequences", "length").items()):
            across = agreement(group, ["seed"], seed)
            if not across:
                continue
            plans = distinct(group)
            logs = [math.log(value) for result in plans for value in result.held_out.values()]
            typical = math.exp(sum(logs) / len(logs)) if logs else float("nan")
            left_out = len(sizes[tokens]) - len(group)
            model = group[0].cell.model
            found.append(Stability(model, tokens, across[0].jaccard, typical, len(plans), left_out))
    return found


def _answer(
    results: Sequence[Result],
    failures: Sequence[Failure],
    agreements: Sequence[Agreement],
    decompositions: Sequence[Decomposition],
    omitted: Sequence[Omitted],
    ranks: Sequence[RankAgreement],
    stability: Sequence[Stability],
) -> str:
    """One paragraph: which matters more, how sure that is, whether perplexity predicts tasks, how many tokens do."""
    sentences = [f"{len(results)} cells were measured" + (f", {len(failures)} could not be." if failures else ".")]
    by_factor = {item.factor: item for item in agreements}
    calibration = [by_factor[name] for name in CALIBRATION if name in by_factor]
    if calibration and "search" in by_factor:
        least = min(calibration, key=lambda item: item.jaccard.value)
        search = by_factor["search"]
        shared = [item.jaccard.told("{:.2f}".format) for item in (search, least)]
        sentences.append(
            f"Plans that differ only in the search share {shared[0]} of their units (Jaccard); plans that differ only "
            f"in the calibration {least.factor} share {shared[1]}."
        )
        if (groups := min(least.groups, search.groups)) < FEWEST:
            sentences.append(
                f"These are pairs from too few sets of cells ({groups}, where {FEWEST} are needed) to say which of the "
                "two changes plans more."
            )
        elif least.jaccard.high < search.jaccard.low:
            sentences.append("So here calibration changes the plan more than the search does.")
        elif search.jaccard.high < least.jaccard.low:
            sentences.append("So here the search changes the plan more than calibration does.")
        else:
            sentences.append("The intervals overlap, so these cells do not say which of the two changes plans more.")

    def named(outcome: str) -> str:
        if outcome in results[0].held_out:
            return f"perplexity on {outcome}"
        return {"plan": "plans", "loss": "the calibration loss"}.get(outcome, f"accuracy on {outcome}")

    for outcome in dict.fromkeys(item.outcome for item in decompositions):
        own = [item for item in decompositions if item.outcome == outcome]
        terms = (CALIBRATION, ("objective",), ("search",), (RESIDUAL,))
        due = [float(np.mean([item.share(names) for item in own])) for names in terms]
        together = float(np.mean([item.together for item in own]))
        left = "nothing can be" if all(item.saturated for item in own) else f"{_percent(due[3])} is"
        sentences.append(
            f"Of the variance of {named(outcome)}, {_percent(due[0])} is due to calibration, {_percent(due[1])} to the "
            f"objective, {_percent(due[2])} to the search, {_percent(together)} to two of these together, and "
            f"{left} left over."
        )
    several = len({item.model for item in omitted}) > 1
    sentences += [
        f"The variance of {named(item.outcome)} at {item.remove}{f' of {item.model}' if several else ''} is left out: "
        f"it is infinite or unknown in {item.cells} {'cell' if item.cells == 1 else 'cells'}."
        for item in omitted
    ]
    if any(item.saturated for item in decompositions):
        sentences.append(
            "Where a grid has as many cells as effects, nothing can be left over: its noise counts as due to these, "
            "and its shares have no intervals."
        )
    if ranks:
        typical = f"{np.mean([item.correlation.value for item in ranks]):.2f}".replace("-", "−")
        sure = sum(item.correlation.low > 0 for item in ranks)
        sentences.append(
            f"Perplexity ranks the distinct plans as task accuracy does with a rank correlation of {typical} on "
            f"average; the interval is above zero in {sure} of {len(ranks)} cases of a ratio, a text and a task."
        )
    if len(sizes := sorted({item.tokens for item in stability})) > 1:
        alike = [np.mean([item.jaccard.value for item in stability if item.tokens == size]) for size in sizes]
        parts = [f"{size:,} tokens {value:.2f}" for size, value in zip(sizes, alike, strict=True)]
        over = ", on average over models" if len({item.model for item in stability}) > 1 else ""
        sentences.append(f"Two seeds of the same calibration agree, by its size{over}: {', '.join(parts)} (Jaccard).")
    return " ".join(sentences)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
