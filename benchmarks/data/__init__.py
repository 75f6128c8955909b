"""Readers of the data sets, each into the schema of [`benchmarks.schema`]; the miniature has a substitute for each."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.schema import MAX_MISSING_SHARE, Dialogues, Protocol, Questions

from . import miniature
from .broken import leave_out_broken
from .mmdialog import read_mmdialog
from .visdial import read_visdial, read_visdial_answers
from .vist import read_vist
from .vqav2 import read_vqav2


def _mmdialog(folder: Path, split: str, protocol: Protocol, _: str | None) -> Dialogues:
    data = read_mmdialog(folder, split, protocol["pool"])
    if protocol.kind == "image":
        data.dialogues = [d for d in data.dialogues if d["gold"]["image_ids"]]
    return data


# By a protocol's `data`: (folder, split, protocol, manifest) -> the data.
READERS: dict[str, Callable[[Path, str, Protocol, str | None], Dialogues | Questions]] = {
    "mmdialog": _mmdialog,
    "visdial": lambda folder, split, protocol, _: read_visdial(folder, split, protocol["caption"]),
    "visdial_answers": lambda folder, split, *_: read_visdial_answers(folder, split),
    "vist": lambda folder, split, _, manifest: read_vist(folder, split, manifest),
    "vqav2": lambda folder, split, *_: read_vqav2(folder, split),
}


def load_data(
    protocol: Protocol, folder: str | Path | None = None, *, split: str | None = None, manifest: str | None = None,
    max_missing_share: float = MAX_MISSING_SHARE,
) -> Dialogues | Questions:  # fmt: skip
    """
    The data of a protocol.

    Args:
        folder: of the data set as it is published; the miniature's split where `None`.
        split: instead of the protocol's.
        manifest: VIST only, a file of the photo ids to keep.
        max_missing_share: of items that may be left out.

    Raises:
        BadDataError: a file is absent or of the wrong shape.
        TooMuchMissingError: more items are left out than allowed; the message counts them by reason.
    """
    split = split or protocol["split"]
    if folder is None:
        data = miniature.READERS[protocol.task](split)
        data.missing.seen = len(data)
        return data
    folder = Path(folder)
    data = READERS[protocol.data](folder, split, protocol, manifest)
    data.missing.check(max_missing_share)
    data = leave_out_broken(data)
    data.missing.check(max_missing_share)
    if not len(data):
        raise ValueError(f"{folder}: no item of {split!r} can be evaluated. {data.missing}")
    return data
