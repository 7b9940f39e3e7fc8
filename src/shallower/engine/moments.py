"""Sums over tokens, in float64: all that a fit by least squares keeps of a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shallower.engine.workers import place_for
from shallower.errors import CorpusError

COPIES = 4  # of the matrix of products, at most, while a system of equations is solved
COPIES_OF_NORM = 6  # the same for the solution of least norm


def require_tokens(tokens: int, inputs: int, *, least: str, instead: str = "") -> None:
    """Raise CorpusError unless there are more tokens than `least`, what is fitted to them, has inputs.

    instead: what else than more text would do, for the error.
    """
    if tokens <= inputs:
        raise CorpusError(
            f"{tokens:,} tokens of calibration text cannot fit {least}, which has {inputs:,} inputs: read more "
            f"(--sequences, --length), several times as many{instead}."
        )


@contextmanager
def _whole_products() -> Iterator[None]:
    """Inside the `with`, CUDA multiplies all bits of float32 numbers, also where the caller chose TF32 with its 10."""
    settings = torch.backends.cuda.matmul
    # torch before 2.9 has the second alone, and later ones refuse to tell it where the first was used
    name, whole = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    chosen = getattr(settings, name)
    setattr(settings, name, whole)
    try:
        yield
    finally:
        setattr(settings, name, chosen)


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
        with _whole_products():
            products = [weighted.T @ x, weighted.T @ y]
        parts = [
            weighted.sum(0, dtype=torch.float64),
            (y * weights[:, None]).sum(0, dtype=torch.float64),
            *products,
            (y.double().square() * weights[:, None]).sum(),
        ]
        if not self._sums:
            self._sums = [part.double() for part in parts]
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total.add_(part)
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
        return self._product(2, self.x_mean)

    @property
    def xy(self) -> Tensor:
        """Covariance of x and y, [inputs, outputs]."""
        return self._product(3, self.y_mean)

    def _product(self, place: int, mean: Tensor | None, device: torch.device | None = None) -> Tensor:
        """The mean product of x with what stands at `place`, less that of the means where `mean` is that of the latter;
        a new tensor.
        """
        product: Tensor = self._sums[place].to(device) / self.weight
        return product if mean is None else product.sub_(torch.outer(self.x_mean.to(device), mean.to(device)))

    @property
    def y_variance(self) -> float:
        """Mean squared distance of y from its mean."""
        return float(self._sums[4] / self.weight - self.y_mean.square().sum())

    def ridge(self, strength: float, *, centred: bool = True) -> Tensor:
        """The map [inputs, outputs] from x − mean to y − mean (or x to y) with least squared error, float64.

        strength: of the penalty on the map's squared entries, in units of the mean variance (or square) of x; with 0
        the solution of least norm.
        """
        device = self._sums[2].device
        needed = self._sums[2].nbytes * (COPIES if strength else COPIES_OF_NORM)
        place = place_for(needed, device)
        xx = self._product(2, self.x_mean if centred else None, place)
        xy = self._product(3, self.y_mean if centred else None, place)
        solution: Tensor
        if strength == 0:
            solution = torch.linalg.pinv(xx, hermitian=True) @ xy
        else:
            xx.diagonal().add_(strength * xx.diagonal().mean().clamp_min(1e-30))
            solution = torch.linalg.solve(xx, xy)
        return solution.to(device)

    def explained(self, matrix: Tensor) -> float:
        """Share of y's variance that the map `matrix` [inputs, outputs] explains; 1 where y does not vary."""
        variance = self.y_variance
        if variance <= 0:
            return 1.0
        gained = 2 * (matrix * self.xy).sum() - (matrix * (self.xx @ matrix)).sum()
        return float(gained) / variance
