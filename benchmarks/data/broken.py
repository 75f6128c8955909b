"""Image files that exist but cannot be read: detected before anything is measured, and counted like absent ones."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.schema import Dialogues, Missing, Questions
from modeling_unimur.images_unimur import BadImageError, decode_image


def leave_out_broken(data: Dialogues | Questions, progress: bool = True) -> Dialogues | Questions:
    """
    `data` without what needs an unreadable image: its items are left out and counted by reason in `missing`; a pool
    loses it as a candidate, counted in `missing.candidates`. Every image file is decoded once for this.
    """
    files = {i: image for i, image in data.images.items() if isinstance(image, str | Path | bytes)}
    with ThreadPoolExecutor() as threads:
        problems = list(
            tqdm(threads.map(_problem, files.values()), "checking images", len(files), disable=not progress)
        )
    broken = {i: problem for i, problem in zip(files, problems, strict=True) if problem}
    if not broken:
        return data
    images = {i: image for i, image in data.images.items() if i not in broken}
    if isinstance(data, Questions):
        kept = []
        for q in data.questions:
            if q["image_id"] in broken:
                data.missing.add(f"image {broken[q['image_id']]}", q["question_id"])
            else:
                kept.append(q)
        return Questions(kept, images, data.missing)
    return _dialogues(data, images, broken)


def _dialogues(data: Dialogues, images: dict[str, Any], broken: dict[str, str]) -> Dialogues:
    pools: dict[int, dict[str, list[str]]] = {}
    kept, candidates = [], data.missing.candidates or Missing(seen=len(data.texts) + len(data.images))
    for d in data.dialogues:
        needed = [e["image_id"] for t in d["turns"][: d["target_turn"]] for e in t["elements"] if e["type"] == "image"]
        problem = next((broken[i] for i in [*needed, *d["gold"]["image_ids"]] if i in broken), None)
        if problem:
            data.missing.add(f"image {problem}", d["dialogue_id"])
            continue
        pool = d["pool"]
        if id(pool) not in pools:
            pools[id(pool)] = pool | {"image_ids": [i for i in pool["image_ids"] if i not in broken]}
        kept.append(d | {"pool": pools[id(pool)]})
    for i, problem in broken.items():
        candidates.add(f"image {problem}", i)
    data.missing.candidates = candidates
    return dataclasses.replace(data, dialogues=kept, images=images)


def _problem(image: str | Path | bytes) -> str | None:
    try:
        decode_image(image)
    except BadImageError as error:
        return error.reason.replace("_", " ")
    return None
