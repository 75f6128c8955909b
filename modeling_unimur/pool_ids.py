"""The ids of candidates: one form in and out, made where none are given, and unique over images and texts."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np


def id_string(value: Any) -> str:
    """
    The form in which every pool keeps and compares an id: `7`, `numpy.int64(7)` and `"7"` are the same one.

    Raises:
        ValueError: it is neither a string, an integer, a path nor a UUID.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"the id {value!r} is of type {type(value).__name__}: give a string or an integer")


def id_strings(name: str, values: Any) -> list[str]:
    """
    A list, set, array, tensor or column of ids as [`id_string`] makes them; `None` is none.

    Args:
        name: of the argument, for messages.

    Raises:
        ValueError: one string, no iterable, or a value that is no id.
    """
    if values is None:
        return []
    if isinstance(values, str | bytes):
        raise ValueError(f"{name}={values!r} is one string: give a list of ids")
    values = values.tolist() if hasattr(values, "tolist") else values  # an array's, a tensor's, a Series'
    if not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r} is of type {type(values).__name__}: give a list of ids")
    try:
        return [id_string(value) for value in values]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_unique(ids: Sequence[str]) -> None:
    """Refuses with a `ValueError` ids with a duplicate."""
    if len(set(ids)) < len(ids):
        raise duplicate(Counter(ids).most_common(1)[0][0])


def duplicate(id_: str, where: str = "the pool") -> ValueError:
    """The refusal of a second candidate of the same id."""
    return ValueError(f"duplicate id {id_!r} in {where}: ids must be unique over images and texts")


def candidate_ids(
    modality: str, items: Sequence[Any], ids: Any, start: int, present: Callable[[Sequence[str]], Collection[str]]
) -> list[str]:
    """
    The ids of new candidates. Where none are given, an image that is a path is called by its file's name, as
    `"panda.jpg"`, further ones of that name `"panda (2).jpg"` and so on; all else by modality and row, as `"text-7"`.

    Args:
        items: n images or texts.
        ids: n ids, or `None`.
        start: the row of the first one.
        present: those of some ids that the pool holds.

    Raises:
        ValueError: ids of another number, or what is no id.
    """
    if ids is not None:
        given = id_strings(f"{modality}_ids", ids)
        if len(given) != len(items):
            raise ValueError(
                f"{len(given)} {modality} ids and {len(items)} {modality}s do not match: give one id for each, or none"
            )
        return given
    # Of a dataset's column each picture that is looked at is decoded, and none is a path.
    named = modality == "image" and isinstance(items, list | tuple)
    names = [
        PurePath(items[i]).name if named and isinstance(items[i], str | os.PathLike) else f"{modality}-{start + i}"
        for i in range(len(items))
    ]
    return _numbered(names, present)


def _numbered(names: list[str], present: Callable[[Sequence[str]], Collection[str]]) -> list[str]:
    """Names of which those that are taken, by the pool or by one before, get a number."""
    ids, used, counts = list(names), set[str](), Counter[str]()
    waiting = list(range(len(names)))
    while waiting:
        for i in waiting:
            counts[names[i]] += 1
            while (name := _with_number(names[i], counts[names[i]])) in used:
                counts[names[i]] += 1
            ids[i] = name
            used.add(name)
        taken = present([ids[i] for i in waiting])
        waiting = [i for i in waiting if ids[i] in taken]
    return ids


def _with_number(name: str, number: int) -> str:
    path = PurePath(name)
    return name if number == 1 else f"{path.stem} ({number}){path.suffix}"
