"""Multimodal response retrieval (Table 1): the reply's text and its image out of one pool."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Measure
from benchmarks.metrics import cosine_per_item, hit_rate_per_item, image_rate_per_item
from benchmarks.schema import Dialogues, Protocol
from benchmarks.systems import System

from .candidates import Embedded, by_pool, embed
from .contexts import context_of

SETTINGS = {"split", "serialisation", "pool", "first_image", "ties"}
BY_LANGUAGE: set[str] = set()
OPTIONAL: set[str] = set()


def run(system: System, data: Dialogues, protocol: Protocol, clip: System | None = None) -> dict[str, Measure]:
    """
    Retrieves every reply (Section 3.4) and scores it; `clip`, or the system itself without one, embeds texts and images
    for CLIP-Sim.

    Returns: see `score`.
    """
    contexts = [context_of(d, data.images, protocol["serialisation"]) for d in data.dialogues]
    embedded, with_image = embed(system, data, contexts), None
    replies = system.image_replies(contexts)
    if replies is not None:
        with_image = replies.with_image
        embedded.image_queries = torch.where(with_image[:, None], replies.queries, embedded.queries)
    words = [system.text_scores([contexts[i] for i in rows], [data.texts[t] for t in pool["text_ids"]])
             for pool, rows in by_pool(data.dialogues)]  # fmt: skip
    return score(
        embedded, data, protocol, clip_embeddings(clip or system, data, embedded), system.similarity,
        with_image=with_image, text_scores=None if words and words[0] is None else words,
    )  # fmt: skip


def clip_embeddings(clip: System, data: Dialogues, like: Embedded) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's embeddings of the same candidate texts and images: what CLIP-Sim compares."""
    return (
        clip.embed_texts([data.texts[i] for i in like.text_rows]),
        clip.embed_images([data.images[i] for i in like.image_rows]),
    )


def score(
    embedded: Embedded, data: Dialogues, protocol: Protocol, clip: tuple[torch.Tensor, torch.Tensor], similarity: Any,
    *, with_image: torch.Tensor | None = None, text_scores: Sequence[torch.Tensor] | None = None, image_bias: float = 0.0,
) -> dict[str, Measure]:  # fmt: skip
    """
    Args:
        clip: CLIP's embeddings of `embedded`'s texts and images, row for row.
        similarity: of queries and candidates.
        with_image: `(n,)` bool where the system itself decides which replies have an image; else the best text is the
            utterance, and the reply has an image where the best of the remaining candidates is one.
        text_scores: `(rows, texts)` for each pool, where texts are not ranked by embedding.
        image_bias: added to every image's cosine.

    Returns:
        Item by item: `image retrieval rate`, over the turns whose reply has an image, and `… on text-only turns`;
        `image R@1`, whether the image retrieved is the gold reply's first (or any of its images, by the protocol); `text R@1`;
        `overall R@1` over all gold texts and images; `whole reply R@1`, beyond the paper: all that is gold is right, and no
        image is shown where none is gold; `CLIP-Sim` of the text and the image returned together (a cosine),
        over the turns for which an image is retrieved.
    """
    n = len(data.dialogues)
    image_queries = embedded.queries if embedded.image_queries is None else embedded.image_queries
    image_share, text_hit, image_hit, clip_sim = (np.full(n, np.nan) for _ in range(4))
    for group, (pool, rows) in enumerate(by_pool(data.dialogues)):
        texts, images = embedded.rows(pool)
        by_text = text_scores[group] if text_scores else similarity(embedded.queries[rows], embedded.texts[texts])
        by_image = similarity(image_queries[rows], embedded.images[images]) + image_bias
        if with_image is not None:
            image_share[rows] = with_image[rows].double().numpy()
        else:
            second = by_text.topk(2, dim=1).values[:, 1] if by_text.shape[1] > 1 else torch.full((len(rows),), -np.inf)
            best = by_image.amax(1)
            # A tie between an image and a text counts half for each.
            image_share[rows] = ((best > second).double() + (best == second).double() / 2).numpy()
        golds = [data.dialogues[i]["gold"] for i in rows]
        text_hit[rows] = _hits(by_text, pool["text_ids"], [g["text_ids"] for g in golds])
        counted = slice(1) if protocol["first_image"] else slice(None)
        image_hit[rows] = _hits(by_image, pool["image_ids"], [g["image_ids"][counted] for g in golds])
        pairs = clip[0][texts[by_text.argmax(1)]], clip[1][images[by_image.argmax(1)]]
        cosines = cosine_per_item(*(p.numpy() for p in pairs))
        clip_sim[rows] = np.where(image_share[rows] > 0, cosines, np.nan)
    on_image_turns, on_text_turns = image_rate_per_item(
        image_share, [bool(d["gold"]["image_ids"]) for d in data.dialogues]
    )
    image_hit = image_hit * image_share
    hits = np.nan_to_num(text_hit) + np.nan_to_num(image_hit)
    golds = np.isfinite(text_hit).astype(float) + np.isfinite(image_hit)
    whole = np.where(np.isfinite(text_hit), text_hit, 1) * np.where(np.isfinite(image_hit), image_hit, 1 - image_share)
    return {
        "image retrieval rate": Measure(on_image_turns),
        "image retrieval rate on text-only turns": Measure(on_text_turns),
        "image R@1": Measure(image_hit),
        "text R@1": Measure(text_hit),
        "overall R@1": Measure(hits, golds),
        "whole reply R@1": Measure(np.where(golds > 0, whole, np.nan)),
        "CLIP-Sim": Measure(clip_sim, percent=False),
    }


def _hits(scores: torch.Tensor, ids: Sequence[str], golds: Sequence[Sequence[str]]) -> np.ndarray:
    place = {name: i for i, name in enumerate(ids)}
    return hit_rate_per_item(scores.numpy(), [[place[g] for g in gold] for gold in golds], (1,))[:, 0]
