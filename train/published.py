"""MMDialog, VisDial and VIST as they are published: their turns, as the evaluation and the training both read them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from train.json_files import BadDataError, read_json, require

Element = dict[str, str | None]
VIST_LENGTH = 5  # sentences of a story


def text_element(text: str) -> Element:
    """A text of a turn."""
    return {"type": "text", "text": text, "image_id": None}


def image_element(image_id: str) -> Element:
    """An image of a turn."""
    return {"type": "image", "text": None, "image_id": image_id}


def mmdialog_turn(turn: Any, where: str) -> list[Element]:
    """The texts and images (media keys) of one of MMDialog's turns. Raises [`BadDataError`] naming the element."""
    elements = []
    for e, element in enumerate(require(turn, "turn", list, where)):
        kind = "__MEDIA__" if isinstance(element, dict) and "__MEDIA__" in element else "__TEXT__"
        value = require(element, kind, str, f"{where}, element {e}")
        if len(element) > 1:
            raise BadDataError(f"{where}, element {e}: expected one of __TEXT__, __MEDIA__, got {sorted(element)}")
        elements.append(image_element(value) if kind == "__MEDIA__" else text_element(value))
    return elements


def visdial_dialogues(path: Path, data: dict[str, Any], progress: bool = True) -> Iterator[tuple[int, Any, str]]:
    """`(position, dialogue, image id)` of each of VisDial's dialogues; raises [`BadDataError`] for a second of an image."""
    seen: set[str] = set()
    dialogues = require(data, "dialogs", list, f"{path}: data")
    for n, dialogue in enumerate(tqdm(dialogues, "reading VisDial", disable=not progress)):
        image_id = str(require(dialogue, "image_id", int, f"{path}: dialogue {n}"))
        if image_id in seen:
            raise BadDataError(f"{path}: dialogue {n} is the second of image {image_id}, expected one an image")
        seen.add(image_id)
        yield n, dialogue, image_id


def visdial_round(a_round: Any, questions: Sequence[str], answers: Sequence[str], where: str) -> list[str]:
    """A round's question and answer; the question alone where the answer is not published."""
    texts = [visdial_text(questions, require(a_round, "question", int, where), f"{where}, question")]
    if a_round.get("answer") is not None:
        texts.append(visdial_text(answers, require(a_round, "answer", int, where), f"{where}, answer"))
    return texts


def visdial_text(texts: Sequence[str], index: Any, where: str) -> str:
    """The entry of one of VisDial's two lists. Raises [`BadDataError`] where there is none."""
    if type(index) is not int or not 0 <= index < len(texts):
        raise BadDataError(f"{where}: {index!r} is not an index into the list of {len(texts)}")
    if not isinstance(texts[index], str):
        raise BadDataError(f"{where}: entry {index} is {type(texts[index]).__name__}, expected str")
    return texts[index]


def vist_stories(path: Path, progress: bool = True) -> dict[str, list[tuple[int, str, str]]]:
    """
    Story id -> `(order, photo id, text)` of each sentence, in the file's order.

    Raises:
        BadDataError: the file is absent or of the wrong shape.
    """
    stories: dict[str, list[tuple[int, str, str]]] = {}
    annotations = require(read_json(path), "annotations", list, str(path))
    for n, inner in enumerate(tqdm(annotations, "reading VIST", disable=not progress)):
        where = f"{path}: annotation {n}"
        if not isinstance(inner, list) or len(inner) != 1:
            raise BadDataError(
                f"{where}: expected a list of one sentence, got {type(inner).__name__} {str(inner)[:80]}"
            )
        story_id, photo = (str(require(inner[0], f, (str, int), where)) for f in ("story_id", "photo_flickr_id"))
        order, text = (
            require(inner[0], "worker_arranged_photo_order", int, where),
            require(inner[0], "text", str, where),
        )
        stories.setdefault(story_id, []).append((order, photo, text))
    return stories
