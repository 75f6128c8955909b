"""The rows of a saved pool: Arrow record batches, large enough to be searched in place, opened and checked."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import is_datasets_available

from .images_unimur import BadImageError, image_file_bytes
from .paths_unimur import inside
from .pool_digests import DIGITS, FileDigest, Guard, MappedFile, damaged

if is_datasets_available():
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets.arrow_writer import ArrowWriter
    from datasets.table import MemoryMappedTable
    from datasets.utils.py_utils import convert_file_size_to_int

# datasets writes 100 rows at a time where there are images. A scan over so short blocks is a tenth slower on one core,
# and uses no second one; over 1,000 rows it is still a twentieth slower than over these.
BATCH_ROWS, BATCH_BYTES = 16_000, 256 * 2**20
# Rows of at most so many bytes are checked whole when a pool is opened, which takes a second; others as they are read.
CHECKED_AT_ONCE = 2**30
COLUMNS = ("id", "modality", "text", "image", "embedding")


def pool_features(dimension: int) -> "datasets.Features":
    """The columns of a pool of q-dimensional embeddings."""
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "modality": datasets.Value("string"),
            "text": datasets.Value("string"),
            "image": datasets.Image(decode=False),
            "embedding": datasets.List(datasets.Value("float32"), length=dimension),
        }
    )


class Batch(NamedTuple):
    """Rows `start` to `stop` (exclusive), written as one record batch, and about how many bytes they take."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class ArrowFile:
    """
    Args:
        name: of the file, in the pool's folder.
        digest: of all of it.
        messages: where Arrow's own messages (schema, record batches) are in it: `(start, length)` bytes.
        structure: `DIGITS` of the SHA-256 over them, so that no damaged one is ever parsed.
    """

    name: str
    digest: FileDigest
    messages: list[list[int]]
    structure: str

    @classmethod
    def of(cls, path: Path) -> "ArrowFile":
        """Reads a file that was just written."""
        messages = _messages(path)
        return cls(path.name, FileDigest.of(path), messages, _structure(path, messages))

    def as_json(self) -> dict[str, Any]:
        """What [`ArrowFile.from_json`] reads."""
        return {
            "name": self.name, "bytes": self.digest.size, "blocks": self.digest.blocks, "messages": self.messages,
            "structure": self.structure,
        }  # fmt: skip

    @classmethod
    def from_json(cls, about: dict[str, Any]) -> "ArrowFile":
        """Raises `KeyError` or `TypeError` where it is no file's."""
        return cls(
            str(about["name"]), FileDigest(int(about["bytes"]), str(about["blocks"])),
            [[int(start), int(length)] for start, length in about["messages"]], str(about["structure"]),
        )  # fmt: skip


def _messages(path: Path) -> list[list[int]]:
    spans, start = [], 0
    with pa.memory_map(str(path)) as source:
        for message in pa.ipc.MessageReader.open_stream(source):
            body = 0 if message.body is None else message.body.size
            spans.append([start, source.tell() - start - body])
            start = source.tell()
        spans.append([start, path.stat().st_size - start])  # the end of the stream
    return spans


def _structure(path: Path, messages: Sequence[Sequence[int]]) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        for start, length in messages:
            file.seek(start)
            state.update(file.read(length))
    return state.hexdigest()[:DIGITS]


# Writing


def record_batches(dataset: "datasets.Dataset", image_folder: Path | None = None) -> list[Batch]:
    """The rows in batches of at most `BATCH_ROWS` and, beyond one row, `BATCH_BYTES` of images, read or not."""
    images = dataset.data.column("image")
    encoded = pc.struct_field(images, "bytes")
    sizes = pc.fill_null(pc.binary_length(encoded), 0).to_numpy().astype(np.int64)
    paths = pc.struct_field(images, "path")
    for row in np.flatnonzero(pc.and_(pc.is_null(encoded), pc.is_valid(paths)).to_numpy()).tolist():
        sizes[row] = os.path.getsize(image_path(paths[row].as_py(), image_folder))
    before = np.concatenate([[0], np.cumsum(sizes)])
    other = sum(dataset.data.column(name).nbytes for name in dataset.column_names if name != "image")
    batches, start = [], 0
    while start < len(dataset):
        fitting = int(np.searchsorted(before, before[start] + BATCH_BYTES, side="right")) - 1
        stop = min(max(fitting, start + 1), start + BATCH_ROWS, len(dataset))
        size = int(before[stop] - before[start]) + (stop - start) * other // len(dataset)
        batches.append(Batch(start, stop, size))
        start = stop
    return batches


