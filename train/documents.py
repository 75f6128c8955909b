"""Interleaved documents as training rows: a dialogue whose context may show images, and the reply it leads to."""

from collections.abc import Sequence
from typing import Any

import datasets
from torch.utils.data import Dataset


class InterleavedDocuments(Dataset):
    """
    Dialogues of the one schema as rows for [`train.collate.PairCollator`].

    They go beyond the paper's caption pairs: the context (texts and images) is aligned with its reply by eq. 3-6, so
    that both maps learn from images that stand inside a conversation. They take no part in eq. 1-2.

    Args:
        dialogues: rows with `dialogue_id`, `turns`, `target_turn` and `gold`; the context is `turns[:target_turn]`,
            the targets are the first of `gold["text_ids"]` and of `gold["image_ids"]` (the first-image rule).
        texts: text id -> text.
        images: rows with `id` and either `image` or cached `image_features` and `image_embeds`.

    Raises:
        ValueError: a dialogue refers to an id that is not in its table.
    """

    def __init__(self, dialogues: Sequence[dict], texts: dict[str, str], images: datasets.Dataset):
        self.dialogues, self.texts = dialogues, texts
        self.use_images(images)

    def use_images(self, images: datasets.Dataset) -> None:
        """Takes another table of images, such as their cached features; it must hold every id the dialogues name."""
        self.images = images
        self._rows = {image_id: row for row, image_id in enumerate(images["id"])}
        for dialogue in self.dialogues:
            wanted = {e["image_id"] for t in dialogue["turns"] for e in t["elements"] if e["type"] == "image"}
            for kind, ids, table in (
                ("image", wanted, self._rows),
                ("text", dialogue["gold"]["text_ids"], self.texts),
            ):
                for missing in set(ids) - table.keys():
                    raise ValueError(
                        f"dialogue {dialogue['dialogue_id']!r} refers to the {kind} {missing!r}, which is missing"
                    )

    def shows_image(self, index: int) -> bool:
        """Whether a document's context has an image."""
        dialogue = self.dialogues[index]
        return any(e["type"] == "image" for t in dialogue["turns"][: dialogue["target_turn"]] for e in t["elements"])

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`id`, `context` (turns of texts and image ids in a one-element tuple), `text`, `image`, `images` (id -> row)."""
        dialogue = self.dialogues[index]
        gold = dialogue["gold"]
        target = gold["image_ids"][0] if gold["image_ids"] else None
        context = [
            [e["text"] if e["type"] == "text" else (e["image_id"],) for e in turn["elements"]]
            for turn in dialogue["turns"][: dialogue["target_turn"]]
        ]
        shown = {e[0] for turn in context for e in turn if isinstance(e, tuple)} | ({target} - {None})
        return {
            "id": dialogue["dialogue_id"],
            "context": context,
            "text": self.texts[gold["text_ids"][0]] if gold["text_ids"] else None,
            "image": target,
            "images": {image_id: self.images[self._rows[image_id]] for image_id in sorted(shown)},
        }
