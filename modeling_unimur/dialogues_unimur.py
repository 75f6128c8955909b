"""What a user may write as a dialogue, brought into one form: a list of turns, each a list of texts and images."""

from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

Element = str | Image.Image | PathLike | bytes
Turn = list[Element]


def parse_dialogue(dialogue: Any) -> list[Turn]:
    """
    Brings one dialogue into turns.

    Args:
        dialogue: one of
            - a string (one turn);
            - an image: `PIL.Image.Image`, `pathlib.Path` or encoded `bytes` (one turn);
            - a list mixing strings and images, each a turn of its own;
            - chat messages: `[{"role": "user", "content": "…" | [{"type": "text", "text": "…"},
              {"type": "image", "image": …}]}]`, each message a turn. Roles are not spelt out to the LLM.

    Returns:
        Turns of elements; an image stays as it was given, undecoded.

    Raises:
        ValueError: an empty dialogue or turn, an unknown form, half a character; the message names the turn.
    """
    if isinstance(dialogue, str) or _is_image(dialogue):
        dialogue = [dialogue]
    if not isinstance(dialogue, list | tuple):
        raise ValueError(
            f"a dialogue is a string, a list of strings and images, or chat messages; got {type(dialogue).__name__}"
        )
    if not dialogue:
        raise ValueError("the dialogue is empty: it needs at least one text or image")
    return [_parse_turn(turn, position) for position, turn in enumerate(dialogue)]


def is_batch(dialogues: Any) -> bool:
    """Whether a value is many dialogues (a list of lists) rather than one dialogue."""
    return (
        isinstance(dialogues, list | tuple) and bool(dialogues) and all(isinstance(d, list | tuple) for d in dialogues)
    )


def check_characters(text: str, name: str) -> None:
    """Refuses with a `ValueError`, which calls it `name`, a text that no encoding holds and so no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, {text[error.start]!r}, at {error.start}: decode it with errors='replace'"
        ) from error


def _parse_turn(turn: Any, position: int) -> Turn:
    if isinstance(turn, dict) and "content" in turn:
        content = turn["content"]
        content = [content] if isinstance(content, str) else content
        if not isinstance(content, list | tuple) or not content:
            raise ValueError(f"turn {position}: 'content' must be a string or a non-empty list of parts")
        elements = [_parse_part(part, position) for part in content]
    else:
        elements = [turn]
    for element in elements:
        if isinstance(element, str):
            if not element.strip():
                raise ValueError(f"turn {position} is an empty text")
            check_characters(element, f"turn {position}")
        elif not _is_image(element):
            raise ValueError(
                f"turn {position}: expected a string, an image (PIL.Image, pathlib.Path or bytes) or a chat message "
                f"with 'content', got {type(element).__name__}"
            )
    return elements


def _parse_part(part: Any, position: int) -> Element:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        image = next((part[key] for key in ("image", "path") if part.get(key) is not None), None)
        if image is not None:
            return _as_image(image, position)
    raise ValueError(
        f"turn {position}: a part of a message is {{'type': 'text', 'text': str}} or {{'type': 'image', 'image': "
        f"PIL.Image, path or bytes}}; got {kind or type(part).__name__!r}. Images behind a URL are for the caller to open."
    )


def _as_image(image: Any, position: int) -> Element:
    # In a message the part's type says that a string is a path; elsewhere a string is text.
    if isinstance(image, str):
        if image.startswith(("http://", "https://", "data:")):
            raise ValueError(f"turn {position}: {image[:60]!r} is a URL; open it yourself and pass the image")
        return Path(image)
    return image


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image | PathLike | bytes)
