"""Ways of doing the same thing, timed in turn and in random order, and compared within a round."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm


def interleaved(
    ways: Mapping[str, Callable[[int], Any]], rounds: int, seed: int = 0, repeats: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """
    Every way once a round, in random order, called with the round's number.

    Args:
        repeats: how many calls of a way in a row make one measurement, where one is too short.

    Returns:
        way -> its seconds per call in each round, their median, minimum and maximum.
    """
    rng, seconds = random.Random(seed), {way: [] for way in ways}
    for way in ways.values():
        way(0)  # warms up
    for number in tqdm(range(rounds), ", ".join(ways)):
        for way in rng.sample(list(ways), len(ways)):
            calls = (repeats or {}).get(way, 1)
            start = time.perf_counter()
            for _ in range(calls):
                ways[way](number)
            seconds[way].append((time.perf_counter() - start) / calls)
    return {
        way: {"median": float(np.median(s)), "low": min(s), "high": max(s), "seconds": s} for way, s in seconds.items()
    }


def ratio(measured: dict[str, Any], above: str, below: str) -> dict[str, float]:
    """How many times as long `above` takes as `below`: the median, minimum and maximum over the rounds."""
    values = sorted(a / b for a, b in zip(measured[above]["seconds"], measured[below]["seconds"], strict=True))
    return {"median": float(np.median(values)), "low": values[0], "high": values[-1]}