def write_arrow(
    dataset: "datasets.Dataset", path: Path, batches: Sequence[Batch] | None = None, *, copy_images: bool = True,
    image_folder: Path | None = None,
) -> None:  # fmt: skip
    """
    Writes rows as one Arrow file, whole or not at all.

    Args:
        batches: of [`record_batches`], by default all.
        copy_images: copy images given as paths into it.
        image_folder: of those paths; by default they are the caller's own and may be anywhere.

    Raises:
        OSError: the disk is full or the file cannot be written; nothing is left of it.
        BadImageError: what a path names is not an image; the message says whose it is.
    """
    part = path.with_name(f".{path.name}.part")
    table = dataset.with_format("arrow")
    batches = record_batches(dataset, image_folder) if batches is None else batches
    try:
        with part.open("wb") as file:
            writer = ArrowWriter(stream=file, features=dataset.features)
            for start, stop, _ in batches:
                rows = table[start:stop]
                rows = _with_images(rows, image_folder) if copy_images else rows
                writer.write_table(rows, writer_batch_size=stop - start)
            writer.finalize(close_stream=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _with_images(rows: "pa.Table", image_folder: Path | None) -> "pa.Table":
    """Rows whose images are all bytes, and whose paths are only the files' names: a saved pool names no folder."""
    images = rows.column("image").combine_chunks()
    paths = images.field("path").to_pylist()
    encoded = images.field("bytes")
    missing = np.flatnonzero(pc.and_(pc.is_null(encoded), pc.is_valid(images.field("path"))).to_numpy(False)).tolist()
    if missing:
        values = encoded.to_pylist()
        for row in missing:
            values[row] = _copied(rows.column("id")[row].as_py(), image_path(paths[row], image_folder))
        encoded = pa.array(values, encoded.type)
    names = pa.array([path and os.path.basename(path) for path in paths], images.field("path").type)
    embedded = pa.StructArray.from_arrays([encoded, names], names=["bytes", "path"], mask=pc.is_null(images))
    number = rows.schema.get_field_index("image")
    return rows.set_column(number, rows.schema.field(number), embedded)


def image_path(path: str, image_folder: Path | None) -> str:
    """Where an image is that a row only names. Raises `ValueError` where that is outside `image_folder`."""
    return path if image_folder is None else str(inside(image_folder, path))


def _copied(id_: str, path: str) -> bytes:
    try:
        return image_file_bytes(path)
    except BadImageError as error:
        raise BadImageError(f"candidate {id_!r}: {error}", error.reason) from error


def save_rows(
    dataset: "datasets.Dataset", folder: Path, max_shard_size: int | str = "500MB", image_folder: Path | None = None
) -> list[ArrowFile]:
    """Saves a pool's rows in files of about `max_shard_size`, named by number and content."""
    limit, size = convert_file_size_to_int(max_shard_size), 0
    parts: list[list[Batch]] = [[]]
    for batch in record_batches(dataset, image_folder):
        if parts[-1] and size + batch.size > limit:
            parts.append([])
            size = 0
        parts[-1].append(batch)
        size += batch.size
    files = []
    for number, batches in enumerate(parts):
        path = folder / f"data-{number:05d}-of-{len(parts):05d}.arrow"
        write_arrow(dataset, path, batches, image_folder=image_folder)
        file = ArrowFile.of(path)
        named = path.with_name(f"{path.stem}-{file.digest.short}.arrow")
        os.replace(path, named)
        files.append(ArrowFile(named.name, file.digest, file.messages, file.structure))
    return files


# Opening


def open_rows(folder: Path, files: Sequence[ArrowFile], dimension: int) -> tuple["datasets.Dataset", Guard | None]:
    """
    The rows of a pool's files, memory-mapped, and what checks those that have not been checked yet, if any.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not the one that was saved, or no pool's.
    """
    for file in files:
        file.digest.check_size(folder / file.name)
        if _structure(folder / file.name, file.messages) != file.structure:
            raise damaged(folder / file.name, "its structure has changed")
    tables, mapped = [], []
    for file in files:
        path = folder / file.name
        memory = pa.memory_map(str(path)).read_buffer()
        mapped.append(MappedFile(path, file.digest, np.frombuffer(memory, dtype=np.uint8)))
        if sum(f.digest.size for f in files) <= CHECKED_AT_ONCE:
            mapped[-1].check(slice(None))
        tables.append(datasets.Dataset(MemoryMappedTable(pa.ipc.open_stream(memory).read_all(), str(path))))
    dataset = datasets.concatenate_datasets(tables) if tables else datasets.Dataset.from_dict({})
    check_columns(dataset, dimension, folder)
    return dataset, None if all(m.done.all() for m in mapped) else Guard(mapped)


def check_columns(dataset: "datasets.Dataset", dimension: int, folder: Path) -> None:
    """Refuses with a `ValueError` rows that are not those of a pool of q-dimensional embeddings."""
    schema, wanted = dataset.data.schema, pool_features(dimension).arrow_schema
    for name in COLUMNS:
        kind = schema.field(name).type if name in schema.names else None
        # The name of a list's values differs between versions of datasets.
        if kind != wanted.field(name).type and (
            name != "embedding"
            or kind is None
            or not pa.types.is_fixed_size_list(kind)
            or (kind.list_size, kind.value_type) != (dimension, pa.float32())
        ):
            raise ValueError(
                f"{str(folder)!r} is no pool: its column {name!r} is {kind}, not {wanted.field(name).type}"
            )


def path_only(dataset: "datasets.Dataset") -> np.ndarray:
    """The rows whose images are references to files, `(m,)` int64."""
    images = dataset.data.column("image")
    return np.flatnonzero(
        pc.and_(pc.is_valid(images), pc.is_null(pc.struct_field(images, "bytes"))).to_numpy()
    )  # a text's image is null


def row_buffers(array: "pa.Array", row: int) -> Iterator[tuple[int, int]]:
    """
    Address and size of the bytes that one row of a string, binary or struct array is read from. Offsets come before the
    bytes they point to, so that the caller can check each before the next is computed.
    """
    place = array.offset + row
    validity = array.buffers()[0]
    if validity is not None:
        yield validity.address + place // 8, 1
    if pa.types.is_struct(array.type):
        for number in range(array.type.num_fields):
            yield from row_buffers(array.field(number), row)
        return
    _, offsets, data = array.buffers()
    yield offsets.address + 4 * place, 8
    start, stop = np.frombuffer(offsets, dtype=np.int32, count=2, offset=4 * place).tolist()
    if data is not None:
        yield data.address + start, stop - start
