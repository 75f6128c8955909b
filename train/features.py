"""What is frozen, computed once: CLIP's features of a data set's images, and the LLM's output at each caption's [RET]."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import trange

from modeling_unimur import UniMuRModel
from modeling_unimur.images_unimur import BadImageError
from train.collate import SkipCounter, drawn_caption


@torch.no_grad()
def cache_image_features(
    images: datasets.Dataset, model: UniMuRModel, skips: SkipCounter, batch_size: int = 64
) -> datasets.Dataset:
    """
    Adds what `W_i2t` reads and what eq. 3-5 align with to each row; bad images lose their row and are counted.

    Args:
        images: rows with an undecoded `image` and an `id`.
        model: its CLIP and its `image_feature` choice are used.
        skips: receives the counts.

    Returns:
        The rows without `image`, with `image_features` (c float32) and `image_embeds` (q float32).
    """

    def encode(batch):
        kept, decoded, reasons = [], [], {}
        for position, image in enumerate(batch["image"]):
            try:
                decoded.append(model.processor.decode(image))
                kept.append(position)
            except BadImageError as error:
                reasons[error.reason] = reasons.get(error.reason, 0) + 1
        skips.update(reasons, len(batch["image"]))
        columns = {name: [values[i] for i in kept] for name, values in batch.items() if name != "image"}
        if not kept:
            return columns | {"image_features": [], "image_embeds": []}
        features, embeds = model.encode_images(model.processor.pixels(decoded).to(model.device))
        return columns | {"image_features": features.cpu().numpy(), "image_embeds": embeds.cpu().numpy()}

    widths = {"image_features": model.config.image_feature_width, "image_embeds": model.config.embedding_width}
    schema = {name: feature for name, feature in images.features.items() if name != "image"}
    schema |= {n: datasets.List(datasets.Value("float32"), length=width) for n, width in widths.items()}
    # In memory and unhashed: the model has no stable hash, and a stale cache would be worse than none.
    return images.map(
        encode, batched=True, batch_size=batch_size, remove_columns=images.column_names,
        features=datasets.Features(schema), keep_in_memory=True, load_from_cache_file=False,
        new_fingerprint=None, desc="CLIP features",
    )  # fmt: skip


class MatchingStates(Dataset):
    """
    What eq. 3-6 read of caption pairs when [RET] is frozen, computed once: the LLM's output at [RET] and CLIP's text
    embedding of every caption, and CLIP's image embedding. A step on them trains W_t2m without running a tower.

    Args:
        pairs: rows with `captions` and cached `image_embeds` (see `cache_image_features`), without empty captions.
        model: its LLM and CLIP are run.
        seed: of the draw of a caption an epoch.

    Attributes:
        ret_states `(captions, d)`, text_embeds `(captions, q)`, image_embeds `(images, q)`: float32.
        epoch (`int`): as [`train.collate.PairCollator`]'s; `collate` draws by it.

    Raises:
        ValueError: [RET] is trained, so that its states change; or a pair has no caption.
    """

    def __init__(self, pairs: datasets.Dataset, model: UniMuRModel, seed: int = 0, batch_size: int = 128):
        if model.config.train_ret_embedding:
            raise ValueError("the states at [RET] cannot be cached while [RET] is trained")
        self.ids, self.seed, self.epoch = pairs["id"], seed, 0
        captions = [[caption.strip() for caption in row] for row in pairs["captions"]]
        for pair_id, row in zip(self.ids, captions, strict=True):
            if not row or not all(row):
                raise ValueError(f"pair {pair_id!r} has an empty caption or none")
        self.counts = [len(row) for row in captions]
        self.starts = [0, *accumulate(self.counts)]
        flat = [caption for row in captions for caption in row]
        # Captions of one length share a batch, so that little is padded.
        order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
        self.image_embeds = torch.from_numpy(np.asarray(pairs.with_format("numpy")["image_embeds"], np.float32))
        self.ret_states = torch.empty(len(flat), model.config.text_width)
        self.text_embeds = torch.empty(len(flat), model.config.embedding_width)
        with torch.no_grad():
            for start in trange(0, len(flat), batch_size, desc="[RET] states"):
                rows = order[start : start + batch_size]
                texts = [flat[i] for i in rows]
                inputs = model.processor.texts(texts).to(model.device)
                words = model.processor.clip_texts(texts).to(model.device)
                self.ret_states[rows] = model.ret_states(inputs["input_ids"], inputs["attention_mask"]).cpu()
                self.text_embeds[rows] = model.encode_clip_texts(
                    words["clip_input_ids"], words["clip_attention_mask"]
                ).cpu()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: Sequence[int]) -> dict[str, Any]:
        """A batch for `UniMuRModel.forward`, the caption of each row drawn for the epoch."""
        chosen = [self.starts[i] + drawn_caption(self.seed, self.epoch, self.ids[i], self.counts[i]) for i in rows]
        here = torch.arange(len(rows))
        return {
            "ret_states": self.ret_states[chosen], "text_embeds": self.text_embeds[chosen],
            "image_embeds": self.image_embeds[list(rows)], "image_rows": here, "target_indices": here,
            "text_rows": here, "skipped": {}, "n_seen": len(rows),
        }  # fmt: skip
