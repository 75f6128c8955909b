"""What every command of the benchmarks writes: json files, and the time of its stages."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, *, long_lists: bool = False) -> None:
    """
    Writes `value` to `path`, indented; makes the folder where it is absent. `long_lists` puts a list of numbers, such as a
    value an item, on one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1)
    if long_lists:  # no text holds a line break, so that only lists begin so
        text = re.sub(r'\[\n[^\[\]{}"]*\]', lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)
    path.write_text(text + "\n")


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Prints the name of a stage at its start and puts the time it took into `seconds`."""
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
