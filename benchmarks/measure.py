"""A measured quantity, item by item, so that any two systems can be compared on the same items."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

    def listed(self) -> list[float | None]:
        """The values as json has them; `None` where an item has none."""
        return [_number(value) for value in self.values]


def difference(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> dict[str, float | None] | None:
    """
    The measure `name` of one result less that of another, both of one call of [`benchmarks.run.compare`], with its paired
    95 % interval as `Measure.against` gives it: out of what each item has, or as the json has it where one of them is the
    first. `None` where the json does not say.
    """
    if all(name in result.get("values", {}) for result in (a, b)):
        first, second = (Measure(np.array(result["values"][name], dtype=np.float64)) for result in (a, b))
        return first.against(second, a["seed"])
    firsts = [result["applies"] and "first_less_this" not in result for result in (a, b)]
    if firsts == [True, False]:
        return b.get("first_less_this", {}).get(name)
    if firsts == [False, True] and (less := a.get("first_less_this", {}).get(name)):
        turned = {"mean": less["mean"], "low": less["high"], "high": less["low"]}
        return {bound: None if value is None else -value for bound, value in turned.items()}
    return None


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
