"""What a user may write as a dialogue, brought into one form: a list of turns, each a list of texts and images."""

import os
from pathlib import Path
from typing import Any

from .images_unimur import SUFFIXES, is_image

Element = Any  # a str, or an image as `is_image` knows it
Turn = list[Element]


def parse_dialogue(dialogue: Any) -> list[Turn]:
    """
    Brings one dialogue into turns.

    Args:
        dialogue: one of
            - a string (one turn);
            - an image as [`is_image`] knows it: `PIL.Image.Image`, `pathlib.Path`, encoded `bytes`, … (one turn);
            - a list mixing strings and images, each a turn of its own;
            - chat messages: `[{"role": "user", "content": "…" | [{"type": "text", "text": "…"},
              {"type": "image", "image": …}]}]`, each message a turn, or one message. Roles are not spelt out to the LLM.

    Returns:
        Turns of elements; an image stays as it was given, undecoded.

    Raises:
        ValueError: an empty dialogue or turn, an unknown form, half a character, or a bare string that names an image
            file (in a message a part's type says what it is); the message names the turn.
    """
    if isinstance(dialogue, str) or is_image(dialogue) or is_message(dialogue):
        dialogue = [dialogue]
    if not isinstance(dialogue, list | tuple):
        raise ValueError(
            "a dialogue is a string, an image, a list of strings and images, or chat messages; got "
            f"{type(dialogue).__name__}"
        )
    if not dialogue:
        raise ValueError("the dialogue is empty: it needs at least one text or image")
    return [_parse_turn(turn, position) for position, turn in enumerate(dialogue)]


def is_message(value: Any) -> bool:
    """Whether a value is a chat message."""
    return isinstance(value, dict) and "content" in value


def check_characters(text: str, name: str) -> None:
    """Refuses with a `ValueError`, which calls it `name`, a text that no encoding holds and so no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, {text[error.start]!r}, at {error.start}: decode it with errors='replace'"
        ) from error


def _parse_turn(turn: Any, position: int) -> Turn:
    if is_message(turn):
        content = turn["content"]
        content = [content] if isinstance(content, str) else content
        if not isinstance(content, list | tuple) or not content:
            raise ValueError(f"turn {position}: 'content' must be a string or a non-empty list of parts")
        elements = [_parse_part(part, position) for part in content]
    else:
        elements = [turn]
        if isinstance(turn, str):
            _check_words(turn, position)
    for element in elements:
        if isinstance(element, str):
            if not element.strip():
                raise ValueError(f"turn {position} is an empty text")
            check_characters(element, f"turn {position}")
        elif not is_image(element):
            raise ValueError(
                f"turn {position}: expected a string, an image (PIL.Image, pathlib.Path, bytes or uint8 array) or a chat "
                f"message with 'content', got {type(element).__name__}"
            )
    return elements


def _check_words(text: str, position: int) -> None:
    """Refuses words that name an image file which is there: almost surely the picture is meant."""
    if os.path.splitext(text)[1].lower() in SUFFIXES and "\n" not in text and os.path.isfile(text):
        raise ValueError(
            f"turn {position}, {text!r}, names an image file, but a string is words: pathlib.Path({text!r}) shows the "
            "picture; as words it must be a message, {'role': 'user', 'content': …}"
        )


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
