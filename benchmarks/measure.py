"""A measured quantity, item by item, so that any two systems can be compared on the same items."""

from dataclasses import dataclass

import numpy as np

from .bootstrap import interval, paired


@dataclass
class Measure:
    """
    Args:
        values: `(n,)` float64, one per item; nan where the quantity is not defined for the item.
        weights: `(n,)`, for a ratio of sums (overall R@1: hits over gold items); `None` for a plain mean.
        percent: whether it is printed times 100.
    """

    values: np.ndarray
    weights: np.ndarray | None = None
    percent: bool = True

    @property
    def value(self) -> float:
        if self.weights is not None:
            return float(np.nansum(self.values) / np.nansum(self.weights)) if np.nansum(self.weights) else float("nan")
        return float(np.nanmean(self.values)) if self.n else float("nan")

    @property
    def n(self) -> int:
        return int(np.isfinite(self.values).sum())

    def summary(self, seed: int = 0) -> dict[str, float | None]:
        """Value with its 95 % bootstrap interval, and the number of items; `None` for what is not defined."""
        low, high = interval(self.values, self.weights, seed=seed) if self.n else (float("nan"), float("nan"))
        return {name: _number(v) for name, v in (("value", self.value), ("low", low), ("high", high))} | {"n": self.n}

    def against(self, other: "Measure", seed: int = 0) -> dict[str, float | None]:
        """This less `other` over the same items, with its paired 95 % interval."""
        difference = paired(self.values, other.values, self.weights, seed=seed)
        return {name: _number(getattr(difference, name)) for name in ("mean", "low", "high")}


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
