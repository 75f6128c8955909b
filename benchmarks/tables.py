"""Results as markdown: the paper's rows first, then the measured ones, each with its protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import table

PLAIN = ("CLIP-Sim", "CLIP-Sim, absent", "CLIP-Sim, another's", "mean rank")  # not percent


def markdown(task: str, results: Sequence[Mapping[str, Any]], published: tuple[list[str], Mapping[str, list]]) -> str:
    """A table of one task: a row per protocol and system, a column per metric with its 95 % interval."""
    columns, rows = published
    names = list(dict.fromkeys([*columns, *(name for r in results for name in r["metrics"])]))
    lines = []
    for system, values in rows.items():
        known = dict(zip(columns, map(str, values), strict=True))
        lines.append(["the paper", system, *(known.get(n, "") for n in names)])
    for r in results:
        label = f"{r['protocol']['variant']} v{r['protocol']['version']}"
        cells = (
            [cell(n, r["metrics"].get(n)) for n in names]
            if r["applies"]
            else ["does not apply"] + [""] * (len(names) - 1)
        )
        lines.append([label, r["system"], *cells])
    notes = [f"- {r['system']}: {note}" for r in results for note in r.get("notes", [])]
    where = results[0]["data"]
    head = (
        f"{task} on {where['source']}, {where['items']} items; {where['left_out']}. "
        "Percent with 95 % bootstrap intervals (CLIP-Sim a cosine, mean rank a rank)."
    )
    grid = table(["protocol", "system", *names], lines, labels=2)
    return "\n".join([head, "", grid, *(["", *dict.fromkeys(notes)] if notes else [])]) + "\n"


def cell(name: str, metric: Mapping[str, Any] | None) -> str:
    """One figure with its interval, as it is printed; one item alone has no interval."""
    if metric is None or metric["value"] is None:
        return ""
    scale, digits = (1, 1 if name == "mean rank" else 3) if name in PLAIN else (100, 1)
    value, *bounds = (f"{scale * metric[k]:.{digits}f}" for k in ("value", "low", "high") if metric[k] is not None)
    return f"{value} ({'–'.join(bounds)})" if bounds else value
