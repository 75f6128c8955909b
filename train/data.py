"""
Readers of image-caption pairs: folders of images, img2dataset/webdataset tar archives, CC3M's and CC12M's tsv.

All give rows of [`train.rows.FEATURES`]. Nothing is decoded here; the collator does that, and drops and counts what is
broken. A row that cannot be read is given too, with what is wrong with it, so that it is counted in the same place.
"""

import json
import os
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from train.rows import (
    FEATURES,
    MAX_TEXT,
    BadRowError,
    Folder,
    as_captions,
    bad_row,
    check_text,
    is_image,
    make_row,
)
from train.tars import Paths, Sample, find_tars, read_samples, tar_stem
from train.text_files import listed, read_lines, read_table

logger = logging.get_logger("train")

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLES = (".jsonl", ".csv", ".parquet")
DOWNLOADED = (
    "",
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
)  # each is a look at the disk
CHUNK = 10_000  # rows that are Python dicts at a time
CAPTION_COLUMNS = ("captions", "caption", "text")
LAYOUTS = """expected one of
  - a folder with metadata.jsonl, metadata.csv or metadata.parquet (file_name, and captions, caption or text) beside its
    images, or the path of such a file;
  - a folder of images with a .txt or .json of the same name beside each;
  - img2dataset/webdataset archives: a .tar file (.tar.gz, .tgz), a folder of them, a pattern such as 'shards/*.tar' or
    'shards/{00000..00331}.tar', or a list;
  - a .tsv of captions and URLs or file names, as CC3M's and CC12M's, with --image_folder"""


def load_pairs(path: Paths, image_folder: str | Path | None = None) -> datasets.Dataset | datasets.IterableDataset:
    """
    Reads pairs from whatever layout `path` has; archives are streamed and have no length.

    Args:
        path: an image folder, its metadata, a tsv, or what [`train.tars.find_tars`] takes.
        image_folder: of a tsv, where its images are.

    Raises:
        ValueError: the path does not exist, or is of no known layout; the message lists them.
    """
    if isinstance(path, str | Path):
        path = Path(path)
        if path.suffix.lower() == ".tsv" and path.is_file():
            if image_folder is None:
                raise ValueError(f"{path} names images: give their folder with --image_folder")
            return read_tsv(path, image_folder)
        if path.suffix.lower() in TABLES and path.is_file():
            return read_image_folder(path.parent, path)
        if any((path / name).is_file() for name in METADATA):
            return read_image_folder(path)
        if path.is_dir() and not find_tars(path):
            return read_named_alike(path)
    return read_tars(path)


def read_image_folder(folder: str | Path, metadata: Path | None = None) -> datasets.Dataset:
    """
    An image folder with its metadata: `metadata.jsonl`, `.csv` (any of `,`, `;`, tab) or `.parquet`.

    Rows that cannot be used are counted in training: `not_json`, `not_utf8`, `broken_row` (a quote that is not closed, fields
    too many or too few), `no_file_name`, `outside_folder`, `no_caption_column`, and those of [`train.rows.as_captions`].
    A row whose file is absent stays too, to be counted as `missing`; a warning counts them. So does another the images
    without a row, which are not used, since nothing says what they show.

    Args:
        folder: of the images.
        metadata: another file than the first of `METADATA` in it.

    Raises:
        ValueError: no metadata or none that can be read, no row in it, or a csv without a needed column.
    """
    folder = Path(folder)
    metadata = metadata or next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is None:
        raise ValueError(f"{folder} has no {', '.join(METADATA)}: {LAYOUTS}")
    named: set[str] = set()
    pairs = _dataset(_folder_rows(folder, metadata, named), metadata)
    # One pass over the folder and one look-up a name: a file system answers far slower than a set.
    files = _files(folder)
    _warn_absent(folder, metadata, sorted(name for name in named - files if not (folder / name).is_file()))
    unused = sorted(name for name in files - named if is_image(name))
    if unused:
        logger.warning(
            f"{folder}: {len(unused)} images have no row in {metadata.name} and are not used, such as {unused[0]}"
        )
    return pairs


