"""Names of files that others wrote, kept inside the folder that they are of."""

from os import PathLike
from pathlib import Path


def inside(folder: str | PathLike, name: str | PathLike) -> Path:
    """
    The file of a name in a folder, its links followed. Links of a Hub download lead to the repository's own `blobs`.

    Raises:
        ValueError: it is outside: by an absolute path, by `..` or by a link.
    """
    root = Path(folder).resolve()
    path = root / name
    target = path.resolve()
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    # The name itself stays in the folder; only where it leads to may be a blob.
    if ".." in Path(name).parts or root not in path.parents or not any(a in target.parents for a in allowed):
        raise ValueError(f"{str(name)!r} is outside {str(folder)!r}: it is not read")
    return target
