"""Folders that appear whole or not at all, and which of a run's checkpoints are whole."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger("train")

ASIDE = ".saving"  # a folder beside the checkpoints: what is written, before it has its name
STATE = "trainer_state.json"
# What resuming reads; those of the random numbers have names by process.
NEEDED = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", STATE)


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """
    A folder to fill that takes the name `target` by one rename, once it is filled and on the disk.

    A former `target` stays as it is until then; it is moved aside in the moment before, and [`restore`] puts it back where
    a process ended between the two. What an error left half-filled is deleted.
    """
    target = Path(target)
    aside = target.parent / ASIDE
    filled = aside / target.name
    shutil.rmtree(filled, ignore_errors=True)
    filled.mkdir(parents=True)
    try:
        yield filled
        put_in_place(filled, target)
    finally:
        shutil.rmtree(filled, ignore_errors=True)
        _remove_empty(aside)


def put_in_place(filled: Path, target: Path) -> None:
    """Gives a filled folder of the same disk its name, in the place of a former one."""
    _sync(filled)
    former = filled.parent / f"former-{target.name}"
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.replace(target, former)
    os.replace(filled, target)
    shutil.rmtree(former, ignore_errors=True)
    _remove_empty(filled.parent)


def restore(output_dir: str | Path) -> None:
    """Puts back what a process that ended inside [`put_in_place`] had moved aside, and deletes what it left unfinished."""
    aside = Path(output_dir) / ASIDE
    for former in aside.glob("former-*"):
        target = Path(output_dir) / former.name.removeprefix("former-")
        if not target.exists():
            logger.warning(f"a save of {target} was interrupted: the former one is put back")
            os.replace(former, target)
    shutil.rmtree(aside, ignore_errors=True)


def newest_whole(output_dir: str | Path) -> Path | None:
    """
    The newest of a run's checkpoints from which it can continue; `None` where there is none. A warning names newer ones that
    are not whole, and why.
    """
    for _, folder in sorted(_numbered(output_dir).items(), reverse=True):
        problem = what_is_broken(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder} is passed over, since {problem}: a save of it was interrupted")
    return None


def rotate_checkpoints(output_dir: str | Path, limit: int | None, step: int, best: str | None = None) -> None:
    """
    Deletes a run's oldest checkpoints beyond `limit`. Each is moved aside first, by one rename, so that no half of one
    keeps its name. Those of later steps than `step` are what a run left that was resumed before them: they go first.

    Args:
        limit: how many to keep; all for `None` or 0.
        step: of the newest, which stays.
        best: the folder of the best, which stays too.
    """
    if not limit:
        return
    numbered = _numbered(output_dir)
    stay = {step} | {
        number for number, folder in numbered.items() if best and folder.resolve() == Path(best).resolve()
    }
    others = sorted(numbered.keys() - stay, key=lambda number: (number < step, number))
    aside = Path(output_dir) / ASIDE
    for number in others[: max(0, len(numbered) - max(limit, len(stay)))]:
        gone = aside / f"removed-{numbered[number].name}"
        shutil.rmtree(gone, ignore_errors=True)
        aside.mkdir(exist_ok=True)
        os.replace(numbered[number], gone)
        shutil.rmtree(gone, ignore_errors=True)
    _remove_empty(aside)


def _numbered(output_dir: str | Path) -> dict[int, Path]:
    """Step -> folder of a run's checkpoints, whole or not."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    matches = ((re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name), folder) for folder in folders)
    return {int(match[1]): folder for match, folder in matches if match}


def what_is_broken(folder: Path) -> str | None:
    """Why training cannot continue from a checkpoint; `None` where it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    random_states = [path.name for path in folder.glob("rng_state*.pth")] or ["rng_state.pth"]
    adapters = [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")]
    for name in (*NEEDED, *sorted(random_states + adapters)):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not _readable(path):
            return f"{name} is cut off"
    return None


def _readable(path: Path) -> bool:
    """Whether a file has its end, as far as its format says."""
    if path.suffix == ".json":
        try:
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        except ValueError:
            return False
    if path.suffix == ".safetensors":
        return _safetensors_whole(path)
    return zipfile.is_zipfile(path)  # torch's own format is a zip, whose table of contents is at its end


def _safetensors_whole(path: Path) -> bool:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < path.stat().st_size else b""
    try:
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        return path.stat().st_size == 8 + length + max((t["data_offsets"][1] for t in tensors), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def _sync(folder: Path) -> None:
    """Waits until a folder's files are on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # another save uses it, or it does not exist
        folder.rmdir()
