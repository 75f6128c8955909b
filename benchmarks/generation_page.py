"""The report page's part on pictures drawn, from `generation-*.json` as [`benchmarks.generate`] writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .claims import DRAWING_CLAIMS, drawing_pairs
from .markdown import table
from .measure import difference
from .protocols import paper
from .protocols import read as read_protocol
from .tables import PLAIN

LED = ("CLIP-Sim", "CLIP-Sim, absent")  # compared with the first row
COMMAND = (
    'python -m benchmarks.generate --seeds {seeds} --rows GILL "GILL + dual alignment" --results benchmarks/results'
)
ABOUT = (
    "A frozen diffusion model draws the picture that a conversation asks for, out of GILL's mapper behind the frozen language "
    "model; the diffusion model is a small latent one, pre-trained on the train scenes. *CLIP-Sim* is CLIP's cosine of the "
    "picture and the true image, *absent* the same where the true image is not in the pool, which changes only what is "
    "retrieved, and *another's* the picture beside the next dialogue's true image. *picture R@1* is whether the true image "
    "is the pool's nearest to the picture, and *R@1* the system's own retrieval. Figures are means over the seeds that are "
    "there, the least and the most in brackets; test split, in percent, CLIP-Sim a cosine. *First less this* is the first "
    "row's value less the row's on the same items: of one seed with its paired 95 % interval, of several on how many that "
    "lies above and below zero."
)


def read(folder: Path) -> list[dict[str, Any]]:
    """The json of every seed in `folder`, a seed's own `generation-N.json` before what else there is of it."""
    files = [(path.stem, json.loads(path.read_text())) for path in folder.glob("generation-*.json")]
    return [file for _, file in sorted(files, key=lambda named: (named[1]["seed"], named[0]))]


def page(folder: Path) -> str:
    """Markdown of every `generation-*.json`, and of `drawn.png` where it exists."""
    files = read(folder)
    seeds = sorted({file["seed"] for file in files})
    command = COMMAND.format(seeds=" ".join(map(str, seeds)))
    parts = ["## A picture drawn (Appendix A.2)", ABOUT, f"```bash\n{command}\n```"]
    for task in dict.fromkeys(r["task"] for file in files for r in file["results"]):
        parts += section(task, files)
    parts += [render(files) for render in (pairs, probe, rule)]
    if (folder / "drawn.png").is_file():
        parts.append("![Conversations with the picture that was retrieved and the one that was drawn](drawn.png)")
    return "\n\n".join(part for part in parts if part)


def section(task: str, files: Sequence[Mapping[str, Any]]) -> list[str]:
    """A task's tables, the paper's rows first; what was measured on other items, or otherwise, has a table of its own."""
    given = read_protocol(task)
    published, rows = paper(task)
    parts = [f"### {task}", given["about"]]
    if rows:
        parts.append(table(["the paper", *published], [[name, *map(str, values)] for name, values in rows.items()]))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for file in files:
        for r in (r for r in file["results"] if r["task"] == task):
            key = (r["protocol"]["variant"], r["protocol"]["version"], r["data"]["items"], file.get("about", ""))
            groups.setdefault(key, []).append(r)
    for (variant, version, items, about), results in groups.items():
        seeds = ", ".join(map(str, sorted({r["seed"] for r in results})))
        parts.append(f"**{variant}**, version {version}. {items} items; seeds {seeds}. {about}".strip())
        parts.append(_systems(results, [c for c in given["columns"] if any(c in r["metrics"] for r in results)]))
        notes = sorted({f"- {r['system']}: {note}" for r in results for note in r.get("notes", [])})
        parts.append("\n".join(notes))
    return parts


