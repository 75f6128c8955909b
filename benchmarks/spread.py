"""The demo's figures over the published seeds: the README's table, and where a run of one's own lies among them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .markdown import table

RESULTS = Path(__file__).parent / "results"
# system -> measure -> a value a seed; percent, CLIP-Sim a cosine
Columns = Mapping[str, Mapping[str, list[float]]]


def published(folder: Path = RESULTS) -> tuple[list[int], Columns]:
    """
    The seeds of `demo-N.json` in `folder`, as `benchmarks.report` writes them, and the demo's columns.
    """
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("demo-*.json"))]
    columns: dict[str, dict[str, list[float]]] = {}
    for file in files:
        for system, values in file["columns"].items():
            for measure, value in values.items():
                columns.setdefault(system, {}).setdefault(measure, []).append(value)
    return [file["seed"] for file in files], columns


def readme_table(columns: Columns) -> str:
    """A markdown table: means over the seeds, with the least and the most where they differ; of recalls, R@1."""
    measures = dict.fromkeys(m for values in columns.values() for m in values if not m.endswith(("R@5", "R@10")))
    rows = [[m, *(_cell(m, values.get(m)) for values in columns.values())] for m in measures]
    return table(["", *columns], rows)


def place(own: Mapping[str, float], seeds: list[int], values: Mapping[str, list[float]]) -> str:
    """
    Where a run lies among the published seeds, in words.

    Args:
        own: measure -> value of the run.
        seeds, values: of [`published`], of the same system.
    """
    if not seeds:
        return "no published seed to compare with"
    among = f"the {len(seeds)} published seeds (other machines round differently)"
    outside = [
        f"{measure} {_text(measure, value)} ({_text(measure, min(values[measure]))} to {_text(measure, max(values[measure]))})"
        for measure, value in own.items()
        if measure in values and not min(values[measure]) - 1e-9 <= value <= max(values[measure]) + 1e-9
    ]
    known = sum(measure in values for measure in own)
    if not outside:
        return f"all {known} figures of UniMuR lie within those of {among}"
    return f"{known - len(outside)} of {known} figures of UniMuR lie within those of {among}; outside: {', '.join(outside)}"


def _cell(measure: str, values: list[float] | None) -> str:
    if values is None:
        return "-"
    mean, low, high = (_text(measure, v) for v in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def _text(measure: str, value: float) -> str:
    return f"{value:.3f}" if measure == "CLIP-Sim" else f"{value:.1f}"


if __name__ == "__main__":
    print(readme_table(published()[1]))
