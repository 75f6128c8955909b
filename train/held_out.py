"""What is held out of a closed form, and the recall by which its open settings are chosen."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

HELD_OUT, ONE_IN = 1000, 10  # items at most, and of how many one
FEW, FOLDS = 2000, 3  # up to so many items each is held out once, in one of so many splits

Rows = dict[str, torch.Tensor]


class HeldOut:
    """
    The rows of the items that are held out: one item in ten by a hash of its id, a thousand at most over all processes.

    Which they are depends on the ids alone, not on the order of the data or the number of processes.

    Args:
        size: how many at most.
        every: holds every item, not one in ten.
    """

    def __init__(self, size: int = HELD_OUT, every: bool = False):
        self.size, self.every = size, every
        self.items: list[tuple[int, Rows]] = []

    @staticmethod
    def hash(name: str) -> int:
        """Of an item's id: what decides whether it is held, and in which order."""
        return zlib.crc32(f"held out {name}".encode())

    def number(self, name: str) -> int | None:
        """The hash of an item that is held out, unless others fill the place; `None` for the rest."""
        number = self.hash(name)
        return number if self.every or number < 2**32 // ONE_IN else None

    def add(self, number: int, rows: Rows) -> None:
        """Holds the rows of the item with this hash."""
        self.items.append((number, rows))

    def surplus(self, slack: int = 0) -> list[Rows]:
        """Takes out the items beyond the size, those of the largest hashes."""
        if len(self.items) <= self.size + slack:
            return []
        self.items.sort(key=lambda item: item[0])
        more, self.items = self.items[self.size :], self.items[: self.size]
        return [rows for _, rows in more]

    def rows(self) -> list[Rows]:
        """What is held of each item, in the order of the hashes."""
        return [rows for _, rows in sorted(self.items, key=lambda item: item[0])]

    def gather(self) -> None:
        """Brings together those of all processes."""
        self.items = gather_object(self.items)


def few_or_part(rows: Any) -> HeldOut:
    """Holds every item of a data set of at most `FEW`, whose tenth would judge by chance, else one in ten."""
    few = hasattr(rows, "__len__") and len(rows) <= FEW
    return HeldOut(len(rows), every=True) if few else HeldOut()


@dataclass
class Replies:
    """
    Held-out queries and the labels of each: rows `(n, ...)`; where a reply has no text or no image, its row is zero.

    Attributes:
        queries, texts: states `(n, d)` of the contexts and of their reply's words.
        images: view -> features `(n, c)`.
        has_text, has_image: `(n,)` bool.
    """

    queries: torch.Tensor
    texts: torch.Tensor
    images: dict[str, torch.Tensor]
    has_text: torch.Tensor
    has_image: torch.Tensor

    def recall(self, text_map: Any, image_map: Any, view: str) -> float:
        """
        Args:
            text_map, image_map: states, and features of the view, to the shared space.

        Table 1's overall R@1 (0 to 1) over one pool of all the texts and images: the share of reply texts that rank first
        among texts, and of reply images that rank first among images and are shown, which an image is where the best one
        scores above the second text (Section 3.4); where no query has a text, every image counts as shown.
        """
        queries = F.normalize(text_map(self.queries), dim=-1)
        images = queries @ F.normalize(image_map(self.images[view][self.has_image]), dim=-1).T
        texts = queries @ F.normalize(text_map(self.texts[self.has_text]), dim=-1).T
        second = texts.topk(2, dim=1).values[:, 1] if texts.shape[1] > 1 else texts.new_full((len(texts),), -torch.inf)
        is_shown = (images.amax(1) > second)[self.has_image]
        hits = first(texts[self.has_text]).sum() + (first(images[self.has_image]) & is_shown).sum()
        return (hits / (self.has_text.sum() + self.has_image.sum())).item()

    def image_recall(self, text_map: Any, view: str = "projected") -> float:
        """R@1 (0 to 1) of the replies' images alone, in the features' own space."""
        queries = F.normalize(text_map(self.queries[self.has_image]), dim=-1)
        images = F.normalize(self.images[view][self.has_image], dim=-1)
        return first(queries @ images.T).float().mean().item()


def first(scores: torch.Tensor) -> torch.Tensor:
    """`(n, n)` scores, each query's own on the diagonal -> `(n,)` bool: it is above all others; ties are misses."""
    return (scores >= scores.diagonal()[:, None]).sum(1) == 1


def pair_replies(rows: Sequence[Rows]) -> Replies | None:
    """Held-out pairs as replies: a caption asks; its image and the next of its captions, where there are more, answer."""
    captions = [r["state"] for r in rows]
    return _replies(
        [c[0] for c in captions], [c[1] if len(c) > 1 else None for c in captions],
        [{view: r[view][0] for view in ("pooled", "projected")} for r in rows],
    )  # fmt: skip


def document_replies(rows: Sequence[Rows]) -> Replies | None:
    """Held-out documents as replies: the context asks, the reply's words and image answer."""
    return _replies(
        [r["state"] for r in rows], [r.get("reply") for r in rows],
        [{view: r[view] for view in ("pooled", "projected")} if "pooled" in r else None for r in rows],
    )  # fmt: skip


def _replies(
    queries: list[torch.Tensor], texts: list[torch.Tensor | None], images: list[Rows | None]
) -> Replies | None:
    given = [image for image in images if image is not None]
    if not queries or not given:
        return None
    return Replies(
        torch.stack(queries).float(),
        torch.stack([text if text is not None else torch.zeros_like(queries[0]) for text in texts]).float(),
        {view: torch.stack([(image or _zeros(given[0]))[view] for image in images]).float() for view in given[0]},
        torch.tensor([text is not None for text in texts]), torch.tensor([image is not None for image in images]),
    )  # fmt: skip


def _zeros(rows: Rows) -> Rows:
    return {view: torch.zeros_like(value) for view, value in rows.items()}
