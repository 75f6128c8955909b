"""From rows to training batches: images decoded in one guarded place, broken pairs dropped and counted."""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from modeling_unimur import UniMuRProcessor
from modeling_unimur.batch_unimur import Captions
from modeling_unimur.images_unimur import BadImageError

logger = logging.get_logger(__name__)

EXAMPLES = 3  # kept for each reason
CACHED_CAPTIONS = ("text_embeds", "ret_states")


class TooManyBadPairsError(RuntimeError):
    """More of the pairs are broken than the set share allows."""


class SkipCounter:
    """
    Counts of pairs seen and of pairs left out by reason, with the first few examples of each.

    Counts are plain dicts, so that they can come back from loader workers and other processes and be added up here.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.seen = 0

    def update(
        self, counts: Mapping[str, int], seen: int, examples: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Adds the counts of a batch, a worker or a process, and its `examples` (reason -> descriptions) if given."""
        self.counts.update(counts)
        self.seen += seen
        for reason, given in (examples or {}).items():
            known = self.examples.setdefault(reason, [])
            known.extend(given[: EXAMPLES - len(known)])

    @property
    def share(self) -> float:
        """Share of the pairs seen that were left out."""
        return sum(self.counts.values()) / max(self.seen, 1)

    def check(self, max_share: float) -> None:
        """Raises [`TooManyBadPairsError`] where more than `max_share` of the pairs were left out."""
        if self.share > max_share:
            limit = f"more than the {max_share:.1%} allowed"
            raise TooManyBadPairsError(f"{self}: {limit}. Fix the data or raise --max_bad_share{self.details()}")

    def details(self) -> str:
        """The examples, one a line and each line led by a line break; empty where none was kept."""
        return "".join(f"\n  {reason}: {example}" for reason, kept in self.examples.items() for example in kept)

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.counts.most_common())
        skipped = sum(self.counts.values())
        return f"{skipped} of {self.seen} pairs left out ({self.share:.1%})" + (f": {reasons}" if reasons else "")


