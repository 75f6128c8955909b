"""
Every claim about speed, measured as ratios in interleaved rounds.

    python -m benchmarks.speed --output benchmarks/results             all parts
    python -m benchmarks.speed --part step --part embedding            some
    python -m benchmarks.speed --page --output benchmarks/results      only the page, from the json there
"""

import argparse
import os
from pathlib import Path

from train.command import run_command

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the libraries are imported

from . import embedding, profiles, quality, step, texts
from .page import page

PARTS = ("step", "profiles", "embedding", "texts", "pool", "quality")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="by default all")
    parser.add_argument("--rounds", type=int, help="by default each part's own")
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    parser.add_argument("--page", action="store_true", help="only write the page")
    arguments = parser.parse_args(argv)
    passed = ["--output", str(arguments.output)]
    passed += [] if arguments.rounds is None else ["--rounds", str(arguments.rounds)]
    for name in [] if arguments.page else arguments.part or PARTS:
        print(f"\n== {name}", flush=True)
        if name == "pool":  # needs faiss, and a checkpoint
            from . import pool

            pool.main(passed)
        elif name in ("profiles", "quality"):  # no rounds
            {"profiles": profiles, "quality": quality}[name].main(["--output", str(arguments.output)])
        else:
            {"step": step, "embedding": embedding, "texts": texts}[name].main(passed)
    print(f"written: {page(arguments.output)}")


if __name__ == "__main__":
    run_command(main)
