"""
Readers of image-caption pairs: an image folder with metadata, img2dataset/webdataset shards, CC3M's tsv.

All give one schema: `id`, `image` (undecoded), `captions`, `source`, `license`, `url`. Nothing is decoded here; the
collator does that, and drops and counts what is broken.
"""

import csv
import glob
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from modeling_unimur.images_unimur import MAX_BYTES

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
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("captions", "caption", "text")
LAYOUTS = """expected one of
  - a folder with metadata.jsonl or metadata.csv (file_name, and captions, caption or text) beside its images;
  - img2dataset/webdataset shards: a .tar file, a folder of them, a pattern such as 'shards/*.tar', or a list;
  - a CC3M .tsv, FROMAGe's or Google's, with --image_folder"""

Paths = str | Path | Iterable[str | Path]


def load_pairs(path: Paths, image_folder: str | Path | None = None) -> datasets.Dataset | datasets.IterableDataset:
    """
    Reads pairs from whatever layout `path` has; shards are streamed and have no length.

    Args:
        path: an image folder, a tsv, or what [`shards`] takes.
        image_folder: of a tsv, where its images lie.

    Raises:
        ValueError: the path does not exist, or is of no known layout; the message lists them.
    """
    if isinstance(path, str | Path):
        path = Path(path)
        if path.suffix == ".tsv" and path.is_file():
            if image_folder is None:
                raise ValueError(f"{path} names images: give the folder they lie in with --image_folder")
            return read_cc3m_tsv(path, image_folder)
        if any((path / name).is_file() for name in METADATA):
            return read_image_folder(path)
    return read_shards(path)


def read_image_folder(folder: str | Path) -> datasets.Dataset:
    """
    An image folder with `metadata.jsonl` or `metadata.csv`.

    A row whose file is absent stays, to be counted as `missing` in training; a warning counts them. So does another
    the images without a row, which are not used, since nothing says what they show.

    Raises:
        ValueError: no metadata, or a row that is not JSON, names no file or has no caption column, by its number.
    """
    folder = Path(folder)
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is None:
        raise ValueError(f"{folder} has neither {' nor '.join(METADATA)}: {LAYOUTS}")
    # One pass over the folder and one look-up a name: a file system answers far slower than a set.
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    named = {Path(row["file_name"]).as_posix() for _, row in _metadata_rows(metadata)}
    _warn_absent(folder, metadata, sorted(name for name in named - files if not (folder / name).is_file()))
    unused = sorted(name for name in files - named if name.lower().endswith(IMAGE_ENDINGS))
    if unused:
        logger.warning(
            f"{folder}: {len(unused)} images have no row in {metadata.name} and are not used, such as {unused[0]}"
        )
    return _dataset(_folder_rows(folder, metadata), metadata)


def read_cc3m_tsv(tsv: str | Path, image_folder: str | Path) -> datasets.Dataset:
    """
    CC3M: FROMAGe's tsv (header `caption`, `image`) or Google's own (caption and URL, no header or `caption`, `url`).

    Google's images are looked for under the name the usual downloaders give, `<row>_<crc32 of the URL>`. In both
    layouts the file may stand with or without an ending. Nothing is fetched. A row whose file is absent stays, to be
    counted as `missing` in training; a warning counts them.

    Raises:
        ValueError: `image_folder` is no folder, or a line does not have two columns.
    """
    if not Path(image_folder).is_dir():
        raise ValueError(f"--image_folder {image_folder} is not a folder: give the one in which {tsv}'s images lie")
    absent: list[str] = []
    pairs = _dataset(_tsv_rows(Path(tsv), Path(image_folder), absent), tsv)
    _warn_absent(image_folder, tsv, absent)
    return pairs


def read_shards(path: Paths) -> datasets.IterableDataset:
    """
    img2dataset/webdataset tar shards, streamed. Loader workers share the shards between them; every process reads all
    and decodes its own part of the pairs, so that several make the batches that one would make.

    A sample without its image or caption is yielded with what it has, to be counted; a truncated shard ends early with
    a warning and the next one goes on.

    Raises:
        ValueError: there is no shard; the message lists the known layouts.
    """
    found = [str(shard) for shard in shards(path)]
    if not found:
        exists = not isinstance(path, str | Path) or Path(path).exists()
        raise ValueError(f"{path} {'has no known layout' if exists else 'does not exist'}: {LAYOUTS}")
    return datasets.IterableDataset.from_generator(_shard_rows, features=FEATURES, gen_kwargs={"shards": found})


def shards(path: Paths) -> list[Path]:
    """The tar files of a path, in order: itself, those in its folder or of its pattern; a list's one after another."""
    if not isinstance(path, str | Path):
        return [shard for part in path for shard in shards(part)]
    pattern = os.path.join(glob.escape(path), "*.tar") if os.path.isdir(path) else str(path)
    # A file whose name happens to look like a pattern is meant as that file.
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    return [Path(name) for name in found if name.endswith(".tar")]


def streamed_length(path: Paths) -> int | None:
    """How many pairs the shards hold by img2dataset's `_stats.json` files; `None` where one is missing."""
    total = 0
    for shard in shards(path):
        stats = shard.with_name(f"{shard.stem}_stats.json")
        if not stats.is_file():
            return None
        total += json.loads(stats.read_text())["successes"]
    return total


