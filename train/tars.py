"""Tar archives of samples as webdataset and img2dataset write them, read one sample at a time and bounded in memory."""

import bz2
import glob
import gzip
import itertools
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from modeling_unimur.images_unimur import MAX_BYTES
from train.rows import IMAGE_ENDINGS, MAX_TEXT, BadRowError, Folder, printable

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGES = frozenset(ending[1:] for ending in IMAGE_ENDINGS)
TEXTS = frozenset(("txt", "json"))
MAX_HEADER = 2**20  # bytes of a long name or of a pax header, which tarfile reads whole
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)

Paths = str | Path | Iterable[str | Path]


@dataclass
class Sample:
    """
    The members of one key whose ending is wanted.

    Attributes:
        key: a member's name up to its last dot.
        files: bytes by ending in lower case.
        problem: why the sample cannot be used.
        sides: keys of pictures that begin with this key and a dot, such as `000.seg.png` beside `000.jpg`.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    problem: BadRowError | None = None
    sides: list[str] = field(default_factory=list)
    endings: set[str] = field(default_factory=set)

    @property
    def image(self) -> bytes | None:
        return next((data for ending, data in self.files.items() if ending in IMAGES), None)

    @property
    def whole(self) -> bool:
        return bool(self.endings & IMAGES) and bool(self.endings & TEXTS)


def find_tars(path: Paths) -> list[Path]:
    """
    The archives of a path, in order: itself, those in its folder and the folders within, those of a pattern (`*`, `?`) or of
    braces (`{00000..00010}.tar`, `{a,b}.tar`); of a list those of one part after another.

    Raises:
        ValueError: braces name an archive that does not exist, or a link in a folder leads out of it.
    """
    if not isinstance(path, str | Path):
        return [tar for part in path for tar in find_tars(part)]
    # A file whose name happens to look like a pattern means that file.
    if os.path.isfile(path):
        return [Path(path)] if is_tar(str(path)) else []
    if os.path.isdir(path):
        bounds = Folder(path)
        files = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        named = sorted(file for file in files if is_tar(file.name) and not file.name.startswith("."))
        return [bounds.file(str(file.relative_to(path))) for file in named]
    patterns = _expand(str(path))
    matches = [sorted(glob.glob(pattern)) for pattern in patterns]
    absent = [pattern for pattern, files in zip(patterns, matches, strict=True) if not files]
    if absent and len(patterns) > 1:
        raise ValueError(f"{path}: {len(absent)} of its {len(patterns)} archives do not exist, such as {absent[0]}")
    return [Path(file) for files in matches for file in files if is_tar(file)]


def is_tar(name: str) -> bool:
    """Whether a file's name ends as an archive's does that is read here."""
    return name.lower().endswith(TAR_ENDINGS)


def tar_stem(path: Path) -> str:
    """An archive's name without its ending."""
    ending = next((e for e in TAR_ENDINGS if path.name.lower().endswith(e)), path.suffix)
    return path.name[: len(path.name) - len(ending)]


def _expand(pattern: str) -> list[str]:
    """Braces as a shell and webdataset expand them; digits keep their width."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    parts = braces[1].split(",")
    if span:
        first, last = span.groups()
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [pattern[: braces.start()] + part + rest for part in parts for rest in _expand(pattern[braces.end() :])]


def read_samples(path: Path, wanted: Collection[str] = IMAGES | TEXTS) -> Iterator[Sample]:
    """
    The samples of one archive, and of those that were appended to it.

    A key is what comes before the last dot, since keys themselves hold dots; the same key again, in another place or with
    an ending it has already, is another sample. Of a key only one picture is held, its first. What is no sample comes as one
    with a problem: `outside_folder` (a name that leads up or starts at the root), `link`, `too_many_bytes`, and, once for an
    archive, `broken_archive` (its rest is not used) and `no_sample`.

    Args:
        path: of the archive.
        wanted: the endings that are read; other members are passed over without holding them.
    """
    waiting: list[Sample] = []  # each of these keys begins with the one before it and a dot
    samples = 0
    try:
        for tar, member in tar_members(path):
            key, ending = split_ending(member.name)
            if ending not in wanted or not os.path.basename(key) or os.path.basename(key).startswith("."):
                continue  # no sample: another file, or one that an archiver adds (`._000.jpg`)
            if member.isdir():
                continue
            while waiting and waiting[-1].key != key and not key.startswith(f"{waiting[-1].key}."):
                yield from _close(waiting)
            if waiting and waiting[-1].key == key and ending in waiting[-1].endings:
                yield from _close(waiting)
            if not waiting or waiting[-1].key != key:
                waiting.append(Sample(key))
                samples += 1
            _add(waiting[-1], ending, tar, member)
    except BROKEN as error:
        cut = waiting.pop().key if waiting and not waiting[-1].whole else None
        while waiting:
            yield from _close(waiting)
        yield Sample(cut or path.name, problem=broken_archive(path, samples, cut, error))
        return
    while waiting:
        yield from _close(waiting)
    if not samples:
        problem = BadRowError(
            "no_sample", f"{path} holds no member with one of the endings {', '.join(sorted(wanted))}"
        )
        yield Sample(path.name, problem=problem)


def broken_archive(path: Path, samples: int, cut: str | None, error: BaseException) -> BadRowError:
    """What is wrong with an archive that ends early, after so many samples and within `cut`."""
    return BadRowError(
        "broken_archive",
        f"{path} ends early, {samples} samples in{f', at {printable(cut)!r}' if cut else ''} ({error}); the rest of it is "
        "not used: fetch or write it again",
    )


def split_ending(name: str) -> tuple[str, str]:
    """A member's name up to its last dot, and what follows it in lower case."""
    stem, _, ending = name.rpartition(".")
    return stem, ending.lower()


