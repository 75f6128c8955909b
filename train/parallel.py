"""Independent jobs side by side, a process and a thread each."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple


class Done(NamedTuple):
    """A job's result, its seconds, and the peak memory of its process in GiB."""

    result: Any
    seconds: float
    memory: float


def side_by_side(jobs: Sequence[tuple[Callable, dict[str, Any]]]) -> list[Done]:
    """
    Runs importable functions with keyword arguments, each in a process of its own, and returns when all are done.

    Models as small as the miniature's gain nothing from a second thread, so two jobs take hardly longer than one; and
    what they compute does not depend on the number of cores. Each process draws its progress bar on its own line.

    Raises:
        Exception: whatever a job raised.
    """
    before = dict(os.environ)
    try:
        with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as processes:
            waiting = []
            for line, (function, arguments) in enumerate(jobs):
                # A spawned process inherits the environment of this moment; both libraries read theirs on import.
                os.environ |= {"TQDM_POSITION": str(line), "OMP_NUM_THREADS": "1"}
                waiting.append(processes.submit(_timed, function, arguments))
            return [future.result() for future in waiting]
    finally:
        os.environ.clear()
        os.environ.update(before)


def _timed(function: Callable, arguments: dict[str, Any]) -> Done:
    start = time.perf_counter()
    result = function(**arguments)
    return Done(result, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
