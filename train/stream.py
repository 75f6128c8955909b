"""Streamed caption pairs with documents between them, in batches of one kind."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from train.documents import KINDS, InterleavedDocuments, checked_share


class MixedStream(IterableDataset):
    """
    Pairs as they come, and documents in their share, every run of `batch_size` rows of one kind (as
    [`train.sampler.GroupedSampler`] gives them where the pairs have a length).

    A pass ends with the pairs, of which a remainder below a batch comes last. The documents have no end: each kind of them is
    shuffled again when all have come. Loader workers share the pairs' archives, and each draws from all documents.

    Args:
        pairs: streamed caption pairs.
        documents: at least one.
        share: the documents' share of the rows, between 0 and 1.
        batch_size: rows of a global batch, over all processes.
        seed: of the shuffles; the order of a pass depends on it, on the pass and on the worker.

    Raises:
        ValueError: the share is not between 0 and 1.
    """

    def __init__(
        self, pairs: datasets.IterableDataset, documents: InterleavedDocuments, share: float, batch_size: int, seed: int
    ):  # fmt: skip
        self.pairs, self.documents, self.batch_size, self.seed = pairs, documents, batch_size, seed
        self.share = checked_share(share)
        kinds = np.array([documents.kind(i) for i in range(len(documents))])
        self._rows = [rows for rows in (np.flatnonzero(kinds == kind) for kind in KINDS) if len(rows)]
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it too

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self._epoch.fill_(epoch)
        self.pairs.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, int(self._epoch), 0 if worker is None else worker.id])
        drawn = [self._shuffled(rows, rng) for rows in self._rows]
        gains = self.share / (1 - self.share) * np.array([len(rows) for rows in self._rows]) / len(self.documents)
        # Rows of each kind that are due. A part of a batch at the start lets what is rare come in some of short passes.
        due = self.batch_size * rng.random(len(drawn))
        for run in self._runs():
            yield from run
            due += len(run) * gains
            while len(run) == self.batch_size and due.max() >= self.batch_size:
                kind = int(due.argmax())
                due[kind] -= self.batch_size
                yield from (next(drawn[kind]) for _ in range(self.batch_size))

    def _runs(self) -> Iterator[list[dict[str, Any]]]:
        """The pairs by `batch_size`; the last run may be shorter."""
        run: list[dict[str, Any]] = []
        for pair in self.pairs:
            run.append(pair)
            if len(run) == self.batch_size:
                yield run
                run = []
        if run:
            yield run

    def _shuffled(self, rows: np.ndarray, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        while True:
            yield from (self.documents[int(i)] for i in rng.permutation(rows))
