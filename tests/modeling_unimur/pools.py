"""Pools for tests: embeddings, the smallest backend that fulfils the contract."""

from collections.abc import Iterable

import numpy as np
import torch

from modeling_unimur.images_unimur import image_reference
from modeling_unimur.pool_base import Pool, Stored
from modeling_unimur.replies_unimur import Hit, Undecoded

Q = 8
MADE_BY = {"towers": "t", "maps": "m", "text_candidates": "ret", "preprocessing": "p", "dimension": Q}


def unit(n, seed=0, q=Q):
    """`(n, q)` float32, L2-normalised."""
    return torch.nn.functional.normalize(torch.randn(n, q, generator=torch.Generator().manual_seed(seed)), dim=-1)


class ListPool(Pool):
    """Another database in one file: candidates in a list in memory."""

    def __init__(self, made_by):
        super().__init__(made_by)
        self.rows, self.vectors = [], np.empty((0, self.dimension), np.float32)

    def __len__(self):
        return len(self.rows)

    def present(self, ids):
        return {stored.id: row for row, stored in enumerate(self.rows) if stored.id in set(ids)}

    def row_keys(self, start, stop):
        return list(range(start, stop))

    def fetch(self, keys: Iterable[int]):
        return {row: self.rows[row] for row in keys}

    def nearest(self, queries, k, modalities, exclude):
        ranked = []
        for query in queries:
            scores = self.vectors @ query
            hits = []
            for modality in modalities:
                mine = [i for i, s in enumerate(self.rows) if s.modality == modality and s.id not in exclude]
                best = sorted(mine, key=lambda i: (-scores[i], i))[:k]
                hits += [Hit(float(scores[i]), i, modality) for i in best]
            ranked.append(hits)
        return ranked

    def statistics(self, modality):
        mine = self.vectors[[i for i, s in enumerate(self.rows) if s.modality == modality]]
        return (mine.mean(0), np.cov(mine.T, bias=True).astype(np.float32)) if len(mine) else None

    def insert(self, modality, ids, items, embeddings):
        for id_, item in zip(ids, items, strict=True):
            if modality == "text":
                self.rows.append(Stored(id_, item, None, modality))
                continue
            reference = image_reference(item)
            self.rows.append(Stored(id_, Undecoded(id_, reference), reference["path"], modality))
        self.vectors, self._moments = np.concatenate([self.vectors, embeddings]), {}
        return self
