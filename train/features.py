"""What is frozen, computed once: CLIP's features of a data set's images and captions, and the LLM's output at [RET]."""

import tempfile
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from modeling_unimur import UniMuRModel
from modeling_unimur.identity_unimur import digest, named_weights
from train.cache import CachedArray, CachedTable, Part, build_cache
from train.collate import SkipCounter, drawn, usable_captions
from train.extract import Rates, content_hash, image_hints, image_parts, values_hash

PART_ROWS = 4096  # a multiple of the batch sizes below, so that parts do not change the batches


class CachedPairs(Dataset):
    """
    Pairs whose images are replaced by memory-mapped features, for [`train.collate.PairCollator`].

    A row has the pair's columns but `image`, with `image_features` (c float32) and `image_embeds` (q float32), and, after
    [`cache_caption_states`], `text_embeds` (captions, q) and by choice `ret_states` (captions, d) of its captions.

    Attributes:
        rows (`datasets.Dataset`): the pairs that were kept, without `image`.
        images, captions: `CachedArray`s by name.
        rates: images a second of `decode` alone by all workers and of `encode` alone; empty where all was cached.
    """

    def __init__(self, rows: datasets.Dataset, table: CachedTable, temporary: Any = None):
        self.rows, self.table = rows, table
        self.caption_table: CachedTable | None = None
        self.starts: list[int] = []
        self.rates: dict[str, float] = {}
        self._temporary = [temporary]  # a folder nobody named lives as long as what was read from it

    @property
    def images(self) -> dict[str, CachedArray]:
        return self.table.columns

    @property
    def captions(self) -> dict[str, CachedArray]:
        return {} if self.caption_table is None else self.caption_table.columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return self.images[index] if index in self.images else self.rows[index]
        row = self.rows[index] | {name: column[index] for name, column in self.images.items()}
        if self.caption_table is not None:
            here = range(self.starts[index], self.starts[index + 1])
            row |= {name: column[here] for name, column in self.captions.items()}
        return row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_temporary": []}


def cache_image_features(
    images: datasets.Dataset, model: UniMuRModel, skips: SkipCounter, batch_size: int = 64,
    folder: str | Path | None = None, workers: int = 0,
) -> CachedPairs:  # fmt: skip
    """
    What `W_i2t` reads and what eq. 3-5 align with, written once as parts; bad images lose their row and are counted.

    Args:
        images: rows with an undecoded `image` and an `id`.
        model: its CLIP and its `image_feature` choice are used.
        skips: receives the counts, whether they are new or the manifest's.
        folder: of the parts; a temporary one by default.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        StaleCacheError, CorruptCacheError, OSError: see [`train.cache.build_cache`].
    """
    folder, temporary = _folder(folder)
    parts = [range(s, min(s + PART_ROWS, len(images))) for s in range(0, len(images), PART_ROWS)]
    rates = Rates(workers)

    def make(numbers: list[int]) -> Iterator[Part]:
        return image_parts(images, model, [(n, parts[n]) for n in numbers], batch_size, workers, rates)

    def changed(number: int, name: str, record: dict) -> bool:
        # A file's path and time are hints that are cheap to read; what counts is its bytes.
        return (
            name != "images"
            or values_hash(content_hash(images[i]["image"]) for i in parts[number]) != record["content"]
        )

    identity = {
        "weights of CLIP's visual tower": digest((n, t) for n, t in named_weights(model.clip) if n.startswith("vis")),
        "configuration of CLIP's visual tower": _computes(model.clip.config.vision_config),
        "dtype of CLIP": str(model.clip.dtype),
        "preprocessing": model.processor.fingerprint,
        "max_image_pixels": model.processor.max_image_pixels,
        "image_feature": model.config.image_feature,
    }
    sources = [
        {
            "rows": _span(rows),
            "ids": values_hash(images[rows.start : rows.stop]["id"]),
            "images": values_hash(image_hints(images, rows)),
        }
        for rows in parts
    ]
    records = build_cache(folder, identity, sources, make, changed=changed, **_alone(temporary))
    for record in records:
        skips.update(record["skipped"], record["seen"], record["examples"])
    left_out = {i for record in records for i in record["left_out"]}
    rows = images.remove_columns("image")
    if left_out:
        rows = rows.select([i for i in range(len(rows)) if i not in left_out])
    pairs = CachedPairs(rows, CachedTable(folder, len(parts)), temporary)
    pairs.rates = rates.report()
    return pairs


@torch.no_grad()
def cache_caption_states(
    pairs: CachedPairs, model: UniMuRModel, folder: str | Path | None = None, batch_size: int = 128
) -> CachedPairs:
    """
    Adds CLIP's embedding of every caption and, with [RET] frozen and no LoRA, the LLM's output at its [RET].

    Args:
        pairs: of [`cache_image_features`].
        folder: of the parts; a temporary one by default.

    Returns:
        The pairs with them; the argument stays as it is, so that several LLMs can share it.

    Raises:
        StaleCacheError, CorruptCacheError, OSError: see [`train.cache.build_cache`].
    """
    folder, temporary = _folder(folder)
    with_states = states_are_frozen(model)
    parts = [range(s, min(s + PART_ROWS, len(pairs))) for s in range(0, len(pairs), PART_ROWS)]
    texts = [[usable_captions(row) for row in pairs.rows[rows.start : rows.stop]["captions"]] for rows in parts]

    def make(numbers: list[int]) -> Iterator[Part]:
        for number in tqdm(numbers, desc="captions"):
            flat = [caption for row in texts[number] for caption in row]
            yield number, _encode_captions(flat, model, batch_size, with_states), {}

    identity = {
        "weights of CLIP's text tower": digest((n, t) for n, t in named_weights(model.clip) if n.startswith("text_")),
        "configuration of CLIP's text tower": _computes(model.clip.config.text_config),
        "dtype of CLIP": str(model.clip.dtype),
        "preprocessing": model.processor.fingerprint,
        "states at [RET]": with_states,
    }
    if with_states:
        identity |= {
            "weights of the LLM": digest(named_weights(model.language_model)),
            "configuration of the LLM": _computes(model.language_model.config),
            "dtype of the LLM": str(model.language_model.dtype),
            "[RET]": digest([("ret_embedding", model.ret_embedding)]),
        }
    sources = [{"rows": _span(rows), "captions": values_hash(part)} for rows, part in zip(parts, texts, strict=True)]
    build_cache(folder, identity, sources, make, **_alone(temporary))
    with_captions = copy(pairs)
    with_captions.caption_table = CachedTable(folder, len(parts))
    with_captions.starts = [0, *accumulate(len(row) for part in texts for row in part)]
    with_captions._temporary = [*pairs._temporary, temporary]
    return with_captions


