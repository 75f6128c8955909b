"""Interleaved documents as training rows: a dialogue whose context may show images, and the reply it leads to."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers.utils import logging

from train.conversations import ImageId, Turn, temporary_folder, write_conversations
from train.rows import FEATURES, make_row

PAIRS, OF_WORDS, WITH_IMAGES = range(3)  # the kinds of rows, of which a batch holds one
KINDS = OF_WORDS, WITH_IMAGES  # of documents

logger = logging.get_logger("train")

CONTEXT = 256  # turns before a reply that are kept: a chat of 10,000 would cost their square


class InterleavedDocuments(Dataset):
    """
    Every reply of every conversation as a row for [`train.collate.PairCollator`].

    They go beyond the paper's caption pairs: the context (texts and images) is aligned with its reply by eq. 3-6, so that
    both maps learn from images inside a conversation. By choice a reply's text is a target of eq. 1-2, too, behind its
    context (`predicted` of the collator).

    A reply's targets are its texts, joined by a space, and the first of its images. Its context is the turns before it, the
    last `CONTEXT` of them; a warning counts where there are more. A reply that cannot be used has a row too, with what is
    wrong with it, to be counted where batches are made.

    Args:
        conversations: rows of [`train.conversations.CONVERSATIONS`].
        images: rows with `id` and either `image` or cached `image_features` and `image_embeds`.
        keep: an object that lives as long as these documents do, such as the temporary folder they are read from.
    """

    def __init__(self, conversations: datasets.Dataset, images: Any, keep: Any = None):
        self.conversations, self._keep = conversations, keep
        self._turns = conversations.data.column("turns")
        rows: list[tuple[int, int, bool]] = []
        self._problems: dict[int, str] = {}
        self._several: set[int] = set()
        long = 0
        for number, replies in enumerate(conversations["replies"]):
            if len(replies) > 1:
                self._several.add(number)
            with_images = [
                t for t, turn in enumerate(self._turns[number].as_py()) if any(e["image"] is not None for e in turn)
            ]
            for reply in replies:
                turn = reply["turn"]
                if reply["problem"] is not None:
                    self._problems[len(rows)] = reply["problem"]
                first = max(0, turn - CONTEXT)
                long += first > 0
                at = bisect_left(with_images, first)
                rows.append(
                    (number, turn, at < len(with_images) and with_images[at] < turn and reply["problem"] is None)
                )
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        self._numbers, self._at, self._shows = table[:, 0], table[:, 1], table[:, 2].astype(bool)
        if long:
            logger.warning(f"{long} replies have more than {CONTEXT} turns before them: the last {CONTEXT} are kept")
        self.use_images(images)

    @classmethod
    def of(cls, conversations: Iterable[dict[str, Any]], images: Any) -> "InterleavedDocuments":
        """Of rows of [`train.conversations.CONVERSATIONS`], which are kept in a temporary file."""
        keep = temporary_folder()
        return cls(write_conversations(conversations, Path(keep.name) / "conversations.arrow"), images, keep)

    def select(self, numbers: Sequence[int]) -> "InterleavedDocuments":
        """The documents of some conversations, by their numbers, with the same images."""
        return InterleavedDocuments(self.conversations.select(numbers).flatten_indices(), self.images, self._keep)

    def use_images(self, images: Any) -> None:
        """Takes another table of images, such as their cached features. A row that needs one it lacks is `missing`."""
        self.images = images
        self._rows = {image_id: row for row, image_id in enumerate(images["id"])}

    def kind(self, index: int) -> int:
        """`WITH_IMAGES` where a document's context has an image, else `OF_WORDS`."""
        return WITH_IMAGES if self._shows[index] else OF_WORDS

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        """A document's id: its conversation's, with the turn of the reply where there are several replies."""
        number = int(self._numbers[index])
        name = self.conversations.data.column("id")[number].as_py()
        return f"{name}-{self._at[index]}" if number in self._several else name

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        `id`, `context` (turns of texts and [`ImageId`]s), `text` and `image` (an id) of the reply, either `None`, `images`
        (id -> row), and `problem` where the document is none.
        """
        document: dict[str, Any] = {
            "id": self.name(index), "context": [], "text": None, "image": None, "images": {},
        }  # fmt: skip
        if index in self._problems:
            return document | {"problem": self._problems[index]}
        at = int(self._at[index])
        first = max(0, at - CONTEXT)
        *context, reply = (self._turn(turn) for turn in self._slice(index, first, at + 1))
        texts = [e for e in reply if isinstance(e, str)]
        target = next((e.id for e in reply if not isinstance(e, str)), None)
        wanted = {e.id for turn in context for e in turn if not isinstance(e, str)}
        wanted |= set() if target is None else {target}
        absent = min(wanted - self._rows.keys(), default=None)
        if absent is not None:
            return document | {"problem": f"missing: its image {absent!r} was left out"}
        return document | {
            "context": context, "text": texts[0] if len(texts) == 1 else " ".join(t.strip() for t in texts) or None,
            "image": target, "images": {name: self.images[self._rows[name]] for name in sorted(wanted)},
        }  # fmt: skip

    def _slice(self, index: int, start: int, stop: int) -> list[list[dict[str, Any]]]:
        """Some turns of a document's conversation, without the rest of it."""
        return self._turns[int(self._numbers[index])].values[start:stop].to_pylist()

    @staticmethod
    def _turn(elements: list[dict[str, Any]]) -> Turn:
        return [e["text"] if e["image"] is None else ImageId(e["image"]) for e in elements]

    def pairs(self) -> datasets.Dataset:
        """
        The images of the conversations that share a turn with words, as caption pairs: for eq. 1-2 and the closed form
        where no other pairs are given.

        Raises:
            ValueError: there is none.
        """
        rows = list(self._pair_rows())
        if not rows:
            lost = f". Of {len(self)} replies these cannot be used: {dict(Counter(self._problems.values()))}"
            raise ValueError(
                "no turn of these dialogues has an image beside words: give image-caption pairs, too, with --train_data"
                + (lost if self._problems else "")
            )
        return datasets.Dataset.from_list(rows, features=FEATURES)

    def _pair_rows(self) -> Iterator[dict[str, Any]]:
        captions: dict[str, list[str]] = {}
        for turns in self.conversations["turns"]:
            for turn in map(self._turn, turns):
                text = " ".join(e.strip() for e in turn if isinstance(e, str))
                image = next((e.id for e in turn if not isinstance(e, str)), None)
                if text and image is not None and text not in captions.setdefault(image, []):
                    captions[image].append(text)
        for image, texts in captions.items():
            yield make_row(image, self.images[self._rows[image]]["image"], texts, "dialogues")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_keep": None, "_turns": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._turns = self.conversations.data.column("turns")


