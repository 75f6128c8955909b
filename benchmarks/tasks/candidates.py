"""Embeddings of a data set's queries and candidates, each candidate once, however many pools hold it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.schema import Dialogues
from benchmarks.systems import System

from .contexts import Squashed


@dataclass
class Embedded:
    """
    `queries` `(n, q)`; `texts` `(t, q)` and `images` `(i, q)` (or `(i, vectors, q)`), or `None` where a data set's
    pools hold none; `text_rows`, `image_rows`: id -> row; `image_queries` `(n, q)` where the queries for images
    are not those for texts.
    """

    queries: torch.Tensor
    texts: torch.Tensor | None
    images: torch.Tensor | None
    text_rows: Mapping[str, int]
    image_rows: Mapping[str, int]
    image_queries: torch.Tensor | None = None

    def rows(self, pool: Mapping[str, Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a pool's texts and of its images."""
        return (
            torch.tensor([self.text_rows[i] for i in pool["text_ids"]], dtype=torch.long),
            torch.tensor([self.image_rows[i] for i in pool["image_ids"]], dtype=torch.long),
        )


def embed(
    system: System, data: Dialogues, contexts: Sequence[Any], *, texts: bool = True, squash: int | None = None,
    template: str = "{text}", bos: str | None = None,
) -> Embedded:  # fmt: skip
    """
    Embeds contexts and candidates.

    Args:
        texts: `False` leaves the pools' texts out.
        squash: resize images to this many pixels a side first.
        template: of a candidate text.
        bos: where the protocol puts it in a context, for the systems that use it.
    """
    text_rows, image_rows = candidate_rows(data, texts)
    pictures = [data.images[i] for i in image_rows]
    words = [template.format(text=data.texts[i]) for i in text_rows]
    bar = {"show_progress_bar": True}
    return Embedded(
        system.embed_dialogues(contexts, **bar, **({} if bos is None else {"bos": bos})),
        system.embed_texts(words, **bar) if words else None,
        system.embed_images(Squashed(pictures, squash) if squash else pictures, **bar) if pictures else None,
        text_rows,
        image_rows,
    )


def candidate_rows(data: Dialogues, texts: bool = True) -> tuple[dict[str, int], dict[str, int]]:
    """Text id -> row and image id -> row over all pools, in order of first appearance."""
    text_rows: dict[str, int] = {}
    image_rows: dict[str, int] = {}
    for pool, _ in by_pool(data.dialogues):
        for ids, rows in ((pool["text_ids"] if texts else (), text_rows), (pool["image_ids"], image_rows)):
            for i in ids:
                rows.setdefault(i, len(rows))
    return text_rows, image_rows


def by_pool(dialogues: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Sequence[str]], list[int]]]:
    """Dialogues grouped by the pool they share: `(pool, positions)`."""
    groups: dict[int, tuple[Any, list[int]]] = {}
    for i, dialogue in enumerate(dialogues):
        groups.setdefault(id(dialogue["pool"]), (dialogue["pool"], []))[1].append(i)
    return list(groups.values())
