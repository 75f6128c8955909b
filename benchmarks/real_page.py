"""The report page's part on the real language model, from `real.json` and the files next to it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .markdown import table

MEASURES = (
    "dialogue to image R@1", "dialogue to image R@5", "contextual image R@1", "contextual image, image informs R@1",
    "contextual image, image informs but is removed R@1", "image retrieval rate",
    "image retrieval rate on text-only turns", "image R@1", "text R@1", "overall R@1",
)  # fmt: skip
LEADING = ("dialogue to image R@1", "overall R@1")


def page(folder: Path) -> str:
    """Markdown of `real.json`, and of `real-prompts.json` and `real-likelihood.json` where these exist."""
    result = json.loads((folder / "real.json").read_text())
    parts = ["## A real language model, untaught", introduction(result), systems(result), orderings(result)]
    for name, render in (("real-prompts", prompts), ("real-likelihood", likelihood)):
        if (folder / f"{name}.json").is_file():
            parts.append(render(json.loads((folder / f"{name}.json").read_text())))
    return "\n\n".join(parts)


def introduction(result: Mapping[str, Any]) -> str:
    """What was run, as a paragraph."""
    seeds = sorted({row["seed"] for row in result["rows"]})
    return (
        f"{result['about']} It stands in the place of the miniature's own language model, which was taught; CLIP, pictures and "
        f"dialogues are the miniature's. The words {result['ret_prompt']!r} stand before [RET], which starts from the "
        f"embedding of {result['ret_init']!r}. The maps are fitted to {result['pairs']:,} natural captions of train scenes. "
        f"Settings were chosen on {result['validation_dialogues']} validation dialogues of each kind without a picture, by "
        f"{result['chosen_by']}; test was measured once, and again when W_i2t's closed form had become the one of "
        "`train/visual_words.py`, which no choice depends on. Values are means over the seeds "
        f"{', '.join(map(str, seeds))} of the "
        "trained maps, the smallest and largest in brackets; canonical correlation and CLIP have no seed. Chance R@1 in the "
        "pool of 1,000 pictures is 0.1."
    )


def systems(result: Mapping[str, Any]) -> str:
    """A row per system, and in the last columns our form less the row, with the paired 95 % interval (first seed)."""
    names = list(dict.fromkeys(row["system"] for row in result["rows"]))
    columns = [m for m in MEASURES if any(m in row["metrics"] for row in result["rows"])]
    rows = []
    for name in names:
        mine = [row for row in result["rows"] if row["system"] == name]
        cells = [_span([r["metrics"][m]["value"] for r in mine if m in r["metrics"]]) for m in columns]
        less = mine[0].get("first_less_this", {})
        rows.append([name, *cells, *(_interval(less[m]) if m in less else "" for m in LEADING)])
    return table(["", *columns, *(f"{names[0]} less this, {m}" for m in LEADING)], rows)


def orderings(result: Mapping[str, Any]) -> str:
    """The paper's orderings: values, the difference's interval on each seed, and a verdict."""
    rows = []
    for row in result["orderings"]:
        a, b = ([s[side] for s in row["seeds"]] for side in ("better", "worse"))
        sign = ">" if np.mean(a) > np.mean(b) else "<" if np.mean(a) < np.mean(b) else "="
        differences = "; ".join(_interval(s["difference"]) for s in row["seeds"])
        here = f"{100 * np.mean(a):.1f} {sign} {100 * np.mean(b):.1f}"
        rows.append([f"{row['says']}, {row['measure']}", row["better"], here, differences, verdict(row["seeds"])])
    head = ["the paper says", "the better row here", "here", "difference, 95 % by seed", "verdict"]
    return "### Which of the paper's orderings hold with a real language model\n\n" + table(head, rows)


def verdict(seeds: Iterable[Mapping[str, Any]]) -> str:
    """`holds` or `does not hold` where every seed's interval is on the same side of zero; else `open`."""
    differences = [s["difference"] for s in seeds]
    above, below = (sum(test(d) for d in differences) for test in (lambda d: d["low"] > 0, lambda d: d["high"] < 0))
    if above == len(differences):
        return "holds"
    if below == len(differences):
        return "does not hold"
    return f"open: above zero on {above}, below on {below} of {len(differences)}"


def prompts(result: Mapping[str, Any], count: int = 12) -> str:
    """The best places to read at, one row per prompt, and after them those with a chat template or a trained [RET]."""
    best: dict[tuple[str, bool], Mapping[str, Any]] = {}
    for row in sorted(result["rows"], key=lambda r: -r["R@1"]):
        best.setdefault((row["words"], row["chat"]), row)
    rows = []
    shown = [row for i, row in enumerate(best.values()) if i < count or row["chat"] or "trained" in row["words"]]
    for row in shown:
        chat = " (chat template)" if row["chat"] else ""
        rows.append([f"`{row['words']!r}`{chat}", READ.get(row["read"], row["read"]), f"{row['R@1']:.1f}"])
    about = (
        f"Dialogue to image R@1 on validation ({result['dialogues']} dialogues, {result['pool']:,} pictures, "
        f"{result['captions']:,} captions), the best of the settings of canonical correlation for each. {result['about']}"
    )
    return "\n\n".join(["### Where the gist is read", about, table(["words before [RET]", "read", "R@1"], rows)])


READ = {"last": "the last token", "before": "the token before the last", "mean": "the mean over the words"}


def likelihood(result: Mapping[str, Any]) -> str:
    """Texts by likelihood."""
    mine = result["miniature"]
    about = (
        f"The right reply of {mine['dialogues']} test dialogues out of {mine['texts']} replies, by the frozen LLM's "
        f'likelihood ("FROMAGe-ppl"); chance R@1 is {100 / mine["texts"]:.1f}. {result["about"]}'
    )
    parts = ["### Texts by likelihood", about, _scores(mine["scores"], "score", ("R@1", "R@5"))]
    if "visdial_answers" in result:
        answers = result["visdial_answers"]
        about = (
            f"VisDial's published answer options ({answers['rounds']} rounds of the sample, 100 options each). The pictures "
            "are not at hand: the contexts are words alone."
        )
        parts += [about, _scores(answers["variants"], "variant", ("R@1", "MRR", "NDCG"))]
    return "\n\n".join(parts)


def _scores(rows: Mapping[str, Mapping[str, Any]], name: str, measures: Iterable[str]) -> str:
    measures = list(measures)
    return table([name, *measures], [[label, *(_with_interval(m[k]) for k in measures)] for label, m in rows.items()])


def _span(values: list[float | None]) -> str:
    if not values or None in values:
        return "-"
    scaled = 100 * np.array(values)
    if len(scaled) == 1 or scaled.max() - scaled.min() < 0.05:
        return f"{scaled.mean():.1f}"
    return f"{scaled.mean():.1f} ({scaled.min():.1f}–{scaled.max():.1f})"


def _interval(difference: Mapping[str, float | None]) -> str:
    if difference["mean"] is None or difference["low"] is None:
        return "-"
    return f"{100 * difference['mean']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"


def _with_interval(metric: Mapping[str, Any]) -> str:
    if metric["value"] is None or metric["low"] is None:
        return "-"
    return f"{100 * metric['value']:.1f} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
