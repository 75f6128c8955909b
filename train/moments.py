"""Means and covariances of what several views see of the same pairs, summed in one pass in float64."""

from collections.abc import Mapping

import torch
import torch.distributed as dist


class Moments:
    """
    Count, sums and products of rows of several named views, such as a caption's state and its image.

    Args:
        widths: view -> width.
        device: of the sums, which are float64 whatever the rows' dtype. Apple's GPUs have no float64: there they are on
            the CPU.

    Sums commute, so the order and the size of the batches change the result by float64's rounding alone.
    """

    def __init__(self, widths: Mapping[str, int], device: torch.device | str = "cpu"):
        self.widths = dict(widths)
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        total = sum(widths.values())
        self.count, self.sums, self.products = (
            torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in ((), (total,), (total, total))
        )

    def add(self, rows: Mapping[str, torch.Tensor]) -> None:
        """
        Takes in n rows of every view: view -> `(n, width)`, row i of all of one pair.

        Raises:
            ValueError: a view is absent, the rows do not match, or they hold NaN or infinity, which would spoil everything
                added before.
        """
        shapes = {name: tuple(value.shape) for name, value in rows.items()}
        n = len(next(iter(rows.values()), ()))
        if shapes != {name: (n, width) for name, width in self.widths.items()}:
            raise ValueError(f"expected n rows of the widths {self.widths}, got {shapes}")
        stacked = torch.cat([rows[name].to(self.device).double() for name in self.widths], dim=1)
        if not torch.isfinite(stacked).all():
            raise ValueError("a state or a target is NaN or infinite: look at the towers' weights and dtype")
        self.count += n
        self.sums += stacked.sum(0)
        self.products += stacked.T @ stacked

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(self.widths, self.device)
        for name in ("count", "sums", "products"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def __rmul__(self, weight: float) -> "Moments":
        """The moments of rows that each count `weight` times."""
        scaled = Moments(self.widths, self.device)
        for name in ("count", "sums", "products"):
            setattr(scaled, name, weight * getattr(self, name))
        return scaled

    def of(self, *views: str) -> "Moments":
        """The moments of some views alone."""
        part = Moments({name: self.widths[name] for name in views}, self.device)
        places = torch.cat([torch.arange(len(self.sums), device=self.device)[self._places(name)] for name in views])
        part.count, part.sums, part.products = self.count, self.sums[places], self.products[places][:, places]
        return part

    def reduce(self) -> "Moments":
        """Adds up the moments of all processes, in place."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for value in (self.count, self.sums, self.products):
                dist.all_reduce(value)
        return self

    def mean(self, view: str) -> torch.Tensor:
        """`(width,)` float64."""
        return self.sums[self._places(view)] / self.count

    def covariance(self, a: str, b: str) -> torch.Tensor:
        """`(width of a, width of b)` float64. Raises `ValueError` where fewer than two rows were added."""
        if self.count < 2:
            raise ValueError(f"{self.count:g} pairs have no covariance: give at least two")
        products = self.products[self._places(a)][:, self._places(b)] / self.count
        return products - torch.outer(self.mean(a), self.mean(b))

    def _places(self, view: str) -> slice:
        names = list(self.widths)
        start = sum(self.widths[name] for name in names[: names.index(view)])
        return slice(start, start + self.widths[view])


class Spectrum:
    """
    A covariance `(n, n)`, singular or not, as its eigenvalues and eigenvectors, from which its powers are made.

    Raises:
        ValueError: nothing varies; `name` says what.
    """

    def __init__(self, covariance: torch.Tensor, name: str):
        values, self.vectors = torch.linalg.eigh(covariance)
        self.values = values.clamp(min=0)
        if not self.values.mean() > 0:
            raise ValueError(f"{name} does not vary from pair to pair: there is nothing to learn from it")

    def inverse(self, power: float, ridge: float) -> torch.Tensor:
        """`(S + ridge tr(S)/n I)^-power`; raises `ValueError` where that is singular."""
        values = self.values + ridge * self.values.mean()
        if power and not values.min() > 1e-15 * values.max():
            raise ValueError(f"the covariance is singular and a ridge of {ridge:g} is too small for it: raise it")
        return self.vectors * values.pow(-power) @ self.vectors.T