def read_named_alike(folder: str | Path) -> datasets.Dataset:
    """
    A folder, and the folders within, of images with a caption beside each: `1.jpg` and `1.txt`, or img2dataset's `1.json`.

    An image without either is counted as `empty_caption` in training; a warning counts the texts beside no image.

    Raises:
        ValueError: no image has a text beside it.
    """
    folder = Path(folder)
    files = sorted(_files(folder))
    images = [name for name in files if is_image(name)]
    stems = {os.path.splitext(name)[0] for name in images}
    texts = {name for name in files if name.lower().endswith((".txt", ".json"))}
    if not any(os.path.splitext(name)[0] in stems for name in texts):
        raise ValueError(f"{folder} has no known layout: {LAYOUTS}")
    alone = sorted(name for name in texts if os.path.splitext(name)[0] not in stems and name.endswith(".txt"))
    if alone:
        logger.warning(f"{folder}: {len(alone)} texts are beside no image and are not used, such as {alone[0]}")
    by_stem: dict[str, list[str]] = {}
    for name in sorted(texts):
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    return _dataset(_alike_rows(folder, images, by_stem), folder)


def read_tsv(tsv: str | Path, image_folder: str | Path) -> datasets.Dataset:
    """
    Two columns, with a header that names them (`caption`; `image` or `url`) or without: FROMAGe's captions and file names,
    CC3M's captions and URLs, CC12M's URLs and captions, which the first line tells apart.

    The image of a URL has the name that the usual downloaders give, `<row>_<crc32 of the URL>`, with or without an
    ending. Nothing is fetched. A row whose file is absent stays, to be counted as `missing` in training;
    a warning counts them. Others are counted as `broken_row` (not two columns), `not_utf8` and `outside_folder`.

    Raises:
        ValueError: `image_folder` is no folder, or there is no row.
    """
    if not Path(image_folder).is_dir():
        raise ValueError(f"--image_folder {image_folder} is not a folder: give the one that holds {tsv}'s images")
    absent: list[str] = []
    pairs = _dataset(_tsv_rows(Path(tsv), Folder(image_folder), absent), tsv)
    _warn_absent(image_folder, tsv, absent)
    return pairs


def read_tars(path: Paths) -> datasets.IterableDataset:
    """
    img2dataset/webdataset tar archives, streamed. Loader workers share the archives between them; every process reads all
    and decodes its own part of the pairs, so that several make the batches that one would make.

    A sample's caption is its `.txt`, or else the `caption`, `captions` or `text` of its `.json`. A sample without its image
    or caption is yielded with what it has, to be counted; so is what is wrong with an archive or a member, by the reasons of
    [`train.tars.read_samples`], `not_utf8` and those of [`train.rows.as_captions`].

    Raises:
        ValueError: there is no archive; the message lists the known layouts.
    """
    tars = [str(tar) for tar in find_tars(path)]
    if not tars:
        exists = not isinstance(path, str | Path) or Path(path).exists()
        raise ValueError(f"{path} {'has no known layout' if exists else 'does not exist'}: {LAYOUTS}")
    return datasets.IterableDataset.from_generator(_tar_rows, features=FEATURES, gen_kwargs={"tars": tars})


def streamed_length(path: Paths) -> int | None:
    """How many pairs the archives hold by img2dataset's `_stats.json` files; `None` where one is missing or invalid."""
    total = 0
    for tar in find_tars(path):
        stats = tar.with_name(f"{tar_stem(tar)}_stats.json")
        if not stats.is_file():
            return None
        try:
            count = json.loads(stats.read_bytes())["successes"]
        except (ValueError, KeyError, TypeError, RecursionError):
            count = None
        if type(count) is not int or count < 0:
            logger.warning(f"{stats} gives no number of 'successes', so that the archives' length is unknown")
            return None
        total += count
    return total


