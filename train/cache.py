"""A folder of Arrow parts that is built once: resumable, refused when stale, verified when opened, memory-mapped."""

import errno
import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from transformers.utils import logging

logger = logging.get_logger("train")

MANIFEST = "manifest.json"
# What one part holds: its columns `(rows, width)` by name, and what is to be noted of it in the manifest.
Part = tuple[int, dict[str, np.ndarray], dict[str, Any]]


class StaleCacheError(ValueError):
    """A cache made of other data, weights or settings than those of this run."""


class CorruptCacheError(OSError):
    """A part whose bytes are not those that were written."""


def build_cache(
    folder: str | Path, identity: dict[str, Any], sources: Sequence[dict[str, str]],
    make: Callable[[list[int]], Iterator[Part]], *, rank: int | None = None, world: int | None = None,
    changed: Callable[[int, str, dict], bool] = lambda *_: True,
) -> list[dict[str, Any]]:  # fmt: skip
    """
    Writes the parts that are not there yet, each process its own (rank r those of number r, r + n, ...), waits for the
    others' and verifies all.

    A part and its record are each written to a temporary file, flushed to the disk and renamed, so that an
    interruption leaves whole parts only and the next call continues after them. `manifest.json` holds the identity and,
    when all are done, each part's sha256, rows, sources and notes.

    Args:
        folder: made where it does not exist.
        identity: what the values depend on; all of it must be equal to reuse a part.
        sources: for each part, its `rows` as text and hashes of what it is made of, by name.
        make: yields the parts of the numbers it is given, in that order.
        rank, world: of the process; those of torch.distributed by default.
        changed: called with a part's number, the name of a source whose hash differs and the part's record, where a
            hash is only a hint; whether the source has really changed.

    Returns:
        The record of each part.

    Raises:
        StaleCacheError: the cache is of another identity or other sources; the message says which.
        CorruptCacheError: the bytes of a part are not those written; the message names it.
        OSError: the disk is full (`ENOSPC`); the message says at which rows. Nothing is left half written.
    """
    folder = Path(folder)
    if rank is None or world is None:
        distributed = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(identity))  # as it will be read back
    _sweep(folder, rank, world)
    _check(folder, _records(folder), identity, sources, changed)
    _barrier()
    if rank == 0:
        _gather(folder, identity, len(sources), prune=True)
    _barrier()
    known = _records(folder)
    mine = range(rank, len(sources), world)
    _verify(folder, {n: known[n] for n in mine if n in known})
    missing = [n for n in mine if n not in known]
    for number, columns, notes in make(missing) if missing else ():
        table = _table(columns)
        try:
            digest = write_whole(folder / _name(number), partial(_write_table, table=table))
            record = {"sha256": digest, "rows": table.num_rows, "sources": sources[number], **notes}
            write_json(folder / f"{_name(number)}.json", record)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk is full at part {number + 1} of {len(sources)} in {folder}, rows {sources[number]['rows']}, "
                f"{table.nbytes:,} bytes. The parts written before it stay: make room and run the same command, which "
                "continues from there",
            ) from error
    while True:
        if rank == 0:
            _gather(folder, identity, len(sources))
        # The others' parts are waited for by looking: a barrier would time out.
        manifest = _read_json(folder / MANIFEST)
        if manifest is not None and len(manifest["shards"]) == len(sources):
            return [manifest["shards"][_name(n)] for n in range(len(sources))]
        time.sleep(0.5)


