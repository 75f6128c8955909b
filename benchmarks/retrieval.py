"""The paper's retrieval tasks on dialogues of the one schema, for anything with the model's `embed_*` interface."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from .ranking import ranks, recall

KS = (1, 5, 10)


def context_of(dialogue: dict, images: Mapping[str, Image.Image]) -> list[dict]:
    """The turns before the target as chat messages, for `embed_dialogues` and `retrieve`."""
    return [
        {"role": turn["speaker"], "content": [
            {"type": "text", "text": e["text"]} if e["type"] == "text" else {"type": "image", "image": images[e["image_id"]]}
            for e in turn["elements"]]}
        for turn in dialogue["turns"][: dialogue["target_turn"]]
    ]  # fmt: skip


def multimodal_response(
    model: Any, clip: Any, dialogues: Sequence[dict], texts: Mapping[str, str], images: Mapping[str, Image.Image]
) -> dict[str, float]:
    """
    Table 1: the reply out of one pool of texts and images (Section 3.4), every dialogue over the same pool.

    Args:
        model: what is measured.
        clip: embeds texts and images for CLIP-Sim.
        dialogues, texts, images: with `gold` and `pool`; the first gold image of a turn counts.

    Returns:
        In percent: `image retrieval rate`, the share of the turns whose reply has an image for which one is shown, and
        `… on text-only turns`, the same where the reply has none; `image R@1`, the share of the image turns whose image
        is shown and right; `text R@1` over all turns; `overall R@1` over all gold texts and images. `CLIP-Sim`, the
        mean cosine of the text and the image returned together (`nan` where no turn shows an image).
    """
    pool = dialogues[0]["pool"]
    if any(d["pool"] != pool for d in dialogues):
        raise ValueError("these dialogues do not share one pool")
    text_ids, image_ids = list(pool["text_ids"]), list(pool["image_ids"])
    queries = model.embed_dialogues([context_of(d, images) for d in dialogues])
    words, pictures = [texts[i] for i in text_ids], [images[i] for i in image_ids]
    text_scores, image_scores = queries @ model.embed_texts(words).T, queries @ model.embed_images(pictures).T

    best_text, best_image = text_scores.argmax(1), image_scores.argmax(1)
    # The best text is the utterance; the best of the rest is shown if it is an image.
    second_text = text_scores.topk(2, dim=1).values[:, 1]
    shown = image_scores.amax(1) > second_text
    wants = torch.tensor([bool(d["gold"]["image_ids"]) for d in dialogues])
    right_text = torch.tensor(
        [text_ids[t] in d["gold"]["text_ids"] for t, d in zip(best_text, dialogues, strict=True)]
    )
    right_image = shown & torch.tensor(
        [d["gold"]["image_ids"][:1] == [image_ids[i]] for i, d in zip(best_image, dialogues, strict=True)]
    )
    similarity = (clip.embed_texts(words)[best_text] * clip.embed_images(pictures)[best_image]).sum(1)
    return {
        "image retrieval rate": _percent(shown[wants]),
        "image retrieval rate on text-only turns": _percent(shown[~wants]),
        "image R@1": _percent(right_image[wants]),
        "text R@1": _percent(right_text),
        "overall R@1": 100 * (right_image.sum() + right_text.sum()).item() / (wants.sum().item() + len(dialogues)),
        "CLIP-Sim": similarity[shown].mean().item(),
    }


def image_retrieval(model: Any, dialogues: Sequence[dict], images: Mapping[str, Image.Image]) -> dict[str, float]:
    """
    Tables 2 and 3: R@1/5/10 in percent of the reply's first image among the images of the dialogues' shared pool.
    """
    image_ids = list(dialogues[0]["pool"]["image_ids"])
    place = {image_id: i for i, image_id in enumerate(image_ids)}
    queries = model.embed_dialogues([context_of(d, images) for d in dialogues])
    scores = queries @ model.embed_images([images[i] for i in image_ids]).T
    found = ranks(scores, torch.tensor([place[d["gold"]["image_ids"][0]] for d in dialogues]))
    return {f"R@{k}": recall(found, k) for k in KS}


def image_to_itself(model: Any, images: Sequence[Image.Image]) -> dict[str, float]:
    """R@1/5/10 in percent of `[image][RET]` against the pool of those images: what W_i2t carries through the LLM."""
    scores = model.embed_dialogues([[image] for image in images]) @ model.embed_images(images).T
    found = ranks(scores, torch.arange(len(images)))
    return {f"R@{k}": recall(found, k) for k in KS}


def _percent(hits: torch.Tensor) -> float:
    return 100 * hits.double().mean().item()
