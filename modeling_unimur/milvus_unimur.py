"""A pool beyond one machine: in a Milvus database, searched by the same call and answering with the same replies."""

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .images_unimur import image_reference
from .replies_unimur import MODALITIES, Hit, Retrieval, Undecoded, candidate_ids, check_search, differences, replies

MADE_BY = "unimur.made_by"
# Milvus holds strings of 65,535 bytes at most; base64 makes four bytes of three.
ID_BYTES, TEXT_BYTES, IMAGE_BYTES = 512, 65_535, 48 * 2**10
BATCH = 1000  # rows a request: 3 MB of 768 dimensions; a server takes 64 MB
SAMPLE = 20_000  # candidates of a modality from which `calibrate` estimates its statistics


class MilvusPool:
    """
    Candidates in a collection of a Milvus server or, with milvus-lite, of a local file. What [`UniMuRModel.retrieve`]
    and `extend_pool` do with a [`CandidatePool`] they do with this one.

    Args:
        uri: a server's address (`"http://host:19530"`) or a local file (`"pool.db"`).
        collection: one that [`MilvusPool.create`] made.
        image_folder: where the images lie that are too large for the database, under the names that it holds.
        search_params: of the index, such as `{"ef": 128}` for HNSW.
        client_arguments: of `pymilvus.MilvusClient`, such as `token`.

    Raises:
        ImportError: pymilvus is not installed.
        ValueError: there is no such collection, or it is not a pool.
    """

    def __init__(
        self, uri: str, collection: str = "unimur", *, image_folder: str | os.PathLike | None = None,
        search_params: dict[str, Any] | None = None, **client_arguments: Any,
    ):  # fmt: skip
        self.client, self.collection = _pymilvus().MilvusClient(str(uri), **client_arguments), collection
        self.image_folder = None if image_folder is None else Path(image_folder)
        self.search_params = search_params or {}
        if not self.client.has_collection(collection):
            raise ValueError(f"{uri} has no collection {collection!r}: make one with MilvusPool.create")
        about = self.client.describe_collection(collection)
        told = (about.get("properties") or {}).get(MADE_BY) or about.get("description")
        try:
            self.made_by: dict[str, Any] = json.loads(told)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the collection {collection!r} in {uri} does not say what made it: it is no pool"
            ) from error

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
            ValueError: the collection exists.
        """
        milvus = _pymilvus()
        client = milvus.MilvusClient(str(uri), **client_arguments)
        if client.has_collection(collection):
            raise ValueError(
                f"{uri} has a collection {collection!r} already: open it with MilvusPool or drop it first"
            )
        told = json.dumps(made_by)
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False, description=told)
        varchar = milvus.DataType.VARCHAR
        schema.add_field("id", varchar, is_primary=True, max_length=ID_BYTES)
        schema.add_field("modality", varchar, max_length=8)
        schema.add_field("row", milvus.DataType.INT64)  # the order among equal scores
        schema.add_field("text", varchar, max_length=TEXT_BYTES, nullable=True)
        schema.add_field("image_path", varchar, max_length=TEXT_BYTES, nullable=True)
        schema.add_field("image_base64", varchar, max_length=TEXT_BYTES, nullable=True)
        schema.add_field("embedding", milvus.DataType.FLOAT_VECTOR, dim=made_by["dimension"])
        indexes = client.prepare_index_params()
        indexes.add_index("embedding", index_type=index, metric_type="COSINE", params=index_params or {})
        client.create_collection(
            collection, schema=schema, index_params=indexes, properties={MADE_BY: told}, consistency_level="Strong"
        )
        client.close()
        return cls(uri, collection, image_folder=image_folder, search_params=search_params, **client_arguments)

    def __len__(self) -> int:
        return self._count()

    def __repr__(self) -> str:
        return f"MilvusPool({len(self)} candidates, collection {self.collection!r})"

    def _count(self, filter: str = "") -> int:
        found = self.client.query(self.collection, filter=filter, output_fields=["count(*)"])
        return int(found[0]["count(*)"])

    # Candidates

    def check_ids(self, ids: Sequence[str]) -> None:
        """As [`CandidatePool.check_ids`]."""
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise ValueError(f"the id {twice!r} stands twice in the pool; ids must be unique over images and texts")
        self._present(ids)

    def _present(self, ids: Sequence[str], skip_existing: bool = False) -> set[str]:
        there = {row["id"] for row in self._get(ids, [])}  # a second insert would silently replace the first
        if there and not skip_existing:
            raise ValueError(
                f"the id {min(there)!r} stands in the collection {self.collection!r} already; ids must be unique over "
                "images and texts (to go on with an interrupted add: skip_existing=True)"
            )
        return there

    def append(
        self, modality: str, items: Sequence[Any], embeddings: torch.Tensor, ids: Sequence[str] | None = None
    ) -> "MilvusPool":
        """As [`CandidatePool.append`], but into the database: this pool itself grows. Raises as `add` does."""
        start = len(self)
        ids = candidate_ids(modality, len(items), ids, start)
        if len(items) != len(embeddings):
            raise ValueError(f"{len(items)} {modality}s and {len(embeddings)} embeddings do not match")
        self.check_ids(ids)
        vectors = embeddings.float().numpy()
        for i in range(0, len(ids), BATCH):
            part = slice(i, i + BATCH)
            self._insert([modality] * len(ids[part]), ids[part], items[part], vectors[part], start + i)
        return self._settled()

    def add(self, pool, *, skip_existing: bool = False, show_progress_bar: bool = True) -> "MilvusPool":
        """
        Copies a [`CandidatePool`] into the database, a batch at a time, out of its memory-mapped files.

        Args:
            skip_existing: leave out candidates whose ids are there, to go on after an interruption.

        Raises:
            ValueError: another model made the pool; an id is there already or too long; a text is longer than 65,535
                bytes; an image is larger than 48 KiB, has no path and there is no `image_folder`.
        """
        pool.check_made_by(self.made_by)
        rows, row = pool.dataset.with_format(None).remove_columns("embedding"), len(self)
        with tqdm(total=len(pool), desc="candidates to Milvus", disable=not show_progress_bar) as bar:
            for i in range(0, len(pool), BATCH):
                data = rows[i : i + BATCH]
                items = [
                    image if text is None else text for text, image in zip(data["text"], data["image"], strict=True)
                ]
                vectors = pool.embeddings.take(np.arange(i, i + len(items)))
                row += self._insert(data["modality"], data["id"], items, vectors, row, skip_existing)
                bar.update(len(items))
        return self._settled()

    def _settled(self) -> "MilvusPool":
        self.client.flush(self.collection)  # until then milvus-lite searches ten times as long
        self.__dict__.pop("_statistics", None)
        return self

    def _insert(self, kinds, ids, items, vectors: np.ndarray, start: int, skip_existing: bool = False) -> int:
        """Inserts candidates as rows from `start` on and says how many."""
        there = self._present(ids, skip_existing)
        rows = []
        for kind, id_, item, vector in zip(kinds, ids, items, vectors, strict=True):
            if id_ in there:
                continue
            if len(id_.encode()) > ID_BYTES:
                raise ValueError(f"the id {id_[:40]!r}... has more than {ID_BYTES} bytes: Milvus takes shorter ones")
            row = {"id": id_, "modality": kind, "row": start + len(rows), "embedding": vector}
            rows.append(row | (self._text(id_, item) if kind == "text" else self._image(id_, item)))
        if rows:
            self.client.insert(self.collection, rows)
        return len(rows)

    def _text(self, id_: str, text: str) -> dict[str, Any]:
        if len(text.encode()) > TEXT_BYTES:
            raise ValueError(f"the text {id_!r} has more than {TEXT_BYTES} bytes: shorten it or leave it out")
        return {"text": text, "image_path": None, "image_base64": None}

    def _image(self, id_: str, image: Any) -> dict[str, Any]:
        source = image_reference(image)
        data, path = source["bytes"], source["path"]
        row = {"text": None, "image_path": None, "image_base64": None}
        if data is None:
            return row | {"image_path": path}
        if len(data) <= IMAGE_BYTES:
            return row | {"image_base64": base64.b64encode(data).decode()}
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
        return row | {"image_path": name}

    # Search

    def search(
        self, queries: torch.Tensor, *, top_k: int = 10, modality: str | None = None, exclude: Sequence[str] = (),
        calibrate: bool = False, image_bias: float = 0.0,
    ) -> list[Retrieval]:  # fmt: skip
        """
        As [`CandidatePool.search`]: with the index `"FLAT"` the same candidates, their scores within float32's rounding.

        The joint query is one request, and a second for those queries whose best hits hold no text. With `calibrate`
        or `image_bias` each modality is asked for; the statistics are estimated once, from at most 20,000 candidates
        of a modality spread over the collection.
        """
        check_search(1, top_k, modality, exclude, image_bias)
        searched, k = queries.float().numpy(), max(top_k, 2)
        if modality is not None or not (calibrate or image_bias):
            ranked = self._hits(searched, k, modality, exclude)
            silent = [i for i, hits in enumerate(ranked) if modality is None and all(h.kind == "image" for h in hits)]
            if silent:
                for i, hits in zip(silent, self._hits(searched[silent], 1, "text", exclude), strict=True):
                    ranked[i] += hits
        else:
            ranked = [[] for _ in searched]
            for kind in MODALITIES:
                for mine, hits in zip(ranked, self._hits(searched, k, kind, exclude), strict=True):
                    mine += hits
        if not all(ranked):
            check_search(len(self), top_k, modality)  # counting takes longer than searching
        if calibrate or image_bias:
            ranked = self._adjusted(searched, ranked, calibrate, image_bias)
        rows = [sorted(hits, key=lambda h: (-h.score, h.key)) for hits in ranked]
        return replies([[h._replace(key=h.key[1]) for h in hits] for hits in rows], top_k, self._fetch)

    def _hits(self, queries: np.ndarray, k: int, modality: str | None, exclude: Sequence[str]) -> list[list[Hit]]:
        """The best candidates of each query, their keys (row, id)."""
        parts = [] if modality is None else [f'modality == "{modality}"']
        if exclude:
            parts.append(f"id not in {json.dumps(list(exclude), ensure_ascii=False)}")
        found = []
        for start in range(0, len(queries), BATCH):
            found += self.client.search(
                self.collection, queries[start : start + BATCH].tolist(), limit=k, filter=" and ".join(parts),
                search_params={"params": self.search_params}, output_fields=["id", "modality", "row"],
            )  # fmt: skip
        return [
            [Hit(h["distance"], (h["entity"]["row"], h["id"]), h["entity"]["modality"]) for h in hits]
            for hits in found
        ]

    def _adjusted(self, queries, ranked, calibrate: bool, image_bias: float) -> list[list[Hit]]:
        moments = {}
        for kind, (mean, covariance) in (self._statistics if calibrate else {}).items():
            variance = ((queries @ covariance) * queries).sum(-1)
            moments[kind] = queries @ mean, np.sqrt(variance.clip(min=1e-12))

        def adjusted(hit: Hit, query: int) -> Hit:
            mean, deviation = moments[hit.kind] if calibrate else (None, None)
            score = (hit.score - float(mean[query])) / float(deviation[query]) if calibrate else hit.score
            return hit._replace(score=score + image_bias * (hit.kind == "image"))

        return [[adjusted(hit, query) for hit in hits] for query, hits in enumerate(ranked)]

    @cached_property
    def _statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found, size = {}, len(self)
        for kind in MODALITIES:
            count = self._count(f'modality == "{kind}"')
            stride = -(-count // SAMPLE)
            rows = []
            for start in range(0, size if count else 0, BATCH * stride):
                page = self.client.query(  # milvus-lite knows no remainder
                    self.collection,
                    filter=f'modality == "{kind}" and row in {list(range(start, start + BATCH * stride, stride))}',
                    output_fields=["embedding"],
                )
                rows += [np.asarray(row["embedding"], dtype=np.float32) for row in page]
            if rows:
                table = np.stack(rows).astype(np.float64)
                found[kind] = table.mean(0), np.cov(table.T, bias=True)
        return found

    def _fetch(self, ids: Iterable[str]) -> dict[str, tuple[str, Any]]:
        found = {}
        for row in self._get(sorted(ids), ["text", "image_path", "image_base64"]):
            item = row["text"]
            if row["image_base64"] is not None:
                item = Undecoded(row["id"], base64.b64decode(row["image_base64"]))
            elif row["image_path"] is not None:
                path = Path(row["image_path"])
                item = Undecoded(row["id"], path if self.image_folder is None else self.image_folder / path)
            found[row["id"]] = row["id"], item
        return found

    def _get(self, ids: Sequence[str], fields: list[str]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(ids), BATCH):
            part = json.dumps(list(ids[start : start + BATCH]), ensure_ascii=False)
            yield from self.client.query(self.collection, filter=f"id in {part}", output_fields=["id", *fields])

    def check_made_by(self, fingerprint: dict[str, Any]) -> None:
        """As [`CandidatePool.check_made_by`]."""
        differ = differences(self.made_by, fingerprint)
        if differ:
            raise ValueError(f"this pool was made by another model; these differ: {differ}. Build it again")

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()


def _pymilvus():
    try:
        import pymilvus
    except ImportError as error:
        raise ImportError(
            "a pool in Milvus needs its client: pip install pymilvus (and milvus-lite for a local file)"
        ) from error
    return pymilvus
