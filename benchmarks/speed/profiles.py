"""
Where a training step's time goes, before and after the two largest gains: the lean step, and the cache.

    python -m benchmarks.speed.profiles --output benchmarks/results

The milliseconds in each operator itself, by torch's profiler, for the shapes and variants of
[`benchmarks.speed.step`]; operators below 3 % of the reference step are summed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.output import write_json
from train.command import run_command

from .step import CACHED, OURS, REFERENCE, STEP_SHAPES, batches, make_model, stepper

WAYS = (REFERENCE, OURS, CACHED)
STEPS, SHARE = 3, 0.03


def operators(variant: str, shape: str) -> dict[str, float]:
    """Milliseconds per step by operator, without the operators it calls."""
    model = make_model(shape)
    step = stepper(variant, model, batches(model, 1))
    step(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(STEPS):
            step(number)
    return {e.key: e.self_cpu_time_total / 1e3 / STEPS for e in profiler.key_averages() if e.self_cpu_time_total}


def measure(shape: str) -> dict[str, Any]:
    """`ways`: by variant, milliseconds by operator, the small ones summed."""
    times_of = {way: operators(way, shape) for way in WAYS}
    whole = sum(times_of[REFERENCE].values())
    named = sorted({n for way in times_of.values() for n, ms in way.items() if ms >= SHARE * whole})
    ways = {}
    for way, times in times_of.items():
        ways[way] = {name: times.get(name, 0.0) for name in named}
        ways[way]["others"] = sum(ms for name, ms in times.items() if name not in named)
    return {"shape": shape, "ways": ways}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    result = {
        "threads": arguments.threads, "torch": torch.__version__, "shapes": [measure(shape) for shape in STEP_SHAPES]
    }  # fmt: skip
    write_json(arguments.output / "step-profile.json", result)
    for shape in result["shapes"]:
        for way, times in shape["ways"].items():
            print(f"{shape['shape']}, {way}: " + ", ".join(f"{n} {ms:.0f} ms" for n, ms in times.items()))
    return result


if __name__ == "__main__":
    run_command(main)
