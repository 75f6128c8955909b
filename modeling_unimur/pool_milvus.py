"""A pool beyond one machine: in a Milvus database, searched by the same call and answering with the same replies."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from .images_unimur import image_file_bytes, image_reference
from .paths_unimur import inside
from .pool_base import Moments, Pool, Stored, unit_rows
from .pool_ids import check_unique
from .replies_unimur import Hit, Undecoded

T = TypeVar("T")

MADE_BY = "unimur.made_by"
OLDEST_SERVER = (2, 3)
# Milvus holds strings of 65,535 bytes at most; base64 makes four bytes of three.
ID_BYTES, TEXT_BYTES, IMAGE_BYTES = 512, 65_535, 48 * 2**10
BATCH = 1000  # rows a request: 3 MB of 768 dimensions; a server takes 64 MB
MOST = 16_384  # results of a request, at most
SAMPLE = 20_000  # candidates of a modality from which `calibrate` estimates its statistics
CONTENT = ("text", "image_path", "image_base64", "source")
# What a search waits for: this process's own insertions. Counts and checks of ids wait for everybody's, which a server
# answers at its next tick only, every 200 ms.
OWN_WRITES = {"consistency_level": "Session"}


class MilvusPool(Pool):
    """
    A [`Pool`] in a collection of a Milvus server or, with milvus-lite, of a local file; `append` makes it grow. Tested
    with the server 2.3.5, the oldest that is taken, and with milvus-lite 3.2; versions between them have the same calls.
    A search sees what was there when the pool was opened and what this process inserted since; what another process
    inserts, within moments.

    Args:
        uri: a server's address (`"http://host:19530"`) or a local file (`"pool.db"`).
        collection: one that [`MilvusPool.create`] made.
        image_folder: where the images are that are too large for the database, under the names that it holds. Nothing
            outside of it is read.
        search_params: of the index, such as `{"ef": 128}` for HNSW.
        client_arguments: of `pymilvus.MilvusClient`, such as `token` or `timeout`.

    Raises:
        ConnectionError: no server answers.
        ImportError: pymilvus is not installed.
        ValueError: there is no such collection, it is not a pool, or the server is too old.
    """

    def __init__(
        self, uri: str, collection: str = "unimur", *, image_folder: str | os.PathLike | None = None,
        search_params: dict[str, Any] | None = None, **client_arguments: Any,
    ):  # fmt: skip
        self.uri, self.collection = str(uri), collection
        self.client = _connect(self.uri, client_arguments)
        self.image_folder = None if image_folder is None else Path(image_folder)
        self.search_params = search_params or {}
        if not self.client.has_collection(collection):
            raise ValueError(f"{uri} has no collection {collection!r}: make one with MilvusPool.create")
        about = self.client.describe_collection(collection)
        properties = (about.get("properties") or {}).get(MADE_BY) or about.get("description")
        try:
            super().__init__(json.loads(properties))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the collection {collection!r} in {uri} does not say what made it: it is no pool"
            ) from error
        names = {field["name"] for field in about["fields"]}
        self._content = [name for name in CONTENT if name in names]  # of older pools without `source`
        self._asked(lambda: self.client.load_collection(collection))  # a server that was restarted takes its time to
        self._count()  # a strong read: from here on, every search sees what is in the collection now

    @classmethod
    def create(
        cls, uri: str, collection: str, made_by: dict[str, Any], *, index: str = "FLAT",
        index_params: dict[str, Any] | None = None, image_folder: str | os.PathLike | None = None,
        search_params: dict[str, Any] | None = None, **client_arguments: Any,
    ) -> "MilvusPool":  # fmt: skip
        """
        A new, empty pool.

        Args:
            made_by: the fingerprint of the model that embeds the candidates: `model.fingerprint`.
            index: Milvus's index type; `"FLAT"` is exact, `"HNSW"`, `"DISKANN"`, `"AUTOINDEX"` and others are not.
            index_params: of the index, such as `{"M": 16, "efConstruction": 200}`.

        Raises:
            ConnectionError: no server answers.
            ValueError: the collection exists, or the server is too old.
        """
        client = _connect(str(uri), client_arguments)
        if client.has_collection(collection):
            raise ValueError(
                f"{uri} has a collection {collection!r} already: open it with MilvusPool or drop it first"
            )
        kinds, made = _pymilvus().DataType, json.dumps(made_by)
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=made)
        schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=ID_BYTES)
        schema.add_field("modality", kinds.VARCHAR, max_length=8)
        schema.add_field("row", kinds.INT64)  # the order among equal scores
        for name in CONTENT:  # empty where there is none: a server before 2.5 knows no null
            schema.add_field(name, kinds.VARCHAR, max_length=TEXT_BYTES)
        schema.add_field("embedding", kinds.FLOAT_VECTOR, dim=made_by["dimension"])
        indexes = client.prepare_index_params()
        indexes.add_index("embedding", index_type=index, metric_type="COSINE", params=index_params or {})
        client.create_collection(
            collection, schema=schema, index_params=indexes, properties={MADE_BY: made}, consistency_level="Strong"
        )
        client.close()
        return cls(uri, collection, image_folder=image_folder, search_params=search_params, **client_arguments)

    def __len__(self) -> int:
        return self._count()

    def __repr__(self) -> str:
        return f"MilvusPool({len(self)} candidates, collection {self.collection!r})"

    def _count(self, filter: str = "") -> int:
        counted = self._query(filter, ["count(*)"])
        return int(counted[0]["count(*)"])

    def _query(self, filter: str, fields: Sequence[str], **level: str) -> list[dict[str, Any]]:
        query = partial(self.client.query, self.collection, filter=filter, output_fields=list(fields), **level)
        return self._asked(query)

    def _asked(self, call: Callable[[], T]) -> T:
        """The answer to a request. Raises `ConnectionError` in one sentence where there is none."""
        try:
            return call()
        except _failures() as error:
            raise ConnectionError(f"Milvus at {self.uri} does not answer as it should: {_reason(error)}") from error

    # Candidates

    def present(self, ids: Sequence[str]) -> dict[str, tuple[int, str]]:
        """As [`Pool.present`]; a key is (row, id)."""
        return {row["id"]: (row["row"], row["id"]) for row in self._get(ids, ["row"])}

    def row_keys(self, start: int, stop: int) -> list[tuple[int, str]]:
        """As [`Pool.row_keys`]."""
        keys = []
        for first in range(start, stop, BATCH):
            rows = self._query(f"row >= {first} and row < {min(first + BATCH, stop)}", ["id", "row"])
            keys += sorted((row["row"], row["id"]) for row in rows)
        return keys

    def fetch(self, keys: Iterable[tuple[int, str]]) -> dict[tuple[int, str], Stored]:
        """As [`Pool.fetch`]."""
        stored = {}
        for row in self._get(sorted(id_ for _, id_ in keys), ["row", "modality", *self._content], **OWN_WRITES):
            item, source = row["text"], row.get("source") or row["image_path"] or None
            if row["modality"] == "image":
                item = Undecoded(row["id"], self._encoded(row))
            stored[row["row"], row["id"]] = Stored(row["id"], item, source, row["modality"])
        return stored

    def _encoded(self, row: dict[str, Any]) -> bytes | Path:
        if row["image_base64"]:
            return base64.b64decode(row["image_base64"])
        if self.image_folder is None:
            raise ValueError(
                f"the image {row['id']!r} is not in the database, which names {row['image_path']!r}: open the pool with "
                "image_folder=, the folder that it is in"
            )
        return inside(self.image_folder, row["image_path"])

    def _get(self, ids: Sequence[str], fields: Sequence[str], **level: str) -> Iterator[dict[str, Any]]:
        for start in range(0, len(ids), BATCH):
            part = json.dumps(list(ids[start : start + BATCH]), ensure_ascii=False)
            yield from self._query(f"id in {part}", ["id", *fields], **level)

    def check_ids(self, ids: Sequence[Any]) -> None:
        """As [`Pool.check_ids`]; a second insert would silently replace the first."""
        try:
            super().check_ids(ids)
        except ValueError as error:
            raise ValueError(f"{error} (to continue an interrupted add: skip_existing=True)") from error

    def append(
        self, modality: str, items: Sequence[Any], embeddings: Any, ids: Any = None, *, skip_existing: bool = False
    ) -> "MilvusPool":
        """
        As [`Pool.append`], but into the database: this pool itself grows.

        Args:
            skip_existing: leave out candidates whose ids are there, to continue after an interruption with the same ids.

        Raises:
            ConnectionError: the server was lost; the message says what was inserted and how to continue.
            ValueError: as `add`.
        """
        if not skip_existing:
            return super().append(modality, items, embeddings, ids)
        names = self.new_ids(modality, items, ids)
        check_unique(names)
        vectors = unit_rows(embeddings, self.dimension, f"the embeddings of {modality}s", names)
        if len(items) != len(vectors):
            raise ValueError(f"{len(items)} {modality}s and {len(vectors)} embeddings do not match")
        there = self.present(names)
        left = [i for i, name in enumerate(names) if name not in there]
        return super().append(modality, [items[i] for i in left], vectors[left], [names[i] for i in left])

    def insert(self, modality: str, ids: Sequence[str], items: Sequence[Any], embeddings: np.ndarray) -> "MilvusPool":
        """As [`Pool.insert`], a batch at a time."""
        start = len(self)
        for i in range(0, len(ids), BATCH):
            part = slice(i, i + BATCH)
            kinds = [modality] * len(ids[part])
            self._insert(kinds, ids[part], items[part], embeddings[part], start + i, of=(i, len(ids)))
        return self._settled(flush="://" not in self.uri)  # a server takes seconds to, and has no need

    def add(self, pool: Any, *, skip_existing: bool = False, show_progress_bar: bool = True) -> "MilvusPool":
        """
        Copies a [`CandidatePool`] into the database, a batch at a time, out of its memory-mapped files.

        Args:
            skip_existing: leave out candidates whose ids are there, to continue after an interruption.

        Raises:
            ConnectionError: the server was lost; the message says what was inserted and how to continue.
            ValueError: another model made the pool; an id is there already or too long; a text is longer than 65,535
                bytes; an image is larger than 48 KiB, and there is no `image_folder`.
        """
        pool.check_made_by(self.made_by)
        start, inserted = len(self), 0
        with tqdm(total=len(pool), desc="candidates to Milvus", disable=not show_progress_bar) as bar:
            for i in range(0, len(pool), BATCH):
                rows = range(i, min(i + BATCH, len(pool)))
                stored = pool.fetch(rows)
                there = self.present([stored[row].id for row in rows])
                if there and not skip_existing:
                    self.check_ids([min(there)])
                left = [row for row in rows if stored[row].id not in there]
                chosen = [stored[row] for row in left]
                self._insert(
                    [s.modality for s in chosen], [s.id for s in chosen], [_reference(s) for s in chosen],
                    pool.embeddings.take(np.array(left, dtype=np.int64)), start + inserted, of=(inserted, len(pool)),
                )  # fmt: skip
                inserted += len(left)
                bar.update(len(rows))
        return self._settled(flush=True)

    def _settled(self, flush: bool) -> "MilvusPool":
        """Until it is flushed, what was inserted is scanned: by milvus-lite in ten times the time."""
        if flush:
            self._asked(lambda: self.client.flush(self.collection))
        self._moments = {}
        return self

    def _insert(
        self, kinds: Sequence[str], ids: Sequence[str], items: Sequence[Any], vectors: np.ndarray, start: int,
        of: tuple[int, int],
    ) -> None:  # fmt: skip
        """Inserts candidates as rows from `start` on; `of`: how many are in already, and will be."""
        rows: list[dict[str, Any]] = []
        for kind, id_, item, vector in zip(kinds, ids, items, vectors, strict=True):
            if len(id_.encode()) > ID_BYTES:
                raise ValueError(f"the id {id_[:40]!r}... has more than {ID_BYTES} bytes: Milvus takes shorter ones")
            given = self._text(id_, item) if kind == "text" else self._image(id_, item)
            row: dict[str, Any] = {"id": id_, "modality": kind, "row": start + len(rows), "embedding": vector}
            rows.append(row | {name: given.get(name, "") for name in self._content})
        if not rows:
            return
        try:
            self.client.insert(self.collection, rows)
        except _failures() as error:
            raise ConnectionError(
                f"Milvus at {self.uri} was lost after {of[0]:,} of {of[1]:,} candidates were inserted ({_reason(error)}): "
                f"make the same call with skip_existing=True and the same ids to continue from {ids[0]!r}"
            ) from error

    def _text(self, id_: str, text: str) -> dict[str, str]:
        if len(text.encode()) > TEXT_BYTES:
            raise ValueError(f"the text {id_!r} has more than {TEXT_BYTES} bytes: shorten it or leave it out")
        return {"text": text}

    def _image(self, id_: str, image: Any) -> dict[str, str]:
        """An image in the database, beside it, or, where it is in `image_folder`, by its name there."""
        reference = image_reference(image)
        data, path = reference["bytes"], reference["path"]
        source = os.path.basename(path) if path else ""
        if data is None:
            if path is None:
                raise ValueError(f"the image {id_!r} is missing: expected a path, bytes or PIL.Image")
            within = self._within(path)
            if within is not None:
                return {"image_path": within, "source": within}
            data = image_file_bytes(path)
        if len(data) <= IMAGE_BYTES:
            return {"image_base64": base64.b64encode(data).decode(), "source": source}
        if self.image_folder is None:
            raise ValueError(
                f"the image {id_!r} has {len(data)} bytes, more than the {IMAGE_BYTES} that are kept in the database: "
                "give image_folder, a folder that every reader of the pool sees"
            )
        self.image_folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(data).hexdigest()
        if not (self.image_folder / name).exists():
            part = self.image_folder / f".{name}.{os.getpid()}"
            part.write_bytes(data)
            os.replace(part, self.image_folder / name)
        return {"image_path": name, "source": source}

    def _within(self, path: str) -> str | None:
        """An image's name in `image_folder`, `None` where it is elsewhere."""
        if self.image_folder is None:
            return None
        try:
            return inside(self.image_folder, path).relative_to(self.image_folder.resolve()).as_posix()
        except ValueError:
            return None

    # Search

    def nearest(
        self, queries: np.ndarray, k: int, modalities: Collection[str], exclude: Sequence[str]
    ) -> list[list[Hit]]:
        """As [`Pool.nearest`]: with the index `"FLAT"` the same candidates, their scores within float32's rounding."""
        ranked: list[list[Hit]] = [[] for _ in queries]
        for modality in modalities:
            for mine, hits in zip(ranked, self._hits(queries, k, modality, exclude), strict=True):
                mine += hits
        return ranked

    def nearest_jointly(self, queries: np.ndarray, k: int, exclude: Sequence[str]) -> list[list[Hit]]:
        """As [`Pool.nearest_jointly`], in one request, and a second for those queries whose best hits hold no text."""
        ranked = self._hits(queries, k, None, exclude)
        silent = [i for i, hits in enumerate(ranked) if all(hit.kind == "image" for hit in hits)]
        if silent:
            for i, hits in zip(silent, self._hits(queries[silent], 1, "text", exclude), strict=True):
                ranked[i] += hits
        return ranked

    def _hits(self, queries: np.ndarray, k: int, modality: str | None, exclude: Sequence[str]) -> list[list[Hit]]:
        if k > MOST:
            raise ValueError(f"top_k={k} is more than the {MOST} results that Milvus gives")
        parts = [] if modality is None else [f'modality == "{modality}"']
        if exclude:
            parts.append(f"id not in {json.dumps(list(exclude), ensure_ascii=False)}")
        ranked: list[list[Hit]] = []
        for start in range(0, len(queries), BATCH):
            search = partial(
                self.client.search, self.collection, queries[start : start + BATCH].tolist(), limit=k,
                filter=" and ".join(parts), search_params={"params": self.search_params},
                output_fields=["id", "modality", "row"], **OWN_WRITES,
            )  # fmt: skip
            for hits in self._asked(search):
                entities = [(hit["distance"], hit["entity"]) for hit in hits]
                ranked.append([Hit(score, (e["row"], e["id"]), e["modality"]) for score, e in entities])
        return ranked

    def statistics(self, modality: str) -> Moments | None:
        """As [`Pool.statistics`], estimated once from at most 20,000 candidates spread over the collection."""
        size, count = len(self), self._count(f'modality == "{modality}"')
        stride = -(-count // SAMPLE)
        rows = []
        for start in range(0, size if count else 0, BATCH * stride):
            numbers = list(range(start, start + BATCH * stride, stride))  # milvus-lite knows no remainder
            page = self._query(f'modality == "{modality}" and row in {numbers}', ["embedding"])
            rows += [np.asarray(row["embedding"], dtype=np.float32) for row in page]
        if not rows:
            return None
        table = np.stack(rows).astype(np.float64)
        return table.mean(0).astype(np.float32), np.cov(table.T, bias=True).astype(np.float32)

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()


def _reference(stored: Stored) -> Any:
    """A text of another pool's, or a picture as it is stored, with its name."""
    if not isinstance(stored.item, Undecoded):
        return stored.item
    source = stored.item.source
    return source | {"path": stored.source} if isinstance(source, dict) else source


def _connect(uri: str, arguments: dict[str, Any]) -> Any:
    """A client whose server answers and is of a version that is taken."""
    milvus = _pymilvus()
    try:
        client = milvus.MilvusClient(uri, **arguments)
        version = str(client.get_server_version())
    except _failures() as error:
        raise ConnectionError(
            f"no Milvus answers at {uri} ({_reason(error)}): give a server's address, as 'http://host:19530', or a local "
            "file, as 'pool.db'"
        ) from error
    numbers = re.search(r"(\d+)\.(\d+)", version)
    if numbers and "lite" not in version.lower() and tuple(map(int, numbers.groups())) < OLDEST_SERVER:
        client.close()
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise ValueError(f"the Milvus server at {uri} is {version}: a pool needs {oldest} or later")
    return client


def _failures() -> tuple[type[Exception], ...]:
    """What a client raises where its server is absent, lost or refuses."""
    return (_pymilvus().MilvusException, OSError)


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "message", "") or error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _pymilvus() -> Any:
    try:
        import pymilvus
    except ImportError as error:
        raise ImportError(
            "a pool in Milvus needs its client: pip install pymilvus (and milvus-lite for a local file)"
        ) from error
    return pymilvus
