"""How a pool lies on disk: what `datasets` saves, in Arrow record batches large enough to be searched where they lie."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers.utils import is_datasets_available

if is_datasets_available():
    import datasets
    import pyarrow.compute as pc
    from datasets.arrow_writer import ArrowWriter
    from datasets.utils.py_utils import convert_file_size_to_int

# datasets writes 100 rows at a time where there are images. A scan over so short blocks is a tenth slower on one core,
# and uses no second one; over 1,000 rows it is still a twentieth slower than over these.
BATCH_ROWS, BATCH_BYTES = 16_000, 256 * 2**20
# What a pool's folder holds: its rows, and what can be made again from them.
ROWS = ("state.json", "dataset_info.json", "data-*.arrow")
EXTRAS = ("pool.json", "index.json", "index-*.faiss", "statistics.safetensors")


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


def record_batches(dataset: "datasets.Dataset") -> list[Batch]:
    """The rows in batches of at most `BATCH_ROWS` and, beyond one row, `BATCH_BYTES` of images, read or not."""
    images = dataset.data.column("image")
    encoded = pc.struct_field(images, "bytes")
    sizes = pc.fill_null(pc.binary_length(encoded), 0).to_numpy().astype(np.int64)
    paths = pc.struct_field(images, "path")
    for row in np.flatnonzero(pc.and_(pc.is_null(encoded), pc.is_valid(paths)).to_numpy()).tolist():
        sizes[row] = os.path.getsize(paths[row].as_py())
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
    dataset: "datasets.Dataset", path: Path, batches: Sequence[Batch] | None = None, *, copy_images: bool = True
) -> None:
    """
    Writes rows as one Arrow file, whole or not at all.

    Args:
        batches: of [`record_batches`], by default all.
        copy_images: copy images given as paths into it.

    Raises:
        OSError: the disk is full or the file cannot be written; nothing is left of it.
    """
    part = path.with_name(f".{path.name}.part")
    table = dataset.with_format("arrow")
    batches = record_batches(dataset) if batches is None else batches
    try:
        with part.open("wb") as file:
            writer = ArrowWriter(stream=file, features=dataset.features, embed_local_files=copy_images)
            for start, stop, _ in batches:
                writer.write_table(table[start:stop], writer_batch_size=stop - start)
            writer.finalize(close_stream=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_dataset(dataset: "datasets.Dataset", folder: Path, max_shard_size: int | str = "500MB") -> None:
    """Saves a pool's rows in files of about `max_shard_size`, for `datasets.load_from_disk`."""
    limit, files, size = convert_file_size_to_int(max_shard_size), [[]], 0
    for batch in record_batches(dataset):
        if files[-1] and size + batch.size > limit:
            files.append([])
            size = 0
        files[-1].append(batch)
        size += batch.size
    names = [f"data-{i:05d}-of-{len(files):05d}.arrow" for i in range(len(files))]
    for name, batches in zip(names, files, strict=True):
        write_arrow(dataset, folder / name, batches)
    write_state(folder, names, dataset.features)


def write_state(folder: Path, names: Sequence[str], features: "datasets.Features") -> None:
    """Makes Arrow files in a folder a saved dataset, without touching them."""
    empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    with tempfile.TemporaryDirectory() as made:  # datasets says itself what its description holds
        with _quiet():
            empty.save_to_disk(made, num_shards=1)
        state = json.loads((Path(made) / "state.json").read_text())
        info = (Path(made) / "dataset_info.json").read_text()
    sizes = [(folder / name).stat().st_size for name in names]
    state["_data_files"] = [{"filename": name} for name in names]
    state["_fingerprint"] = datasets.fingerprint.Hasher.hash([[str(n), s] for n, s in zip(names, sizes, strict=True)])
    (folder / "dataset_info.json").write_text(info)
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def replace(folder: Path, made: Path, patterns: Sequence[str]) -> None:
    """Moves the files of `made` into a pool's folder in the place of those of `patterns`; other files stay."""
    (folder / "pool.json").unlink(missing_ok=True)  # first gone, last back: until then the folder is no pool
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()
    for file in sorted(made.iterdir(), key=lambda f: f.name == "pool.json"):
        os.replace(file, folder / file.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without datasets' progress bars."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
