"""CLIP's features of a data set's images, computed once: CLIP is frozen, so later epochs need not run it."""

import datasets
import torch

from modeling_unimur import UniMuRModel
from modeling_unimur.images_unimur import BadImageError
from train.collate import SkipCounter


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