def _systems(results: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    rows = []
    for name in dict.fromkeys(r["system"] for r in results):
        mine = [r for r in results if r["system"] == name]
        cells = [span([r["metrics"].get(c, {}).get("value") for r in mine], c) for c in columns]
        less = [[r.get("first_less_this", {}).get(c) for r in mine] for c in LED]
        rows.append([name, *cells, *(differences(d, c) for d, c in zip(less, LED, strict=True))])
    return table(["here", *columns, *(f"first less this, {c}" for c in LED)], rows)


def pairs(files: Sequence[Mapping[str, Any]]) -> str:
    """The two rows of Table A.2 beside each other, on the same items; empty where they were not measured."""
    rows = []
    for _, published, better, worse, measure, _ in DRAWING_CLAIMS:
        by_seed = drawing_pairs(files, better, worse, measure)
        if by_seed:
            less = [difference(a, b, measure) for a, b in by_seed.values()]
            values = [[pair[side]["metrics"][measure]["value"] for pair in by_seed.values()] for side in (0, 1)]
            rows.append([measure, published, *(span(v, measure) for v in values), differences(less, measure)])
    if not rows:
        return ""
    _, _, better, worse, _, _ = DRAWING_CLAIMS[0]
    head = ["", "the paper", better, worse, "the first less the second"]
    return "### Dual alignment or none\n\n" + table(head, rows)


def probe(files: Sequence[Mapping[str, Any]]) -> str:
    """What a linear probe reads off true pictures, off samples of the diffusion model, and by chance."""
    read_off = [file["probe"] for file in files if "probe" in file]
    if not read_off:
        return ""
    rows = [
        [name, *(span([p[name][what] / 100 for p in read_off], what) for what in read_off[0][name])]
        for name in ("true pictures", "samples", "chance")
    ]
    counts = ", ".join(str(n) for n in sorted({p["n"] for p in read_off}))
    about = f"A linear probe on the pixels of {counts} pictures a seed, drawn from test captions, percent."
    heading = "### What the diffusion model draws from a caption"
    return "\n\n".join([heading, about, table(["", *read_off[0]["samples"]], rows)])


def rule(files: Sequence[Mapping[str, Any]]) -> str:
    """What the rule of `generate="auto"` learned on validation."""
    learned = [file["rule"] for file in files if "rule" in file]
    if not learned:
        return ""
    names = {"draw_below": "draws below a score of", "rule": "by the rule", "retrieved": "always retrieved",
             "drawn": "always drawn", "better of the two": "better of the two"}  # fmt: skip
    cells = [span([r[name] for r in learned], "CLIP-Sim") for name in names]
    share = span([r["drawn share"] for r in learned], "drawn share")
    dialogues = ", ".join(str(n) for n in sorted({r["n"] for r in learned}))
    about = f"{dialogues} validation dialogues a seed, half of them without their true image in the pool; mean CLIP-Sim there."
    head = [*names.values(), "of the replies drawn, %"]
    return '### When `generate="auto"` draws\n\n' + about + "\n\n" + table(head, [[*cells, share]], labels=0)


def span(values: Sequence[float | None], name: str) -> str:
    """The mean with the least and the most, as the column is printed; a dash where a seed has no value."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    digits, scaled = _digits(name), _scale(name) * np.array(known)
    low, mean, high = (f"{value:.{digits}f}" for value in (scaled.min(), scaled.mean(), scaled.max()))
    return mean if low == high else f"{mean} [{low}, {high}]"


def differences(given: Sequence[Mapping[str, float | None] | None], name: str) -> str:
    """One seed's difference with its interval; of several the mean, and on how many the interval is off zero."""
    known = [d for d in given if d is not None and d["mean"] is not None and d["low"] is not None]
    if not known:
        return ""
    means, lows, highs = (_scale(name) * np.array([d[k] for d in known], dtype=float) for k in ("mean", "low", "high"))
    digits = _digits(name)
    if len(known) == 1:
        return f"{means[0]:+.{digits}f} [{lows[0]:+.{digits}f}, {highs[0]:+.{digits}f}]"
    above, below = int((lows > 0).sum()), int((highs < 0).sum())
    return f"{means.mean():+.{digits}f}; above zero on {above}, below on {below} of {len(known)}"


def _scale(name: str) -> int:
    return 1 if name in PLAIN else 100


def _digits(name: str) -> int:
    return 3 if name in PLAIN else 1
