"""
What a pool's folder holds, how it is replaced by another, and its way to the Hub and back.

`pool.json` decides: it names the model that made the pool and the files that count, with their digests, and is replaced
by one rename after they are written under names of their own. Other files of the pool's are left over and removed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import create_branch, create_repo, snapshot_download, upload_folder
from transformers.utils import is_datasets_available, logging

from .paths_unimur import inside
from .pool_arrow import ArrowFile, check_columns, open_rows, pool_features
from .pool_digests import DIGITS, FileDigest, Guard

if is_datasets_available():
    import datasets
    import pyarrow as pa

logger = logging.get_logger(__name__)

METADATA, STATISTICS = "pool.json", "statistics.safetensors"
FORMAT = 2  # the first had no digests: its pool.json is the fingerprint alone
# For `datasets.load_from_disk`, and nothing here reads them.
STATE, INFO = "state.json", "dataset_info.json"
ROWS, INDEXES, MOMENTS = "data-*.arrow", "index-*.faiss", "statistics*.safetensors"
FORMER_INDEX = "index.json"  # of the first format
# All that a pool's folder holds of its own: the rows, and what can be made again from them.
EXTRAS = (METADATA, FORMER_INDEX, INDEXES, MOMENTS)
ALL = (*EXTRAS, ROWS, STATE, INFO)
SAVING = ".saving-"


@dataclass(frozen=True)
class Description:
    """
    What `pool.json` says.

    Args:
        made_by: the fingerprint of the model that made the pool.
        rows: the files of its rows, in order.
        index: what the index says of itself, `None` where there is none.
        files: its other files, their digests by name.
        checked: whether there are digests; a pool saved before there were has none.
    """

    made_by: dict[str, Any]
    rows: list[ArrowFile] = field(default_factory=list)
    index: dict[str, Any] | None = None
    files: dict[str, FileDigest] = field(default_factory=dict)
    checked: bool = True

    @property
    def names(self) -> set[str]:
        """The files that count."""
        return {METADATA, STATE, INFO, *self.files, *(file.name for file in self.rows)}

    def file(self, start: str) -> str | None:
        """The name of the file of `files` that starts so."""
        return next((name for name in self.files if name.startswith(start)), None)

    def write(self, path: Path) -> None:
        """Writes it through to the disk, with a digest of its own."""
        body = {
            "format": FORMAT,
            "made_by": self.made_by,
            "rows": [file.as_json() for file in self.rows],
            "index": self.index,
            "files": {n: {"bytes": d.size, "blocks": d.blocks} for n, d in self.files.items()},
        }
        with path.open("w") as file:
            file.write(json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> "Description":
        """
        Raises:
            FileNotFoundError: the folder holds no pool.
            ValueError: the file is damaged, or of a later format.
        """
        path = folder / METADATA
        if not path.is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no {METADATA}: it is not a pool that save_to_disk wrote")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body and isinstance(body, dict) and all(isinstance(v, str | int | float | None) for v in body.values()):
                former = folder / FORMER_INDEX
                return cls(body, index=json.loads(former.read_text()) if former.is_file() else None, checked=False)
            digest = body.pop("digest")
            if digest != _digest(body):
                raise ValueError("its content has changed since it was saved")
            if body["format"] != FORMAT:
                raise ValueError(f"it is of format {body['format']}, and this version reads {FORMAT}")
            rows = [ArrowFile.from_json(file) for file in body["rows"]]
            files = {name: FileDigest(d["bytes"], d["blocks"]) for name, d in body["files"].items()}
            return cls(body["made_by"], rows, body["index"], files)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}): save or download the pool again") from error


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:DIGITS]


def has_index(folder: Path) -> bool:
    """Whether a folder holds a pool with an index."""
    return any(folder.glob(INDEXES))


# Opening


def open_folder(folder: Path) -> tuple[Description, "datasets.Dataset", Guard | None]:
    """
    A saved pool: what it says of itself, its rows, and what checks those that have not been checked yet.

    Raises:
        FileNotFoundError: there is none, or a file of it is missing.
        ValueError: a file is damaged, is outside the folder, or is no pool's.
    """
    about = Description.read(folder)
    if not about.checked:
        logger.warning(
            f"the pool in {str(folder)!r} was saved without digests: damage to its files is not noticed. Saving it "
            "again adds them"
        )
        return about, _open_unchecked(folder, about.made_by), None
    for name in (*about.files, *(file.name for file in about.rows)):
        inside(folder, name)
    for name, digest in about.files.items():
        digest.check(folder / name)
    dataset, guard = open_rows(folder, about.rows, about.made_by["dimension"])
    return about, dataset, guard


def _open_unchecked(folder: Path, made_by: dict[str, Any]) -> "datasets.Dataset":
    try:
        for file in json.loads((folder / STATE).read_text())["_data_files"]:
            inside(folder, file["filename"])
        for name in (STATE, INFO):
            inside(folder, name)
        dataset = datasets.load_from_disk(str(folder))
        check_columns(dataset, made_by["dimension"], folder)
        return dataset
    except (pa.ArrowException, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(folder)!r} cannot be opened ({error}): save or download the pool again") from error


# Saving


class Saving:
    """
    A new state of a pool's folder, made aside and published by [`Saving.publish`]; used as a context, whose end removes
    what is left. Two processes must not save into one folder at a time.

    Args:
        folder: made where there is none.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for left in folder.glob(f"{SAVING}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.made = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.made, ignore_errors=True)

    def named(self, name: str) -> tuple[str, FileDigest]:
        """Gives a file that was made the name of its content; that name and its digest."""
        path = self.made / name
        digest = FileDigest.of(path)
        final = f"{path.stem}-{digest.short}{path.suffix}"
        _sync(path)
        os.replace(path, self.made / final)
        return final, digest

    def publish(self, about: Description) -> None:
        """
        Makes what was made, and what it names beside that, the folder's pool: at the rename of `pool.json`, and not
        before; a pool that was there is whole until then.
        """
        about.write(self.made / METADATA)
        state_files(self.made, [file.name for file in about.rows], int(about.made_by["dimension"]))
        last = (METADATA, STATE, INFO)
        for path in sorted(self.made.iterdir()):
            if path.name not in last:
                os.replace(path, self.folder / path.name)
        _sync(self.folder)
        for name in last:
            os.replace(self.made / name, self.folder / name)
        _sync(self.folder)
        for pattern in ALL:
            for file in self.folder.glob(pattern):
                if file.name not in about.names:
                    file.unlink()


def adopt(folder: Path, names: Sequence[str], made_by: dict[str, Any]) -> None:
    """
    Makes Arrow files of rows that are in a folder its pool, without changing them; where they are that already, the pool
    stays as it is, with its index.
    """
    rows = [ArrowFile.of(folder / name) for name in names]
    with suppress(FileNotFoundError, ValueError):
        about = Description.read(folder)
        if about.made_by == made_by and about.rows == rows:
            return
    with Saving(folder) as saving:
        saving.publish(Description(made_by, rows))


def state_files(folder: Path, names: Sequence[str], dimension: int) -> None:
    """Writes what makes Arrow files a saved dataset for `datasets.load_from_disk`."""
    empty, info = _empty_dataset(dimension)
    state = json.loads(empty)
    state["_data_files"] = [{"filename": name} for name in names]
    state["_fingerprint"] = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:DIGITS]
    (folder / INFO).write_text(info)
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")


