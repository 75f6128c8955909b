"""Approximate search: one faiss index a modality, whose hits are scored again from the memory-mapped embeddings."""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from .pool_exact import CHUNK, Embeddings, Top
from .replies_unimur import MODALITIES

logger = logging.get_logger(__name__)

SAMPLE = 65_536  # embeddings that lists and codebooks are trained on, at least
GOOD_RECALL = 0.95
DOUBLINGS = 4  # of efSearch or nprobe, at most, to reach it
TOO_FEW = "should be at least as large as number of clusters"  # faiss


class Recipe(NamedTuple):
    """A faiss index: factory string, search parameters, and how many hits a wanted candidate are scored again."""

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
        indexes: a faiss index a modality, over its rows in order; a modality without one is searched exactly.
        about: what the pool says of it: kind, search, oversample, made_by, content, bytes, recall_at_10, recall_queries.
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
        rng, indexes, recipes = np.random.default_rng(seed), {}, {}
        for modality in (m for m in MODALITIES if embeddings.counts[m]):
            chosen = recipe(kind, embeddings.dimension, embeddings.counts[modality])
            index = _trained(embeddings, modality, kind, chosen, rng)
            if index is None:
                continue
            for start, views in embeddings.blocks(CHUNK, (modality,)):
                block = np.concatenate(views)
                images = embeddings.is_image[start : start + len(block)]
                index.add(np.ascontiguousarray(block[images if modality == "image" else ~images]))
            indexes[modality], recipes[modality] = index, chosen
        about: dict[str, Any] = {
            "kind": kind,
            "search": {m: r.search if search is None else search for m, r in recipes.items()},
            "oversample": recipe(kind, embeddings.dimension, 1).oversample if oversample is None else oversample,
            "made_by": made_by,
            "content": content(embeddings),
            "bytes": {m: _bytes(i) + 4 * embeddings.counts[m] for m, i in indexes.items()},  # and which row it is
        }
        self = cls(embeddings, indexes, about)
        self._set_search()
        about |= self._tuned(queries, rng) if search is None else self._measure(queries, rng)
        low = {m: r for m, r in about["recall_at_10"].items() if r < GOOD_RECALL}
        if low:
            logger.warning(
                f"the {kind} index returns {', '.join(f'{r:.3f} of the ten best {m}s' for m, r in low.items())}: a higher "
                "oversample=, or search= (efSearch for hnsw, nprobe for ivf), returns more"
            )
        return self

    def top(
        self, queries: np.ndarray, k: int, kinds: Collection[str] = MODALITIES, banned: np.ndarray | None = None
    ) -> dict[str, Top]:
        """As [`Embeddings.top`]: the scores are exact, but a candidate may be missed."""
        best: dict[str, Top] = {}
        for kind in (m for m in kinds if self.embeddings.counts[m]):
            if kind not in self.indexes:
                best |= self.embeddings.top(queries, k, (kind,), banned)
                continue
            rows = self._rows[kind]
            excluded = 0 if banned is None else int((self.embeddings.is_image[banned] == (kind == "image")).sum())
            wanted = min(k, len(rows) - excluded)
            fetch = k * self.about["oversample"] + excluded
            if fetch > len(rows) // 4:  # so much of the pool is sooner scanned
                best |= self.embeddings.top(queries, k, (kind,), banned)
                continue
            places = self.indexes[kind].search(queries, fetch)[1]
            hits = np.where(places >= 0, rows[places].astype(np.int64), -1)
            if banned is not None and excluded:
                hits[np.isin(hits, banned)] = -1
            scores, hits = (part[:, :k] for part in self.embeddings.rescored(queries, hits))
            short = np.flatnonzero((hits >= 0).sum(1) < wanted)
            if len(short):  # an inverted list, or a graph's corner, held too few
                exact = self.embeddings.top(queries[short], k, (kind,), banned)[kind]
                scores[short, : exact.scores.shape[1]], hits[short, : exact.rows.shape[1]] = exact
            best[kind] = Top(scores, hits)
        return best

    def _set_search(self) -> None:
        for modality, index in self.indexes.items():
            for setting in filter(None, self.about["search"][modality].split(",")):
                _faiss().ParameterSpace().set_index_parameters(index, setting)

    def _tuned(self, queries: np.ndarray | None, rng: np.random.Generator) -> dict[str, Any]:
        """The recall, after efSearch or nprobe was doubled where it was low."""
        measured = self._measure(queries, rng)
        for _ in range(DOUBLINGS):
            search = self.about["search"]
            low = [m for m, r in measured["recall_at_10"].items() if r < GOOD_RECALL and search[m]]
            if not low:
                break
            for modality in low:
                name, effort = search[modality].split("=")
                search[modality] = f"{name}={2 * int(effort)}"
            self._set_search()
            measured = self._measure(queries, rng)
        return measured

    def _measure(self, queries: np.ndarray | None, rng: np.random.Generator) -> dict[str, Any]:
        """The share of each modality's exact ten best that the index returns; one of equal score counts, too."""
        recalls: dict[str, float] = {}
        count = 0 if queries is None else len(queries)
        for modality, rows in self._rows.items():
            own, used = None, queries
            if used is None:
                own = np.sort(rng.choice(rows, min(200, len(rows)), replace=False)).astype(np.int64)
                used = self.embeddings.take(own)
            count = len(used)
            k = min(10, len(rows) - (own is not None))
            scores = []
            for search in (self.embeddings.top, self.top):
                best, places = search(used, k + (own is not None), (modality,))[modality]
                if own is not None:
                    best = np.where(places == own[:, None], -np.inf, best)
                scores.append(-np.sort(-best, axis=1)[:, :k])
            exact, approximate = scores
            recalls[modality] = float((approximate >= exact[:, -1:]).mean()) if k else 1.0
        whose = "given" if queries is not None else "of the pool's own embeddings, each without itself"
        return {"recall_at_10": recalls, "recall_queries": f"{count} {whose}"}

    def save(self, folder: Path) -> list[str]:
        """Writes a file a modality into a folder; their names, `index-<modality>.faiss`."""
        names = []
        for modality, index in self.indexes.items():
            names.append(f"index-{modality}.faiss")
            _faiss().write_index(index, str(folder / names[-1]))
        return names

    @classmethod
    def load(
        cls, file: Callable[[str], Path | None], about: dict[str, Any], embeddings: Embeddings, made_by: dict[str, Any]
    ) -> "PoolIndex":
        """
        Opens a saved index, memory-mapped where faiss can (hnsw, ivf, sq8; the codes of pq are read).

        Args:
            file: where a modality's file is, `None` for one that is searched exactly.
            about: what the pool says of it.

        Raises:
            ValueError: it was built over other candidates or by another model, or faiss cannot read it.
        """
        for name, mine in (("made_by", made_by), ("content", content(embeddings))):
            if about.get(name) != mine:
                raise ValueError(
                    f"the pool's index is stale: its {name} is {about.get(name)}, the pool's {mine}. Load the pool with "
                    "index=False, build_index and save it again"
                )
        faiss, indexes = _faiss(), {}
        mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
        for modality in (m for m in MODALITIES if embeddings.counts[m]):
            path = file(modality)
            if path is None:
                continue
            try:
                indexes[modality] = faiss.read_index(str(path), mapped)
            except RuntimeError as error:
                raise ValueError(f"{str(path)!r} is no index that this faiss reads: {error}") from error
            if indexes[modality].ntotal != embeddings.counts[modality]:
                raise ValueError(f"{str(path)!r} is an index of other candidates: load the pool with index=False")
        self = cls(embeddings, indexes, about)
        self._set_search()
        return self


def _trained(embeddings: Embeddings, modality: str, kind: str, chosen: Recipe, rng: np.random.Generator) -> Any:
    """An empty index, trained where its kind needs it; `None` where the modality has too few candidates for that."""
    faiss = _faiss()
    try:
        index = faiss.index_factory(embeddings.dimension, chosen.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"kind={kind!r} is neither hnsw, ivf, sq8 or pq nor what faiss's index_factory takes for dimension "
            f"{embeddings.dimension}: {str(error).strip().splitlines()[-1]}"
        ) from error
    if index.is_trained:
        return index
    rows = embeddings.rows(modality)
    size = min(len(rows), max(SAMPLE, 40 * getattr(index, "nlist", 0)))
    try:
        index.train(embeddings.take(np.sort(rng.choice(rows, size, replace=False))))
    except RuntimeError as error:
        if TOO_FEW not in str(error):
            raise
        logger.warning(f"{len(rows)} {modality}s are too few to train a {kind} index with: they are searched exactly")
        return None
    return index


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
