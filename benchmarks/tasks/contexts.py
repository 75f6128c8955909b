"""A dialogue's context as a protocol serialises it, with its pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from benchmarks.schema import Dialogues
from modeling_unimur.images_unimur import decode_image


def context_of(
    dialogue: Mapping[str, Any],
    images: Mapping[str, Any],
    serialisation: str | Mapping[str, str] = "turns",
    context: str = "all",
) -> list[dict]:
    """
    The turns before the target as chat messages, for `embed_dialogues` and `retrieve`.

    Args:
        serialisation: `"turns"`, the processor's own; or a template for each speaker's texts (`{text}`), `join` between
            turns (after a turn of images alone `image_join`, where given) and `end` after the last, all in one
            message. Images keep their places.
        context: `"all"`, `"text"` (without images) or `"last"` (the last turn's text alone).

    Raises:
        ValueError: a speaker without a template; an empty context.
    """
    turns = dialogue["turns"][: dialogue["target_turn"]]
    turns = turns[-1:] if context == "last" else turns
    parts = []
    for turn in turns:
        elements = [e for e in turn["elements"] if context == "all" or e["type"] == "text"]
        content = []
        for e in elements:
            if e["type"] == "image":
                content.append({"type": "image", "image": images[e["image_id"]]})
                continue
            text = e["text"]
            if serialisation != "turns":
                if turn["speaker"] not in serialisation:
                    raise ValueError(f"dialogue {dialogue['dialogue_id']!r}: no template for {turn['speaker']!r}")
                text = serialisation[turn["speaker"]].format(text=text, image="")
            content.append({"type": "text", "text": text})
        if content:
            parts.append({"role": turn["speaker"], "content": content})
    if not parts:
        raise ValueError(f"dialogue {dialogue['dialogue_id']!r} has no context")
    if serialisation == "turns":
        return parts
    join = serialisation.get("join", "\n")
    joined: list[dict] = []
    for i, part in enumerate(parts):
        lone = all(e["type"] == "image" for e in parts[i - 1]["content"])
        between = serialisation.get("image_join", join) if lone else join
        joined += [*_text(between if i else ""), *part["content"]]
    joined += _text(serialisation.get("end", ""))
    return [{"role": "user", "content": _merged(joined)}]


def _text(words: str) -> list[dict]:
    return [{"type": "text", "text": words}] if words else []


def _merged(content: list[dict]) -> list[dict]:
    """Neighbouring texts as one: a separator is not a text of its own."""
    merged: list[dict] = []
    for part in content:
        if merged and part["type"] == merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    return merged


def context_images(dialogue: Mapping[str, Any]) -> list[str]:
    """The ids of the images before the target turn, in order."""
    turns = dialogue["turns"][: dialogue["target_turn"]]
    return [e["image_id"] for turn in turns for e in turn["elements"] if e["type"] == "image"]


class Contexts(Sequence):
    """
    The contexts of a data set's dialogues, each made when it is read: all resized pictures would fill the memory.

    Args:
        serialisation, context: as [`context_of`]'s.
        squash: resize their images to this many pixels a side.
    """

    def __init__(
        self, data: Dialogues, serialisation: str | Mapping[str, str], context: str = "all", squash: int | None = None
    ):
        self.data, self.serialisation, self.context, self.squash = data, serialisation, context, squash

    def __len__(self) -> int:
        return len(self.data.dialogues)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        dialogue, images = self.data.dialogues[index], self.data.images
        if self.squash:
            ids = context_images(dialogue)
            images = dict(zip(ids, Squashed([images[i] for i in ids], self.squash), strict=True))
        return context_of(dialogue, images, self.serialisation, self.context)


class Squashed(Sequence):
    """Images resized to `side` x `side` without keeping their shape, as FROMAGe does before CLIP's preprocessing."""

    def __init__(self, images: Sequence[Any], side: int):
        self.images, self.side = images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return decode_image(self.images[index]).resize((self.side, self.side), Image.BICUBIC)
