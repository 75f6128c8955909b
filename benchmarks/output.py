"""What every command of the benchmarks writes: json files, and the time of its stages."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path`, indented; makes the folder where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Prints the name of a stage at its start and puts the time it took into `seconds`."""
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
