"""Sums over tokens, in float64: all that a fit by least squares keeps of a text."""

from __future__ import annotations

import torch
from torch import Tensor

from shallower.errors import CorpusError


def require_tokens(tokens: int, inputs: int, *, least: str, instead: str = "") -> None:
    """Raise CorpusError unless there are more tokens than `least`, what is fitted to them, has inputs.

    instead: what else than more text would do, for the error.
    """
    if tokens <= inputs:
        raise CorpusError(
            f"{tokens:,} tokens of calibration text cannot fit {least}, which has {inputs:,} inputs: read more "
            f"(--sequences, --length), several times as many{instead}."
        )


class Moments:
    """Weighted sums of x, y, x xᵀ, x yᵀ and y², in float64; all that a least-squares fit needs.

    On accelerators, most of which are slow at float64, the products of one batch are in float32.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.tokens = 0
        """Tokens that count."""
        self.seen = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """x: float32 [tokens, inputs]. y: float32 [tokens, outputs]. weights: [tokens]."""
        if x.device.type == "cpu":  # beside a massive activation float32 products lose what all other tokens say
            x, y, weights = x.double(), y.double(), weights.double()
        weighted = x * weights[:, None]
        parts = [
            weighted.sum(0, dtype=torch.float64),
            (y * weights[:, None]).sum(0, dtype=torch.float64),
            (weighted.T @ x).double(),
            (weighted.T @ y).double(),
            (y.double().square() * weights[:, None]).sum(),
        ]
        self._sums = (
            parts if not self._sums else [total.add_(part) for total, part in zip(self._sums, parts, strict=True)]
        )
        self.weight += float(weights.sum(dtype=torch.float64))
        self.tokens += int((weights > 0).sum())
        self.seen += len(weights)

    @property
    def x_mean(self) -> Tensor:
        mean: Tensor = self._sums[0] / self.weight
        return mean

    @property
    def y_mean(self) -> Tensor:
        mean: Tensor = self._sums[1] / self.weight
        return mean

    @property
    def xx(self) -> Tensor:
        """Covariance of x, [inputs, inputs]."""
        square: Tensor = self._sums[2] / self.weight
        covariance: Tensor = square - torch.outer(self.x_mean, self.x_mean)
        return covariance

    @property
    def xy(self) -> Tensor:
        """Covariance of x and y, [inputs, outputs]."""
        product: Tensor = self._sums[3] / self.weight
        covariance: Tensor = product - torch.outer(self.x_mean, self.y_mean)
        return covariance

    @property
    def y_variance(self) -> float:
        """Mean squared distance of y from its mean."""
        return float(self._sums[4] / self.weight - self.y_mean.square().sum())

    def ridge(self, strength: float, *, centred: bool = True) -> Tensor:
        """The map [inputs, outputs] from x − mean to y − mean (or x to y) with least squared error, float64.

        strength: of the penalty on the map's squared entries, in units of the mean variance (or square) of x; with 0
        the solution of least norm.
        """
        xx, xy = (self.xx, self.xy) if centred else (self._sums[2] / self.weight, self._sums[3] / self.weight)
        solution: Tensor
        if strength == 0:
            solution = torch.linalg.pinv(xx, hermitian=True) @ xy
        else:
            penalised = xx.clone()
            penalised.diagonal().add_(strength * xx.diagonal().mean().clamp_min(1e-30))
            solution = torch.linalg.solve(penalised, xy)
        return solution

    def explained(self, matrix: Tensor) -> float:
        """Share of y's variance that the map `matrix` [inputs, outputs] explains; 1 where y does not vary."""
        variance = self.y_variance
        if variance <= 0:
            return 1.0
        gained = 2 * (matrix * self.xy).sum() - (matrix * (self.xx @ matrix)).sum()
        return float(gained) / variance
