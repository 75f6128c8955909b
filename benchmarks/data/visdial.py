"""VisDial v1.0: dialogues of questions and answers about an image, for image retrieval and for ranking the answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.schema import ABSENT, Dialogues, Missing
from train.json_files import BadDataError, find_file, list_files, read_json, require
from train.published import text_element, visdial_dialogues, visdial_round, visdial_text

SPLITS = ("val", "test")  # train's images are COCO's, under other names


def read_visdial(folder: str | Path, split: str = "val", caption: bool = False, progress: bool = True) -> Dialogues:
    """
    One item per dialogue: all its rounds, then its image out of the split's images.

    Args:
        folder: holds `visdial_1.0_{split}.json` (or a single `visdial_1.0_{split}*.json`) and the images
            `VisualDialog_{split}2018_{id:012d}.jpg`, in `VisualDialog_{split}2018/` or in `folder` itself.
        split: `"val"`, or `"test"`, whose dialogues may be shorter and end in a question.
        caption: put the image's caption first, as a turn of speaker `"C"`.

    Returns:
        Turns of speakers `"Q"` and `"A"` with the text as published (questions lack their "?"); the target comes after
        the last turn. Every dialogue shares one pool of the images present; a dialogue whose image is absent, or that
        has no turn, is left out and counted.

    Raises:
        BadDataError: a file is absent or of the wrong shape; the split is not one of these.
    """
    folder = Path(folder)
    path, data = _read(folder, split)
    questions, answers = (require(data, name, list, f"{path}: data") for name in ("questions", "answers"))
    files, missing, items = _images(folder, split), Missing(), {}
    images: dict[str, Path] = {}
    captions: dict[str, str] = {}
    for n, dialogue, image_id in visdial_dialogues(path, data, progress):
        missing.seen += 1
        where = f"{path}: dialogue {n}"
        turns = [_turn("C", require(dialogue, "caption", str, where))] if caption else []
        for r, a_round in enumerate(require(dialogue, "dialog", list, where), 1):
            turns += _round(a_round, questions, answers, f"{where}, round {r}")
        name = _file_name(split, image_id)
        if name not in files:
            missing.add(ABSENT, name)
        elif not turns:
            missing.add("no round", image_id)
        if name in files:
            images[image_id] = files[name]
            if isinstance(dialogue.get("caption"), str):
                captions[image_id] = dialogue["caption"]
            if turns:
                items[image_id] = turns
    pool = {"text_ids": [], "image_ids": list(images)}
    dialogues = [
        {"dialogue_id": image_id, "turns": turns, "target_turn": len(turns), "pool": pool,
         "gold": {"text_ids": [], "image_ids": [image_id]}}
        for image_id, turns in items.items()
    ]  # fmt: skip
    return Dialogues(dialogues, {}, images, missing, captions)


def read_visdial_answers(folder: str | Path, split: str = "val", progress: bool = True) -> Dialogues:
    """
    One item per round: the image (speaker `"I"`), the rounds before and the question, then the gold one of the options.

    Args:
        folder, split: as in [`read_visdial`]; the dense annotations `visdial_1.0_{split}_dense_annotations*.json` are
            read if present.

    Returns:
        Items named `{image_id}-{round}`, rounds from 1. Pools hold the options in the order published, as ids
        `a{index}` into the list of answers; `relevance` has a value per option in the one round of a dialogue that has dense
        annotations. Annotations of dialogues that are not in the file are not used. Rounds without options, or whose
        image is absent, are left out and counted.

    Raises:
        BadDataError: a file is absent or of the wrong shape; the split is published without answers; no dense
            annotation belongs to any dialogue.
    """
    folder = Path(folder)
    path, data = _read(folder, split)
    questions, answers = (require(data, name, list, f"{path}: data") for name in ("questions", "answers"))
    _check_answered(path, data, split)
    answer_ids = [f"a{i}" for i in range(len(answers))]
    texts = {i: visdial_text(answers, n, f"{path}: answers") for n, i in enumerate(answer_ids)}
    dense_path, dense = _dense(folder, split)
    files, missing, items, used = _images(folder, split), Missing(), [], set()
    images: dict[str, Path] = {}
    for n, dialogue, image_id in visdial_dialogues(path, data, progress):
        name = _file_name(split, image_id)
        turns = [{"speaker": "I", "elements": [{"type": "image", "text": None, "image_id": image_id}]}]
        for r, a_round in enumerate(require(dialogue, "dialog", list, f"{path}: dialogue {n}"), 1):
            where = f"{path}: dialogue {n} (image {image_id}), round {r}"
            missing.seen += 1
            asked, *answered = _round(a_round, questions, answers, where)
            turns.append(asked)
            item_id = f"{image_id}-{r}"
            if not a_round.get("answer_options"):
                missing.add("no answer options", item_id)
            elif name not in files:
                missing.add(ABSENT, name)
            else:
                images[image_id] = files[name]
                options, gold = _options(a_round, answers, where)
                item = {
                    "dialogue_id": item_id, "turns": list(turns), "target_turn": len(turns),
                    "pool": {"text_ids": [answer_ids[i] for i in options], "image_ids": []},
                    "gold": {"text_ids": [answer_ids[gold]], "image_ids": []},
                }  # fmt: skip
                if item_id in dense:
                    item["relevance"] = _relevance(dense[item_id], len(options), f"{dense_path}: {item_id}")
                items.append(item)
            if item_id in dense:
                used.add(item_id)
            turns += answered
    if dense and not used:
        raise BadDataError(f"{dense_path}: no annotation belongs to a round of {path}: are both of one split?")
    return Dialogues(items, texts, images, missing)


def _read(folder: Path, split: str) -> tuple[Path, dict]:
    if split not in SPLITS:
        raise BadDataError(f"VisDial split {split!r}: expected one of {', '.join(SPLITS)}")
    name = f"visdial_1.0_{split}.json"
    others = [p for p in sorted(folder.glob(f"visdial_1.0_{split}*.json")) if "dense" not in p.name]
    if not (folder / name).is_file() and len(others) > 1:
        raise BadDataError(f"{folder}: no {name}, and several in its place: {', '.join(p.name for p in others)}")
    path = find_file(folder, name, *(p.name for p in others))
    content = read_json(path)
    data = require(content, "data", dict, str(path))
    held = content.get("split", split)
    if not str(held).startswith(split):
        raise BadDataError(f"{path}: is of the split {held!r}, expected {split!r}")
    return path, data


def _check_answered(path: Path, data: dict[str, Any], split: str) -> None:
    """Raises `BadDataError` where no round says which option is its answer."""
    for n, dialogue, _ in visdial_dialogues(path, data, False):
        rounds = require(dialogue, "dialog", list, f"{path}: dialogue {n}")
        if any(isinstance(a_round, dict) and "gt_index" in a_round for a_round in rounds):
            return
    raise BadDataError(f"{path}: the split {split!r} is published without answers; 'val' is what can be scored here")


def _options(a_round: dict[str, Any], answers: Sequence[str], where: str) -> tuple[list[int], int]:
    """A round's options as indices into the answers, and that of the gold one."""
    options = require(a_round, "answer_options", list, where)
    for option in options:
        visdial_text(answers, option, f"{where}, answer_options")
    gold = require(a_round, "gt_index", int, where)
    if not 0 <= gold < len(options):
        raise BadDataError(f"{where}: gt_index is {gold}, expected 0 to {len(options) - 1}")
    return options, options[gold]


