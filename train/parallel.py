"""Independent jobs side by side, a process and a thread each."""

import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

_SPAWN = multiprocessing.get_context("spawn")
_starting = threading.Lock()  # a process starts with the environment of all of this one, so one at a time


class Done(NamedTuple):
    """A job's result, its seconds, and the peak memory of its process in GiB."""

    result: Any
    seconds: float
    memory: float


def side_by_side(jobs: Sequence[tuple[Callable, dict[str, Any]]], workers: int = 2) -> list[Done]:
    """
    Runs importable functions with keyword arguments, each in a process of its own, at most `workers` at a time, and
    returns when all are done. When one raises, the others are ended: they may be waiting for it.

    Models as small as the miniature's gain nothing from a second thread, so two jobs take hardly longer than one; and
    what they compute does not depend on the number of cores. Each process draws its progress bar on its own line.

    Raises:
        Exception: whatever a job raised.
    """
    lines: SimpleQueue[int] = SimpleQueue()
    for line in range(workers):
        lines.put(line)
    end, open_end = _SPAWN.Pipe(duplex=False)
    with open_end, end, ThreadPoolExecutor(workers) as threads:
        waiting = [threads.submit(_in_a_process, function, arguments, lines, end) for function, arguments in jobs]
        ended, others = wait(waiting, return_when=FIRST_EXCEPTION)
        if others:
            open_end.close()
            threads.shutdown(cancel_futures=True)
        return [future.result() for future in waiting if future in ended]


def _in_a_process(function: Callable, arguments: dict[str, Any], lines: "SimpleQueue[int]", end: Connection) -> Done:
    line = lines.get()
    try:
        with ProcessPoolExecutor(1, _SPAWN, _end_at, (end,)) as process:
            # A new process imports the main script, and OpenMP and tqdm with it, before it runs anything of ours: they have
            # to find these set.
            with _starting, _environment(OMP_NUM_THREADS="1", TQDM_POSITION=str(line)):
                waiting = process.submit(_timed, function, arguments)
            return waiting.result()
    finally:
        lines.put(line)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """The environment with other values, and then as it was."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def peak_memory() -> float:
    """The most memory that this process has had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _end_at(end: Connection) -> None:
    """
    Ends this process when the other end of the pipe is closed: by a job that failed, or by the system where the command
    ends, however that is, so that a killed one leaves no job behind.
    """
    threading.Thread(target=_exit_after, args=[end], daemon=True).start()


def _exit_after(end: Connection) -> None:
    end.poll(None)  # nothing is ever sent
    os._exit(1)


def _timed(function: Callable, arguments: dict[str, Any]) -> Done:
    start = time.perf_counter()
    result = function(**arguments)
    return Done(result, time.perf_counter() - start, peak_memory())
