"""
What a user may give to a verb, brought into one form: a sequence of items, and whether a single one was given.

| given | `embed_images`, `build_pool` | `embed_texts` | `embed_dialogues` | `retrieve`, the pipeline |
|---|---|---|---|---|
| a string | a path; of a folder: its images | one text | one dialogue | one dialogue |
| an image (see [`is_image`]) | one image | refused | one dialogue | one dialogue |
| chat messages, or one message | refused | refused | one dialogue | one dialogue |
| a list of strings and images | n items | n texts | **n dialogues** | **one dialogue of n turns** |
| a list of lists | refused | refused | n dialogues | n dialogues |
| array, Series, `datasets` column, `KeyDataset`, generator | n items | n texts | n dialogues | n dialogues |

An item that is refused is named by its place.
"""

import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .dialogues_unimur import is_message
from .images_unimur import image_files, is_image

logger = logging.get_logger(__name__)

KINDS = ("dialogues", "images", "texts")
# A flat list of so many strings is a list of dialogues more likely than one dialogue.
MANY_TURNS = 32


def as_items(kind: str, given: Any) -> tuple[Sequence[Any], bool]:
    """
    Args:
        kind: `"dialogues"`, `"images"` or `"texts"`: what the items are to be.
        given: one item, or any collection of them, as the module's table has it. What has a length and is indexed by
            number stays as it is, so that a column of pictures is read as it is embedded; a generator is read now.

    Returns:
        The items, and whether `given` was a single one.

    Raises:
        ValueError: neither an item nor an ordered collection; a folder without images.
    """
    if kind == "images" and isinstance(given, str | os.PathLike) and os.path.isdir(given):
        return image_files(given), False
    if _is_one(kind, given):
        return [given], True
    return _collection(kind, given), False


def as_dialogues(given: Any) -> tuple[Sequence[Any], bool]:
    """As `as_items("dialogues", …)`, but that a list, lists of lists aside, is one dialogue whose items are its turns."""
    if not isinstance(given, list | tuple):
        return as_items("dialogues", given)
    if given and all(isinstance(dialogue, list | tuple) for dialogue in given):
        return given, False
    if len(given) > MANY_TURNS and all(isinstance(turn, str) for turn in given):
        logger.warning(
            f"a list of {len(given)} strings is read as one dialogue of so many turns; if each is a dialogue of its own, "
            "write [[text], [text], …]"
        )
    return [given], True


def warn_of_turns(dialogues: Sequence[Any]) -> None:
    """Warns where a list to embed mixes words and images, and so is likely meant as one dialogue."""
    if not isinstance(dialogues, list | tuple) or len(dialogues) < 2:
        return
    if any(isinstance(d, str) for d in dialogues) and any(is_image(d) for d in dialogues):
        logger.warning(
            f"a list of {len(dialogues)} texts and images is embedded as so many dialogues; if they are the turns of one, "
            "write [[text, image, …]]"
        )


def batches(items: Sequence[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """Consecutive items, `size` at a time, each list with the number of its first."""
    for start in range(0, len(items), size):
        stop = min(start + size, len(items))
        # A sequence can be sliced, which a column of datasets answers in one read; other data sets know numbers alone.
        sliced = isinstance(items, Sequence)
        yield start, list(items[start:stop]) if sliced else [items[i] for i in range(start, stop)]


def check_count(name: str, value: Any) -> int:
    """An argument that counts, at least 1, as an `int`; refuses with a `ValueError` whatever is no whole number."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    return count


def check_pool(pool: Any) -> None:
    """Refuses with a `ValueError` what cannot be searched."""
    if all(hasattr(pool, name) for name in ("check_made_by", "append", "search")):
        return
    if isinstance(pool, str | os.PathLike):
        raise ValueError(f"pool={os.fspath(pool)!r} is a path: CandidatePool.load_from_disk(path) opens a saved pool")
    raise ValueError(f"pool is a {type(pool).__name__}: model.build_pool(images=[…], texts=[…]) makes a pool")


def kind_of(item: Any, *, query: bool = False) -> tuple[str, Any]:
    """
    What a value is embedded as by `encode`: `"dialogues"`, `"images"` or `"texts"`, and the value in that form.

    Args:
        item: a string, an image, chat messages, one message, or `{"image": …, "text": …}` (each one value or a list),
            which is a dialogue of one turn.
        query: make a dialogue of a string and of an image too.

    Raises:
        ValueError: a dict of other keys.
    """
    if is_message(item):
        return "dialogues", [item]
    if isinstance(item, dict) and not is_image(item):
        unknown = sorted(map(str, set(item) - {"image", "text"}))
        given = [_listed(item[name]) for name in ("image", "text") if item.get(name) is not None]
        if unknown or not given:
            raise ValueError(f"a dict of {sorted(map(str, item))}: expected 'image', 'text' or both")
        if len(given) == 1 and len(given[0]) == 1:
            return kind_of(given[0][0], query=query)
        return "dialogues", [{"role": "user", "content": [_part(value) for values in given for value in values]}]
    if isinstance(item, list | tuple):
        return "dialogues", item
    if not isinstance(item, str) and not is_image(item):
        raise ValueError(f"expected a text, an image, chat messages or {{'image', 'text'}}, got {type(item).__name__}")
    if query:
        return "dialogues", [item]
    return ("texts" if isinstance(item, str) else "images"), item


def _is_one(kind: str, given: Any) -> bool:
    if isinstance(given, str):
        return True
    if kind == "texts":
        return False
    if is_image(given):
        return True
    messages = isinstance(given, list | tuple) and bool(given) and all(is_message(turn) for turn in given)
    return kind == "dialogues" and (messages or is_message(given))


def _collection(kind: str, given: Any) -> Sequence[Any]:
    if isinstance(given, list | tuple):
        return given
    if hasattr(given, "column_names") or hasattr(given, "columns"):
        raise ValueError(f"{kind} is a whole table ({type(given).__name__}): give one of its columns, table['name']")
    for name in ("to_list", "to_pylist"):  # pandas and polars, Arrow
        if hasattr(given, name):
            return getattr(given, name)()
    if isinstance(given, np.ndarray):
        if (given.ndim == 1 and given.dtype.kind in "OUT") or (kind == "images" and given.ndim == 4):
            return list(given)
        expected = "a list of strings, or an array of them" if kind == "texts" else "pixels are uint8, (n, h, w, 3)"
        raise ValueError(f"{kind} cannot be an array of {given.dtype} and shape {given.shape}: {expected}")
    if isinstance(given, torch.Tensor):
        raise ValueError(f"{kind} cannot be a tensor: give what they are made of, not the processor's output")
    if isinstance(given, Mapping | Set | bytes | bytearray | memoryview):
        raise ValueError(f"expected a list of {kind}, got {type(given).__name__}")
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return given
    if isinstance(given, Iterable):
        return list(given)
    raise ValueError(f"expected a list of {kind}, got {type(given).__name__}")


def _part(element: Any) -> dict[str, Any]:
    kind = "text" if isinstance(element, str) else "image"
    return {"type": kind, kind: element}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
