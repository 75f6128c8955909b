"""Where a run is in its data, kept with each checkpoint so that a resumed run is the run that was interrupted."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.collate import SkipCounter

PROGRESS = "progress.json"


@dataclass
class Progress:
    """
    Attributes:
        passes: passes over the data that were begun. Streamed data have no length, so that steps do not give it.
        first_step: optimizer steps before the present pass.
        order: what the order of streamed data depends on, such as shards, seed and workers, by name; empty for data with a
            length, whose order depends on the seed and the epoch.
        resumed: whether the present pass was begun before an interruption.
    """

    passes: int = 0
    first_step: int = 0
    order: dict[str, Any] = field(default_factory=dict)
    resumed: bool = False

    def begin_pass(self, step: int) -> int:
        """Counts a pass that begins after so many optimizer steps. Returns its number, from 0."""
        if not self.resumed:
            self.passes, self.first_step = self.passes + 1, step
        self.resumed = False
        return self.passes - 1

    def save(self, folder: Path, skips: SkipCounter) -> None:
        """Writes it to a checkpoint, with the counts of all processes."""
        about = asdict(self) | {"seen": skips.seen, "skipped": dict(skips.counts), "examples": skips.examples}
        (folder / PROGRESS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def resume(self, folder: Path, skips: SkipCounter) -> bool:
        """
        Goes on from a checkpoint, and `skips` from its counts. Returns whether the checkpoint has any, which those of
        earlier versions have not.

        Raises:
            ValueError: the data are streamed, and in another order than before, or the checkpoint does not say in which.
        """
        if not (folder / PROGRESS).is_file():
            if self.order:
                raise ValueError(
                    f"{folder} holds no {PROGRESS}, which says where in the streamed data it is: train again"
                )
            return False
        about = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        self._check_order(folder, about["order"])
        self.passes, self.first_step, self.resumed = about["passes"], about["first_step"], True
        skips.counts.clear()
        skips.examples.clear()
        skips.seen = 0
        skips.update(about["skipped"], about["seen"], about["examples"])
        return True

    def _check_order(self, folder: Path, former: Mapping[str, Any]) -> None:
        differing = [
            f"{name} ({_short(former.get(name))} then, {_short(self.order.get(name))} now)"
            for name in sorted(former.keys() | self.order.keys())
            if former.get(name) != self.order.get(name)
        ]
        if differing:
            raise ValueError(
                f"{folder} cannot be resumed: streamed pairs would come in another order, since these differ: "
                f"{', '.join(differing)}. Give the former values, or train again from the start"
            )


def _short(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else str(value)
