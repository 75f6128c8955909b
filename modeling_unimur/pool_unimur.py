"""One pool of images and texts (Section 3.4): built, searched by cosine, saved, appended to."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers.utils import is_datasets_available, logging

from .exact_unimur import Embeddings
from .images_unimur import image_reference
from .index_unimur import METADATA as INDEX
from .index_unimur import PoolIndex
from .milvus_unimur import MilvusPool
from .replies_unimur import (
    MODALITIES,
    Candidate,
    Hit,
    Retrieval,
    Undecoded,
    candidate_ids,
    check_search,
    differences,
    replies,
)
from .sharing_unimur import download_pool, upload_pool
from .storage_unimur import EXTRAS, ROWS, pool_features, replace, save_dataset

if is_datasets_available():
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

__all__ = ["Candidate", "CandidatePool", "Retrieval"]

logger = logging.get_logger(__name__)

METADATA = "pool.json"
STATISTICS = "statistics.safetensors"
MOMENTS = ("mean", "covariance")
# An exact query reads every embedding: a million of 768 dimensions, 3 GB, take a core about a quarter of a second.
ADVISE_INDEX = 1_000_000


class CandidatePool:
    """
    A `datasets.Dataset` (id, modality, text or image, embedding) and what made it.

    Args:
        dataset: columns `id`, `modality`, `text`, `image` (undecoded), `embedding` (q float32, L2-normalised).
        made_by: the fingerprint of the model that embedded the candidates.

    Raises:
        ValueError: an id stands in it twice.
    """

    def __init__(self, dataset: "datasets.Dataset", made_by: dict[str, Any]):
        _check_unique(dataset.data.column("id") if dataset._indices is None else dataset.with_format("arrow")["id"][:])
        self._set(dataset, made_by)

    def _set(self, dataset: "datasets.Dataset", made_by: dict[str, Any]) -> "CandidatePool":
        # A selection of rows would be searched as if it were the whole table.
        self.dataset = dataset if dataset._indices is None else dataset.flatten_indices()
        self.made_by = made_by
        self.index: PoolIndex | None = None
        self._folder: Path | None = None  # where exactly these rows are saved
        self._advised = False
        return self

    @classmethod
    def empty(cls, made_by: dict[str, Any]) -> "CandidatePool":
        """A pool without candidates."""
        _demand_datasets()
        return cls(
            datasets.Dataset.from_dict(
                {name: [] for name in pool_features(1)}, features=pool_features(made_by["dimension"])
            ),
            made_by,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def counts(self) -> dict[str, int]:
        """How many candidates there are of each modality."""
        return dict(self.embeddings.counts)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {m}s" for m, count in self.counts.items())
        index = f", {self.index.about['kind']} index" if self.index else ""
        return f"CandidatePool({counts}, dimension {self.made_by['dimension']}{index})"

    def check_ids(self, ids: Sequence[str]) -> None:
        """Refuses with a `ValueError` ids of new candidates that stand in the pool or twice among themselves."""
        own = self.dataset.data.column("id")
        _check_unique(pa.chunked_array([*own.chunks, pa.array(ids, own.type)]))

    def append(
        self, modality: str, items: Sequence[Any], embeddings: torch.Tensor, ids: Sequence[str] | None = None
    ) -> "CandidatePool":
        """
        A new pool with more candidates of one modality.

        Args:
            modality: `"image"` or `"text"`.
            items: n texts or images (an image given as a path stays a reference until the pool is saved).
            embeddings: `(n, q)` float32, L2-normalised.
            ids: n unique names; by default the modality and the row's number.

        Raises:
            ValueError: unequal lengths, or an id twice.

        An index stays with the shorter pool.
        """
        start = len(self)
        ids = candidate_ids(modality, len(items), ids, start)
        if len(items) != len(embeddings):
            raise ValueError(f"{len(items)} {modality}s and {len(embeddings)} embeddings do not match")
        is_text = modality == "text"
        rows = {
            "id": ids,
            "modality": [modality] * len(ids),
            "text": list(items) if is_text else [None] * len(ids),
            "image": [None] * len(ids) if is_text else [image_reference(image) for image in items],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.float().numpy().reshape(-1)), embeddings.shape[1]
            ),
        }
        new = datasets.Dataset.from_dict(rows, features=pool_features(embeddings.shape[1]))
        if self.index:
            logger.warning(
                f"the {self.index.about['kind']} index does not cover the {len(ids)} new candidates and is left behind; "
                "the longer pool is searched exactly until build_index is called on it"
            )
        return CandidatePool(datasets.concatenate_datasets([self.dataset, new]) if start else new, self.made_by)

    # Search

    def search(
        self, queries: torch.Tensor, *, top_k: int = 10, modality: str | None = None, exclude: Sequence[str] = (),
        calibrate: bool = False, image_bias: float = 0.0,
    ) -> list[Retrieval]:  # fmt: skip
        """
        The best candidates by cosine, over images and texts together.

        Args:
            queries: `(n, q)` float32, L2-normalised.
            top_k: how many candidates to return per query, at least 1.
            modality: `"image"` or `"text"` to search one kind only.
            exclude: ids that are not returned.
            calibrate: standardise each modality's scores per query by their mean and deviation over the pool, which
                removes the gap between the two kinds; off is the paper's plain cosine.
            image_bias: added to every image's score: trades the image retrieval rate against text R@1.

        Returns:
            A [`Retrieval`] per query.

        Raises:
            ValueError: an empty pool or one emptied by `modality` and `exclude`, or an unknown modality.
        """
        check_search(len(self), top_k, modality, exclude, image_bias)
        searched = queries.float().numpy()
        kinds = MODALITIES if modality is None else (modality,)
        found = self._searcher().top(searched, max(top_k, 2), kinds, self._rows_of(exclude))
        ranked: list[list[Hit]] = [[] for _ in range(len(queries))]
        for kind, (scores, rows) in found.items():
            if calibrate:
                mean, deviation = self._score_statistics(searched, kind)
                scores = (scores - mean[:, None]) / deviation[:, None]
            if kind == "image":
                scores = scores + np.float32(image_bias)
            for hits, values, mine in zip(ranked, scores.tolist(), rows.tolist(), strict=True):
                hits += [Hit(value, row, kind) for value, row in zip(values, mine, strict=True) if row >= 0]
        return replies([sorted(hits, key=lambda h: (-h.score, h.key)) for hits in ranked], top_k, self._fetch)

    def _searcher(self) -> Embeddings | PoolIndex:
        if self.index is not None:
            return self.index
        if len(self) > ADVISE_INDEX and not self._advised:
            self._advised = True
            logger.warning(
                f"every query is compared with all {len(self):,} candidates: pool.build_index() makes a pool that is "
                "searched approximately, many times faster"
            )
        return self.embeddings

    def _rows_of(self, ids: Sequence[str]) -> np.ndarray | None:
        """Rows of those of the ids that stand in the pool, ascending."""
        return np.array(sorted(self._row[i] for i in set(ids) if i in self._row), dtype=np.int64) if ids else None

    def _fetch(self, rows: Iterable[int]) -> dict[int, tuple[str, Any]]:
        """Id and item of some rows; a picture is decoded when it is looked at."""
        rows = sorted(rows)
        data = self._shown[rows]
        return {
            row: (id_, Undecoded(id_, image) if text is None else text)
            for row, id_, text, image in zip(rows, data["id"], data["text"], data["image"], strict=True)
        }

    @cached_property
    def embeddings(self) -> Embeddings:
        """The embeddings where they lie, and exact search over them."""
        return Embeddings(self.dataset.data)

    @cached_property
    def _shown(self) -> "datasets.Dataset":
        return self.dataset.with_format(None).select_columns(["id", "text", "image"])

    @cached_property
    def _row(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self.dataset.data.column("id").to_pylist())}

    @cached_property
    def _statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per modality, mean `(q,)` and covariance `(q, q)` of its embeddings: a query's score statistics follow."""
        return {m: self.embeddings.statistics(m) for m in MODALITIES if self.embeddings.counts[m]}

    def _score_statistics(self, queries: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
        mean, covariance = self._statistics[kind]
        variance = ((queries @ covariance) * queries).sum(-1)
        return queries @ mean, np.sqrt(variance.clip(min=1e-12))

    def build_index(
        self, kind: str = "hnsw", *, search: str | None = None, oversample: int | None = None,
        queries: torch.Tensor | None = None, seed: int = 0,
    ) -> "CandidatePool":  # fmt: skip
        """
        The same pool searched approximately, by faiss; this one stays exact.

        The index finds candidates; their scores are then computed from the stored embeddings, so that they equal those
        of exact search. Its recall@10 against exact search is measured and kept: `pool.index.about`.

        Args:
            kind: `"hnsw"` or `"ivf"` (fast; they keep float32), `"sq8"` or `"pq"` (small: a quarter and a sixteenth of
                float32), or a string of faiss's `index_factory`.
            search: faiss's search parameters, such as `"efSearch=128"` or `"nprobe=64"`; each kind has its own.
            oversample: how many finds a wanted candidate are scored again; each kind has its own.
            queries: `(n, q)` float32 to measure recall with. By default 200 of the pool's own embeddings; real queries
                lie farther from the pool and are found less well, so give some where there are any.
            seed: of the samples that are trained on and measured with.

        Raises:
            ValueError: an empty pool, or an unknown kind.
            ImportError: faiss is not installed.
        """
        check_search(len(self), 1, None)
        pool = object.__new__(CandidatePool)._set(self.dataset, self.made_by)
        pool.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "index"}
        asked = None if queries is None else queries.float().numpy()
        pool.index = PoolIndex.build(
            self.embeddings, self.made_by, kind, search=search, oversample=oversample, queries=asked, seed=seed
        )
        return pool

    # Persistence

    def check_made_by(self, fingerprint: dict[str, Any]) -> None:
        """Refuses a model other than the one that made the pool, with a `ValueError` that says what differs."""
        differ = differences(self.made_by, fingerprint)
        if differ:
            raise ValueError(f"this pool was made by another model; these differ: {differ}. Build it again")

    def save_to_disk(self, path: str | PathLike, *, max_shard_size: int | str = "500MB") -> None:
        """
        Writes the pool as Arrow files and a `pool.json`, with its index and the statistics of `calibrate` where there
        are any; images given as paths are copied into it. A pool saved there before is replaced; one that was loaded
        from there keeps its rows and gets the index alone.

        Args:
            max_shard_size: of an Arrow file, about.

        Raises:
            PermissionError: other candidates would replace the files that this pool itself is read from.
        """
        folder = Path(path).resolve()
        read = {Path(file["filename"]).resolve().parent for file in self.dataset.cache_files}
        if folder != self._folder and folder in read:
            raise PermissionError(f"{fspath(path)!r} holds the pool that this one reads: save it elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:  # a full disk spoils no former pool
            if folder != self._folder:
                save_dataset(self.dataset, Path(made), max_shard_size)
            if self.index is not None:
                self.index.save(Path(made))
            if "_statistics" in self.__dict__:
                pairs = ((f"{m}.{n}", t) for m, s in self._statistics.items() for n, t in zip(MOMENTS, s, strict=True))
                save_file(dict(pairs), Path(made) / STATISTICS)
            (Path(made) / METADATA).write_text(json.dumps(self.made_by, indent=2) + "\n")
            replace(folder, Path(made), ROWS + EXTRAS if folder != self._folder else EXTRAS)

    @classmethod
    def load_from_disk(cls, path: str | PathLike, *, index: bool = True) -> "CandidatePool":
        """
        Opens a saved pool, memory-mapped; `index=False` leaves its index aside and searches exactly.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its index was built over other candidates.
        """
        _demand_datasets()
        folder = Path(path).resolve()
        if not (folder / METADATA).is_file():
            raise FileNotFoundError(f"{fspath(path)!r} holds no {METADATA}: it is not a pool that save_to_disk wrote")
        made_by = json.loads((folder / METADATA).read_text())
        # What was saved had been checked: its ids are not read again.
        pool = object.__new__(cls)._set(datasets.load_from_disk(fspath(folder)), made_by)
        pool._folder = folder
        if (folder / STATISTICS).is_file():
            tensors = load_file(folder / STATISTICS)
            kinds = [m for m in MODALITIES if f"{m}.mean" in tensors]
            pool.__dict__["_statistics"] = {m: tuple(tensors[f"{m}.{n}"] for n in MOMENTS) for m in kinds}
        if index and (folder / INDEX).is_file():
            pool.index = PoolIndex.load(folder, pool.embeddings, made_by)
        return pool

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "500MB", **arguments: Any) -> str:
        """Uploads the pool as a dataset repository with a card that says what made it. See [`upload_pool`]."""
        return upload_pool(self, repo_id, max_shard_size=max_shard_size, **arguments)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, **arguments: Any) -> "CandidatePool":
        """Downloads a pool that `push_to_hub` uploaded and opens it. See [`download_pool`]."""
        return cls.load_from_disk(download_pool(repo_id, revision=revision, **arguments))

    def to_milvus(
        self, uri: str, collection: str = "unimur", *, show_progress_bar: bool = True, **arguments: Any
    ) -> MilvusPool:
        """The same candidates in a new collection of a Milvus database; `arguments` as [`MilvusPool.create`]'s."""
        pool = MilvusPool.create(uri, collection, self.made_by, **arguments)
        return pool.add(self, show_progress_bar=show_progress_bar)


def _demand_datasets() -> None:
    if not is_datasets_available():
        raise ImportError("a pool is stored with the datasets library: pip install datasets")


def _check_unique(ids: "pa.ChunkedArray") -> None:
    if pc.count_distinct(ids, mode="all").as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(f"the id {twice!r} stands twice in the pool; ids must be unique over images and texts")
