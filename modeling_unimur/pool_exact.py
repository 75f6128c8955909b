"""Exact search by cosine, streamed over a pool's memory-mapped embeddings: nothing of their size is ever copied."""

import warnings
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import is_datasets_available

from .pool_digests import Guard
from .replies_unimur import MODALITIES

if is_datasets_available():
    import pyarrow.compute as pc

CHUNK = 16_384  # rows read at a time where they must be copied
# Rows and scores of a block of the search, at most: the scores then stay in the processor's cache.
BLOCK, SCORES = 2**18, 2**20
# A float32 product of unit vectors errs by less, and equal rows may err differently: what is so near the k-th place
# is computed again before it is dropped.
ROUNDING = 1e-5
PENDING = 2**16


class Top(NamedTuple):
    """
    Args:
        scores: `(n, k)` float32, falling; -inf where there is no further candidate.
        rows: `(n, k)` int64, the candidates' rows; -1 there.
    """

    scores: np.ndarray
    rows: np.ndarray


class Embeddings:
    """
    The embeddings of a pool as views on its Arrow buffers, each row with its modality.

    Args:
        table: an Arrow table whose column `embedding` is a fixed-size list of float32 without nulls, and `modality`.
        guard: checks what is read where the files have not been checked yet.

    Raises:
        ValueError: an embedding is missing; later, of any method, that what it reads is damaged.
    """

    def __init__(self, table: Any, guard: Guard | None = None):
        embedding = table.column("embedding")
        if embedding.null_count:
            raise ValueError(f"{embedding.null_count} candidates of the pool have no embedding: build it again")
        self.dimension = embedding.type.list_size
        self._modality, self._guard = table.column("modality"), guard
        self._is_image: np.ndarray | None = None
        self._counts: dict[str, int] = {}
        self.views = [
            # flatten() respects the offset of a sliced array, as .values would not.
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, self.dimension)
            for chunk in embedding.chunks
            if len(chunk)
        ]
        self.starts = np.cumsum([0, *map(len, self.views)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def is_image(self) -> np.ndarray:
        """`(len,)` bool: whether a row is an image; the others are texts."""
        if self._is_image is None:
            if self._guard is not None:
                self._guard.check_arrays(self._modality.chunks)
            self._is_image = pc.equal(self._modality, "image").to_numpy()
            images = int(self._is_image.sum())
            self._counts = {"image": images, "text": len(self) - images}
        return self._is_image

    @property
    def counts(self) -> dict[str, int]:
        """How many candidates of each modality."""
        _ = self.is_image
        return self._counts

    def rows(self, kind: str) -> np.ndarray:
        """Rows of a modality, `(m,)` int64 ascending."""
        return np.flatnonzero(self.is_image if kind == "image" else ~self.is_image)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of some rows, `(m, q)` float32."""
        taken = np.empty((len(rows), self.dimension), dtype=np.float32)
        order = np.argsort(rows)
        chunks = np.searchsorted(self.starts, rows[order], side="right") - 1
        ends = [*(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(rows)] if len(rows) else []
        start = 0
        for stop in ends:
            places, chunk, start = order[start:stop], chunks[start], stop
            inside = rows[places] - self.starts[chunk]
            if self._guard is not None:
                self._guard.check_rows(self.views[chunk], inside)
            taken[places] = self.views[chunk][inside]
        return taken

    def blocks(self, rows: int, kinds: Collection[str] = MODALITIES) -> Iterator[tuple[int, list[np.ndarray]]]:
        """First row and consecutive views of every block of at most `rows`; one without these `kinds` is left out."""
        views: list[np.ndarray] = []
        start = length = 0
        for chunk_start, chunk in zip(self.starts.tolist(), self.views, strict=False):
            for offset in range(0, len(chunk), rows):
                view = chunk[offset : offset + rows]
                if length + len(view) > rows and length:
                    if self._has(start, length, kinds):
                        yield start, views
                    views, length = [], 0
                if not length:
                    start = chunk_start + offset
                if self._guard is not None:
                    self._guard.check(view.ctypes.data, view.nbytes)
                views.append(view)
                length += len(view)
        if length and self._has(start, length, kinds):
            yield start, views

    def _has(self, start: int, length: int, kinds: Collection[str]) -> bool:
        if len(kinds) == len(MODALITIES):
            return True
        images = self.is_image[start : start + length]
        return bool(images.any() if "image" in kinds else not images.all())

    def top(
        self, queries: np.ndarray, k: int, kinds: Collection[str] = MODALITIES, banned: np.ndarray | None = None
    ) -> dict[str, Top]:
        """
        The best candidates of each modality in one pass; among equal scores the lower row comes first.

        Args:
            queries: `(n, q)` float32.
            k: per query and modality.
            kinds: the modalities searched.
            banned: `(b,)` int64 ascending, rows that are not returned.
        """
        transposed = torch.from_numpy(np.ascontiguousarray(queries)).T
        kinds = [kind for kind in kinds if self.counts[kind]]
        best = {kind: _Best(self, queries, min(k, self.counts[kind])) for kind in kinds}
        rows = max(1, min(BLOCK, SCORES // max(1, len(queries))))
        buffer = np.empty((min(rows, len(self)), len(queries)), dtype=np.float32)
        for start, views in self.blocks(rows, kinds):
            at = 0
            for view in views:  # the products go straight from the mapped pages into the block's scores
                # torch's threads, not numpy's: after a product the latter spin, and the next query's LLM waits for them.
                torch.mm(_tensor(view), transposed, out=torch.from_numpy(buffer[at : at + len(view)]))
                at += len(view)
            scores = buffer[:at]
            if banned is not None and len(banned):
                inside = banned[np.searchsorted(banned, start) : np.searchsorted(banned, start + at)]
                scores[inside - start] = -np.inf
            images = self.is_image[start : start + at]
            for kind, mine in best.items():
                inside = np.flatnonzero(images if kind == "image" else ~images)
                if not len(inside):
                    continue
                first, last = int(inside[0]), int(inside[-1]) + 1
                if last - first == len(inside):  # as pools are mostly built: nothing is copied
                    mine.offer(scores[first:last], start + first)
                else:
                    mine.offer(scores.take(inside, axis=0), start + inside)
        return {kind: mine.top() for kind, mine in best.items()}

    def rescored(self, queries: np.ndarray, rows: np.ndarray) -> Top:
        """Some rows of each query, `(n, m)` and -1 where there are fewer, by their scores."""
        top = Top(np.full(rows.shape, -np.inf, dtype=np.float32), np.full_like(rows, -1))
        for i, (query, mine) in enumerate(zip(queries, rows, strict=True)):
            mine = mine[mine >= 0]
            scores = self.scores(query, mine)
            order = np.lexsort((mine, -scores))
            top.scores[i, : len(mine)], top.rows[i, : len(mine)] = scores[order], mine[order]
        return top

    def scores(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """
        Cosines `(m,)` of a query with rows, computed in float64 and rounded to float32: they depend on neither batch nor
        block nor index, and equal embeddings score the same.
        """
        return (self.take(rows).astype(np.float64) @ query.astype(np.float64)).astype(np.float32)

    def statistics(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean `(q,)` and covariance `(q, q)` float32 of a modality: every query's score statistics follow from them."""
        total, products = np.zeros(self.dimension), np.zeros((self.dimension, self.dimension))
        for start, views in self.blocks(CHUNK, (kind,)):
            block = np.concatenate(views)
            images = self.is_image[start : start + len(block)]
            block = block[images if kind == "image" else ~images]
            total += block.sum(0, dtype=np.float64)
            products += block.T @ block  # float32 within a block, float64 over the blocks
        mean = total / self.counts[kind]
        covariance = products / self.counts[kind] - np.outer(mean, mean)
        return mean.astype(np.float32), covariance.astype(np.float32)


def _tensor(mapped: np.ndarray) -> torch.Tensor:
    """A read-only array as a tensor that shares it; torch warns that writing to it would be wrong, and nobody does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(mapped)


class _Best:
    """The best k rows of each of n queries so far, with what rounding may have kept from being among them."""

    def __init__(self, embeddings: Embeddings, queries: np.ndarray, k: int):
        self.embeddings, self.queries, self.k = embeddings, queries, k
        self.query, self.rows = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)  # sorted by query, then score
        self.scores = np.empty(0, dtype=np.float32)
        self.kth = np.full(len(queries), -np.inf, dtype=np.float32)

    def offer(self, scores: np.ndarray, rows: int | np.ndarray) -> None:
        """Scores `(b, n)` of further rows, -inf for none; of which rows: the first, or all of them."""
        floor = self.kth
        if np.isneginf(floor).any() and len(scores) > self.k:  # at first: the k-th of some of this block
            some = scores[: max(1024, 2 * self.k)].T
            floor = np.maximum(floor, np.partition(some, some.shape[1] - self.k, axis=1)[:, some.shape[1] - self.k])
        hits = np.flatnonzero(scores >= np.maximum(floor - ROUNDING, np.finfo(np.float32).min))
        if not len(hits):
            return
        places, query = np.divmod(hits, len(self.queries))
        self.query = np.concatenate([self.query, query])
        self.rows = np.concatenate([self.rows, places + rows if isinstance(rows, int) else rows[places]])
        self.scores = np.concatenate([self.scores, scores.ravel()[hits]])
        rank = self._sort()
        last = rank == self.k - 1
        self.kth[self.query[last]] = self.scores[last]
        self._keep(self.scores >= self.kth[self.query] - ROUNDING)
        if len(self.rows) > len(self.queries) * self.k + PENDING:
            self._settle()

    def top(self) -> Top:
        rank = self._settle()
        top = Top(
            np.full((len(self.queries), self.k), -np.inf, dtype=np.float32),
            np.full((len(self.queries), self.k), -1, dtype=np.int64),
        )
        top.scores[self.query, rank], top.rows[self.query, rank] = self.scores, self.rows
        return top

    def _settle(self) -> np.ndarray:
        """Scores all that is kept again and drops what is not among the best k; each one's rank from 0."""
        ends = np.searchsorted(self.query, np.arange(len(self.queries) + 1))
        parts = [
            self.embeddings.scores(query, self.rows[start:stop])
            for query, start, stop in zip(self.queries, ends, ends[1:], strict=False)
        ]
        self.scores = np.concatenate([self.scores[:0], *parts])
        rank = self._sort()
        self._keep(rank < self.k)
        return rank[rank < self.k]

    def _sort(self) -> np.ndarray:
        order = np.lexsort((self.rows, -self.scores, self.query))
        self._keep(order)
        return np.arange(len(order)) - np.searchsorted(self.query, self.query)

    def _keep(self, chosen: np.ndarray) -> None:
        self.query, self.rows, self.scores = self.query[chosen], self.rows[chosen], self.scores[chosen]
