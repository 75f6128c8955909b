"""VQAv2: open-ended questions about COCO's images, with ten people's answers."""

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.schema import ABSENT, Missing, Questions
from train.json_files import BadDataError, find_file, list_files, read_json, require

OPTIONAL = ("question_type", "answer_type", "multiple_choice_answer")


def read_vqav2(folder: str | Path, split: str = "val2014", progress: bool = True) -> Questions:
    """
    Questions with the humans' answers.

    Args:
        folder: holds `v2_OpenEnded_mscoco_{split}_questions.json` and `v2_mscoco_{split}_annotations.json` (or
            `questions.json`, `annotations.json`) and the images `COCO_{split}_{id:012d}.jpg`, in `{split}/` or directly.
        split: `"val2014"`, `"train2014"`; `"test2015"` and `"test-dev2015"` have no annotations, and both have the
            images of test2015.

    Returns:
        Questions in the file's order; `answers` is empty in the test splits. Questions without an annotation in the
        other splits, or whose image is absent, are left out and counted. Annotations of no question are not used.

    Raises:
        BadDataError: a file is absent, of another split (`data_subtype`) or of the wrong shape; no annotation belongs
            to a question.
    """
    folder = Path(folder)
    path = find_file(folder, f"v2_OpenEnded_mscoco_{split}_questions.json", "questions.json")
    asked = _items(path, "questions", split)
    known = None if split.startswith("test") else _annotations(folder, split)
    of = split.replace("test-dev", "test")
    files, missing, images = list_files(folder / of, folder), Missing(seen=len(asked)), {}
    questions = []
    answered = False
    for n, question in enumerate(tqdm(asked, "reading VQAv2", disable=not progress)):
        where = f"{path}: question {n}"
        question_id = str(require(question, "question_id", (int, str), where))
        image_id = str(number := require(question, "image_id", int, where))
        text = require(question, "question", str, where)
        annotation = {} if known is None else known.get(question_id)
        if annotation and str(annotation.get("image_id", image_id)) != image_id:
            raise BadDataError(
                f"{where}: question {question_id} is about image {image_id}, its annotation about {annotation['image_id']}"
            )
        answered |= bool(annotation)
        name = f"COCO_{of}_{number:012d}.jpg"
        if annotation is None:
            missing.add("no annotation", question_id)
        elif name not in files:
            missing.add(ABSENT, name)
        else:
            images[image_id] = files[name]
            optional = {field: annotation[field] for field in OPTIONAL if annotation.get(field) is not None}
            questions.append(
                {"question_id": question_id, "image_id": image_id, "question": text,
                 "answers": annotation.get("answers", []), **optional}
            )  # fmt: skip
    if known is not None and asked and not answered:
        raise BadDataError(f"{path}: no annotation belongs to a question: are both files of {split}?")
    return Questions(questions, images, missing)


def _items(path: Path, field: str, split: str) -> list[Any]:
    content = read_json(path)
    items = require(content, field, list, str(path))
    held = content.get("data_subtype", split)
    if held != split:
        raise BadDataError(f"{path}: 'data_subtype' is {held!r}, but the split asked for is {split!r}")
    return items


def _annotations(folder: Path, split: str) -> dict[str, dict]:
    """Question id -> annotation, its `answers` as strings."""
    path = find_file(folder, f"v2_mscoco_{split}_annotations.json", "annotations.json")
    known = {}
    for n, annotation in enumerate(_items(path, "annotations", split)):
        where = f"{path}: annotation {n}"
        question_id = str(require(annotation, "question_id", (int, str), where))
        answers = require(annotation, "answers", list, where)
        if question_id in known or not answers:
            problem = "is annotated twice" if question_id in known else "has no answer"
            raise BadDataError(f"{where}: question {question_id} {problem}")
        for field in OPTIONAL:
            if annotation.get(field) is not None:
                require(annotation, field, str, where)
        known[question_id] = {
            **annotation,
            "answers": [require(a, "answer", str, f"{where}, answers") for a in answers],
        }
    return known