def _add(sample: Sample, ending: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    """Puts a member into its sample, or says why not, without reading it."""
    another = ending in IMAGES and sample.endings & IMAGES
    if sample.problem is None and not another:
        try:
            sample.files[ending] = read_member(tar, member)
        except BadRowError as error:
            sample.problem = error
    sample.endings.add(ending)  # only now: an archive that breaks off here leaves the sample without it


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """
    The bytes of a picture or a text in an archive.

    Raises:
        BadRowError: `outside_folder`, `link` or `too_many_bytes`, without reading it.
    """
    name = printable(member.name)
    bound = MAX_BYTES if split_ending(name)[1] in IMAGES else MAX_TEXT
    if name.startswith("/") or ".." in name.split("/"):
        raise BadRowError("outside_folder", f"{name!r} leads out of the archive's folder")
    if not member.isfile():
        kind = "link" if member.issym() or member.islnk() else "special file"
        raise BadRowError("link", f"{name!r} is a {kind}, which holds nothing: pack the file itself")
    if member.size > bound:
        raise BadRowError("too_many_bytes", f"{name!r} has {member.size:,} bytes, over {bound:,}")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _close(waiting: list[Sample]) -> Iterator[Sample]:
    """Takes out the last sample, unless it proves to be a side picture of the one before it."""
    sample = waiting.pop()
    if not sample.whole and sample.problem is None and waiting and not sample.endings & TEXTS:
        waiting[-1].sides.append(sample.key)
        waiting[-1].sides += sample.sides
        return
    yield sample
    if not sample.whole:
        problem = BadRowError("empty_caption", "no caption")
        yield from (Sample(key, problem=problem) for key in sample.sides)


# Archives


class _BoundedTarInfo(tarfile.TarInfo):
    """A header whose name or attributes are of a sane length."""

    def _proc_member(self, tar: Any) -> Any:
        if self.size < 0 or (self.type in b"xgXLK" and self.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]  # tarfile's own hook, which its stubs leave out


def tar_members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member of an archive and of those appended to it; raises one of `BROKEN`."""
    with _open(path) as file:
        start: int | None = 0
        while start is not None:
            file.seek(start)
            with tarfile.TarFile(fileobj=file, mode="r", tarinfo=_BoundedTarInfo) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # which tarfile keeps
                    yield tar, member
                start = _next_archive(file, tar.offset)


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        start = file.read(6)
    opened: Any = path.open("rb")
    for magic, reader in ((b"\x1f\x8b", gzip.GzipFile), (b"BZh", bz2.BZ2File), (b"\xfd7zXZ", lzma.LZMAFile)):
        if start.startswith(magic):
            opened.close()
            opened = reader(path)  # type: ignore[operator]  # each takes a path first
    return opened


def _next_archive(file: IO[bytes], end: int) -> int | None:
    """
    Where another archive begins after the zeros that end one; `None` at the file's end. tarfile takes a cut or broken header
    for the end, so that its zeros are looked for.
    """
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the archive has no end")
    for at in itertools.count(end + tarfile.BLOCKSIZE, tarfile.BLOCKSIZE):
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            return at
        if not block:
            return None
    return None
