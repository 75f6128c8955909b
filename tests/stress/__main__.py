"""
Every long form in turn, and one summary of them.

    python -m tests.stress --output benchmarks/results/stress.json
    python -m tests.stress --part kills --part fuzz

Kills, damaged pools, random input to verbs and readers, the endpoint under load, every family
of language models. What does not hold is named, the rest runs all the same, and the exit status is 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import make_model

from . import endpoint, families, fuzz, kills, pool_corruption

FILES_OF_A_READER = 6  # kinds of file that the tests damage for `load_pairs`; for `load_dialogues` they are one more

Answer = tuple[dict[str, Any], bool]  # figures, and whether the part held


def _kills(arguments: argparse.Namespace) -> Answer:
    figures: dict[str, Any] = {}
    for job in kills.JOBS:
        outcomes, bad = kills.run(job, arguments.kills)
        figures[job] = dict(outcomes) | ({"lost at": bad} if bad else {})
        print(job, figures[job], flush=True)
    return figures, not any("lost" in counts for counts in figures.values())


def _pools(arguments: argparse.Namespace) -> Answer:
    outcomes, bad = pool_corruption.run(arguments.pools)
    return dict(outcomes) | ({"bad": bad} if bad else {}), not bad


def _fuzz(arguments: argparse.Namespace) -> Answer:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        pool = fuzz.made_pool(model)
        for verb in fuzz.VERBS:
            start = time.perf_counter()
            try:
                figures[verb] = fuzz.run(verb, model, pool, arguments.cases)
            except Exception as error:  # an exception that no verb documents is what this part is for
                figures[verb] = {"broken": f"{type(error).__name__}: {error}"}
            print(verb, figures[verb], f"{time.perf_counter() - start:.0f} s", flush=True)
    return figures, not any("broken" in counts for counts in figures.values())


def _readers(arguments: argparse.Namespace) -> Answer:
    file = Path(__file__).parents[1] / "train" / "test_fuzz_readers.py"
    each = -(-arguments.cases // FILES_OF_A_READER)
    command = [sys.executable, "-m", "pytest", "--tb=short", str(file)]
    done = subprocess.run(command, env=os.environ | {"FUZZ_CASES": str(each)}, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        print(done.stdout)
    return {"cases of each file": each, "pytest": last.strip("= ")}, not done.returncode


def _endpoint(arguments: argparse.Namespace) -> Answer:
    figures = endpoint.run(arguments.clients, arguments.seconds)
    return figures, not (figures["wrong"] or figures["broken"]) and bool(figures["good"])


def _families(arguments: argparse.Namespace) -> Answer:
    table = families.run(sorted(families.KINDS), families.TABLE)
    works = [kind for kind, row in table.items() if row["works"]]
    packs = sum(table[kind]["packs"] for kind in works)
    converses = sum(table[kind]["converses"] is True for kind in works)
    counts = {"tried": len(table), "work": len(works), "pack": packs, "converse": converses}
    return counts, bool(works)  # what does not work is refused in words, as the table says


PARTS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "kills": _kills, "pools": _pools, "fuzz": _fuzz, "readers": _readers, "endpoint": _endpoint, "families": _families,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="this one alone; may be repeated")
    parser.add_argument("--kills", type=int, default=50, help="of each job")
    parser.add_argument("--pools", type=int, default=4000, help="damaged copies of saved pools")
    parser.add_argument("--cases", type=int, default=10_000, help="random inputs of each verb and each reader")
    parser.add_argument("--clients", type=int, default=64, help="of the endpoint")
    parser.add_argument("--seconds", type=float, default=120, help="for which the endpoint is asked")
    parser.add_argument("--output", type=Path, help="a JSON file for the summary; what it holds of other parts stays")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    held = True
    for name in arguments.part or PARTS:
        print(f"-- {name}", flush=True)
        start = time.perf_counter()
        figures, good = PARTS[name](arguments)
        held &= good
        figures = {"holds": good, "took_s": round(time.perf_counter() - start)} | figures
        print(name, json.dumps(figures, indent=1), flush=True)
        if arguments.output:
            summary = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
            summary[name] = figures | {"torch": torch.__version__, "transformers": transformers.__version__}
            arguments.output.write_text(json.dumps(summary, indent=1) + "\n")
    raise SystemExit(not held)


if __name__ == "__main__":
    main()
