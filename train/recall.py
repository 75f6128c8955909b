"""Recall of replies and of captions' images over one pool: what training is validated by and its end reports."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch

from modeling_unimur import UniMuRModel
from modeling_unimur.images_unimur import BadImageError
from train.collate import usable_captions

KS = (1, 5, 10)


def hits_at(scores: torch.Tensor, labels: torch.Tensor | Sequence[int], ks: Sequence[int] = KS) -> torch.Tensor:
    """
    `(n, candidates)` scores and each row's own candidate `(n,)` -> `(n, len(ks))` float32: whether it is among the first k.

    Candidates that tie may come in any order, so a tie over the k-th place counts by its share.
    """
    labels = torch.as_tensor(labels, device=scores.device)
    own = scores.gather(1, labels[:, None])
    above, equal = (scores > own).sum(1, keepdim=True), (scores == own).sum(1, keepdim=True)
    places = torch.tensor(list(ks), device=scores.device)
    return ((places - above) / equal).clamp(0, 1)


def percent(hits: torch.Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """`(n, len(ks))` hits -> `R@k` in percent; NaN where n is 0."""
    return {f"R@{k}": float(100 * mean) for k, mean in zip(ks, hits.float().mean(0), strict=True)}


def image_key(image: Any) -> str:
    """What two rows of one image have in common: the path of an undecoded image, or the hash of its bytes."""
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    return str(path) if data is None else hashlib.sha256(data).hexdigest()


def caption_to_image_recall(model: UniMuRModel, pairs: Iterable[dict[str, Any]], limit: int) -> dict[str, float]:
    """
    R@1/5/10 in percent of each row's first caption, as a one-turn dialogue, against the images of all rows.

    An image is in the pool once, however many rows it has, and is the label of the caption of each of them.

    Args:
        pairs: rows with `image` (undecoded) and `captions`.
        limit: how many rows, from the first.

    Returns:
        `R@1`, `R@5`, `R@10` (NaN without any row), `pool`, the number of images, and `left out`, the rows that could not
        be read.
    """
    images: list[Any] = []
    captions: list[str] = []
    labels: list[int] = []
    places: dict[str, int] = {}
    left_out = 0
    for row in islice(pairs, limit):
        try:
            if not (usable := usable_captions(row["captions"])):
                raise BadImageError("no caption", "empty_caption")
            key = image_key(row["image"])
            if key not in places:
                images.append(model.processor.decode(row["image"]))
                places[key] = len(places)
            captions.append(usable[0])
            labels.append(places[key])
        except BadImageError:
            left_out += 1
    recalls: dict[str, float] = {f"R@{k}": float("nan") for k in KS}
    if captions:
        queries = model.embed_dialogues(captions, show_progress_bar=True)
        recalls = percent(hits_at(queries @ model.embed_images(images, show_progress_bar=True).T, labels))
    return recalls | {"pool": len(images), "left out": left_out}


def reply_recall(
    queries: torch.Tensor, texts: torch.Tensor, images: torch.Tensor, text_labels: Sequence[int | None],
    image_labels: Sequence[int | None], ks: Sequence[int] = KS,
) -> dict[str, float]:  # fmt: skip
    """
    Section 3.4's replies out of one pool of texts and images: the best text is the utterance, and an image is shown where
    the best image scores above the second text; a tie counts half.

    Args:
        queries: `(n, q)` L2-normalised, of the contexts.
        texts, images: `(candidates, q)` L2-normalised; either may be empty.
        text_labels, image_labels: for each context the candidate that its reply holds, or `None`.

    Returns:
        In percent: `reply_R@k` over all the replies' texts among texts and images among images, an image counting where
        one is shown; `reply_image_R@k` of the images alone, shown or not; `image_rate`, the share of the replies with an
        image on which one is shown, and `image_rate_text_only`, of those without. What no reply asks for is left out.
    """
    by_text, by_image = queries @ texts.T, queries @ images.T
    shows = torch.zeros(len(queries))
    if len(images):
        none = torch.full((len(queries),), -torch.inf)
        second = by_text.topk(2, dim=1).values[:, 1] if len(texts) > 1 else none
        best = by_image.amax(1)
        shows = (best > second).float() + (best == second).float() / 2
    with_text, with_image = (
        torch.tensor([i for i, label in enumerate(labels) if label is not None], dtype=torch.long)
        for labels in (text_labels, image_labels)
    )
    text_hits = hits_at(by_text[with_text], [x for x in text_labels if x is not None], ks)
    image_hits = hits_at(by_image[with_image], [x for x in image_labels if x is not None], ks)
    shown_hits = image_hits * shows[with_image, None]
    result: dict[str, float] = {}
    if len(with_text) or len(with_image):
        result |= {f"reply_{k}": v for k, v in percent(torch.cat([text_hits, shown_hits]), ks).items()}
    if len(with_image):
        result |= {f"reply_image_{k}": v for k, v in percent(image_hits, ks).items()}
        result["image_rate"] = float(100 * shows[with_image].mean())
    if len(with_image) < len(queries):
        text_only = torch.ones(len(queries), dtype=torch.bool)
        text_only[with_image] = False
        result["image_rate_text_only"] = float(100 * shows[text_only].mean())
    return result
