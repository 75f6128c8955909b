"""What every reader gives: rows of one schema, the words for what is wrong with one, and paths that stay in a folder."""

import os
from pathlib import Path
from typing import Any

import datasets

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
        "source": datasets.Value("string"),
        "license": datasets.Value("string"),
        "url": datasets.Value("string"),
        "problem": datasets.Value("string"),
    }
)
# What the decoder reads or names in its refusal: a file that is not listed here is not even counted.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
MAX_TEXT = 2**20  # bytes of a caption's file or characters of a field; longer ones are no captions


class BadRowError(ValueError):
    """A row that cannot be used; `reason` is a short name to count it by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def make_row(
    name: str, image: dict[str, Any] | None, captions: list[str], source: str, *, license: Any = None, url: Any = None
) -> dict[str, Any]:
    """
    A row of `FEATURES`.

    Args:
        name: its id.
        image: undecoded, `{"bytes", "path"}`, or `None`.
        captions: checked by [`as_captions`].
        license, url: kept where they are texts.
    """
    return {
        "id": printable(name), "image": image, "captions": captions, "source": source, "license": _text(license),
        "url": _text(url), "problem": None,
    }  # fmt: skip


def bad_row(name: str, error: BadRowError, source: str) -> dict[str, Any]:
    """A row that is there only to be counted where batches are made: `problem` is `"{reason}: {message}"`."""
    row = make_row(name, None, [], source)
    return row | {"problem": printable(f"{error.reason}: {error}")}


def as_captions(value: Any, name: str) -> list[str]:
    """
    A text, a list of texts or `None` as a list of captions, without its nulls.

    Raises:
        BadRowError: `bad_caption`, another type; `half_character`, a text that no encoding holds; `long_caption`.
    """
    captions = value if isinstance(value, list) else [value]
    if not all(caption is None or isinstance(caption, str) for caption in captions):
        raise BadRowError("bad_caption", f"{name} must be a text or a list of texts, got {str(value)[:80]!r}")
    return [check_text(caption, name) for caption in captions if caption is not None]


def check_text(text: str, name: str) -> str:
    """The text itself; raises [`BadRowError`] for one that is too long or that no encoding holds."""
    if len(text) > MAX_TEXT:
        raise BadRowError("long_caption", f"{name} has {len(text):,} characters, more than {MAX_TEXT:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{name} has half a character, {text[error.start]!r}, at {error.start}"
        raise BadRowError("half_character", message) from error
    return text


def printable(text: str) -> str:
    """The text with half characters, such as those of a file name that is not UTF-8, spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does, in either case."""
    return name.lower().endswith(IMAGE_ENDINGS)


class Folder:
    """
    A folder that data may refer into, and not out of.

    A snapshot of the Hub's cache consists of links to its repository's `blobs`, which count as inside.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        real = self.path.resolve()
        self.root = str(real.parents[1] if real.parent.name == "snapshots" else real)
        self._parents: dict[str, str] = {}  # resolved once: a look at every part of every path is slow

    def file(self, name: str) -> Path:
        """
        The path of a file by its name in the folder, whether or not it exists.

        Raises:
            BadRowError: `outside_folder`: the name or a link leads out of it.
        """
        path = os.path.join(self.path, name)
        parent, base = os.path.split(path)
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent)
        real = os.path.join(self._parents[parent], base)
        if base in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(real)
        if os.path.commonpath([self.root, real]) != self.root:
            raise BadRowError(
                "outside_folder", f"{name[:200]!r} is outside {self.path}: copy it there or give the folder it is in"
            )
        return Path(path)


def _text(value: Any) -> str | None:
    return printable(value) if isinstance(value, str) else None
