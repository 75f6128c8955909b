"""From undecoded images to CLIP's features: decoded ahead in worker processes, bad ones counted, what was read hashed."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_unimur import UniMuRModel, UniMuRProcessor
from modeling_unimur.images_unimur import MAX_BYTES, BadImageError
from train.cache import Part
from train.collate import SkipCounter, known_problem

logger = logging.get_logger("train")


@torch.no_grad()
def image_parts(
    images: datasets.Dataset, model: UniMuRModel, parts: list[tuple[int, range]], batch_size: int, workers: int,
    rates: "Rates",
) -> Iterator[Part]:  # fmt: skip
    """Decodes ahead in worker processes, over all parts in one go, and encodes here."""
    batches = [(n, list(rows[i : i + batch_size])) for n, rows in parts for i in range(0, len(rows), batch_size)]
    loader = DataLoader(
        _Rows(images), batch_sampler=[rows for _, rows in batches], num_workers=workers,
        collate_fn=Decode(model.processor), pin_memory=model.device.type == "cuda",
    )  # fmt: skip
    widths = {"image_features": model.config.image_feature_width, "image_embeds": model.config.clip_width}
    with tqdm(total=sum(len(rows) for _, rows in batches), desc="CLIP features", unit="image") as bar:
        decoded = zip(batches, loader, strict=True)
        for number, rows in parts:
            columns = {name: [np.empty((0, width), np.float32)] for name, width in widths.items()}
            left_out, contents, counts = [], [], SkipCounter()
            for _ in range(0, len(rows), batch_size):
                (_, indices), batch = next(decoded)
                start = time.perf_counter()
                if batch["pixels"] is not None:
                    values = model.encode_images(batch["pixels"].to(model.device, non_blocking=True))
                    for name, value in zip(widths, values, strict=True):
                        columns[name].append(value.cpu().numpy())
                rates.add(len(batch["kept"]), batch["seconds"], time.perf_counter() - start)
                kept = set(batch["kept"])
                left_out += [i for at, i in enumerate(indices) if at not in kept]
                contents += batch["contents"]
                for reason, example in batch["problems"]:
                    counts.update({reason: 1}, 0, {reason: [example]})
                bar.update(len(indices))
            notes = {
                "seen": len(rows), "skipped": dict(counts.counts), "examples": counts.examples, "left_out": left_out,
                "content": values_hash(contents),
            }  # fmt: skip
            yield number, {name: np.concatenate(values) for name, values in columns.items()}, notes


class _Rows(Dataset):
    def __init__(self, images: datasets.Dataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.images[index]


class Decode:
    """A worker's part: undecoded rows to pixels, with what could not be read and the hash of what was."""

    def __init__(self, processor: UniMuRProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        start, images, kept, problems = time.perf_counter(), [], [], []
        for position, row in enumerate(rows):
            problem, message = known_problem(row)
            if problem is not None:
                problems.append((problem, f"{row['id']!r}: {message}"))
                continue
            try:
                images.append(self.processor.decode(row["image"]))
                kept.append(position)
            except BadImageError as error:
                problems.append((error.reason, f"{row['id']!r}: {error}"))
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"] if images else None
        contents = [content_hash(row["image"]) for row in rows]
        seconds = time.perf_counter() - start
        return {"pixels": pixels, "kept": kept, "problems": problems, "contents": contents, "seconds": seconds}


class Rates:
    """Images a second of decoding alone, by all workers, and of encoding alone."""

    def __init__(self, workers: int):
        self.workers, self.images, self.decode, self.encode = max(workers, 1), 0, 0.0, 0.0

    def add(self, images: int, decode: float, encode: float) -> None:
        self.images, self.decode, self.encode = self.images + images, self.decode + decode, self.encode + encode

    def report(self) -> dict[str, float]:
        if not self.images:
            return {}
        rates = {"decode": self.images * self.workers / self.decode, "encode": self.images / self.encode}
        message = f"images/s: decode {rates['decode']:.0f} by {self.workers} process(es), encode {rates['encode']:.0f}"
        if rates["decode"] < rates["encode"]:
            logger.warning(f"{message}: decoding is what limits the rate; raise --dataloader_num_workers")
        else:
            logger.info(message)
        return rates


# What was read


def content_hash(image: Any) -> str:
    """Hash of an undecoded image's bytes; of its size alone where it is too large to be read."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if data is None and path is not None:
        try:
            size = os.path.getsize(path)
            data = Path(path).read_bytes() if size <= MAX_BYTES else f"{size} bytes".encode()
        except (OSError, ValueError):
            data = None
    return "absent" if data is None else hashlib.sha256(data).hexdigest()


def image_hints(images: datasets.Dataset, rows: range) -> Iterator[list]:
    """Of each image what changes when it does and is cheap to see: its bytes' hash, or its file's name, size and time."""
    for image in images[rows.start : rows.stop]["image"]:
        if image is None or image.get("bytes") is not None or image.get("path") is None:
            yield [content_hash(image)]
            continue
        try:
            state = os.stat(image["path"])
            yield [image["path"], state.st_size, state.st_mtime_ns]
        except (OSError, ValueError):
            yield [image["path"], None]


def values_hash(values: Any) -> str:
    state = hashlib.sha256()
    for value in values:
        state.update(json.dumps(value).encode())
        state.update(b"\n")
    return state.hexdigest()[:16]
