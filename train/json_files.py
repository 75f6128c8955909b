"""Published json files, read strictly: a file or a field that is not as it is published is named."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BadDataError(ValueError):
    """A file is absent or of the wrong shape; the message gives the path and the field."""


def read_json(path: Path) -> Any:
    """A json file, or json lines. Raises [`BadDataError`] naming the path where it is absent or not json."""
    text = _read_text(path)
    try:
        # An array or an object over several lines is one value; json lines are a value a line.
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] != "{" or error.msg != "Extra data":
            raise BadDataError(f"{path}: not json ({error})") from error
    return list(_lines(text, path))


def read_items(path: Path) -> Iterator[Any]:
    """
    The items of a json array or of json lines, distinguished by the first byte, one at a time: of a file of gigabytes only
    the text and one item are held.

    Raises:
        BadDataError: the path is absent, or not of this form; the message gives the position or the line.
    """
    text = _read_text(path)
    if text.lstrip()[:1] != "[":
        yield from _lines(text, path)
        return
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    ended = text[at : at + 1] == "]"
    while not ended:
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise BadDataError(f"{path}: not json ({error})") from error
        yield item
        at = _skip(text, at)
        ended = text[at : at + 1] == "]"
        if not ended:
            if text[at : at + 1] != ",":
                raise BadDataError(f"{path}: the array breaks off or lacks a comma at character {at}")
            at = _skip(text, at + 1)
    if _skip(text, at + 1) != len(text):
        raise BadDataError(f"{path}: more text after the array's end at character {at}")


def require(value: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`value[name]`, which must be of `kind`. Raises [`BadDataError`] that names `where` (path and item) and the field."""
    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    if not isinstance(value, dict) or name not in value:
        held = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise BadDataError(f"{where}: expected the field {name!r} ({names}), got {held}")
    of_kind = isinstance(value[name], kind)
    if isinstance(value[name], bool):  # which Python counts as an integer
        of_kind = bool in (kind if isinstance(kind, tuple) else (kind,))
    if not of_kind:
        raise BadDataError(f"{where}: the field {name!r} is {type(value[name]).__name__}, expected {names}")
    return value[name]


def list_files(*folders: Path) -> dict[str, Path]:
    """
    File name -> path over `folders`, the first that has a name counting: one listing a folder instead of a look at
    every file. Absent folders are empty.
    """
    files: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file():
                        files.setdefault(entry.name, folder / entry.name)
    return files


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` (relative paths) in `folder`. Raises [`BadDataError`] that lists what was looked for."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    state = "" if folder.is_dir() else " (there is no such folder)"
    raise BadDataError(f"{folder}{state}: none of the files looked for is there: {', '.join(names)}")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise BadDataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 ({error})") from error


def _lines(text: str, path: Path) -> Iterator[Any]:
    # Not str.splitlines: it also splits at separators that may be inside a json string, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise BadDataError(f"{path}, line {number}: neither json nor json lines ({error})") from error


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()