class PairCollator:
    """
    Batches of caption pairs and interleaved documents for [`UniMuRModel.forward`].

    Args:
        processor: the model's.
        caption: `"random"`, one of an image's captions drawn per epoch, or `"first"`.
        seed: of that draw.
        pack: several sequences share a row of the LLM's input, instead of padding (see [`plan_packing`]).

    A row is a caption pair (`id`, `image`, `captions`) or a document (see [`train.documents.InterleavedDocuments`]),
    its images undecoded or given as cached `image_features` (c float32) and `image_embeds` (q float32). A row with a
    bad image or without a caption is dropped; `skipped` (`dict[str, int]`) counts them by reason and `n_seen` (`int`)
    all. The first few of each reason are logged by name, in the process that read them. A batch without any usable row
    repeats the last good one, with a warning. Pairs that all have cached
    `text_embeds` (captions, q), and `ret_states` (captions, d), give those of the drawn captions in place of their tokens.

    Attributes:
        every_caption (`bool`): a pair gives an item for each of its captions, instead of one, and each of these again with
            something before it where pairs are read as conversations.
        pair_contexts (`str`): what e_t of a pair is read behind: `"caption"`, as in the paper, or `"conversations"`, where a
            third of the pairs shows the image before its caption, and a third two of its captions in turn, as somebody
            would speak of a picture (of one caption, half show the image). Cached `ret_states` are not theirs.
        named (`bool`): a batch also has `names`, the row's id for each image of pairs and for each document, and `replies`,
            the documents' texts.
        worded (`bool`): a batch of pairs also has `words`, the caption of each item.
        predicted (`str`): which replies of documents are targets of eq. 1-2 behind their contexts: `"none"`, `"after images"`,
            those whose context shows one, since W_i2t learns from no other, or `"all"`.
        images (`bool`): whether images are read; without them a batch is for the mapper's loss alone.
        epoch (`int`): with the seed and the row's id, what the draw of captions depends on; set it before each epoch.

    Raises:
        TooManyBadPairsError: no row of the first batch is usable.
        ValueError: `caption` is neither of the two.
    """

    every_caption = named = worded = False
    images = True
    pair_contexts = "caption"
    predicted = "none"

    def __init__(self, processor: UniMuRProcessor, caption: str = "random", seed: int = 0, pack: bool = False):
        if caption not in ("random", "first"):
            raise ValueError(f"caption must be 'random' or 'first', got {caption!r}")
        self.processor, self.caption, self.seed, self.pack = processor, caption, seed, pack
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it too
        self._spare: tuple[list[dict[str, Any]], list, str] | None = None
        self._logged: Counter[str] = Counter()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        items, images, names, skips = self._usable(rows)
        cached = bool(images) and isinstance(images[0], tuple)
        replies = [item["text"] for item in items]
        states = self._captions([item.pop("cached", {}) for item in items])
        if "text_embeds" in states:
            items = [item | {"text": None} for item in items]
        batch = self.processor.documents(items, None if cached or not self.images else images, pack=self.pack)
        if self.pair_contexts != "caption" and any("context" not in row for row in rows):
            # One that shows its own target would teach W_i2t to name the image to [RET], whatever that does to its words.
            batch["contexts"]["fixed_images"] = True
        if "ret_states" in states:
            batch["contexts"] = {"states": states["ret_states"]}
        if "text_embeds" in states:
            batch["targets"] |= {"text_rows": torch.arange(len(items)), "text_embeds": states["text_embeds"]}
        if cached:
            features, embeds = (
                torch.from_numpy(np.asarray(values, dtype=np.float32)) for values in zip(*images, strict=True)
            )
            batch["images"] = {"features": features, "embeds": embeds}
        named: dict[str, Any] = {"names": names, "replies": replies} if self.named else {}
        words = [item["caption"][1] for item in items if item["caption"] and item["caption"][0] is not None]
        if self.worded and words:
            named["words"] = words
        return {**batch, **named, "skipped": dict(skips.counts), "n_seen": skips.seen}

    def _usable(
        self, rows: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Any], list[str], SkipCounter]:
        """The items of the good rows (of the last good one where there is none), their images, the ids, what was left out."""
        items: list[dict[str, Any]] = []
        images: list[Any] = []
        names: list[str] = []
        skips = SkipCounter()
        for row in rows:
            problem, why = known_problem(row)
            if problem is None:
                given, needed, problem = self._document(row) if "context" in row else self._pair(row)
                why = "no caption"
            if problem is None:
                try:
                    ready = [self._image(image) for image in needed]
                except BadImageError as error:
                    problem, why = error.reason, str(error)
            if problem is not None:
                skips.update({problem: 1}, 1, {problem: [f"{row['id']!r}: {why}"]})
                self._logged[problem] += 1
                if self._logged[problem] <= EXAMPLES:
                    logger.warning(f"pair {row['id']!r} is left out ({problem}): {why}")
                continue
            skips.seen += 1
            items += [_shifted(item, len(images)) for item in given]
            images += ready
            names.append(row["id"])
            self._spare = given, ready, row["id"]
        if not items:
            broken = f"all {len(rows)} pairs of a batch are broken: {dict(skips.counts)}{skips.details()}"
            if self._spare is None:
                raise TooManyBadPairsError(broken)
            # A step needs a pair, in every process. Whether too many are broken is for the counts of all to say.
            logger.warning(f"{broken}\nthe last good pair is taken again")
            items, images, names = list(self._spare[0]), list(self._spare[1]), [self._spare[2]]
        return items, images, names, skips

    def _pair(self, row: dict[str, Any]) -> tuple[list[dict], list, str | None]:
        captions = usable_captions(row["captions"])
        if not captions:
            return [], [], "empty_caption"
        chosen: Sequence[int] = range(1)
        if self.every_caption:
            chosen = range(len(captions))
        elif self.caption == "random":
            chosen = [drawn(self.seed, self.epoch, row["id"], len(captions))]
        items = []
        for at, context in self._pair_contexts(row["id"], captions, chosen):
            cached = {name: row[name][at] for name in CACHED_CAPTIONS if name in row}
            if len(context) > 1:
                cached.pop("ret_states", None)
            items.append(
                {"caption": (0, captions[at]), "context": context, "image": 0, "text": captions[at], "cached": cached}
            )
        return items, [row] if self.images else [], None

    def _pair_contexts(
        self, pair_id: str, captions: Sequence[str], chosen: Sequence[int]
    ) -> list[tuple[int, list[list[str | int]]]]:
        """Captions of a pair, each with the turns that lead to it."""
        alone: list[tuple[int, list[list[str | int]]]] = [(at, [[captions[at]]]) for at in chosen]
        if self.pair_contexts == "caption":
            return alone
        read = []
        for at in chosen:
            contexts = conversations(captions, at)[1 if self.every_caption else 0 :]
            read.append((at, contexts[drawn(self.seed, self.epoch, f"context of {pair_id}, {at}", len(contexts))]))
        return alone + read if self.every_caption else read

    @staticmethod
    def _captions(cached: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """What is cached of the captions of every item."""
        names = [name for name in CACHED_CAPTIONS if all(name in given for given in cached)]
        return {name: torch.from_numpy(np.stack([given[name] for given in cached])) for name in names}

    def _document(self, row: dict[str, Any]) -> tuple[list[dict], list, str | None]:
        names = list(row["images"])
        context = [[names.index(e[0]) if isinstance(e, tuple) else e for e in turn] for turn in row["context"]]
        target = None if row["image"] is None else names.index(row["image"])
        shows = any(isinstance(e, int) for turn in context for e in turn)
        predicted = self.predicted == "all" or (self.predicted == "after images" and shows)
        caption = (None, row["text"]) if predicted and row["text"] is not None else None
        item = {"caption": caption, "context": context, "image": target, "text": row["text"]}
        return [item], list(row["images"].values()), None

    def _image(self, row: dict[str, Any]) -> Any:
        if "image_features" in row:
            return row["image_features"], row["image_embeds"]
        return self.processor.decode(row["image"])


def no_captions(device: torch.device) -> Captions:
    """A part of no rows, by which a process without captions takes part in eq. 1-2's mean."""
    none = torch.zeros(0, 1, dtype=torch.long, device=device)
    return {
        "input_ids": none, "attention_mask": none, "labels": none, "image_indices": none[:, 0],
        "label_positions": none[:, 0],
    }  # fmt: skip


def known_problem(row: Mapping[str, Any]) -> tuple[str | None, str]:
    """What its reader says is wrong with a row: the reason, `None` where nothing is, and the message."""
    reason, _, message = (row.get("problem") or "").partition(": ")
    return reason or None, message


def usable_captions(captions: Sequence[str | None] | None) -> list[str]:
    """A pair's captions, stripped, without the empty ones."""
    return [caption.strip() for caption in captions or () if caption and caption.strip()]


def conversations(captions: Sequence[str], at: int) -> list[list[list[str | int]]]:
    """
    The conversations as which a pair of image 0 is read, turns that end in its caption `at`: that alone, behind the image and,
    where there is another, behind the next caption.
    """
    before: list[list[list[str | int]]] = [[], [[0]]]
    if len(captions) > 1:
        before.append([[captions[(at + 1) % len(captions)]]])
    return [[*turns, [captions[at]]] for turns in before]


def drawn(seed: int, epoch: int, name: str, count: int) -> int:
    """Which of `count` captions, or contexts, `name` takes in an epoch: by a hash, so the same in every worker and run."""
    return zlib.crc32(f"{seed}-{epoch}-{name}".encode()) % count


def _shifted(item: dict[str, Any], by: int) -> dict[str, Any]:
    """The item with its image indices counted from the batch's first image."""
    caption, target = item["caption"], item["image"]
    return item | {
        "caption": caption and (None if caption[0] is None else caption[0] + by, caption[1]),
        "context": [[e + by if isinstance(e, int) else e for e in turn] for turn in item["context"]],
        "image": None if target is None else target + by,
    }
