"""One pool of images and texts (Section 3.4) in Arrow files or memory: built, searched by cosine, saved, appended to."""

from collections.abc import Collection, Iterable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers.utils import is_datasets_available, logging

from .images_unimur import image_reference
from .paths_unimur import inside
from .pool_arrow import ArrowFile, image_path, path_only, pool_features, row_buffers, save_rows
from .pool_base import Moments, Pool, Stored, unit_rows
from .pool_digests import FileDigest, Guard
from .pool_exact import Embeddings
from .pool_faiss import PoolIndex
from .pool_files import STATISTICS, Description, Saving, download_pool, open_folder, upload_pool
from .pool_ids import duplicate
from .pool_milvus import MilvusPool
from .replies_unimur import MODALITIES, Candidate, Hit, Retrieval, Undecoded, check_search

if is_datasets_available():
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

__all__ = ["Candidate", "CandidatePool", "Retrieval"]

logger = logging.get_logger(__name__)

MOMENTS = ("mean", "covariance")
# An exact query reads every embedding: a million of 768 dimensions, 3 GB, take a core about a quarter of a second.
ADVISE_INDEX = 1_000_000


class CandidatePool(Pool):
    """
    A [`Pool`] that is a `datasets.Dataset` (id, modality, text or image, embedding). `append` makes a new one.

    Args:
        dataset: columns `id`, `modality`, `text`, `image` (undecoded), `embedding` (q float32, L2-normalised).
        made_by: the fingerprint of the model that embedded the candidates.
        image_folder: where the images are that the rows only name; by default anywhere, for rows of the caller's own.
        unique: the ids are known to be unique, and not read.

    Raises:
        ImportError: datasets is not installed.
        ValueError: it has a duplicate id.
    """

    def __init__(
        self, dataset: "datasets.Dataset", made_by: dict[str, Any], *, image_folder: str | PathLike | None = None,
        unique: bool = False,
    ):  # fmt: skip
        super().__init__(made_by)
        # A selection of rows would be searched as if it were the whole table.
        self.dataset = dataset if dataset._indices is None else dataset.flatten_indices()
        self.image_folder = None if image_folder is None else Path(image_folder)
        if not unique:
            _check_unique(self.dataset.data.column("id"))
        self.index: PoolIndex | None = None
        self._guard: Guard | None = None  # of the files that the rows are read from
        self._saved: Path | None = None  # where exactly these rows are saved, and as what
        self._about: Description | None = None
        # Made when first needed
        self._embeddings: Embeddings | None = None
        self._rows: dict[str, int] | None = None
        self._items: datasets.Dataset | None = None
        self._advised = False

    @classmethod
    def empty(cls, made_by: dict[str, Any]) -> "CandidatePool":
        """A pool without candidates."""
        _demand_datasets()
        rows: dict[str, list[Any]] = {name: [] for name in pool_features(1)}
        return cls(datasets.Dataset.from_dict(rows, features=pool_features(int(made_by["dimension"]))), made_by)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def counts(self) -> dict[str, int]:
        """How many candidates there are of each modality."""
        return dict(self.embeddings.counts)

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings, memory-mapped where they are, and exact search over them."""
        if self._embeddings is None:
            self._embeddings = Embeddings(self.dataset.data, self._guard)
        return self._embeddings

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {m}s" for m, count in self.counts.items())
        index = f", {self.index.about['kind']} index" if self.index else ""
        return f"CandidatePool({counts}, dimension {self.dimension}{index})"

    # What a pool does

    @property
    def ids(self) -> list[str]:
        """The ids of all candidates, in the order they were added."""
        return list(self._id_column().to_pylist())

    def present(self, ids: Sequence[str]) -> dict[str, int]:
        """As [`Pool.present`]; a key is a row."""
        if self._rows is not None:
            return {id_: self._rows[id_] for id_ in ids if id_ in self._rows}
        own = self._id_column()
        rows = np.flatnonzero(pc.is_in(own, value_set=pa.array(list(ids), own.type)).to_numpy())
        return {own[row].as_py(): row for row in rows.tolist()}

    def _id_column(self) -> "pa.ChunkedArray":
        column = self.dataset.data.column("id")
        if self._guard is not None:
            self._guard.check_arrays(column.chunks)
        return column

    def row_keys(self, start: int, stop: int) -> list[int]:
        """As [`Pool.row_keys`]."""
        return list(range(start, stop))

    def fetch(self, keys: Iterable[int]) -> dict[int, Stored]:
        """As [`Pool.fetch`]; a picture is decoded when it is looked at."""
        rows = sorted(keys)
        self._check_rows(rows)
        if self._items is None:
            self._items = self.dataset.with_format(None).remove_columns("embedding")
        data = self._items[rows]
        parts = zip(rows, data["id"], data["modality"], data["text"], data["image"], strict=True)
        stored = {}
        for row, id_, modality, text, image in parts:
            if modality == "text":
                stored[row] = Stored(id_, text, None, modality)
                continue
            if image and image["bytes"] is None and image["path"] is not None:
                image = {"bytes": None, "path": image_path(image["path"], self.image_folder)}
            stored[row] = Stored(id_, Undecoded(id_, image), image and image["path"], modality)
        return stored

    def _check_rows(self, rows: Sequence[int]) -> None:
        """Checks what some rows are read from, without their embeddings."""
        if self._guard is None:
            return
        for name in ("id", "modality", "text", "image"):
            chunks = self.dataset.data.column(name).chunks
            starts = np.cumsum([0, *map(len, chunks)])
            for row in rows:
                chunk = int(np.searchsorted(starts, row, side="right")) - 1
                for address, size in row_buffers(chunks[chunk], row - int(starts[chunk])):
                    self._guard.check(address, size)

    def nearest(
        self, queries: np.ndarray, k: int, modalities: Collection[str], exclude: Sequence[str]
    ) -> list[list[Hit]]:
        """As [`Pool.nearest`], in one pass over the embeddings."""
        ranked: list[list[Hit]] = [[] for _ in range(len(queries))]
        for kind, (scores, rows) in self._searcher().top(queries, k, modalities, self._excluded(exclude)).items():
            for hits, values, mine in zip(ranked, scores.tolist(), rows.tolist(), strict=True):
                hits += [Hit(value, row, kind) for value, row in zip(values, mine, strict=True) if row >= 0]
        return ranked

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

    def _excluded(self, ids: Sequence[str]) -> np.ndarray | None:
        """Rows of those of the ids that the pool holds, ascending."""
        if not ids:
            return None
        if self._rows is None:  # a conversation excludes at every turn
            self._rows = {id_: row for row, id_ in enumerate(self.ids)}
        return np.array(sorted(set(self.present(ids).values())), dtype=np.int64)

    def statistics(self, modality: str) -> Moments | None:
        """As [`Pool.statistics`], over all candidates."""
        return self.embeddings.statistics(modality) if self.embeddings.counts[modality] else None

    def insert(
        self, modality: str, ids: Sequence[str], items: Sequence[Any], embeddings: np.ndarray
    ) -> "CandidatePool":
        """
        As [`Pool.insert`]: a new pool. An image given as a path stays a reference until the pool is saved. An index stays
        with the shorter pool.
        """
        is_text = modality == "text"
        images = [None] * len(ids) if is_text else [image_reference(image) for image in items]
        if self.image_folder is not None:
            for image in (i for i in images if i is not None and i["bytes"] is None and i["path"]):
                inside(self.image_folder, image["path"])
        rows = {
            "id": list(ids),
            "modality": [modality] * len(ids),
            "text": list(items) if is_text else [None] * len(ids),
            "image": images,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), self.dimension),
        }
        new = datasets.Dataset.from_dict(rows, features=pool_features(self.dimension))
        if self.index:
            logger.warning(
                f"the {self.index.about['kind']} index does not cover the {len(ids)} new candidates and is dropped; "
                "the longer pool is searched exactly until build_index is called on it"
            )
        dataset = datasets.concatenate_datasets([self.dataset, new]) if len(self) else new
        pool = CandidatePool(dataset, self.made_by, image_folder=self.image_folder, unique=True)
        pool._guard = self._guard
        return pool

    def build_index(
        self, kind: str = "hnsw", *, search: str | None = None, oversample: int | None = None,
        queries: Any = None, seed: int = 0,
    ) -> "CandidatePool":  # fmt: skip
        """
        The same pool searched approximately, by faiss; this one stays exact.

        The index proposes candidates; their scores are then computed from the stored embeddings, so that they equal those
        of exact search. Its recall@10 against exact search is measured and kept: `pool.index.about`.

        Args:
            kind: `"hnsw"` or `"ivf"` (fast; they keep float32), `"sq8"` or `"pq"` (small: a quarter and a sixteenth of
                float32), or a string of faiss's `index_factory`.
            search: faiss's search parameters, such as `"efSearch=128"` or `"nprobe=64"`. By default those of the kind,
                doubled up to four times until recall@10 is 0.95.
            oversample: how many hits a wanted candidate are scored again; each kind has its own.
            queries: `(n, q)` to measure recall with. By default 200 of the pool's own embeddings; real queries
                are farther from the pool and have lower recall, so give some where there are any.
            seed: of the samples that are trained on and measured with.

        A modality of too few candidates to train the index with is searched exactly.

        Raises:
            ValueError: an empty pool, or an unknown kind.
            ImportError: faiss is not installed.
        """
        check_search(len(self), 1, None)
        rows = None if queries is None else unit_rows(queries, self.dimension, "queries")
        pool = CandidatePool(self.dataset, self.made_by, image_folder=self.image_folder, unique=True)
        pool._guard, pool._saved, pool._about = self._guard, self._saved, self._about
        pool._embeddings, pool._rows, pool._moments = self.embeddings, self._rows, self._moments
        pool.index = PoolIndex.build(
            self.embeddings, self.made_by, kind, search=search, oversample=oversample, queries=rows, seed=seed
        )
        return pool

    # Persistence

    def verify(self) -> None:
        """
        Checks all of a saved pool's rows that have not been read yet: opening one does for rows of at most 1 GiB, and
        larger ones are checked in blocks of 1 MiB as they are read.

        Raises:
            ValueError: a file is damaged; the message names it.
        """
        if self._guard is not None:
            self._guard.check_all()

    def save_to_disk(self, path: str | PathLike, *, max_shard_size: int | str = "500MB") -> None:
        """
        Writes the pool as Arrow files and a `pool.json` with their digests, with its index and the statistics of
        `calibrate` where there are any; images given as paths are copied into it. A pool saved there before is replaced
        by one rename: killed at any moment, the folder holds the old one or the new one. A pool that was loaded from
        there keeps its rows and gets the index alone. `datasets.load_from_disk` reads the rows.

        Args:
            max_shard_size: of an Arrow file, about.

        Raises:
            PermissionError: other candidates would replace the files that this pool itself is read from.
            FileNotFoundError: the pool was loaded from there, and its rows are no longer there.
            BadImageError: an image given as a path is none; the message names the candidate.
        """
        folder = Path(path).resolve()
        read = {Path(file["filename"]).resolve().parent for file in self.dataset.cache_files}
        if folder != self._saved and folder in read:
            raise PermissionError(f"{fspath(path)!r} holds the pool that this one reads: save it elsewhere")
        with Saving(folder) as saving:
            rows = self._own_rows(folder)
            if rows is None:
                rows = save_rows(self.dataset, saving.made, max_shard_size, self.image_folder)
            made = [] if self.index is None else self.index.save(saving.made)
            if self._moments:
                pairs = ((f"{m}.{n}", t) for m, s in self._moments.items() for n, t in zip(MOMENTS, s, strict=True))
                save_file(dict(pairs), saving.made / STATISTICS)
                made.append(STATISTICS)
            files: dict[str, FileDigest] = dict(saving.named(name) for name in made)
            about = None if self.index is None else self.index.about
            description = Description(self.made_by, rows, about, files)
            saving.publish(description)
        if folder == self._saved:
            self._about = description

    def _own_rows(self, folder: Path) -> list[ArrowFile] | None:
        """The files of the rows where they are saved in a folder already."""
        if folder != self._saved or self._about is None:
            return None
        if not self._about.checked:
            return [ArrowFile.of(Path(file["filename"])) for file in self.dataset.cache_files]
        for file in self._about.rows:
            file.digest.check_size(folder / file.name)
        return self._about.rows

    @classmethod
    def load_from_disk(
        cls, path: str | PathLike, *, index: bool = True, image_folder: str | PathLike | None = None
    ) -> "CandidatePool":
        """
        Opens a saved pool, memory-mapped. Its files are checked against the digests saved with them: the index and rows
        of at most 1 GiB at once, further rows a block of 1 MiB at a time as they are read ([`verify`] reads all).

        Args:
            index: `False` leaves its index aside and searches exactly.
            image_folder: where the images are that the rows only name; without it such rows are refused.

        Raises:
            FileNotFoundError: there is none, or a file of it is missing.
            ValueError: a file is damaged or outside the folder, a row names a file, or its index was built over
                other candidates.
        """
        _demand_datasets()
        folder = Path(path).resolve()
        about, dataset, guard = open_folder(folder)
        # What was saved had been checked: its ids are not read again.
        pool = cls(dataset, about.made_by, image_folder=image_folder, unique=True)
        pool._saved, pool._about, pool._guard = folder, about, guard
        pool._check_references()
        pool._moments = _load_moments(folder, about)
        if index:
            pool.index = _load_index(folder, about, pool.embeddings)
        return pool

    def _check_references(self) -> None:
        """A saved pool holds its images: one that only names a file would make its reader open it."""
        if self._guard is not None:
            self._guard.check_arrays(_validity(self.dataset.data.column("image")))
        rows = path_only(self.dataset)
        if not len(rows) or self.image_folder is not None:
            return
        image = self.dataset.data.column("image")[int(rows[0])].as_py()
        raise ValueError(
            f"{len(rows)} images of the pool are not in it: row {rows[0]} only names {image['path']!r}. Give "
            "image_folder=, the folder that they are in, if you trust the pool to read there"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._saved is not None and (self.index is None or self._indexed_on_disk()):
            return _reopen, (self._saved, self._about, self.index is not None, self.image_folder)
        index = None if self.index is None else (self.index.indexes, self.index.about)
        return _rebuild, (self.dataset, self.made_by, self.image_folder, self._moments, index)

    def _indexed_on_disk(self) -> bool:
        return self.index is not None and self._about is not None and self.index.about == self._about.index

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


def _reopen(folder: Path, about: Description, index: bool, image_folder: Path | None) -> CandidatePool:
    """A pickled pool in another process, out of its own files."""
    pool = CandidatePool.load_from_disk(folder, index=index, image_folder=image_folder)
    if pool._about != about:
        raise ValueError(f"another pool was saved in {str(folder)!r} since this one was pickled: load it again")
    return pool


def _rebuild(
    dataset: "datasets.Dataset", made_by: dict[str, Any], image_folder: Path | None, moments: dict[str, Moments],
    index: tuple[dict[str, Any], dict[str, Any]] | None,
) -> CandidatePool:  # fmt: skip
    """A pickled pool that is not saved; datasets reopens those of its rows that are in files."""
    pool = CandidatePool(dataset, made_by, image_folder=image_folder, unique=True)
    pool._moments = moments
    if index is not None:
        pool.index = PoolIndex(pool.embeddings, *index)
    return pool


def _load_moments(folder: Path, about: Description) -> dict[str, Moments]:
    name = about.file(Path(STATISTICS).stem) if about.checked else STATISTICS
    if name is None or not (folder / name).is_file():
        return {}
    tensors = load_file(folder / name)
    kinds = [m for m in MODALITIES if f"{m}.mean" in tensors]
    return {m: (tensors[f"{m}.mean"], tensors[f"{m}.covariance"]) for m in kinds}


def _load_index(folder: Path, about: Description, embeddings: Embeddings) -> PoolIndex | None:
    if about.index is None:
        return None

    def file(modality: str) -> Path | None:
        name = about.file(f"index-{modality}") if about.checked else f"index-{modality}.faiss"
        return None if name is None else folder / name

    return PoolIndex.load(file, about.index, embeddings, about.made_by)


def _validity(column: "pa.ChunkedArray") -> list["pa.Array"]:
    """What says which images there are, without their bytes."""
    arrays = []
    for chunk in column.chunks:
        for array in (chunk, chunk.field(0)):
            validity = array.buffers()[0]
            if validity is not None:
                arrays.append(pa.Array.from_buffers(pa.bool_(), len(array), [None, validity], offset=array.offset))
    return arrays


def _demand_datasets() -> None:
    if not is_datasets_available():
        raise ImportError("a pool is stored with the datasets library: pip install datasets")


def _check_unique(ids: "pa.ChunkedArray") -> None:
    if pc.count_distinct(ids, mode="all").as_py() < len(ids):
        counts = pc.value_counts(ids)
        raise duplicate(counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py())
