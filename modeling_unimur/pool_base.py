"""
What a pool is, whatever holds its candidates: one contract, and all that does not depend on where they are.

Another database is one file: a subclass of [`Pool`] with the seven methods under "What a database does".
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from math import nan
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from .display_unimur import gallery
from .pool_ids import candidate_ids, check_unique, duplicate, id_string, id_strings
from .replies_unimur import MODALITIES, Candidate, Hit, Retrieval, candidate_figure, check_search, differences, replies

UNIT = 1e-4  # how far from 1 a length may be: a row within it is taken as it is
LISTED = 5  # candidates that a notebook shows from either end of a pool
PAGE = 1000  # candidates that are fetched at a time while a pool is iterated
Moments = tuple[np.ndarray, np.ndarray]


class Stored(NamedTuple):
    """
    A candidate as a pool holds it.

    Args:
        id: its id.
        item: a text, or an [`Undecoded`] picture.
        source: the path or name that an image was given by, `None` where there was none.
        modality: `"image"` or `"text"`.
    """

    id: str
    item: Any
    source: str | None
    modality: str


class Pool(ABC):
    """
    One pool of images and texts in one space of embeddings (Section 3.4).

    `pool[3]` and `pool["panda.jpg"]` are [`Candidate`]s, and so is what iterating gives, in the order in which they were
    added. An id is a string or an integer, `7` and `"7"` being one.

    Args:
        made_by: the fingerprint of the model that embeds the candidates; `"dimension"` is q.
    """

    def __init__(self, made_by: dict[str, Any]):
        self.made_by = made_by
        self._moments: dict[str, Moments] = {}  # of `statistics`, computed once

    # What a database does

    @abstractmethod
    def __len__(self) -> int:
        """How many candidates there are."""

    @abstractmethod
    def present(self, ids: Sequence[str]) -> dict[str, Any]:
        """Those of some ids that the pool holds, each with its key: what `fetch` and [`Hit`] know a candidate by."""

    @abstractmethod
    def row_keys(self, start: int, stop: int) -> list[Any]:
        """The keys of the candidates from number `start` to `stop` (exclusive), in the order they were added."""

    @abstractmethod
    def fetch(self, keys: Iterable[Any]) -> dict[Any, Stored]:
        """The candidates of some keys."""

    @abstractmethod
    def nearest(
        self, queries: np.ndarray, k: int, modalities: Collection[str], exclude: Sequence[str]
    ) -> list[list[Hit]]:
        """
        The k best candidates of each of some modalities by cosine, for each query; in any order.

        Args:
            queries: `(n, q)` float32, L2-normalised.
            exclude: ids that are not returned; the pool need not hold them.
        """

    @abstractmethod
    def statistics(self, modality: str) -> Moments | None:
        """Mean `(q,)` and covariance `(q, q)` float32 of a modality's embeddings, `None` where there are none."""

    @abstractmethod
    def insert(self, modality: str, ids: Sequence[str], items: Sequence[Any], embeddings: np.ndarray) -> Self:
        """
        The pool with more candidates: itself, or another one.

        Args:
            ids: n ids that the pool does not hold.
            items: n texts, or images as [`image_reference`] takes them.
            embeddings: `(n, q)` float32, L2-normalised.
        """

    def nearest_jointly(self, queries: np.ndarray, k: int, exclude: Sequence[str]) -> list[list[Hit]]:
        """At least the k best candidates over both modalities, the best text and the two best images, as `nearest`."""
        return self.nearest(queries, k, MODALITIES, exclude)

    # What follows from it

    @property
    def dimension(self) -> int:
        """q."""
        return int(self.made_by["dimension"])

    @property
    def ids(self) -> list[str]:
        """The ids of all candidates, in the order they were added."""
        return [stored.id for page in self._pages() for stored in page]

    def __iter__(self) -> Iterator[Candidate]:
        for page in self._pages():
            yield from map(_unranked, page)

    def _pages(self) -> Iterator[list[Stored]]:
        for start in range(0, len(self), PAGE):
            keys = self.row_keys(start, min(start + PAGE, len(self)))
            stored = self.fetch(keys)
            yield [stored[key] for key in keys]

    def _repr_html_(self) -> str:
        last = range(max(LISTED, len(self) - LISTED), len(self))
        shown = [self[row] for row in (*range(min(LISTED, len(self))), *last)]
        which = f"; the first and the last {LISTED}:" if len(self) > 2 * LISTED else ":"
        return gallery(f"{self!r}{which}", map(candidate_figure, shown))

    def __contains__(self, id_: Any) -> bool:
        return bool(self.present([id_string(id_)]))

    def __getitem__(self, which: int | str) -> Candidate:
        """
        One candidate, by its number from 0 (negative: from the end) or its id as a string; its rank is 0, its score NaN.

        Raises:
            IndexError: there are fewer.
            KeyError: there is no such id.
            TypeError: neither a number nor a string.
        """
        if isinstance(which, str):
            keys = list(self.present([which]).values())
            if not keys:
                raise KeyError(f"no candidate has the id {which!r}")
        elif isinstance(which, int | np.integer) and not isinstance(which, bool):
            row = int(which) + (len(self) if which < 0 else 0)
            keys = self.row_keys(row, row + 1) if 0 <= row < len(self) else []
            if not keys:
                raise IndexError(f"candidate {which} of {len(self)}")
        else:
            raise TypeError(f"a candidate is indexed by its number or its id, not by {type(which).__name__}")
        return _unranked(self.fetch(keys)[keys[0]])

    def check_made_by(self, fingerprint: dict[str, Any]) -> None:
        """Refuses a model other than the one that made the pool, with a `ValueError` that says what differs."""
        differ = differences(self.made_by, fingerprint)
        if differ:
            raise ValueError(f"this pool was made by another model; these differ: {differ}. Build it again")

    def new_ids(self, modality: str, items: Sequence[Any], ids: Any = None, start: int | None = None) -> list[str]:
        """The ids of new candidates as [`candidate_ids`] makes them, from row `start` on or from the pool's end."""
        return candidate_ids(modality, items, ids, len(self) if start is None else start, self.present)

    def check_ids(self, ids: Sequence[Any]) -> None:
        """Refuses with a `ValueError` ids of new candidates that the pool holds, or a duplicate among them."""
        ids = id_strings("ids", ids)
        check_unique(ids)
        present = self.present(ids)
        if present:
            raise duplicate(min(present))

    def append(self, modality: str, items: Sequence[Any], embeddings: Any, ids: Any = None) -> Self:
        """
        The pool with more candidates of one modality.

        Args:
            modality: `"image"` or `"text"`.
            items: n texts or images (PIL, paths, bytes or datasets' undecoded ones).
            embeddings: `(n, q)`, a tensor or an array; `(q,)` is one. Only their directions count.
            ids: n unique names; by default as [`candidate_ids`] makes them.

        Raises:
            ValueError: an unknown modality, unequal lengths, a duplicate id, or embeddings of another width, of no length,
                or with NaN or infinity.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality={modality!r} is not 'image' or 'text'")
        if isinstance(items, str | bytes) or not hasattr(items, "__len__"):
            raise ValueError(f"expected a list of {modality}s, got {type(items).__name__}")
        names = self.new_ids(modality, items, ids)
        vectors = unit_rows(embeddings, self.dimension, f"the embeddings of {modality}s", names)
        if len(items) != len(vectors):
            raise ValueError(f"{len(items)} {modality}s and {len(vectors)} embeddings do not match")
        if modality == "text":
            check_texts(items, names)
        self.check_ids(names)
        return self.insert(modality, names, items, vectors)

    # Search

    def search(
        self, queries: Any, *, top_k: int = 10, modality: str | None = None, exclude: Iterable[Any] = (),
        calibrate: bool = False, image_bias: float = 0.0,
    ) -> list[Retrieval]:  # fmt: skip
        """
        The best candidates by cosine, over images and texts together; among equal scores the one added first.

        Args:
            queries: `(n, q)`, a tensor or an array of embeddings; `(q,)` is one query. Only their directions count.
            top_k: how many candidates to return per query, at least 1.
            modality: `"image"` or `"text"` to search one kind only.
            exclude: ids that are not returned.
            calibrate: standardise each modality's scores per query by their mean and deviation over the pool, which
                removes the gap between the two kinds; off is the paper's plain cosine.
            image_bias: added to every image's score: trades the image retrieval rate against text R@1.

        Returns:
            A [`Retrieval`] per query.

        Raises:
            ValueError: an empty pool or one emptied by `modality` and `exclude`, an unknown modality, or queries that are
                no embeddings of the pool's width.
        """
        excluded = id_strings("exclude", exclude)
        check_search(1, top_k, modality, excluded, image_bias)
        vectors = unit_rows(queries, self.dimension, "queries")
        k = max(top_k, 2)
        if modality is None and not (calibrate or image_bias):
            ranked = self.nearest_jointly(vectors, k, excluded)
        else:
            ranked = self.nearest(vectors, k, MODALITIES if modality is None else (modality,), excluded)
        if not all(ranked):
            check_search(len(self), top_k, modality)
        if calibrate or image_bias:
            ranked = self._adjusted(vectors, ranked, calibrate, image_bias)
        return replies([sorted(hits, key=lambda h: (-h.score, h.key)) for hits in ranked], top_k, self.fetch)

    def _adjusted(
        self, queries: np.ndarray, ranked: list[list[Hit]], calibrate: bool, image_bias: float
    ) -> list[list[Hit]]:
        """Hits with their scores standardised and biased, in float32 as they came."""
        moments = {kind: self._score_moments(queries, kind) for kind in MODALITIES} if calibrate else {}
        bias = {"image": np.float32(image_bias), "text": np.float32(0)}

        def adjusted(number: int, hit: Hit) -> Hit:
            score = np.float32(hit.score)
            if calibrate:
                mean, deviation = moments[hit.kind]
                score = (score - mean[number]) / deviation[number]
            return hit._replace(score=float(score + bias[hit.kind]))

        return [[adjusted(number, hit) for hit in hits] for number, hits in enumerate(ranked)]

    def _score_moments(self, queries: np.ndarray, kind: str) -> Moments:
        """Mean and deviation `(n,)` of each query's scores over a modality: they follow from the embeddings'."""
        if kind not in self._moments:
            moments = self.statistics(kind)
            if moments is None:
                return np.zeros(len(queries), np.float32), np.ones(len(queries), np.float32)
            self._moments[kind] = moments
        mean, covariance = self._moments[kind]
        variance = ((queries @ covariance) * queries).sum(-1)
        return queries @ mean, np.sqrt(variance.clip(min=1e-12))


def _unranked(stored: Stored) -> Candidate:
    return Candidate(stored.id, stored.modality, stored.item, nan, 0, stored.source)


def check_texts(texts: Iterable[Any], ids: Sequence[str]) -> None:
    """Refuses with a `ValueError` what is no string."""
    for text, id_ in zip(texts, ids, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"the text {id_!r} is of type {type(text).__name__}: expected a string")


def unit_rows(values: Any, width: int, what: str, names: Sequence[str] | None = None) -> np.ndarray:
    """
    Embeddings of any float type, on any device, `(n, q)` or `(q,)` -> `(n, q)` float32, C-contiguous, L2-normalised. A
    row whose length is within `UNIT` of 1 keeps its bits.

    Args:
        width: q.
        what: they are, for messages.
        names: of the rows, for messages.

    Raises:
        ValueError: of another width or type, without length, or with NaN or infinity.
    """
    expected = f"{what} must be an array (n, {width}) of embeddings"
    if isinstance(values, str):
        raise ValueError(f"{expected}, not words: model.retrieve(dialogue, pool) searches by a dialogue's words")
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        rows = (values.float() if values.is_floating_point() else values).numpy()  # numpy knows no bfloat16
    else:
        try:
            rows = np.asarray(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{expected}, not {type(values).__name__}: {error}") from error
    if rows.dtype.kind not in "fiu":
        raise ValueError(f"{expected}, not {type(values).__name__} of {rows.dtype}")
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{expected}, not {tuple(np.shape(values))}")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=1)
    named = partial(_row_name, names)
    if not np.isfinite(lengths).all():
        row = int(np.flatnonzero(~np.isfinite(lengths))[0])
        raise ValueError(f"{what} hold NaN or infinity, or what overflows float32: {named(row)}")
    if not lengths.all():
        row = int(np.flatnonzero(lengths == 0)[0])
        raise ValueError(f"{what} hold a row of zeros, which has no direction: {named(row)}")
    off = np.abs(lengths - 1) > UNIT
    if off.any():
        rows = np.where(off[:, None], rows / lengths[:, None], rows)
    return rows


def _row_name(names: Sequence[str] | None, row: int) -> str:
    return repr(names[row]) if names is not None and row < len(names) else f"row {row}"
