"""
Every ordering of the paper with a real language model, settings chosen on validation and measured once on test.

    python -m benchmarks.real.study --seeds 0 1 2 --output benchmarks/results/real.json

The seeds are those of the trained maps: of their initial values, batches and noise. Canonical correlation has none; the
towers, captions and dialogues are the same for all.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Measure
from benchmarks.output import write_json
from train.canonical import Setting
from train.command import run_command

from . import visual
from .bench import DIALOGUE, Bench, make_bench
from .fetch import ABOUT
from .settings import PAIRS, RET_INIT, RET_PROMPT
from .spaces import OBJECTIVES, Fit, Pairs, canonical, canonical_spaces, learn

WIDTHS, RIDGES, POWERS = (32, 48, 64, 96), (0.01, 0.03, 0.1, 0.3, 1.0), (1.0, 2.0, 3.0, 4.0)
RATES, NOISE = (2e-3, 8e-3), 0.5
VALIDATION = 300  # dialogues of each kind
PLAIN = "DAT, no noise"  # exactly the paper's form
OURS, OURS_TRAINED = "UniMuR (canonical)", "UniMuR (canonical), W_i2t trained"
CRITERION = "the mean of dialogue to image R@1 and overall R@1"

# The paper's claim, the better row, the worse row, the measure.
ORDERINGS = [
    ("DAT's overall R@1 is above VM's (Table 4)", "DAT", "VM", "overall R@1"),
    ("DAT's overall R@1 is above TM's (Table 4)", "DAT", "TM", "overall R@1"),
    ("DAT's text R@1 is above VM's (Table 4)", "DAT", "VM", "text R@1"),
    ("VM shows images more often than DAT (Table 4)", "VM", "DAT", "image retrieval rate"),
    ("TM shows images less often than DAT (Table 4)", "DAT", "TM", "image retrieval rate"),
    ("MSE's overall R@1 is above InfoNCE's (Table 5)", "DAT", "DAT, InfoNCE", "overall R@1"),
    ("InfoNCE's overall R@1 is above max-margin's (Table 5)", "DAT, InfoNCE", "DAT, max-margin", "overall R@1"),
    *((f"UniMuR is above FROMAGe ({table})", form, "FROMAGe's heads", measure)
      for table, measure in (("Table 1", "overall R@1"), ("Table 1", "image retrieval rate"),
                             ("Table 2", "contextual image R@1"), ("Table 3", "dialogue to image R@1"))
      for form in (PLAIN, "DAT", OURS)),
    *(("UniMuR finds more of a dialogue's images than CLIP (Table 3)", form, "CLIP", "dialogue to image R@1")
      for form in (PLAIN, "DAT", OURS)),
]  # fmt: skip


def criterion(measures: Mapping[str, Measure]) -> float:
    """The criterion by which a setting is chosen."""
    return (measures["dialogue to image R@1"].value + measures["overall R@1"].value) / 2


def choose_canonical(bench: Bench, pairs: Pairs, states: dict) -> tuple[Setting, list[dict[str, Any]]]:
    """The best setting of the grid on validation, and the measures of all."""
    widths = [k for k in WIDTHS if k <= pairs.features.shape[1]]
    settings = [Setting("pooled", k, rho, w) for rho in RIDGES for k in widths for w in POWERS]
    tried = [
        (setting, bench.measure(bench.embedded(space, "validation", states), "validation"))
        for setting, space in canonical_spaces(pairs, settings)
    ]
    return _best(tried)


def choose_fit(bench: Bench, pairs: Pairs, states: dict, name: str) -> tuple[Fit, list[dict[str, Any]]]:
    """The same for an objective trained by Adam, with seed 0."""
    tried = []
    for rate in RATES:
        fit = Fit(rate, 0.0 if name == PLAIN else NOISE)
        space = learn(pairs, OBJECTIVES[name], fit, 0)
        tried.append((fit, bench.measure(bench.embedded(space, "validation", states), "validation")))
    return _best(tried)


def _best(tried: list[tuple[Any, dict[str, Measure]]]) -> tuple[Any, list[dict[str, Any]]]:
    best = max(tried, key=lambda row: criterion(row[1]))[0]
    return best, [asdict(setting) | {name: m.value for name, m in measures.items()} for setting, measures in tried]


def measured(
    bench: Bench, pairs: Pairs, chosen: Mapping[str, Any], seed: int, split: str = "test"
) -> dict[str, dict[str, Measure]]:
    """
    Every system of one seed on a split, those without a seed with seed 0 alone.

    Args:
        chosen: OURS -> its setting, and an objective's name -> its fit.
    """
    states = bench.evaluation_states(split)
    spaces = {OURS: canonical(pairs, chosen[OURS])} | {
        name: learn(pairs, OBJECTIVES[name], fit, seed) for name, fit in chosen.items() if name != OURS
    }
    results = {name: bench.measure(bench.embedded(space, split, states), split) for name, space in spaces.items()}
    if seed == 0:
        results["CLIP"] = bench.measure(bench.embedded_by(bench.clip, split), split)
    return results


def rows_of(results: Mapping[str, Mapping[str, Measure]], seed: int) -> list[dict[str, Any]]:
    """Rows for the json: values with intervals, and our form's value less each row's on the same items."""
    ours = results[OURS]
    return [
        {"system": name, "seed": seed, "metrics": {k: m.summary() for k, m in measures.items()}}
        | (
            {}
            if name == OURS
            else {"first_less_this": {k: ours[k].against(m) for k, m in measures.items() if k in ours}}
        )
        for name, measures in results.items()
    ]


def judge(results: Mapping[int, Mapping[str, Mapping[str, Measure]]]) -> list[dict[str, Any]]:
    """Every ordering: both values by seed, and the difference with its paired 95 % interval."""
    judged = []
    for says, better, worse, measure in ORDERINGS:
        differences = []
        for seed, systems in results.items():
            # A row without seeds is compared with every seed of the other.
            a, b = (systems.get(n) or results[min(results)][n] for n in (better, worse))
            differences.append({"seed": seed, "better": a[measure].value, "worse": b[measure].value}
                               | {"difference": a[measure].against(b[measure])})  # fmt: skip
        judged.append({"says": says, "better": better, "worse": worse, "measure": measure, "seeds": differences})
    return judged


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="of the LLM and the states")
    parser.add_argument("--miniature", type=Path, help="of the miniature's towers; by default in the folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/real/real.json"))
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    bench = make_bench(arguments.folder, arguments.miniature, seed=0)
    pairs = bench.pairs(PAIRS)
    visual.closed_form(bench, pairs.features)
    bench.evaluation("validation", VALIDATION)
    states = bench.evaluation_states("validation")
    chosen, searched = {}, {}
    chosen[OURS], searched[OURS] = choose_canonical(bench, pairs, states)
    for name in OBJECTIVES:
        chosen[name], searched[name] = choose_fit(bench, pairs, states, name)
        print(f"{name}: {chosen[name]}", flush=True)
    results = {seed: measured(bench, pairs, chosen, seed) for seed in arguments.seeds}
    first = arguments.seeds[0]
    visual.train(bench, pairs.features, arguments.folder / "W_i2t.safetensors")
    space = canonical(pairs, chosen[OURS])
    trained = bench.evaluation_states("test", which="trained")
    results[first][OURS_TRAINED] = bench.measure(bench.embedded(space, "test", trained), "test")
    rows = [row for seed, systems in results.items() for row in rows_of(systems, seed)]
    result = {
        "about": ABOUT, "ret_prompt": RET_PROMPT, "ret_init": RET_INIT, "pairs": PAIRS,
        "validation_dialogues": len(states[DIALOGUE]), "chosen_by": CRITERION,
        "chosen": {name: asdict(setting) for name, setting in chosen.items()}, "validation": searched, "rows": rows,
        "orderings": judge(results), "dtype": str(bench.model.language_model.dtype),
        "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
    write_json(arguments.output, result)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