class CachedArray:
    """
    A column `(rows, width)` over memory-mapped parts.

    An int gives a row, a slice or a sequence of ints a new array of these rows.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = [part for part in parts if len(part)] or list(parts[:1])
        self.starts = [0, *accumulate(len(part) for part in self.parts)]
        self.shape = (self.starts[-1], self.parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | torch.Tensor) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            if not 0 <= rows < len(self):
                raise IndexError(f"row {rows} of {len(self)}")
            part = bisect_right(self.starts, rows) - 1
            return self.parts[part][rows - self.starts[part]]
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        values = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        parts = np.searchsorted(self.starts, wanted, side="right") - 1
        for number in np.unique(parts):
            here = parts == number
            values[here] = self.parts[number][wanted[here] - self.starts[number]]
        return values


class CachedTable:
    """The columns of a built folder, memory-mapped; another process that it is sent to maps the files itself."""

    def __init__(self, folder: str | Path, count: int):
        self.folder, self.count = Path(folder), count
        self._open()

    def _open(self) -> None:
        tables = []
        for number in range(self.count):
            with pa.memory_map(str(self.folder / _name(number))) as source:
                tables.append(pa.ipc.open_file(source).read_all())
        self.columns = {
            name: CachedArray([_values(table[name]) for table in tables]) for name in tables[0].column_names
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "count": self.count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


# Identity and verification


def _check(folder: Path, records: dict[int, dict], identity: dict, sources: Sequence[dict], changed: Callable) -> None:
    manifest = _read_json(folder / MANIFEST)
    if manifest is None:
        return
    cached, others = manifest["identity"], []
    for name in sorted(identity.keys() | cached.keys()):
        if identity.get(name) != cached.get(name):
            others.append(f"{name} (cached {cached.get(name)!r}, now {identity.get(name)!r})")
    if not others:
        if any(number >= len(sources) for number in records):
            others.append(f"number of rows (cached {len(records)} parts, now {len(sources)})")
        names = {}
        for number, record in sorted(records.items()):
            for name, digest in sources[number].items() if number < len(sources) else ():
                if record["sources"].get(name) != digest and name not in names and changed(number, name, record):
                    names[name] = number
        others += [f"{name} (first among rows {sources[number]['rows']})" for name, number in names.items()]
    if others:
        raise StaleCacheError(
            f"the cache in {folder} was made of something else. What differs: {'; '.join(others)}. Give another "
            "--cache_dir, or delete this folder to have it made again"
        )


def _verify(folder: Path, records: dict[int, dict]) -> None:
    with ThreadPoolExecutor(8) as threads:  # hashing does not hold Python's lock
        digests = threads.map(lambda number: sha256(folder / _name(number)), records)
        for (number, record), digest in zip(records.items(), digests, strict=True):
            if digest != record["sha256"]:
                raise CorruptCacheError(
                    f"{folder / _name(number)} is corrupt: its sha256 is {digest}, and {record['sha256']} was written. "
                    "Delete that file and run the same command, which makes it again"
                )


def _gather(folder: Path, identity: dict, count: int, *, prune: bool = False) -> None:
    """Puts the parts' records into the manifest, when all are there or, to `prune`, those whose files are."""
    records = {_name(n): record for n, record in _records(folder).items()}
    manifest = {"identity": identity, "shards": dict(sorted(records.items()))}
    if (prune or len(records) == count) and manifest != _read_json(folder / MANIFEST):
        write_json(folder / MANIFEST, manifest)
    if prune or len(records) == count:
        for name in records:
            (folder / f"{name}.json").unlink(missing_ok=True)


def _sweep(folder: Path, rank: int, world: int) -> None:
    """Removes what an interruption left of this process's parts, the first's manifest; others may be writing theirs."""
    for path in folder.glob("*.tmp"):
        number = path.name.partition(".")[0]
        if (int(number) % world if number.isdigit() else 0) == rank:
            path.unlink(missing_ok=True)


def _records(folder: Path) -> dict[int, dict[str, Any]]:
    """The records of parts whose file is there: those of the manifest, and newer ones beside their part."""
    newer = {path.stem: _read_json(path) for path in folder.glob("*.arrow.json")}
    # After them: one that the first process moves into the manifest meanwhile is in either.
    parts = (_read_json(folder / MANIFEST) or {"shards": {}})["shards"]
    parts |= {name: record for name, record in newer.items() if record is not None}
    return {int(Path(name).stem): record for name, record in parts.items() if (folder / name).is_file()}


# Files


def _name(number: int) -> str:
    return f"{number:05d}.arrow"


def _table(columns: dict[str, np.ndarray]) -> pa.Table:
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in columns.items()
    }
    return pa.table(arrays)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """A column of one part, `(rows, width)`, not copied."""
    width = column.type.list_size
    if not column.num_chunks:
        return np.empty((0, width), column.type.value_type.to_pandas_dtype())
    return column.chunk(0).flatten().to_numpy(zero_copy_only=True).reshape(-1, width)


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_json(path: Path, value: Any) -> None:
    """A value as JSON, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def write_whole(path: Path, fill: Callable[[Path], Any]) -> str:
    """Whole or not at all: a temporary file beside it, on the disk before it is renamed. Returns its sha256."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        fill(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        digest = sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            state.update(block)
    return state.hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
