"""A dialogue's image, drawn or else retrieved (Table A.2)."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Measure
from benchmarks.metrics import cosine_per_item
from benchmarks.schema import Dialogues, Protocol
from benchmarks.systems import DoesNotApplyError, System

from . import image
from .candidates import by_pool, embed
from .contexts import Contexts

SETTINGS = image.SETTINGS | {"limit"}
BY_LANGUAGE: set[str] = set()
OPTIONAL: set[str] = {"caption"}


def run(system: System, data: Dialogues, protocol: Protocol, clip: System | None = None) -> dict[str, Measure]:
    """
    Asks `system` for the picture of each dialogue: what it draws, or, where it cannot, the image of
    the pool that it ranks first. `clip`, or else the system itself, embeds the pictures.

    Returns:
        Item by item: `CLIP-Sim` of the picture and the true image, both by CLIP; `CLIP-Sim, absent`, the same where the
        true image is not in the pool, which changes only what is retrieved; `CLIP-Sim, another's`, the picture beside the
        next dialogue's true image, which is what a random picture of this system is worth; `picture R@1`, whether the
        picture is nearest to the true image among those of the pool, by CLIP; and [`benchmarks.tasks.image`]'s `R@1` of
        the system's own retrieval, where it has one.

    Raises:
        DoesNotApplyError: the system neither draws nor retrieves.
    """
    contexts = Contexts(data, protocol["serialisation"], protocol["context"], protocol["squash"])
    drawn = _drawn(system, data, contexts)
    measures, pictures = _retrieved(system, data, contexts, protocol, drawn is not None)
    clip = clip or system
    known = {name: row for row, name in enumerate(dict.fromkeys(_images(data)))}
    embedded = clip.embed_images([data.images[name] for name in known]).numpy()
    true = embedded[[known[d["gold"]["image_ids"][0]] for d in data.dialogues]]
    drawings = None if drawn is None else clip.embed_images(drawn).numpy()
    shown = []
    for names, scores in pictures or [([], np.zeros(0))] * 2:
        if drawings is None:
            shown.append(embedded[[known[name] for name in names]])
        elif system.draw_below is None:
            shown.append(drawings)
        else:  # the image of the pool stays where it is good enough
            kept = scores >= system.draw_below
            shown.append(np.where(kept[:, None], embedded[[known[name] for name in names]], drawings))
    for name, rows in zip(("CLIP-Sim", "CLIP-Sim, absent"), shown, strict=True):
        measures[name] = Measure(cosine_per_item(rows, true), percent=False)
    measures["CLIP-Sim, another's"] = Measure(cosine_per_item(shown[0], np.roll(true, -1, axis=0)), percent=False)
    measures["picture R@1"] = Measure(_nearest(shown[0], data, embedded, known))
    return measures


def _images(data: Dialogues) -> list[str]:
    return [name for pool, _ in by_pool(data.dialogues) for name in pool["image_ids"]]


def _drawn(system: System, data: Dialogues, contexts: Sequence) -> list[Image.Image] | None:
    captions = [data.captions.get(d["gold"]["image_ids"][0]) for d in data.dialogues]
    try:
        return system.draw(contexts, captions)
    except DoesNotApplyError:
        return None


def _retrieved(
    system: System, data: Dialogues, contexts: Sequence, protocol: Protocol, draws: bool
) -> tuple[dict[str, Measure], list[tuple[list[str], np.ndarray]] | None]:
    """
    The system's R@1, and the pool's best image of each dialogue with its score: with the true image in the pool and
    without. Nothing, where it draws and does not retrieve.
    """
    try:
        embedded = embed(system, data, contexts, texts=False, squash=protocol["squash"])
    except DoesNotApplyError:
        if not draws:
            raise
        return {}, None
    measures = {"R@1": image.score(embedded, data, protocol, system.similarity)["R@1"]}
    best: list[tuple[list[str], np.ndarray]] = [([""] * len(data), np.zeros(len(data))) for _ in range(2)]
    for pool, rows in by_pool(data.dialogues):
        names = list(pool["image_ids"])
        scores = system.similarity(embedded.queries[rows], embedded.images[embedded.rows(pool | {"text_ids": []})[1]])
        for absent, (chosen, values) in enumerate(best):
            for row, i in enumerate(rows):
                left = scores[row].clone()
                if absent:
                    left[[names.index(g) for g in data.dialogues[i]["gold"]["image_ids"]]] = -torch.inf
                chosen[i], values[i] = names[int(left.argmax())], float(left.max())
    return measures, best


def _nearest(pictures: np.ndarray, data: Dialogues, embedded: np.ndarray, known: dict[str, int]) -> np.ndarray:
    """Whether each picture's nearest image of its pool is the true one."""
    hits = np.zeros(len(data))
    for pool, rows in by_pool(data.dialogues):
        names = list(pool["image_ids"])
        scores = pictures[rows] @ embedded[[known[name] for name in names]].T
        for row, i in enumerate(rows):
            hits[i] = names[int(scores[row].argmax())] in data.dialogues[i]["gold"]["image_ids"][:1]
    return hits
