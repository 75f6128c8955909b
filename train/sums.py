"""The moments of what a closed form is fitted to, beside the rows that are held out to choose its settings by."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from train.held_out import FOLDS, HeldOut, Rows
from train.moments import Moments

SUMMED = 256  # items whose rows are added up at once
TOO_FEW = "the closed form needs at least two pairs besides those held out"


class Sums:
    """
    The moments of the rows that are fitted, and the rows held out.

    Args:
        views: those of a row that enter the moments.
        held: takes the rows held out; all of them where there are few ([`train.held_out.few_or_part`]).
        device: of the moments.
    """

    def __init__(self, views: Sequence[str], held: HeldOut | None = None, device: torch.device | str = "cpu"):
        self.views, self.held, self.device = views, held or HeldOut(), device
        self.moments: Moments | None = None

    def add(self, rows: Rows, items: Sequence[str]) -> None:
        """Takes in rows of all views; `items` names the item of each, such as the pair that a caption is of."""
        places: dict[str, list[int]] = {}
        for place, name in enumerate(items):
            places.setdefault(name, []).append(place)
        numbers = {name: self.held.number(name) for name in places}
        self.fit(rows, [place for name, at in places.items() if numbers[name] is None for place in at])
        for name, at in places.items():
            number = numbers[name]
            if number is not None:
                self.held.add(number, {view: value[at].cpu() for view, value in rows.items()})
        self.fit_surplus(slack=self.held.size)

    def fit_surplus(self, slack: int = 0) -> None:
        """Adds what is held beyond the size, and by choice some more, to the moments after all."""
        for rows in self.held.surplus(slack):
            if self.enters(rows):
                self.fit(_stacked(rows))

    def fit(self, rows: Rows, at: Sequence[int] | slice = slice(None)) -> None:
        """Adds some of the rows to the moments."""
        if self.moments is None:
            self.moments = Moments({view: rows[view].shape[1] for view in self.views}, self.device)
        self.moments.add({view: rows[view][at] for view in self.views})

    def finish(self) -> "Sums":
        """Adds up those of all processes. Raises `ValueError` where one of them had no row to add."""
        if self.held.every:
            self.held.gather()
            return self
        without = sum(gather_object([self.moments is None]))
        if without == PartialState().num_processes:
            return self
        if self.moments is None or without:
            raise ValueError(f"{without} of the processes had no row to add up: use fewer processes or more shards")
        self.moments.reduce()
        self.held.gather()
        self.fit_surplus()
        return self

    def folds(self) -> list[tuple[Moments, list[Rows]]]:
        """
        What a setting is fitted to, and what was held out of it to choose by: one split, or of few items [`FOLDS`], in
        which each is held out once. Fewer than two items a fold are no choice: then nothing is held out.

        Raises:
            ValueError: there is nothing to fit.
        """
        rows = self.held.rows()
        if not self.held.every:
            return [(self.fitted(), rows)]
        rows.sort(key=self.enters, reverse=True)  # so that each split has its part of both kinds
        if len(rows) < 2 * FOLDS or not self.enters(rows[FOLDS - 1]):
            return [(self.whole(), [])]
        parts = [rows[fold::FOLDS] for fold in range(FOLDS)]
        return [(self._sum([r for other in parts if other is not part for r in other]), part) for part in parts]

    @property
    def empty(self) -> bool:
        """Whether no row enters the moments."""
        return self.moments is None and not any(map(self.enters, self.held.rows()))

    def fitted(self) -> Moments:
        """The moments of the rows that are not held out. Raises `ValueError` where there is none."""
        if self.moments is None:
            raise ValueError(TOO_FEW)
        return self.moments

    def whole(self) -> Moments:
        """The moments of all rows, those held out too. Raises `ValueError` where there is none."""
        held = list(filter(self.enters, self.held.rows()))
        if self.held.every:
            return self._sum(held)
        return self.fitted() + self._sum(held) if held else self.fitted()

    def enters(self, rows: Rows) -> bool:
        """A document whose reply has no image is held out as a query, and enters no moments."""
        return all(view in rows for view in self.views)

    def _sum(self, items: Iterable[Rows]) -> Moments:
        """The moments of those of the items that enter them."""
        counted = [_stacked(rows) for rows in items if self.enters(rows)]
        if not counted:
            raise ValueError(TOO_FEW)
        moments = Moments({view: counted[0][view].shape[1] for view in self.views}, self.device)
        for start in range(0, len(counted), SUMMED):
            block = counted[start : start + SUMMED]
            moments.add({view: torch.cat([rows[view] for rows in block]) for view in self.views})
        return moments


def _stacked(rows: Rows) -> Rows:
    """The rows of one item, `(m, width)` or `(width,)`, as `(m, width)`."""
    return {view: value.reshape(-1, value.shape[-1]) for view, value in rows.items()}