def mixed(pairs: Any, documents: InterleavedDocuments, share: float | None = None) -> tuple[Dataset, list[int]]:
    """
    Pairs and documents as one data set, and the kind of each row for [`train.sampler.GroupedSampler`].

    Args:
        pairs: caption pairs, cached or not.
        share: the documents' share of an epoch's rows, between 0 and 1; by default as they are. The kind that has too few
            rows for it is repeated as often as needed, and nothing is left out.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    counts = [len(pairs), len(documents)]
    if share is not None:
        share = checked_share(share)
        needed = [round(counts[1] / share * (1 - share)), round(counts[0] / (1 - share) * share)]
        counts = [max(count, least) for count, least in zip(counts, needed, strict=True)]
    kinds = [documents.kind(i) for i in range(len(documents))]
    rows = [_repeated(len(part), count) for part, count in zip((pairs, documents), counts, strict=True)]
    groups = [PAIRS] * counts[0] + [kinds[i] for i in rows[1]]
    parts = [part if len(part) == count else Subset(part, picked)
             for part, count, picked in zip((pairs, documents), counts, rows, strict=True)]  # fmt: skip
    return ConcatDataset(parts), groups


def checked_share(share: float) -> float:
    """Raises `ValueError` where it is not between 0 and 1."""
    if not 0 < share < 1:
        raise ValueError(f"--dialogue_share {share}: expected a number between 0 and 1")
    return share


def _repeated(length: int, count: int) -> list[int]:
    """`count` indices of `length` rows: whole passes, then some that are drawn, always the same."""
    if not length:
        return []
    drawn = np.random.default_rng(0).permutation(length)[: count % length]
    return [*range(length)] * (count // length) + sorted(int(i) for i in drawn)
