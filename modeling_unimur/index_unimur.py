"""Approximate search: one faiss index a modality, whose finds are scored again from the memory-mapped embeddings."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from .exact_unimur import CHUNK, Embeddings, Top
from .replies_unimur import MODALITIES

logger = logging.get_logger(__name__)

METADATA = "index.json"
SAMPLE = 65_536  # embeddings that lists and codebooks are trained on, at least
GOOD_RECALL = 0.95


class Recipe(NamedTuple):
    """A faiss index: factory string, search parameters, and how many finds a wanted candidate are scored again."""

    factory: str
    search: str
    oversample: int


def recipe(kind: str, dimension: int, count: int) -> Recipe:
    """
    What an index of this kind is made of. Those that keep float32 (hnsw, ivf) are fast; those that keep codes are
    small: sq8 a quarter of float32, pq a sixteenth (4 bits for every 2 dimensions).

    Args:
        kind: `"hnsw"`, `"ivf"`, `"sq8"`, `"pq"`, or a string of faiss's index_factory.
    """
    lists = max(1, min(4 * int(count**0.5), count // 40))
    known = {
        "hnsw": Recipe("HNSW16", "efSearch=48", 1),
        "ivf": Recipe(f"IVF{lists},Flat", f"nprobe={min(32, lists)}", 1),
        "sq8": Recipe("SQ8", "", 4),
        "pq": Recipe(f"PQ{max(1, dimension // 2)}x4fs", "", 20),
    }
    return known.get(kind, Recipe(kind, "", 4))


class PoolIndex:
    """
    Searches like [`Embeddings.top`], approximately.

    Args:
        embeddings: of the pool.
        indexes: a faiss index a modality, over its rows in order.
        about: what `index.json` says: kind, search, oversample, made_by, content, bytes, recall_at_10, recall_queries.
    """

    def __init__(self, embeddings: Embeddings, indexes: dict[str, Any], about: dict[str, Any]):
        self.embeddings, self.indexes, self.about = embeddings, indexes, about
        small = np.uint32 if len(embeddings) < 2**32 else np.int64
        self._rows = {kind: embeddings.rows(kind).astype(small) for kind in indexes}

    @classmethod
    def build(
        cls, embeddings: Embeddings, made_by: dict[str, Any], kind: str = "hnsw", *, search: str | None = None,
        oversample: int | None = None, queries: np.ndarray | None = None, seed: int = 0,
    ) -> "PoolIndex":  # fmt: skip
        """Builds and measures. See [`CandidatePool.build_index`]."""
        faiss = _faiss()
        rng, indexes, found = np.random.default_rng(seed), {}, {}
        for modality in (m for m in MODALITIES if embeddings.counts[m]):
            count = embeddings.counts[modality]
            chosen = recipe(kind, embeddings.dimension, count)
            try:
                index = faiss.index_factory(embeddings.dimension, chosen.factory, faiss.METRIC_INNER_PRODUCT)
            except RuntimeError as error:
                raise ValueError(
                    f"kind={kind!r} is neither hnsw, ivf, sq8 or pq nor what faiss's index_factory takes for dimension "
                    f"{embeddings.dimension}: {str(error).strip().splitlines()[-1]}"
                ) from error
            if not index.is_trained:
                rows = embeddings.rows(modality)
                size = min(count, max(SAMPLE, 40 * getattr(index, "nlist", 0)))
                index.train(embeddings.take(np.sort(rng.choice(rows, size, replace=False))))
            for start, views in embeddings.blocks(CHUNK, (modality,)):
                block = np.concatenate(views)
                images = embeddings.is_image[start : start + len(block)]
                index.add(np.ascontiguousarray(block[images if modality == "image" else ~images]))
            indexes[modality], found[modality] = index, chosen
        some = next(iter(found.values()))
        about = {
            "kind": kind,
            "search": {m: r.search if search is None else search for m, r in found.items()},
            "oversample": some.oversample if oversample is None else oversample,
            "made_by": made_by,
            "content": content(embeddings),
            "bytes": {m: _bytes(i) + 4 * embeddings.counts[m] for m, i in indexes.items()},  # and which row it is
        }
        self = cls(embeddings, indexes, about)
        self._set_search()
        about |= self._measure(queries, rng)
        low = {m: r for m, r in about["recall_at_10"].items() if r < GOOD_RECALL}
        if low:
            logger.warning(
                f"the {kind} index finds {', '.join(f'{r:.3f} of the ten best {m}s' for m, r in low.items())}: a higher "
                "oversample=, or search= (efSearch for hnsw, nprobe for ivf), finds more"
            )
        return self

    def top(
        self, queries: np.ndarray, k: int, kinds: Collection[str] = MODALITIES, banned: np.ndarray | None = None
    ) -> dict[str, Top]:
        """As [`Embeddings.top`]: the scores are exact, but a candidate may be missed."""
        found = {}
        for kind in (m for m in kinds if m in self.indexes):
            rows = self._rows[kind]
            excluded = 0 if banned is None else int((self.embeddings.is_image[banned] == (kind == "image")).sum())
            wanted = min(k, len(rows) - excluded)
            fetch = k * self.about["oversample"] + excluded
            if fetch > len(rows) // 4:  # so much of the pool is sooner scanned
                found |= self.embeddings.top(queries, k, (kind,), banned)
                continue
            places = self.indexes[kind].search(queries, fetch)[1]
            hits = np.where(places >= 0, rows[places].astype(np.int64), -1)
            if excluded:
                hits[np.isin(hits, banned)] = -1
            scores, hits = (part[:, :k] for part in self.embeddings.rescored(queries, hits))
            short = np.flatnonzero((hits >= 0).sum(1) < wanted)
            if len(short):  # an inverted list, or a graph's corner, held too few
                exact = self.embeddings.top(queries[short], k, (kind,), banned)[kind]
                scores[short, : exact.scores.shape[1]], hits[short, : exact.rows.shape[1]] = exact
            found[kind] = Top(scores, hits)
        return found

    def _set_search(self) -> None:
        for modality, index in self.indexes.items():
            for setting in filter(None, self.about["search"][modality].split(",")):
                _faiss().ParameterSpace().set_index_parameters(index, setting)

    def _measure(self, queries: np.ndarray | None, rng: np.random.Generator) -> dict[str, Any]:
        """The share of each modality's exact ten best that the index returns; one of equal score counts as found."""
        recalls = {}
        for modality, rows in self._rows.items():
            own = None
            asked = queries
            if queries is None:
                own = np.sort(rng.choice(rows, min(200, len(rows)), replace=False)).astype(np.int64)
                asked = self.embeddings.take(own)
            k = min(10, len(rows) - (own is not None))
            scores = []
            for search in (self.embeddings.top, self.top):
                best, places = search(asked, k + (own is not None), (modality,))[modality]
                if own is not None:
                    best = np.where(places == own[:, None], -np.inf, best)
                scores.append(-np.sort(-best, axis=1)[:, :k])
            exact, approximate = scores
            recalls[modality] = float((approximate >= exact[:, -1:]).mean()) if k else 1.0
        told = "given" if queries is not None else "of the pool's own embeddings, each without itself"
        return {"recall_at_10": recalls, "recall_queries": f"{len(asked)} {told}"}

    def save(self, folder: Path) -> None:
        """Writes `index-<modality>.faiss` and `index.json` into a folder."""
        for modality, index in self.indexes.items():
            _faiss().write_index(index, str(folder / f"index-{modality}.faiss"))
        (folder / METADATA).write_text(json.dumps(self.about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, embeddings: Embeddings, made_by: dict[str, Any]) -> "PoolIndex":
        """
        Opens a saved index, memory-mapped where faiss can (hnsw, ivf, sq8; the codes of pq are read).

        Raises:
            ValueError: it was built over other candidates or by another model.
        """
        about = json.loads((folder / METADATA).read_text())
        for name, mine in (("made_by", made_by), ("content", content(embeddings))):
            if about.get(name) != mine:
                raise ValueError(
                    f"the index in {folder} is stale: its {name} is {about.get(name)}, the pool's {mine}. Load the pool "
                    "with index=False, build_index and save it again"
                )
        faiss = _faiss()
        mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
        indexes = {
            m: faiss.read_index(str(folder / f"index-{m}.faiss"), mapped) for m in MODALITIES if embeddings.counts[m]
        }
        self = cls(embeddings, indexes, about)
        self._set_search()
        return self


def content(embeddings: Embeddings) -> str:
    """16 hexadecimal digits over the modalities' counts and 64 embeddings spread over the pool."""
    state = hashlib.sha256(json.dumps(embeddings.counts, sort_keys=True).encode())
    rows = np.linspace(0, len(embeddings) - 1, min(64, len(embeddings)), dtype=np.int64)
    state.update(embeddings.take(rows).tobytes())
    return state.hexdigest()[:16]


def _bytes(index) -> int:
    """The index's size, by writing it to nowhere: a copy in memory may not fit."""
    sizes = []
    _faiss().write_index(index, _faiss().PyCallbackIOWriter(lambda part: sizes.append(len(part))))
    return sum(sizes)


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an approximate index is faiss's: pip install faiss-cpu") from error
    return faiss
