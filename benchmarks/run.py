"""
Measures a model on one task, beside baselines, on the miniature or on a folder of the real data.

    python -m benchmarks.run --task visdial --model PATH
    python -m benchmarks.run --task visdial --model PATH --data visdial/ --baseline clip=PATH --limit 100
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.command import require, run_command

if __name__ == "__main__":
    require("bench", "accelerate", "evaluate", "matplotlib", "yaml")

import torch

from .arguments import positive, usable_device
from .baselines.clip import ClipBaseline
from .data import load_data
from .load import SYSTEMS, load
from .measure import Measure
from .output import write_json
from .protocols import TASKS, paper, protocols
from .schema import MAX_MISSING_SHARE, Dialogues, Protocol, Questions
from .systems import DoesNotApplyError, System
from .tables import markdown
from .tasks import KINDS


def evaluate(
    system: System, data: Dialogues | Questions, protocol: Protocol, clip: System | None = None
) -> dict[str, Measure] | None:
    """One system on one protocol; `None` where the task does not apply to it (no language model, no embedding)."""
    try:
        return KINDS[protocol.kind].run(system, data, protocol, clip)
    except DoesNotApplyError:
        return None


def compare(
    systems: Sequence[System], data: Dialogues | Questions, protocol: Protocol, *, clip: System, seed: int = 0,
    source: str = "miniature", values: bool = False, second: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """
    Every system on one protocol, each against the first over the same items: all of `data`, or the protocol's `limit`.

    Returns:
        One result per system: protocol, data, system, seed, `metrics` (value, 95 % interval, items) and `first_less_this`
        (the first system's value less this one's, with its paired 95 % interval); with `second`, `second_less_this` in the
        same way, of all behind the second; with `values`, also what each item has, from which
        [`benchmarks.measure.difference`] compares any two.
    """
    results, leaders = [], {}
    data = data.first(protocol.settings.get("limit"))
    for system in systems:
        start = time.perf_counter()
        system.begin()
        print(f"{protocol.label}: {system.name}", flush=True)
        measures = evaluate(system, data, protocol, clip)
        result = {
            "task": protocol.task, "protocol": {"variant": protocol.variant, "version": protocol.version,
            "miniature": protocol.miniature, "settings": protocol.settings},
            "data": {"source": source, "items": len(data), "pool": data.pool_hash, "left_out": str(data.missing),
                     "left_out_by_reason": data.missing.by_reason()},
            "system": system.name, "revision": system.revision, "seed": seed, "torch": torch.__version__,
        }  # fmt: skip
        if measures is None:
            results.append(result | {"applies": False, "metrics": {}})
            continue
        result |= {"applies": True, "metrics": {k: m.summary(seed) for k, m in measures.items()}}
        if values:
            result["values"] = {name: m.listed() for name, m in measures.items() if m.weights is None}
        for place, leader in leaders.items():
            result[f"{place}_less_this"] = {
                name: leader[name].against(m, seed) for name, m in measures.items() if name in leader
            }
        if len(leaders) < 1 + second:
            leaders["second" if leaders else "first"] = measures
        results.append(result | {"notes": system.notes, "seconds": round(time.perf_counter() - start, 1)})
    return results


def chosen(task: str, variants: Sequence[str] | None, *, miniature: bool) -> list[Protocol]:
    """A task's protocols, or those variants of it alone. Raises `ValueError` that names a variant there is not."""
    every = protocols(task, miniature=miniature)
    known = [protocol.variant for protocol in every]
    for variant in variants or ():
        if variant not in known:
            raise ValueError(f"--variant {variant}: {task} has {', '.join(known)}")
    return [protocol for protocol in every if not variants or protocol.variant in variants]


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--model", required=True, help="a UniMuR checkpoint: a folder or a name on the Hub")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="KIND=PATH",
        help=f"another row; KIND is one of {', '.join(SYSTEMS)}",
    )
    parser.add_argument("--data", help="folder of the data set as it is published; by default the miniature")
    parser.add_argument("--split", help="instead of the protocol's")
    parser.add_argument("--variant", action="append", help="of the protocol; by default every one")
    parser.add_argument("--limit", type=positive, help="only the first N items, for a trial")
    parser.add_argument("--manifest", help="VIST: file of the photo ids to keep")
    parser.add_argument(
        "--max_missing_share", type=float, default=MAX_MISSING_SHARE, help="of items that may be left out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks"), help="folder of the json and the table"
    )
    return parser


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Raises `ValueError` or `OSError`: a variant or a system is unknown, or a model or the data cannot be read."""
    arguments = make_parser().parse_args(argv)
    measured = chosen(arguments.task, arguments.variant, miniature=arguments.data is None)
    systems = [load("unimur", arguments.model)]
    for baseline in arguments.baseline:
        kind, _, path = baseline.partition("=")
        systems.append(load(kind, path or arguments.model))
    for system in systems:
        system.model.to(arguments.device)
    clip = ClipBaseline(systems[0].model)
    results = []
    for protocol in measured:
        data = load_data(
            protocol, arguments.data, split=arguments.split, manifest=arguments.manifest,
            max_missing_share=arguments.max_missing_share,
        )  # fmt: skip
        print(data.missing)
        source = Path(arguments.data).name if arguments.data else "miniature"
        results += compare(
            systems, data.first(arguments.limit), protocol, clip=clip, seed=arguments.seed, source=source
        )
    table = markdown(arguments.task, results, paper(arguments.task))
    write_json(arguments.output / f"{arguments.task}.json", results)
    (arguments.output / f"{arguments.task}.md").write_text(table)
    print("\n" + table)
    print(f"written: {arguments.output / arguments.task}.json and .md")
    return results


if __name__ == "__main__":
    run_command(main)
