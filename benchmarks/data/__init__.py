"""Readers of the data sets, each into the one schema of [`benchmarks.schema`]; the miniature stands in for each."""

from pathlib import Path

from benchmarks.protocols import Protocol
from benchmarks.schema import MAX_MISSING_SHARE, Dialogues, Questions

from . import miniature
from .broken import leave_out_broken
from .mmdialog import read_mmdialog
from .visdial import read_visdial, read_visdial_answers
from .vist import read_vist
from .vqav2 import read_vqav2


def load_data(
    protocol: Protocol, folder: str | Path | None = None, *, split: str | None = None, manifest: str | None = None,
    max_missing_share: float = MAX_MISSING_SHARE,
) -> Dialogues | Questions:  # fmt: skip
    """
    What a protocol measures on.

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
    if protocol.data == "mmdialog":
        data = read_mmdialog(folder, split, protocol["pool"])
        if protocol.kind == "image":
            data.dialogues = [d for d in data.dialogues if d["gold"]["image_ids"]]
    elif protocol.task == "visdial":
        data = read_visdial(folder, split, protocol["caption"])
    elif protocol.task == "visdial_answers":
        data = read_visdial_answers(folder, split)
    elif protocol.task == "vist":
        data = read_vist(folder, split, manifest)
    else:
        data = read_vqav2(folder, split)
    data.missing.check(max_missing_share)
    data = leave_out_broken(data)
    data.missing.check(max_missing_share)
    if not len(data):
        raise ValueError(f"{folder}: no item of {split!r} can be evaluated. {data.missing}")
    return data
