"""Requests that arrive while a model computes are answered together, by one thread."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import ceil
from typing import Any


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


class Batcher:
    """
    A queue before a function that answers several requests at once. To be used within one event loop.

    Args:
        answer: n requests -> n answers, an exception in the place of a request that has none; called in a thread of its own.
        max_waiting: how many requests may wait.
        max_batch: how many are answered together.
    """

    def __init__(
        self, answer: Callable[[Sequence[Any]], Sequence[Any]], *, max_waiting: int = 64, max_batch: int = 16
    ):
        self.answer, self.max_waiting, self.max_batch = answer, max_waiting, max_batch
        self._waiting: dict[asyncio.Future, Any] = {}  # oldest first
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "answers")
        self._batch_seconds = 0.0  # what the last batch took

    @property
    def full(self) -> bool:
        """Whether as many requests wait as may."""
        return len(self._waiting) >= self.max_waiting

    @property
    def retry_after(self) -> int:
        """In how many seconds, at least 1, those that wait will be answered at the pace of the last batch."""
        return max(1, ceil(self._batch_seconds * (1 + len(self._waiting) / self.max_batch)))

    async def ask(self, request: Any) -> Any:
        """
        The answer to a request. Cancelled, it leaves the queue.

        Raises:
            QueueFullError: no more requests may wait.
            Exception: what `answer` has in the request's place.
        """
        if self.full:
            raise QueueFullError
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = request
        self._arrived.set()
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    async def run(self) -> None:
        """Answers whatever waits, until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                batch = {future: self._waiting.pop(future) for future in list(islice(self._waiting, self.max_batch))}
                if not batch:
                    self._arrived.clear()
                    continue
                start = time.monotonic()
                answers = await loop.run_in_executor(self._thread, self._answers, list(batch.values()))
                self._batch_seconds = time.monotonic() - start
                for future, answer in zip(batch, answers, strict=True):
                    if future.done():  # its client has left, or it took too long
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
                del batch, answers  # not until the next request comes
        finally:
            self._thread.shutdown(wait=False)

    def _answers(self, requests: list[Any]) -> Sequence[Any]:
        try:
            return self.answer(requests)
        except Exception as error:
            return [error] * len(requests)
