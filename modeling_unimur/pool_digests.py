"""Whether a saved file is the one that was written: SHA-256 of every block of it, checked before the block is used."""

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 2**20
DIGITS = 16  # hexadecimal, of each block's SHA-256: a damaged block passes once in 2**64


@dataclass(frozen=True)
class FileDigest:
    """
    Args:
        size: bytes of the file.
        blocks: `DIGITS` of every block of `BLOCK` bytes, one after the other.
    """

    size: int
    blocks: str

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Reads a file."""
        parts, size = [], 0
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                parts.append(block_digest(block))
                size += len(block)
        return cls(size, "".join(parts))

    @property
    def short(self) -> str:
        """`DIGITS` that name the content."""
        return hashlib.sha256(f"{self.size} {self.blocks}".encode()).hexdigest()[:DIGITS]

    def check(self, path: Path) -> None:
        """Raises `FileNotFoundError` or, where the file is another one, `ValueError`, naming it."""
        self.check_size(path)
        if FileDigest.of(path) != self:
            raise damaged(path, "its content has changed")

    def check_size(self, path: Path) -> None:
        """As `check`, by the size alone."""
        if not path.is_file():
            raise FileNotFoundError(f"{str(path)!r} is missing: the pool is not whole; save or download it again")
        size = path.stat().st_size
        if size != self.size:
            raise damaged(path, f"it has {size} bytes of {self.size}")


def block_digest(block: Any) -> str:
    """`DIGITS` of the SHA-256 of a bytes-like object."""
    return hashlib.sha256(block).hexdigest()[:DIGITS]


def damaged(path: Path, how: str) -> ValueError:
    """The refusal of a file that is not the one that was saved."""
    return ValueError(f"{str(path)!r} is damaged ({how} since it was saved): save or download the pool again")


class MappedFile:
    """
    A memory-mapped file whose blocks are checked when they are first read.

    Args:
        path: of the file, for messages.
        digest: what it must be.
        memory: all of it, `(size,)` uint8.
    """

    def __init__(self, path: Path, digest: FileDigest, memory: np.ndarray):
        self.path, self.digest, self.memory = path, digest, memory
        self.start = memory.ctypes.data
        self.stop = self.start + len(memory)
        self.done = np.zeros(-(-len(memory) // BLOCK), dtype=bool)

    def check(self, blocks: np.ndarray | slice) -> None:
        """Some of the blocks, by number. Raises `ValueError` naming the file and the first byte of a damaged one."""
        numbers = np.arange(len(self.done))[blocks]
        for number in numbers[~self.done[numbers]].tolist():
            block = self.memory[number * BLOCK : (number + 1) * BLOCK]
            if block_digest(block) != self.digest.blocks[number * DIGITS : (number + 1) * DIGITS]:
                raise damaged(self.path, f"the content from byte {number * BLOCK} has changed")
            self.done[number] = True


class Guard:
    """Checks what is read out of mapped files, once; memory that is not theirs is not looked at."""

    def __init__(self, files: Sequence[MappedFile]):
        self.files = sorted(files, key=lambda file: file.start)
        self._starts = [file.start for file in self.files]

    def check(self, address: int, size: int) -> None:
        """`size` bytes from an address on, all of one file. Raises `ValueError` where they are damaged."""
        file = self._file(address)
        if file is not None and size:
            first, last = address - file.start, address - file.start + size - 1
            file.check(slice(first // BLOCK, last // BLOCK + 1))

    def check_rows(self, table: np.ndarray, rows: np.ndarray) -> None:
        """Some rows of a C-contiguous table `(n, q)`."""
        file = self._file(table.ctypes.data)
        if file is not None and len(rows):
            width = table.strides[0]
            first = table.ctypes.data - file.start + rows.astype(np.int64) * width
            file.check(np.unique(np.concatenate([first // BLOCK, (first + width - 1) // BLOCK])))

    def check_arrays(self, arrays: Iterable[Any]) -> None:
        """All that some Arrow arrays are made of."""
        for array in arrays:
            for buffer in array.buffers():
                if buffer is not None:
                    self.check(buffer.address, buffer.size)

    def check_all(self) -> None:
        """Everything that has not been checked yet."""
        for file in self.files:
            file.check(slice(None))

    def _file(self, address: int) -> MappedFile | None:
        number = bisect.bisect_right(self._starts, address) - 1
        return self.files[number] if number >= 0 and address < self.files[number].stop else None