def _dataset(rows: Iterator[dict[str, Any]], origin: str | Path) -> datasets.Dataset:
    # Explicit features: inference from the first rows fails late. In memory: a cache on disk goes by the arguments and
    # would outlive a change of the files. In chunks: millions of Python dicts weigh several times their Arrow table.
    chunks = []
    while chunk := list(islice(rows, 10_000)):
        chunks.append(datasets.Dataset.from_list(chunk, features=FEATURES))
    if not chunks:
        raise ValueError(f"no pair found in {origin}: it has no rows")
    return datasets.concatenate_datasets(chunks)


def _warn_absent(folder: str | Path, listing: str | Path, absent: list[str]) -> None:
    if absent:
        logger.warning(
            f"{folder}: {len(absent)} images that {Path(listing).name} names are absent, such as {absent[0]}; "
            "training counts them as missing"
        )


def _metadata_rows(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with the words that name it in an error."""
    with metadata.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a mark in front
        lines = csv.DictReader(file) if metadata.suffix == ".csv" else (line for line in file if line.strip())
        for number, row in enumerate(lines, 1):
            where = f"{metadata}, row {number}"
            if isinstance(row, str):
                try:
                    row = json.loads(row)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not JSON ({error}); expected one object a line") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected an object, got a {type(row).__name__}")
            if not row.get("file_name") or not isinstance(row["file_name"], str):
                raise ValueError(f"{where}: no 'file_name'; it must give the image's path inside the folder")
            yield where, row


def _folder_rows(folder: Path, metadata: Path) -> Iterator[dict[str, Any]]:
    for where, row in _metadata_rows(metadata):
        column = next((name for name in CAPTION_COLUMNS if name in row), None)
        if column is None:
            raise ValueError(
                f"{where}: none of {', '.join(map(repr, CAPTION_COLUMNS))}; it has {', '.join(map(str, row))}"
            )
        captions = row[column] if isinstance(row[column], list) else [row[column]]
        if not all(caption is None or isinstance(caption, str) for caption in captions):
            raise ValueError(f"{where}: {column!r} must be a text or a list of texts, got {row[column]!r}")
        yield {
            "id": row["file_name"],
            "image": {"bytes": None, "path": str(folder / row["file_name"])},
            "captions": [caption for caption in captions if caption is not None],
            "source": str(folder),
            "license": _text(row.get("license")),
            "url": _text(row.get("url")) or _text(row.get("flickr_url")),
        }


def _tsv_rows(tsv: Path, folder: Path, absent: list[str]) -> Iterator[dict[str, Any]]:
    with tsv.open(encoding="utf-8", newline="") as file:
        # Quotes are part of a caption, and "null" or "NA" are captions too.
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        number = -1  # of the row, from 0, as the downloaders count
        for line in lines:
            if not line or (number < 0 and line in (["caption", "image"], ["caption", "url"])):
                continue
            number += 1
            if len(line) != 2:
                raise ValueError(
                    f"{tsv}, line {lines.line_num}: expected two columns, caption and image or URL, got {len(line)}"
                )
            caption, where = line
            url = where if where.startswith(("http://", "https://")) else None
            name = f"{number}_{zlib.crc32(where.encode())}" if url else where
            candidates = [folder / (name + ending) for ending in ("", *IMAGE_ENDINGS)]
            path = next((c for c in candidates if c.is_file()), None)
            if path is None:
                absent.append(name)
            yield {
                "id": name, "image": {"bytes": None, "path": str(path or candidates[0])}, "captions": [caption],
                "source": str(tsv), "license": None, "url": url,
            }  # fmt: skip


def _shard_rows(shards: list[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        sample: dict[str, bytes] = {}
        key, complete = None, 0
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    # The ending is what follows the last dot: keys themselves may hold dots.
                    stem, _, ending = member.name.rpartition(".")
                    # No sample: a file without an ending, or one that an archiver leaves behind (`._000.jpg`).
                    if not member.isfile() or not os.path.basename(stem) or os.path.basename(stem).startswith("."):
                        continue
                    if stem != key and key is not None:
                        yield _sample(shard, key, sample)
                        sample, complete = {}, complete + 1
                    key = stem
                    # One byte more than is decoded, so that a larger one is known for what it is.
                    sample[ending.lower()] = tar.extractfile(member).read(MAX_BYTES + 1)
                # tarfile takes a cut or broken header for the end; the end is a block of zeros.
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("the archive has no end")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            logger.warning(
                f"{shard} ends early, {complete} samples in, at {key!r} ({error}); the rest of it is not used: "
                "fetch or write it again"
            )
        if key is not None:
            yield _sample(shard, key, sample)


def _sample(shard: str, key: str, files: dict[str, bytes]) -> dict[str, Any]:
    try:
        about = json.loads(files.get("json", b"{}"))
    except ValueError:  # neither JSON nor UTF-8: it only adds to the pair
        about = {}
    if not isinstance(about, dict):
        about = {}
    caption = files.get("txt", b"").decode("utf-8", "replace").strip() or _text(about.get("caption"))
    image = next((files[e[1:]] for e in IMAGE_ENDINGS if e[1:] in files), None)
    return {
        "id": f"{Path(shard).stem}/{key}", "image": None if image is None else {"bytes": image, "path": None},
        "captions": [caption] if caption else [], "source": shard,
        "license": _text(about.get("license")), "url": _text(about.get("url")),
    }  # fmt: skip


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
