"""One pool of images and texts (Section 3.4): built, searched by cosine, saved, appended to."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import is_datasets_available

from .images_unimur import decode_image

if is_datasets_available():
    import datasets

MODALITIES = ("image", "text")
METADATA = "pool.json"


@dataclass(frozen=True)
class Candidate:
    """A retrieved candidate: `item` is a text or an RGB `PIL.Image`; `rank` counts from 1; `score` is what it was ranked by."""

    id: str
    modality: str
    item: str | Image.Image
    score: float
    rank: int


@dataclass(frozen=True)
class Retrieval:
    """
    The reply of Section 3.4: `text`, the best text of the pool; `image`, the best of what remains if that is an image;
    `candidates`, the best of the pool in order. `text` is `None` where no text was searched.
    """

    text: str | None
    image: Image.Image | None
    candidates: list[Candidate]


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
        self.dataset = dataset
        self.made_by = made_by
        ids = dataset["id"][:] if len(dataset) else []
        if len(set(ids)) < len(ids):
            seen: set[str] = set()
            twice = next(i for i in ids if i in seen or seen.add(i))
            raise ValueError(f"the id {twice!r} stands twice in the pool; ids must be unique over images and texts")

    @classmethod
    def empty(cls, made_by: dict[str, Any]) -> "CandidatePool":
        """A pool without candidates."""
        if not is_datasets_available():
            raise ImportError("a pool is stored with the datasets library: pip install datasets")
        return cls(
            datasets.Dataset.from_dict({name: [] for name in _features(1)}, features=_features(made_by["dimension"])),
            made_by,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def counts(self) -> dict[str, int]:
        """How many candidates there are of each modality."""
        return {m: len(self._rows[m]) for m in MODALITIES}

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {m}s" for m, count in self.counts.items())
        return f"CandidatePool({counts}, dimension {self.made_by['dimension']})"

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
        """
        start = len(self)
        ids = [f"{modality}-{start + i}" for i in range(len(items))] if ids is None else [str(i) for i in ids]
        if not len(items) == len(embeddings) == len(ids):
            raise ValueError(f"{len(items)} {modality}s, {len(embeddings)} embeddings and {len(ids)} ids do not match")
        is_text = modality == "text"
        rows = {
            "id": ids,
            "modality": [modality] * len(ids),
            "text": list(items) if is_text else [None] * len(ids),
            "image": [None] * len(ids) if is_text else [_reference(image) for image in items],
            "embedding": list(embeddings.numpy()),
        }
        new = datasets.Dataset.from_dict(rows, features=_features(embeddings.shape[1]))
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
        if not len(self):
            raise ValueError("the pool is empty: build it with images, texts or both")
        if modality not in (None, *MODALITIES):
            raise ValueError(f"modality={modality!r} is not 'image', 'text' or None")
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        exclude = set(exclude)
        ranked: list[list[tuple[float, int, str]]] = [[] for _ in range(len(queries))]
        for kind in MODALITIES if modality is None else (modality,):
            if not len(self._rows[kind]):
                continue
            scores, rows = self._top(queries, kind, max(top_k, 2), exclude)
            if calibrate:
                mean, deviation = self._score_statistics(queries, kind)
                scores = (scores - mean[:, None]) / deviation[:, None]
            if kind == "image":
                scores = scores + image_bias
            for query, (values, places) in enumerate(zip(scores.tolist(), rows.tolist(), strict=True)):
                ranked[query] += [(v, p, kind) for v, p in zip(values, places, strict=True) if v > -float("inf")]
        if not all(ranked):
            raise ValueError("no candidate remains: modality and exclude leave nothing of the pool")
        return [self._reply(sorted(found, key=lambda c: (-c[0], c[1])), top_k) for found in ranked]

    def _top(self, queries: torch.Tensor, kind: str, k: int, exclude: set[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines `(n, k)` of the best candidates of a modality and their rows in the dataset."""
        scores = queries.float() @ self._embeddings[kind].T
        banned = [i for i, row in enumerate(self._rows[kind]) if self._ids[row] in exclude] if exclude else []
        scores[:, banned] = -float("inf")
        values, places = scores.topk(min(k, scores.shape[1]), dim=-1)
        return values, torch.from_numpy(self._rows[kind])[places]

    def _reply(self, found: list[tuple[float, int, str]], top_k: int) -> Retrieval:
        candidates = [self._candidate(*hit, rank) for rank, hit in enumerate(found, 1) if rank <= top_k]
        text = next((hit for hit in found if hit[2] == "text"), None)
        rest = next((hit for hit in found if hit is not text), None)
        image = rest if rest is not None and rest[2] == "image" else None
        shown = {(c.rank - 1): c for c in candidates}
        text, image = (
            None if hit is None else shown.get(found.index(hit)) or self._candidate(*hit, found.index(hit) + 1)
            for hit in (text, image)
        )
        return Retrieval(text and text.item, image and image.item, candidates)

    def _candidate(self, score: float, row: int, kind: str, rank: int) -> Candidate:
        data = self.dataset[row]
        item = data["text"] if kind == "text" else decode_image(data["image"])
        return Candidate(data["id"], kind, item, score, rank)

    @cached_property
    def _ids(self) -> list[str]:
        return self.dataset["id"][:]

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        kinds = np.array(self.dataset["modality"][:] if len(self) else [], dtype=object)
        return {m: np.flatnonzero(kinds == m) for m in MODALITIES}

    @cached_property
    def _embeddings(self) -> dict[str, torch.Tensor]:
        table = self.dataset.with_format("numpy", columns=["embedding"])[:]["embedding"].astype(np.float32)
        return {m: torch.from_numpy(table[self._rows[m]]) for m in MODALITIES}

    @cached_property
    def _statistics(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Per modality, mean `(q,)` and covariance `(q, q)` of its embeddings: a query's score statistics follow."""
        return {m: (e.mean(0), torch.cov(e.T, correction=0)) for m, e in self._embeddings.items() if len(e)}

    def _score_statistics(self, queries: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        mean, covariance = self._statistics[kind]
        variance = ((queries @ covariance) * queries).sum(-1)
        return queries @ mean, variance.clamp(min=1e-12).sqrt()

    # Persistence

    def check_made_by(self, fingerprint: dict[str, Any]) -> None:
        """Refuses a model other than the one that made the pool, with a `ValueError` that says what differs."""
        differ = [
            f"{k} ({self.made_by.get(k)!r} here, {v!r} in the model)"
            for k, v in fingerprint.items()
            if self.made_by.get(k) != v
        ]
        if differ:
            raise ValueError(f"this pool was made by another model; these differ: {', '.join(differ)}. Build it again")

    def save_to_disk(self, path: str | PathLike) -> None:
        """Writes the pool as Arrow files and a `pool.json`; images given as paths are copied into it."""
        self.dataset.save_to_disk(fspath(path))
        (Path(path) / METADATA).write_text(json.dumps(self.made_by, indent=2) + "\n")

    @classmethod
    def load_from_disk(cls, path: str | PathLike) -> "CandidatePool":
        """Opens a saved pool, memory-mapped. Raises `FileNotFoundError` where there is none."""
        metadata = Path(path) / METADATA
        if not metadata.is_file():
            raise FileNotFoundError(f"{fspath(path)!r} holds no {METADATA}: it is not a pool that save_to_disk wrote")
        return cls(datasets.load_from_disk(fspath(path)), json.loads(metadata.read_text()))


def _features(dimension: int) -> "datasets.Features":
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "modality": datasets.Value("string"),
            "text": datasets.Value("string"),
            "image": datasets.Image(decode=False),
            "embedding": datasets.List(datasets.Value("float32"), length=dimension),
        }
    )


def _reference(image: Any) -> dict[str, Any]:
    """An image as datasets keeps it undecoded."""
    if isinstance(image, dict):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, str | PathLike):
        return {"bytes": None, "path": str(Path(image).absolute())}
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
