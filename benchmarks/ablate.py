"""
The paper's ablations and its open questions on the miniature.

    python -m benchmarks.ablate --table 4          Tables 4, 5, 6, or `open` for what the paper leaves open
    python -m benchmarks.ablate --table all --seeds 0 1 2 3 4

Every row has the same steps and is trained at the same learning rates. The rate with the best mean on validation over
the seeds is taken, and only that one is measured on test.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.command import run_command
from train.parallel import side_by_side

from .ablation import Row, run_test, run_validation
from .output import write_json

BIASES = tuple(round(b, 3) for b in np.linspace(-0.3, 0.3, 25))
MATCHING = ("image retrieval rate", "image retrieval rate on text-only turns", "image R@1", "text R@1", "overall R@1",
            "dialogue to image R@1")  # fmt: skip
VISUAL = ("contextual image R@1", "contextual image, image informs R@1", "overall R@1")

SPACE = {"alignment": "canonical", "lambda2": 0.0, "temperature": 0.05}
NEAR = {"state_noise": 0.3, "negatives_bank": 4096}

# name -> (what it asks, the measure that chooses the rate, the columns, rows; the first is the default)
TABLES: dict[str, tuple[str, str, Sequence[str], list[Row]]] = {
    "4": ("Table 4: the training strategy", "overall R@1", MATCHING,
          [Row("DAT"), Row("VM", {"lambda2": 0.0}), Row("TM", {"lambda1": 0.0})]),
    "5": ("Table 5: the text-matching loss", "overall R@1", MATCHING,
          [Row("MSE"), Row("InfoNCE", {"text_matching": "infonce"}), Row("max-margin", {"text_matching": "max_margin"})]),
    "6": ("Table 6: the size of the language model", "dialogue to image R@1",
          ("dialogue to image R@1", "dialogue to image R@5", "dialogue to image R@10"),
          [Row("OPT 128 x 2 layers"), Row("OPT 64 x 1 layer", language_model="opt-64x1"),
           Row("OPT 192 x 3 layers", language_model="opt-192x3")]),
    "alignment": ("the space in which [RET] and images meet", "overall R@1", (*MATCHING, "contextual image R@1"),
                  [Row("canonical correlation, then steps", SPACE, training=NEAR),
                   Row("canonical correlation alone", SPACE, steps=0),
                   Row("alone, of CLIP's projected embedding", SPACE, steps=0, grid={"features": ("projected",)}),
                   Row("alone, CLIP's text a third view", SPACE, steps=0, grid={"text_weights": (1.0,)}),
                   Row("then steps, with eq. 6 at weight 1", SPACE | {"lambda2": 1.0}, training=NEAR),
                   Row("then steps, with eq. 6 at weight 10", SPACE | {"lambda2": 10.0}, training=NEAR),
                   Row("then steps, without noise", SPACE, training=NEAR | {"state_noise": 0.0}),
                   Row("then steps, image map trained", SPACE | {"train_image_map": True}, training={"state_noise": 0.3}),
                   Row("the paper's (DAT)"),
                   Row("the paper's, with noise and a bank", training=NEAR)]),
    "text candidates": ("the space of candidate texts (Section 3.4)", "overall R@1", MATCHING,
                        [Row("[RET]"), *(Row(name.replace("_", " "), {"text_candidates": name})
                                         for name in ("last_output", "input_embeddings", "clip_text"))]),
    "text target": ("the target of eq. 6", "overall R@1", MATCHING,
                    [Row("normalised, mean over q"), Row("raw, mean over q", {"text_target": "raw"}),
                     Row("normalised, sum over q", {"text_target_reduction": "sum"}),
                     Row("raw, sum over q", {"text_target": "raw", "text_target_reduction": "sum"})]),
    "lambda2": ("the weight of L_tm in eq. 7", "overall R@1", MATCHING,
                [Row("10 (the paper's)"), Row("1", {"lambda2": 1.0}), Row("100", {"lambda2": 100.0})]),
    "temperature": ("tau of eq. 4-5", "overall R@1", MATCHING,
                    [Row("learned from 0.07"), Row("fixed at 0.07", {"learn_temperature": False}),
                     Row("fixed at 0.01", {"learn_temperature": False, "temperature": 0.01})]),
    "negatives": ("past images as further negatives of eq. 4", "overall R@1", MATCHING,
                  [Row("of the batch"), *(Row(f"and {size:,} past images", training={"negatives_bank": size})
                                          for size in (512, 2048, 8192))]),
    # With the LLM in the loop a step costs ten times as much, so these two tables have half the steps, for every row.
    "visual prefix": ("the image feature and the number of visual tokens", "contextual image, image informs R@1", VISUAL,
                      [Row("6 tokens, pooled", {}, "captioning", steps=160),
                       Row("1 token, pooled", {"n_visual_tokens": 1}, "captioning", steps=160),
                       Row("6 tokens, projected", {"image_feature": "projected"}, "captioning", steps=160)]),
    "schedule": ("[RET] and the order of the losses", "overall R@1", (*MATCHING, "contextual image R@1"),
                 [Row("joint, [RET] frozen", {}, "joint", steps=160),
                  Row("alternating, [RET] frozen", {}, "alternating", steps=160),
                  Row("joint, [RET] trained", {"train_ret_embedding": True}, "joint", steps=160)]),
}  # fmt: skip
GROUPS = {"all": list(TABLES), "open": [name for name in TABLES if not name.isdigit()]}


def ablate(tables: Sequence[str], seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """
    Runs tables over seeds, two at a time.

    Returns:
        By table: `asks`, `chosen_by`, `shown` (the columns) and `rows`, each with its `validation` means by rate, the
        chosen `rate`, and a test result per seed.
    """
    rows = list({row.key + str(row.fields): row for name in tables for row in TABLES[name][3]}.values())
    folders = [str(folder / f"seed-{seed}") for seed in seeds]
    jobs = [(run_validation, {"folder": f, "seed": s, "rows": rows}) for f, s in zip(folders, seeds, strict=True)]
    validation = [done.result for done in side_by_side(jobs)]
    chosen: dict[str, list[dict]] = {}
    for name in tables:
        _, by, _, members = TABLES[name]
        chosen[name] = []
        for row in members:
            key = row.key + json.dumps(row.fields.get("text_candidates"))
            means = {rate: float(np.mean([v[key][f"{rate:g}"][by] for v in validation])) for rate in row.rates}
            chosen[name].append({"row": row, "rate": max(means, key=means.get), "validation": means})
    flat = [entry for name in tables for entry in chosen[name]]
    given = {"rows": [e["row"] for e in flat], "rates": [e["rate"] for e in flat]}
    given["biases"] = [BIASES if name == "4" else () for name in tables for _ in chosen[name]]
    jobs = [(run_test, {"folder": f, "seed": s, **given}) for f, s in zip(folders, seeds, strict=True)]
    tested = [done.result for done in side_by_side(jobs)]
    for at, entry in enumerate(flat):
        entry["seeds"] = [result[at] for result in tested]
    results = {}
    for name in tables:
        asks, by, columns, members = TABLES[name]
        results[name] = {
            "asks": asks, "chosen_by": f"{by} on validation", "shown": list(columns), "rates": list(members[0].rates),
            "rows": [
                {"name": e["row"].name, "fields": e["row"].fields, "part": e["row"].part, "steps": e["row"].steps,
                 "training": e["row"].training,
                 "language_model": e["row"].language_model, "rate": e["rate"], "rates": list(e["row"].rates),
                 "validation": {f"{r:g}": v for r, v in e["validation"].items()}, "seeds": e["seeds"]}
                for e in chosen[name]
            ],
        }  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", default=["all"], choices=[*GROUPS, *TABLES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/report"), help="towers and trained maps, by seed")
    parser.add_argument("--output", type=Path, help="folder of the json; by default --folder")
    arguments = parser.parse_args()
    tables = list(dict.fromkeys(name for given in arguments.table for name in GROUPS.get(given, [given])))
    results = ablate(tables, arguments.seeds, arguments.folder)
    output = arguments.output or arguments.folder
    for name, result in results.items():
        path = output / f"ablation-{name.replace(' ', '-')}.json"
        write_json(path, result)
        print(f"\n{result['asks']} (test, mean of {len(arguments.seeds)} seeds; percent)")
        for row in result["rows"]:
            means = {m: 100 * np.mean([s["metrics"][m]["value"] for s in row["seeds"]]) for m in result["shown"]}
            print(f"  {row['name']:28} lr {row['rate']:<6g} " + "  ".join(f"{m} {v:.1f}" for m, v in means.items()))
        print(f"written: {path}")


if __name__ == "__main__":
    run_command(main)
