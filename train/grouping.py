"""Pairs by their image: a data set with a row for each caption becomes one with a row for each image; shares held out."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import datasets
import pyarrow.compute as pc
from transformers.utils import logging

from train.data import FEATURES

logger = logging.get_logger("train")

Pairs = TypeVar("Pairs", datasets.Dataset, datasets.IterableDataset)


def one_row_an_image(pairs: datasets.Dataset) -> datasets.Dataset:
    """
    Rows that name the same file as one row, the first, with the captions of all; other rows stay as they are.

    Flickr8k and its like have a row for each caption. Apart, an image's rows would be each other's negatives, and an image
    would count once for each of its captions.
    """
    paths = pc.struct_field(pairs.with_format("arrow")["image"][:], "path").to_pylist()
    rows_of: dict[Any, list[int]] = {}
    for row, path in enumerate(paths):
        rows_of.setdefault(row if path is None else path, []).append(row)
    if len(rows_of) == len(pairs):
        return pairs
    captions = pairs["captions"][:]
    merged = [[caption for row in rows for caption in captions[row] or ()] for rows in rows_of.values()]
    logger.info(f"{len(pairs)} rows show {len(merged)} images: an image is one row, with the captions of all its rows")
    first = pairs.select([rows[0] for rows in rows_of.values()]).remove_columns("captions")
    return first.add_column("captions", merged, feature=FEATURES["captions"]).select_columns(pairs.column_names)


def is_held_out(name: str, share: float) -> bool:
    """Whether the item of this id is held out, by its hash: in every run, process and order of the data the same."""
    return zlib.crc32(f"validation {name}".encode()) < share * 2**32


def hold_out(pairs: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and those held out, by the hash of their id; streamed ones stay so."""
    if not hasattr(pairs, "__len__"):
        return pairs.filter(_kept(share, False)), pairs.filter(_kept(share, True))
    held = [is_held_out(name, share) for name in pairs["id"]]
    return (
        pairs.select([i for i, out in enumerate(held) if not out]),
        pairs.select([i for i, out in enumerate(held) if out]),
    )


def _kept(share: float, wanted: bool) -> Callable[[dict[str, Any]], bool]:
    return lambda row: is_held_out(row["id"], share) == wanted