def _round(a_round: Any, questions: Sequence[str], answers: Sequence[str], where: str) -> list[dict]:
    """Question and answer as turns."""
    return [_turn(s, text) for s, text in zip("QA", visdial_round(a_round, questions, answers, where), strict=False)]


def _turn(speaker: str, text: str) -> dict:
    return {"speaker": speaker, "elements": [text_element(text)]}


def _dense(folder: Path, split: str) -> tuple[Path | None, dict[str, Any]]:
    """`{image}-{round}` -> annotation; empty if there is no such file."""
    paths = sorted(folder.glob(f"visdial_1.0_{split}_dense_annotations*.json"))
    if len(paths) > 1:
        raise BadDataError(f"{folder}: several dense annotations: {', '.join(p.name for p in paths)}; keep one")
    if not paths:
        return None, {}
    dense = {}
    for n, annotation in enumerate(read_json(paths[0])):
        where = f"{paths[0]}: annotation {n}"
        key = f"{require(annotation, 'image_id', int, where)}-{require(annotation, 'round_id', int, where)}"
        if key in dense:
            raise BadDataError(f"{where}: round {key} is annotated twice")
        dense[key] = require(annotation, "gt_relevance", list, where)
    return paths[0], dense


def _relevance(values: list, options: int, where: str) -> list[float]:
    if len(values) != options or not all(type(v) in (int, float) and 0 <= v <= 1 for v in values):
        raise BadDataError(f"{where}: gt_relevance holds {len(values)} values, expected {options} numbers from 0 to 1")
    return [float(v) for v in values]


def _images(folder: Path, split: str) -> dict[str, Path]:
    return list_files(folder / f"VisualDialog_{split}2018", folder)


def _file_name(split: str, image_id: str) -> str:
    return f"VisualDialog_{split}2018_{int(image_id):012d}.jpg"
