"""Independent jobs side by side, a process and a thread each."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partialmethod
from typing import Any, NamedTuple

from tqdm.std import tqdm


class Done(NamedTuple):
    """A job's result, its seconds, and the peak memory of its process in GiB."""

    result: Any
    seconds: float
    memory: float


def side_by_side(jobs: Sequence[tuple[Callable, dict[str, Any]]], workers: int = 2) -> list[Done]:
    """
    Runs importable functions with keyword arguments, each in a process of its own, at most `workers` at a time, and
    returns when all are done.

    Models as small as the miniature's gain nothing from a second thread, so two jobs take hardly longer than one; and
    what they compute does not depend on the number of cores. Each process draws its progress bar on its own line.

    Raises:
        Exception: whatever a job raised.
    """
    context = multiprocessing.get_context("spawn")
    # A new process imports the main script, and OpenMP with it, before it runs our code: this must be set by then.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        started = context.Value("i", 0)
        with ProcessPoolExecutor(
            workers, context, initializer=_settle, initargs=(started, workers), max_tasks_per_child=1
        ) as processes:
            waiting = [processes.submit(_timed, function, arguments) for function, arguments in jobs]
            return [future.result() for future in waiting]
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _settle(started: Any, workers: int) -> None:
    """Gives the process's progress bars a line of their own."""
    with started.get_lock():
        line, started.value = started.value % workers, started.value + 1
    tqdm.__init__ = partialmethod(tqdm.__init__, position=line)


def _timed(function: Callable, arguments: dict[str, Any]) -> Done:
    start = time.perf_counter()
    result = function(**arguments)
    return Done(result, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
