"""The paper's orderings, each a claim about two rows and a measure, and whether it holds on the miniature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .measure import difference

# (the paper's claim, its figures, task, variant's beginning, better, worse, measure)
TASK_CLAIMS = [
    ("UniMuR's overall R@1 is above FROMAGe's (Table 1)", "32.3 > 15.3", "mmdialog", "UniMuR", "FROMAGe", "overall R@1"),
    ("UniMuR's overall R@1 is above BLIP-2's (Table 1)", "32.3 > 22.2", "mmdialog", "UniMuR", "BLIP-2", "overall R@1"),
    ("BLIP-2's image R@1 is above FROMAGe's (Table 1)", "16.8 > 11.0", "mmdialog", "BLIP-2", "FROMAGe", "image R@1"),
    ("UniMuR shows an image more often where one is due than FROMAGe (Table 1)", "68.3 > 28.2", "mmdialog", "UniMuR",
     "FROMAGe", "image retrieval rate"),
    ("UniMuR's text and image belong together more than FROMAGe's (Table 1)", "0.187 > 0.102", "mmdialog", "UniMuR",
     "FROMAGe", "CLIP-Sim"),
    ("UniMuR finds more contextual images than FROMAGe (Table 2)", "27.8 > 25.4", "mmdialog_image", "UniMuR", "FROMAGe",
     "R@1"),
    ("UniMuR finds more images from dialogues than FROMAGe (Table 3)", "24.7 > 20.8", "visdial", "UniMuR", "FROMAGe",
     "R@1"),
    ("FROMAGe finds more images from dialogues than CLIP (Table 3)", "20.8 > 17.7", "visdial", "FROMAGe", "CLIP", "R@1"),
    ("UniMuR finds more images from dialogues than CLIP (Table 3)", "24.7 > 17.7", "visdial", "UniMuR", "CLIP", "R@1"),
    ("UniMuR gets more whole replies right than FROMAGe", "-", "mmdialog", "UniMuR", "FROMAGe", "whole reply R@1"),
    ("With FROMAGe's decision of when to show an image, pairs alone's overall R@1 is above FROMAGe's", "-", "mmdialog",
     "UniMuR, pairs alone, shown as FROMAGe's", "FROMAGe", "overall R@1"),
    ("With Section 3.4's decision, pairs alone's overall R@1 is above FROMAGe's", "-", "mmdialog", "UniMuR, pairs alone",
     "FROMAGe, shown as in Section 3.4", "overall R@1"),
    ("UniMuR's overall R@1 is above CLIP's", "-", "mmdialog", "UniMuR", "CLIP", "overall R@1"),
    ("UniMuR finds more contextual images than CLIP", "-", "mmdialog_image", "UniMuR", "CLIP", "R@1"),
    ("UniMuR finds more of a story's pictures than CLIP", "-", "vist", "UniMuR", "CLIP", "R@1"),
    ("UniMuR answers better than FROMAGe (Table 7)", "29.8 > 28.5", "vqav2", "UniMuR", "FROMAGe", "accuracy"),
    ("FROMAGe answers better than Frozen (Table 7)", "28.5 > 25.5", "vqav2", "FROMAGe", "Frozen", "accuracy"),
]  # fmt: skip
ABLATION_CLAIMS = [
    ("DAT's overall R@1 is above VM's (Table 4)", "32.3 > 27.6", "4", "DAT", "VM", "overall R@1"),
    ("DAT's overall R@1 is above TM's (Table 4)", "32.3 > 22.7", "4", "DAT", "TM", "overall R@1"),
    ("DAT's text R@1 is above VM's (Table 4)", "36.1 > 29.8", "4", "DAT", "VM", "text R@1"),
    ("VM shows images more often than DAT (Table 4)", "74.3 > 68.3", "4", "VM", "DAT", "image retrieval rate"),
    ("TM shows images less often than DAT (Table 4)", "68.3 > 44.1", "4", "DAT", "TM", "image retrieval rate"),
    ("MSE's overall R@1 is above InfoNCE's (Table 5)", "32.3 > 28.0", "5", "MSE", "InfoNCE", "overall R@1"),
    ("InfoNCE's overall R@1 is above max-margin's (Table 5)", "28.0 > 26.3", "5", "InfoNCE", "max-margin", "overall R@1"),
    ("A larger language model finds more images (Table 6)", "24.7 > 16.5", "6", "OPT 128 x 2 layers", "OPT 64 x 1 layer",
     "dialogue to image R@1"),
    ("A still larger one finds more yet (Table 6)", "27.8 > 24.7", "6", "OPT 192 x 3 layers", "OPT 128 x 2 layers",
     "dialogue to image R@1"),
]  # fmt: skip
# Of the task `generation`, in `generation-*.json`: `>` as above; `level` holds on a seed whose paired 95 % interval of
# the two rows has zero in it.
DRAWING_CLAIMS = [
    ("GILL with dual alignment finds more images than GILL (Table A.2)", "24.6 > 21.7", "GILL + dual alignment", "GILL", "R@1",
     ">"),
    ("GILL with dual alignment draws as well as GILL: no difference is seen (Table A.2)", "0.642, 0.645",
     "GILL + dual alignment", "GILL", "CLIP-Sim", "level"),
]  # fmt: skip


@dataclass
class Judged:
    """A claim, the paper's figures, ours, and on how many seeds the order holds."""

    claim: str
    paper: str
    ours: str
    verdict: str


