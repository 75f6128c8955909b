"""
Readers of image-caption pairs: an image folder with metadata, img2dataset/webdataset shards, CC3M's tsv.

All give one schema: `id`, `image` (undecoded), `captions`, `source`, `license`, `url`. Nothing is decoded here; the
collator does that, and drops and counts what is broken.
"""

import csv
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

logger = logging.get_logger("train")

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
        "source": datasets.Value("string"),
        "license": datasets.Value("string"),
        "url": datasets.Value("string"),
    }
)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LAYOUTS = """expected one of
  - a folder with metadata.jsonl or metadata.csv (file_name, and captions, caption or text) beside its images;
  - img2dataset/webdataset shards: a .tar file, or a folder of them;
  - a CC3M .tsv, FROMAGe's or Google's, with --image_folder"""


def load_pairs(path: str | Path, image_folder: str | Path | None = None) -> datasets.Dataset | datasets.IterableDataset:
    """
    Reads pairs from whatever layout `path` has; shards are streamed and have no length.

    Raises:
        ValueError: the path does not exist, or is of no known layout; the message lists them.
    """
    path = Path(path)
    if path.suffix == ".tsv" and path.is_file():
        if image_folder is None:
            raise ValueError(f"{path} names images: give the folder they lie in with --image_folder")
        return read_cc3m_tsv(path, image_folder)
    if any((path / name).is_file() for name in ("metadata.jsonl", "metadata.csv")):
        return read_image_folder(path)
    if shards(path):
        return read_shards(path)
    raise ValueError(f"{path} {'has no known layout' if path.exists() else 'does not exist'}: {LAYOUTS}")


def read_image_folder(folder: str | Path) -> datasets.Dataset:
    """
    An image folder with `metadata.jsonl` or `metadata.csv`.

    A row whose file is absent stays, to be counted as `missing` in training; images without a row are counted in a
    warning, since nothing says what they show.

    Raises:
        ValueError: a row without `file_name` or a caption column; the message names the line.
    """
    folder = Path(folder)
    metadata = next(folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file())
    named = set()
    for row in _metadata_rows(metadata):
        named.add(row["file_name"])
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS}
    if files - named:
        logger.warning(
            f"{folder}: {len(files - named)} images have no row in {metadata.name} and are not used, such as "
            f"{min(files - named)}"
        )
    return _dataset(_folder_rows, folder=str(folder), metadata=str(metadata))


def read_cc3m_tsv(tsv: str | Path, image_folder: str | Path) -> datasets.Dataset:
    """
    CC3M: FROMAGe's tsv (header `caption`, `image`) or Google's own (no header, caption and URL).

    Google's images are looked for under the name the usual downloaders give, `<row>_<crc32 of the URL>`. In both
    layouts the file may stand with or without an ending. Nothing is fetched.

    Raises:
        ValueError: a line does not have two columns.
    """
    return _dataset(_tsv_rows, tsv=str(tsv), folder=str(image_folder))


def read_shards(path: str | Path) -> datasets.IterableDataset:
    """
    img2dataset/webdataset tar shards, streamed; loader workers and processes share the shards between them.

    A sample without its image or caption is yielded with what it has, to be counted; a truncated shard ends early with
    a warning and the next one goes on.
    """
    return datasets.IterableDataset.from_generator(
        _shard_rows, features=FEATURES, gen_kwargs={"shards": [str(shard) for shard in shards(path)]}
    )


def shards(path: str | Path) -> list[Path]:
    """The tar files at a path, itself or in its folder, in order."""
    path = Path(path)
    return [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar"))


def streamed_length(path: str | Path) -> int | None:
    """How many pairs the shards hold by img2dataset's `_stats.json` files; `None` where one is missing."""
    total = 0
    for shard in shards(path):
        stats = shard.with_name(f"{shard.stem}_stats.json")
        if not stats.is_file():
            return None
        total += json.loads(stats.read_text())["successes"]
    return total


def _dataset(rows, **kwargs) -> datasets.Dataset:
    # Written once as Arrow and memory-mapped, with explicit features: inference from the first rows fails late.
    built = datasets.Dataset.from_list(list(rows(**kwargs)), features=FEATURES)
    if not len(built):
        raise ValueError(f"no pair found in {', '.join(kwargs.values())}")
    return built


def _metadata_rows(metadata: Path) -> Iterator[dict[str, Any]]:
    with metadata.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file) if metadata.suffix == ".csv" else (json.loads(line) for line in file if line.strip())
        for number, row in enumerate(lines, 1):
            if not row.get("file_name"):
                raise ValueError(f"{metadata}, row {number}: no 'file_name'")
            yield row


def _folder_rows(folder: str, metadata: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_metadata_rows(Path(metadata)), 1):
        given = next((row[name] for name in ("captions", "caption", "text") if name in row), None)
        if given is None:
            raise ValueError(f"{metadata}, row {number}: none of 'captions', 'caption' and 'text'; it has {sorted(row)}")
        yield {
            "id": row["file_name"],
            "image": {"bytes": None, "path": str(Path(folder) / row["file_name"])},
            "captions": [given] if isinstance(given, str) else list(given or []),
            "source": folder,
            "license": row.get("license"),
            "url": row.get("url") or row.get("flickr_url"),
        }


def _tsv_rows(tsv: str, folder: str) -> Iterator[dict[str, Any]]:
    with open(tsv, encoding="utf-8", newline="") as file:
        # Quotes are part of a caption, and "null" or "NA" are captions too.
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        number = -1
        for line in lines:
            if number < 0 and line == ["caption", "image"]:
                continue
            number += 1
            if len(line) != 2:
                raise ValueError(f"{tsv}, row {number}: expected two columns, caption and image or URL, got {len(line)}")
            caption, where = line
            url = where if where.startswith(("http://", "https://")) else None
            name = f"{number}_{zlib.crc32(where.encode())}" if url else where
            candidates = [Path(folder) / (name + ending) for ending in ("", *IMAGE_ENDINGS)]
            path = next((c for c in candidates if c.is_file()), candidates[0])
            yield {
                "id": name, "image": {"bytes": None, "path": str(path)}, "captions": [caption],
                "source": tsv, "license": None, "url": url,
            }  # fmt: skip


def _shard_rows(shards: list[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        sample: dict[str, bytes] = {}
        key = None
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    # The ending is what follows the last dot: keys themselves may hold dots.
                    stem, _, ending = member.name.rpartition(".")
                    if stem != key and key is not None:
                        yield _sample(shard, key, sample)
                        sample = {}
                    key = stem
                    sample[ending.lower()] = tar.extractfile(member).read()
        except (tarfile.ReadError, EOFError, OSError) as error:
            logger.warning(f"{shard} ends early after {key!r} ({error}); the rest of it is not used")
        if key is not None and sample:
            yield _sample(shard, key, sample)


def _sample(shard: str, key: str, files: dict[str, bytes]) -> dict[str, Any]:
    about = json.loads(files["json"]) if "json" in files else {}
    caption = files["txt"].decode("utf-8", "replace") if "txt" in files else about.get("caption")
    image = next((files[e[1:]] for e in IMAGE_ENDINGS if e[1:] in files), b"")
    return {
        "id": f"{Path(shard).stem}/{key}", "image": {"bytes": image, "path": None},
        "captions": [caption] if caption else [], "source": shard,
        "license": about.get("license"), "url": about.get("url"),
    }  # fmt: skip
