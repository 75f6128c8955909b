"""Caption-to-image recall of a model on image-caption pairs, over every image as one pool."""

from itertools import islice

import numpy as np

from modeling_unimur import UniMuRModel
from modeling_unimur.images_unimur import BadImageError
from train.collate import usable_captions

from .metrics import hit_rate_per_item


def caption_to_image_recall(model: UniMuRModel, pairs, limit: int) -> dict[str, float]:
    """
    R@1/5/10 in percent of each pair's first caption, as a one-turn dialogue, against the images of all pairs.

    Args:
        pairs: rows with `image` (undecoded) and `captions`.
        limit: how many pairs, from the first.

    Returns:
        `R@1`, `R@5`, `R@10`, `pool` and `left out`, the pairs that could not be read.
    """
    images, captions, left_out = [], [], 0
    for row in islice(pairs, limit):
        try:
            if not (usable := usable_captions(row["captions"])):
                raise BadImageError("no caption", "empty_caption")
            images.append(model.processor.decode(row["image"]))
            captions.append(usable[0])
        except BadImageError:
            left_out += 1
    scores = (
        model.embed_dialogues(captions, show_progress_bar=True) @ model.embed_images(images, show_progress_bar=True).T
    )
    ks = (1, 5, 10)
    found = hit_rate_per_item(scores.numpy(), [[i] for i in range(len(images))], ks)
    recalls = 100 * np.nanmean(found, axis=0)
    return {f"R@{k}": float(r) for k, r in zip(ks, recalls, strict=True)} | {"pool": len(images), "left out": left_out}