@cache
def _empty_dataset(dimension: int) -> tuple[str, str]:
    """What datasets itself writes beside no rows: its state and its description."""
    features = pool_features(dimension)
    empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as made:
            empty.save_to_disk(made, num_shards=1)
            return (Path(made) / STATE).read_text(), (Path(made) / INFO).read_text()
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _sync(path: Path) -> None:
    """Through to the disk, a folder's names too where the system can."""
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# The Hub
MODEL = "org/the-model-that-made-this-pool"  # in a card: a pool knows its model by fingerprint, not by name


def upload_pool(
    pool, repo_id: str, *, max_shard_size: int | str = "500MB", private: bool | None = None, token: str | None = None,
    revision: str | None = None, commit_message: str = "Upload a UniMuR candidate pool",
) -> str:  # fmt: skip
    """
    Saves a [`CandidatePool`] aside and uploads it as the dataset repository `repo_id`, images included.

    Args:
        max_shard_size: of an Arrow file, about.
        private, token, commit_message: as `huggingface_hub`'s.
        revision: a branch, made where there is none; by default `main`.

    Returns:
        The commit's URL.
    """
    repo_id = create_repo(repo_id, repo_type="dataset", private=private, token=token, exist_ok=True).repo_id
    if revision is not None:
        create_branch(repo_id, repo_type="dataset", branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pool.save_to_disk(folder, max_shard_size=max_shard_size)
        (Path(folder) / "README.md").write_text(pool_card(pool, repo_id))
        # What a former pool had, such as more files or an index, does not stay beside the new one's.
        former = [ROWS, "index*", MOMENTS]
        done = upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type="dataset", token=token, revision=revision,
            commit_message=commit_message, delete_patterns=former,
        )  # fmt: skip
    return str(done.commit_url)


def download_pool(repo_id: str, *, revision: str | None = None, **arguments: Any) -> str:
    """The folder of a pool on the Hub; `arguments` (token, cache_dir, local_files_only, ...) go to snapshot_download."""
    return snapshot_download(repo_id, repo_type="dataset", revision=revision, **arguments)


def pool_card(pool, repo_id: str) -> str:
    """The dataset card: what the pool holds, what made it, how it is opened."""
    counts = pool.counts
    size = next(name for name, limit in SIZES.items() if len(pool) < limit)
    index = "none; it is searched exactly"
    if pool.index is not None:
        recalls = ", ".join(f"{value:.3f} for {m}s" for m, value in pool.index.about["recall_at_10"].items())
        index = f"{pool.index.about['kind']}, recall@10 {recalls} ({pool.index.about['recall_queries']})"
    made_by = "\n".join(f"| {name} | `{value}` |" for name, value in pool.made_by.items())
    return f"""---
library_name: datasets
task_categories:
- image-to-text
- text-retrieval
tags:
- unimur
- multimodal-retrieval
size_categories:
- {size}
---
# A UniMuR candidate pool

{counts["image"]:,} images and {counts["text"]:,} texts with their unified embeddings (L2-normalised float32), for
retrieval by a UniMuR model. Only the model that made it can search it: a query of another one is refused.

| made by | |
|---|---|
{made_by}

Approximate index: {index}.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{MODEL}", trust_remote_code=True)  # put its name here
pool = model.pool_from_hub("{repo_id}")
print(model.retrieve("hello!", pool).text)
```

The licences and the origin of the images and texts are their own: whoever uploads a pool says here what they are.
"""


SIZES = {
    "n<1K": 1e3, "1K<n<10K": 1e4, "10K<n<100K": 1e5, "100K<n<1M": 1e6, "1M<n<10M": 1e7, "10M<n<100M": 1e8,
    "100M<n<1B": 1e9, "1B<n<10B": 1e10, "10B<n<100B": 1e11, "100B<n<1T": 1e12, "n>1T": float("inf"),
}  # fmt: skip