def judge(
    results: list[dict[str, Any]], tables: Mapping[str, Any], drawings: Sequence[Mapping[str, Any]] = ()
) -> list[Judged]:
    """
    Every claim whose two values were measured.

    Args:
        results: of every seed, as [`benchmarks.run.compare`] gives them.
        tables: the ablations by name.
        drawings: the json of [`benchmarks.generate`], a seed's own first; of each seed the first that has both rows counts.
    """
    judged = []
    for claim, paper, task, better, worse, measure in TASK_CLAIMS:
        # Both forms of UniMuR are judged: the paper's has caption pairs alone.
        for system in dict.fromkeys([better, "UniMuR, pairs alone"] if better == "UniMuR" else [better]):
            name = claim + (", pairs alone" if system != better else "")
            a, b = (_of_task(results, task, s, measure) for s in (system, worse))
            judged += _judged(name, paper, a, b, 1 if measure == "CLIP-Sim" else 100)
    for claim, paper, table, better, worse, measure in ABLATION_CLAIMS:
        if table in tables:
            a, b = (_of_row(tables[table], name, measure) for name in (better, worse))
            judged += _judged(claim, paper, a, b, 100)
    for claim, paper, better, worse, measure, kind in DRAWING_CLAIMS:
        pairs = drawing_pairs(drawings, better, worse, measure)
        a, b = ({seed: pair[side]["metrics"][measure]["value"] for seed, pair in pairs.items()} for side in (0, 1))
        scale = 1 if measure == "CLIP-Sim" else 100
        judgements = _judged(claim, paper, a, b, scale)
        judged += judgements if kind == ">" else [replace(j, verdict=_level(pairs, measure)) for j in judgements]
    return judged


def drawing_pairs(
    drawings: Sequence[Mapping[str, Any]], better: str, worse: str, measure: str, task: str = "generation"
) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """Seed -> the results of two systems on the same items, of the first of the files that has both."""
    pairs: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for file in drawings:
        rows = {
            r["system"]: r
            for r in file["results"]
            if r["task"] == task and r["metrics"].get(measure, {}).get("value") is not None
        }
        if better in rows and worse in rows:
            pairs.setdefault(file["seed"], (rows[better], rows[worse]))
    return pairs


def _level(pairs: Mapping[int, tuple[dict, dict]], measure: str) -> str:
    """On how many seeds the paired interval has zero in it; a seed whose json cannot say is not counted."""
    known = [d for d in (difference(a, b, measure) for a, b in pairs.values()) if d and d["low"] is not None]
    level = sum(d["low"] <= 0 <= d["high"] for d in known)
    if not known:
        return "open: no paired interval"
    return f"{_word(level, len(known))}: {level} of {len(known)} seeds"


def _word(holds: int, seeds: int) -> str:
    return "holds" if holds == seeds else "does not hold" if holds == 0 else "open"


def _judged(claim: str, paper: str, a: dict[int, float], b: dict[int, float], scale: int) -> list[Judged]:
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return []
    better, worse = (scale * np.array([x[s] for s in seeds]) for x in (a, b))
    digits = 3 if scale == 1 else 1
    holds = int((better > worse).sum())
    sign = ">" if better.mean() > worse.mean() else "<" if better.mean() < worse.mean() else "="
    ours = f"{better.mean():.{digits}f} {sign} {worse.mean():.{digits}f}"
    return [Judged(claim, paper, ours, f"{_word(holds, len(seeds))}: {holds} of {len(seeds)} seeds")]


def _of_task(results: list[dict], task: str, system: str, measure: str) -> dict[int, float]:
    """seed -> value, by the first variant of the protocol that was run."""
    rows = [r for r in results if r["task"] == task and r["system"] == system and measure in r["metrics"]]
    main = [r for r in rows if "," not in r["protocol"]["variant"]]
    first = main[0]["protocol"]["variant"] if main else None
    return {
        r["seed"]: r["metrics"][measure]["value"]
        for r in main
        if r["protocol"]["variant"] == first and r["metrics"][measure]["value"] is not None
    }


def _of_row(table: Mapping[str, Any], name: str, measure: str) -> dict[int, float]:
    row = next(row for row in table["rows"] if row["name"] == name)
    return {s["seed"]: s["metrics"][measure]["value"] for s in row["seeds"]}