def _files(folder: Path) -> set[str]:
    """Every file's name in a folder and the folders within."""
    files: set[str] = set()
    for where, _, names in os.walk(folder):
        part = Path(where).relative_to(folder)
        files |= {(part / name).as_posix() for name in names if not name.startswith(".")}
    return files


def _dataset(rows: Iterator[dict[str, Any]], origin: str | Path) -> datasets.Dataset:
    # Explicit features: inference from the first rows fails late. In memory: a cache on disk depends on the arguments alone and
    # would outlive a change of the files. In chunks: millions of Python dicts weigh several times their Arrow table.
    chunks = []
    while chunk := list(islice(rows, CHUNK)):
        chunks.append(datasets.Dataset.from_list(chunk, features=FEATURES))
    if not chunks:
        raise ValueError(f"there is no pair in {origin}: it has no rows")
    return datasets.concatenate_datasets(chunks)


def _warn_absent(folder: str | Path, listing: str | Path, absent: list[str]) -> None:
    if absent:
        logger.warning(
            f"{folder}: {len(absent)} images that {Path(listing).name} names are absent, such as {absent[0]}; "
            "training counts them as missing"
        )


def _folder_rows(folder: Path, metadata: Path, named: set[str]) -> Iterator[dict[str, Any]]:
    bounds = Folder(folder)
    for number, record in enumerate(read_table(metadata)):
        values = record.values
        if not number and metadata.suffix.lower() == ".csv" and isinstance(values, dict):
            _check_columns(metadata, values)
        try:
            if isinstance(values, BadRowError):
                raise values
            row = _folder_row(bounds, values)
            named.add(Path(row["id"]).as_posix())
            yield row
        except BadRowError as error:
            yield bad_row(record.where, error, str(folder))


def _check_columns(metadata: Path, values: dict[str, Any]) -> None:
    """A csv says its columns once, so that one without a needed one is wrong as a whole."""
    if "file_name" not in values or not set(CAPTION_COLUMNS) & values.keys():
        raise ValueError(
            f"{metadata} has the columns {', '.join(values)}: expected 'file_name', an image's path inside the folder, and "
            f"one of {', '.join(map(repr, CAPTION_COLUMNS))}"
        )


def _folder_row(bounds: Folder, values: dict[str, Any]) -> dict[str, Any]:
    name = values.get("file_name")
    if not name or not isinstance(name, str):
        raise BadRowError("no_file_name", "no 'file_name'; it must give the image's path inside the folder")
    path = bounds.file(check_text(name, "'file_name'"))
    return make_row(
        name, {"bytes": None, "path": str(path)}, _captions(values), str(bounds.path), license=values.get("license"),
        url=values.get("url") or values.get("flickr_url"),
    )  # fmt: skip


def _captions(values: dict[str, Any]) -> list[str]:
    """The captions of a metadata row or of a sample's json."""
    present = [name for name in CAPTION_COLUMNS if name in values]
    if not present:
        raise BadRowError(
            "no_caption_column", f"none of {', '.join(map(repr, CAPTION_COLUMNS))}; it has {list(values)}"
        )
    column = next((name for name in present if values[name] is not None), present[0])
    value = listed(values[column], repr(column)) if column == "captions" else values[column]
    return as_captions(value, repr(column))