def states_are_frozen(model: UniMuRModel) -> bool:
    """Whether training leaves the LLM's output at a caption's [RET] as it is."""
    return not (model.config.train_ret_embedding or model.config.text_adapter)


class MatchingStates(Dataset):
    """
    What eq. 3-6 read of caption pairs when [RET] is frozen. A step on them trains W_t2m without running a tower.

    Args:
        pairs: of [`cache_image_features`], without empty captions; their captions are cached where they are not yet.
        model: its LLM and CLIP are run for that.
        seed: of the draw of a caption an epoch.

    Attributes:
        ret_states `(captions, d)`, text_embeds `(captions, clip_width)`, image_features `(images, c)`, image_embeds
            `(images, clip_width)`: [`CachedArray`]s.
        starts: the captions of pair i are those from `starts[i]` to before `starts[i + 1]`.
        epoch (`int`): as [`train.collate.PairCollator`]'s; `collate` draws by it.

    Raises:
        ValueError: [RET] or a LoRA is trained, so that the states change; or a pair has an empty caption or none.
    """

    def __init__(self, pairs: CachedPairs, model: UniMuRModel, seed: int = 0, batch_size: int = 128):
        if not states_are_frozen(model):
            raise ValueError("the states at [RET] cannot be cached while [RET] is trained or the LLM has a LoRA")
        self.ids, self.seed, self.epoch = list(pairs["id"]), seed, 0
        for pair_id, row in zip(self.ids, pairs["captions"], strict=True):
            if not row or len(usable_captions(row)) < len(row):
                raise ValueError(f"pair {pair_id!r} has an empty caption or none")
        if "ret_states" not in pairs.captions:
            pairs = cache_caption_states(pairs, model, None, batch_size)
        self.pairs = pairs
        self.starts = pairs.starts
        self.image_features, self.image_embeds = pairs.images["image_features"], pairs.images["image_embeds"]
        self.ret_states, self.text_embeds = pairs.captions["ret_states"], pairs.captions["text_embeds"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: Sequence[int]) -> dict[str, Any]:
        """A batch for `UniMuRModel.forward`, the caption of each row drawn for the epoch."""
        chosen = [
            self.starts[i] + drawn(self.seed, self.epoch, self.ids[i], self.starts[i + 1] - self.starts[i])
            for i in rows
        ]
        here = torch.arange(len(rows))
        return {
            "contexts": {"states": torch.from_numpy(self.ret_states[chosen])},
            "targets": {
                "image_rows": here, "image_indices": here, "text_rows": here,
                "text_embeds": torch.from_numpy(self.text_embeds[chosen]),
            },
            "images": {
                "features": torch.from_numpy(self.image_features[list(rows)]),
                "embeds": torch.from_numpy(self.image_embeds[list(rows)]),
            },
            "skipped": {}, "n_seen": len(rows),
        }  # fmt: skip


def _folder(named: str | Path | None) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """Where parts are written, and the temporary folder that it is where none is named."""
    if named is not None:
        return Path(named), None
    temporary = tempfile.TemporaryDirectory()
    return Path(temporary.name), temporary


def _alone(temporary: Any) -> dict[str, Any]:
    """A temporary folder is the process's own, so it makes every part itself."""
    return {} if temporary is None else {"rank": 0, "world": 1}


def _computes(config: PreTrainedConfig) -> str:
    """A hash of what a tower's config says beside its weights, such as its activation; not of where it came from."""
    settings = config.to_diff_dict()
    origin = ("architectures", "dtype", "transformers_version")
    return values_hash([[k, str(settings[k])] for k in sorted(settings) if not k.startswith("_") and k not in origin])


def _span(rows: range) -> str:
    return f"{rows.start}-{rows.stop - 1}"


@torch.no_grad()
def _encode_captions(
    captions: list[str], model: UniMuRModel, batch_size: int, with_states: bool
) -> dict[str, np.ndarray]:
    widths = {"text_embeds": model.config.clip_width}
    if with_states:
        widths["ret_states"] = model.config.text_width
    columns = {name: np.empty((len(captions), width), np.float32) for name, width in widths.items()}
    # Captions of one length share a batch, so that little is padded.
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [captions[i] for i in rows]
        words = model.processor.clip_texts(texts).to(model.device)
        embeds = model.encode_clip_texts(words["clip_input_ids"], words["clip_attention_mask"])
        columns["text_embeds"][rows] = embeds.cpu().numpy()
        if with_states:
            inputs = model.processor.texts(texts).to(model.device)
            states = model.ret_states(inputs["input_ids"], inputs["attention_mask"])
            columns["ret_states"][rows] = states.cpu().numpy()
    return columns
