"""Whether a training's losses show that learning has failed, or only that text is of more than one kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

FAST, SLOW = 0.9, 0.98  # weight of the past in the two running means of the loss
SETTLED = 20  # steps before the slow one means something
WORSE = 1.5  # a fast mean so many times the least slow one, and 1 nat and 3 deviations above it, has diverged
MARGIN, EARLY_MARGIN = 1.0, 4.0  # nats; before it has settled there is only the first step's loss to compare with
DEVIATIONS = 3.0


@dataclass(frozen=True)
class LossTrend:
    """What is remembered of the losses so far; no more than JSON holds.

    first, last: of a step. mean: fast running mean. slow: sum of the slow one, which its weights have yet to divide.
    variance: the same of half the squared difference of a step's loss from the one before, which a trend or a jump
    hardly touches. least: of the slow mean, with the deviation of a step's loss at that time.
    """

    steps: int = 0
    first: float = 0.0
    last: float = 0.0
    mean: float = 0.0
    slow: float = 0.0
    variance: float = 0.0
    least: float | None = None
    deviation: float = 0.0

    def after(self, loss: float) -> LossTrend:
        """The same with one step more."""
        if not self.steps:
            return LossTrend(1, loss, loss, loss, (1 - SLOW) * loss)
        steps = self.steps + 1
        slow = SLOW * self.slow + (1 - SLOW) * loss
        variance = SLOW * self.variance + (1 - SLOW) * (loss - self.last) ** 2 / 2
        mean = FAST * self.mean + (1 - FAST) * loss
        now = replace(self, steps=steps, last=loss, mean=mean, slow=slow, variance=variance)
        level = slow / (1 - SLOW**steps)
        if steps < SETTLED or (self.least is not None and level >= self.least):
            return now
        return replace(now, least=level, deviation=(variance / (1 - SLOW ** (steps - 1))) ** 0.5)

    @property
    def reference(self) -> float:
        """What the loss once was."""
        return self.first if self.least is None else self.least

    @property
    def spoiled(self) -> bool:
        """Whether the mean is where no such text explains it."""
        return not self.mean <= self._ceiling

    @property
    def in_doubt(self) -> bool:
        """Whether the mean or the last step's loss is."""
        return not max(self.mean, self.last) <= self._ceiling

    @property
    def _ceiling(self) -> float:
        margin = EARLY_MARGIN if self.least is None else max(MARGIN, DEVIATIONS * self.deviation)
        return max(WORSE * self.reference, self.reference + margin)