def _alike_rows(folder: Path, images: list[str], texts: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    bounds = Folder(folder)
    for name in images:
        files = {}
        try:
            path = bounds.file(name)
            for text in texts.get(os.path.splitext(name)[0], ()):
                with bounds.file(text).open("rb") as file:
                    files[text.rpartition(".")[2].lower()] = file.read(MAX_TEXT + 1)
            about = _about(files)
            captions = _sample_captions(files, about)
        except BadRowError as error:
            yield bad_row(name, error, str(folder))
            continue
        yield make_row(
            name, {"bytes": None, "path": str(path)}, captions, str(folder), license=about.get("license"),
            url=about.get("url"),
        )  # fmt: skip


def _tsv_rows(tsv: Path, bounds: Folder, absent: list[str]) -> Iterator[dict[str, Any]]:
    columns: tuple[int, int] | None = None  # of the caption and of the image
    number = -1  # of the row, from 0, as the downloaders count
    for line in read_lines(tsv):
        # Quotes are part of a caption, and "null" or "NA" are captions too.
        fields = line.text.rstrip("\r\n").split("\t")
        if fields == [""] and line.problem is None:
            continue
        if columns is None:
            columns, header = _tsv_columns(fields)
            if header:
                continue
        number += 1
        try:
            if line.problem is not None:
                raise line.problem
            yield _tsv_row(fields, columns, number, tsv, bounds, absent)
        except BadRowError as error:
            yield bad_row(f"{tsv}, line {line.number}", error, str(tsv))


def _tsv_columns(fields: list[str]) -> tuple[tuple[int, int], bool]:
    """Which column is the caption and which names the image, and whether the first line says it as a header."""
    names = [name.strip().lower() for name in fields]
    image = next((name for name in ("image", "url") if name in names), None)
    if image is not None and "caption" in names and len(names) == 2:
        return (names.index("caption"), names.index(image)), True
    if _is_url(fields[0]) and not _is_url(fields[-1]):
        return (1, 0), False
    return (0, 1), False


def _tsv_row(
    fields: list[str], columns: tuple[int, int], number: int, tsv: Path, bounds: Folder, absent: list[str]
) -> dict[str, Any]:
    if len(fields) != 2:
        raise BadRowError("broken_row", f"expected two columns, caption and image or URL, got {len(fields)}")
    caption, where = (fields[column] for column in columns)
    check_text(caption, "the caption")
    name = f"{number}_{zlib.crc32(where.encode())}" if _is_url(where) else where
    candidates = [bounds.file(name + ending) for ending in DOWNLOADED]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        absent.append(name)
    image = {"bytes": None, "path": str(path or candidates[0])}
    return make_row(name, image, [caption], str(tsv), url=where if _is_url(where) else None)


def _is_url(value: str) -> bool:
    return value.startswith(("http://", "https://"))


def _tar_rows(tars: list[str]) -> Iterator[dict[str, Any]]:
    for tar in tars:
        for sample in read_samples(Path(tar)):
            name = f"{tar_stem(Path(tar))}/{sample.key}"
            if sample.problem is not None and sample.problem.reason == "broken_archive":
                logger.warning(str(sample.problem))
            try:
                yield _tar_row(name, sample, tar)
            except BadRowError as error:
                yield bad_row(name, error, tar)


def _tar_row(name: str, sample: Sample, tar: str) -> dict[str, Any]:
    if sample.problem is not None:
        raise sample.problem
    about = _about(sample.files)
    image = None if sample.image is None else {"bytes": sample.image, "path": None}
    captions = _sample_captions(sample.files, about)
    return make_row(name, image, captions, tar, license=about.get("license"), url=about.get("url"))


def _about(files: dict[str, bytes]) -> dict[str, Any]:
    """A sample's json; one that is not an object says nothing."""
    try:
        about = json.loads(files.get("json", b"{}"))
    except (ValueError, RecursionError):  # neither JSON nor UTF-8: it only adds to the pair
        about = {}
    return about if isinstance(about, dict) else {}


def _sample_captions(files: dict[str, bytes], about: dict[str, Any]) -> list[str]:
    """The text of a sample, or else the captions of its json."""
    try:
        caption = files.get("txt", b"").decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRowError("not_utf8", f"its .txt is not UTF-8 ({error.reason} at byte {error.start})") from error
    if caption:
        return as_captions(caption, "its .txt")
    present = set(CAPTION_COLUMNS) & about.keys()
    return _captions(about) if present else []
