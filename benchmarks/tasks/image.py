"""Retrieval of a dialogue's image (Tables 2 and 3, VIST)."""

from typing import Any

import numpy as np
import torch

from benchmarks.measure import Measure
from benchmarks.metrics import hit_rate_per_item
from benchmarks.schema import Dialogues, Protocol
from benchmarks.systems import System

from .candidates import Embedded, by_pool, embed
from .contexts import Contexts, context_images

SETTINGS = {"split", "serialisation", "pool", "first_image", "ties", "direction", "squash", "context"}
BY_LANGUAGE: set[str] = set()
OPTIONAL: set[str] = {"caption", "seen_images"}
KS = (1, 5, 10)


def run(system: System, data: Dialogues, protocol: Protocol, clip: System | None = None) -> dict[str, Measure]:
    """R@1/5/10 of the reply's first image among the images of its pool; see `score` for the direction."""
    serialisation, squash = protocol["serialisation"], protocol["squash"]
    contexts = Contexts(data, serialisation, protocol["context"], squash)
    bos = None if serialisation == "turns" else serialisation.get("bos")
    embedded = embed(system, data, contexts, texts=False, squash=squash, bos=bos)
    return score(embedded, data, protocol, system.similarity)


def score(embedded: Embedded, data: Dialogues, protocol: Protocol, similarity: Any) -> dict[str, Measure]:
    """
    `R@1`, `R@5`, `R@10`, one item per dialogue (`"image per dialogue"`) or per image (`"dialogue per image"`). With
    `seen_images: last` the images in a context rank below all others, also where one of them is the gold image.

    Raises:
        ValueError: `"dialogue per image"` where dialogues have pools of their own.
    """
    groups = by_pool(data.dialogues)
    if protocol["direction"] == "dialogue per image":
        if len(groups) > 1:
            raise ValueError(f"{protocol.label}: each image ranks all dialogues, which need one shared pool")
        return _measures(_dialogues_per_image(embedded, data, groups[0][0], similarity))
    hits = np.full((len(data.dialogues), len(KS)), np.nan)
    counted = slice(1) if protocol["first_image"] else slice(None)
    for pool, rows in groups:
        scores = similarity(embedded.queries[rows], embedded.images[embedded.rows(pool | {"text_ids": []})[1]])
        place = {name: i for i, name in enumerate(pool["image_ids"])}
        if protocol.settings.get("seen_images") == "last":
            for row, i in enumerate(rows):
                scores[row, [place[name] for name in context_images(data.dialogues[i]) if name in place]] = -torch.inf
        gold = [[place[g] for g in data.dialogues[i]["gold"]["image_ids"][counted]] for i in rows]
        hits[rows] = hit_rate_per_item(scores.numpy(), gold, KS)
    return _measures(hits)


def _dialogues_per_image(embedded, data, pool, similarity) -> np.ndarray:
    """Each gold image ranks all dialogues; those about it are its gold dialogues."""
    about: dict[str, list[int]] = {}
    for i, dialogue in enumerate(data.dialogues):
        about.setdefault(dialogue["gold"]["image_ids"][0], []).append(i)
    images = torch.tensor([embedded.image_rows[i] for i in about])
    scores = similarity(embedded.queries, embedded.images[images]).T
    return hit_rate_per_item(scores.numpy(), list(about.values()), KS)


def _measures(hits: np.ndarray) -> dict[str, Measure]:
    return {f"R@{k}": Measure(hits[:, i]) for i, k in enumerate(KS)}
