"""
Conversations: turns of texts and images of which some are replies, and how chat messages become one.

A conversation is a row of `CONVERSATIONS`. Its images are ids of an [`Images`] table beside it. Roles are not spelt out to
the LLM; they say which turns are replies.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.arrow_writer import ArrowWriter

from train.rows import FEATURES, BadRowError, Folder, check_text, is_image, make_row, printable

STRING = datasets.Value("string")
CONVERSATIONS = datasets.Features(
    {
        "id": STRING,
        "turns": datasets.List(datasets.List({"text": STRING, "image": STRING})),
        "replies": datasets.List({"turn": datasets.Value("int32"), "problem": STRING}),
    }
)
ROLES = {"system": False, "user": False, "human": False, "assistant": True, "gpt": True, "model": True}  # a reply?
PLACEHOLDER = "<image>"
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
URLS = ("http://", "https://", "data:", "s3://", "gs://", "hf://")


class ImageId(NamedTuple):
    """An image of a turn, by its id."""

    id: str


Turn = list[str | ImageId]


def make_conversation(
    name: str, turns: Sequence[Turn], replies: Iterable[int], problems: dict[int, BadRowError] | None = None
) -> dict[str, Any]:
    """
    A row of `CONVERSATIONS`.

    Args:
        name: its id.
        replies: the turns that are replies. One without a turn before it is counted as `no_context`.
        problems: turns that are no examples, and why; their turn may come after the last one.
    """
    known = dict.fromkeys(replies) | dict(problems or {})
    if 0 in known and known[0] is None:
        known[0] = BadRowError("no_context", "a reply without a turn before it")
    return {
        "id": printable(name),
        "turns": [
            [{"text": e, "image": None} if isinstance(e, str) else {"text": None, "image": e.id} for e in turn]
            for turn in turns
        ],
        "replies": [
            {"turn": turn, "problem": error and printable(f"{error.reason}: {error}")}
            for turn, error in sorted(known.items())
        ],
    }


def bad_conversation(name: str, error: BadRowError) -> dict[str, Any]:
    """A conversation that is there only to be counted, once."""
    return make_conversation(name, [], (), {0: error})


class Images:
    """
    The images that conversations refer to, each once, written to a file as they come.

    Args:
        folder: that paths may refer into; an image's id is its path in it.
        file: written here (Arrow, rows of [`train.rows.FEATURES`]).
    """

    def __init__(self, folder: str | Path, file: Path):
        self.folder, self.file = Folder(folder), file
        self.known: set[str] = set()
        self._stems: dict[str, str] | None = None
        self._writer = ArrowWriter(path=str(file), features=FEATURES)

    def add(self, image: Any) -> ImageId:
        """
        The id of an image: a path, encoded bytes, or datasets' `{"bytes", "path"}`. Nothing is opened.

        Raises:
            BadRowError: `url_image`, `outside_folder`, or `bad_image` for another type.
        """
        given = image
        if isinstance(image, dict) and set(image) & {"bytes", "path"}:
            given = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(given, bytes):
            name = hashlib.sha256(given).hexdigest()[:32]
            return self._write(name, {"bytes": given, "path": None})
        if not isinstance(given, str) or not given:
            raise BadRowError("bad_image", f"an image is a path in the folder or bytes, got {type(given).__name__}")
        if given.startswith(URLS):
            raise BadRowError("url_image", f"{given[:80]!r} is a URL: fetch it and name the file")
        path = self.folder.file(check_text(given, "an image's path"))
        return self._write(given, {"bytes": None, "path": str(path)})

    def named(self, *stems: str) -> ImageId:
        """
        The picture of the first of these names, without an ending, that is in the folder or the folders within; the first as a
        .jpg where none is there, to be counted as `missing`. Raises as `add` does.
        """
        if self._stems is None:
            self._stems = {}
            for where, _, names in os.walk(self.folder.path):
                for name in sorted(filter(is_image, names)):
                    path = os.path.relpath(os.path.join(where, name), self.folder.path)
                    self._stems.setdefault(os.path.splitext(name)[0], path)
        return self.add(next((self._stems[stem] for stem in stems if stem in self._stems), f"{stems[0]}.jpg"))

    def _write(self, name: str, image: dict[str, Any]) -> ImageId:
        if name not in self.known:
            self.known.add(name)
            self._writer.write(make_row(name, image, [], str(self.folder.path)))
        return ImageId(name)

    def table(self) -> datasets.Dataset:
        """All of them, memory-mapped; none can be added after it."""
        return _finish(self._writer, self.file, FEATURES)


def write_conversations(conversations: Iterable[dict[str, Any]], file: Path) -> datasets.Dataset:
    """Rows of `CONVERSATIONS`, written to a file as they come and memory-mapped."""
    writer = ArrowWriter(path=str(file), features=CONVERSATIONS)
    for conversation in conversations:
        writer.write(conversation)
    return _finish(writer, file, CONVERSATIONS)


def _finish(writer: ArrowWriter, file: Path, features: datasets.Features) -> datasets.Dataset:
    if not writer.finalize()[0]:
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return datasets.Dataset.from_file(str(file))


def without_duplicates(conversations: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The conversations; each whose id came before is counted as `duplicate_id` in its place."""
    known: set[str] = set()
    for conversation in conversations:
        name = conversation["id"]
        if name in known:
            conversation = bad_conversation(name, BadRowError("duplicate_id", f"{name!r} is the id of another, too"))
        known.add(name)
        yield conversation


def temporary_folder() -> tempfile.TemporaryDirectory:
    """Where tables that nobody named a place for are kept as long as they are used."""
    return tempfile.TemporaryDirectory(prefix="unimur-dialogues-")


# Chat messages


def parse_chat(row: dict[str, Any], name: str, images: Any) -> dict[str, Any]:
    """
    Chat messages as a conversation: each message a turn, each of an assistant a reply.

    Args:
        row: `messages` (or ShareGPT's `conversations`), each with `role` and `content` (or `from` and `value`): a text, in
            which `<image>` means the next of the row's `images` (or its one `image`), or a list of parts
            `{"type": "text", "text"}` and `{"type": "image"}` with `image` or `path` (a path or bytes), `index` (into
            `images`), or nothing (the next of `images`). `id` is the conversation's, if it has one.
        name: its id, if it has none.
        images: takes an image by `add` and gives its [`ImageId`].

    Returns:
        The conversation. A message that cannot be read makes the replies from it on bad, each counted by the reason:
        `unknown_role`, `empty_message` (neither text nor image), `bad_message`, `image_missing` (a placeholder without its
        image), `half_character`, `long_caption`, and those of [`Images.add`]. All are bad with `images_unused` (more images
        than placeholders), and one is counted for a chat with `no_messages` or `no_reply`.
    """
    given = row.get("id")
    name = str(given) if isinstance(given, str | int) and str(given) else name
    messages = next((row[column] for column in MESSAGE_COLUMNS if row.get(column) is not None), None)
    if not isinstance(messages, list) or not messages:
        return bad_conversation(name, BadRowError("no_messages", f"no list of 'messages'; it has {sorted(row)}"))
    supply = _Supply(row, images)
    turns: list[Turn] = []
    replies: list[int] = []
    error: BadRowError | None = None
    first_bad = len(messages)
    for position, message in enumerate(messages):
        try:
            reply, turn = _parse_message(message, position, supply)
        except BadRowError as problem:
            error, first_bad = problem, position
            break
        turns.append(turn)
        replies += [position] if reply else []
    if error is None and (unused := supply.unused()):
        error, first_bad = BadRowError("images_unused", f"{unused} more images than placeholders"), 0
    if error is not None:
        lost = [at for at in range(first_bad, len(messages)) if _is_reply(messages[at])] or [first_bad]
        kept = [at for at in replies if at < first_bad]
        return make_conversation(name, turns, kept, dict.fromkeys(lost, error))
    if not replies:
        return bad_conversation(name, BadRowError("no_reply", "no message of an assistant, which would be a reply"))
    return make_conversation(name, turns, replies)


class _Supply:
    """A row's own images, taken one after another or by their index."""

    def __init__(self, row: dict[str, Any], images: Any):
        one = row.get("image")
        given = row.get("images")
        given = given if given is not None else [] if one is None else [one]
        self.given = given if isinstance(given, list) else [given]
        self.images, self.next, self.used = images, 0, set()  # type: tuple[Any, int, set[int]]

    def take(self, index: int | None = None) -> ImageId:
        if index is None:
            index, self.next = self.next, self.next + 1
        if not 0 <= index < len(self.given) or self.given[index] is None:
            raise BadRowError("image_missing", f"a placeholder asks for image {index} of {len(self.given)}")
        self.used.add(index)
        return self.images.add(self.given[index])

    def unused(self) -> int:
        return len(self.given) - len(self.used)


def _is_reply(message: Any) -> bool:
    return isinstance(message, dict) and ROLES.get(str(message.get("role") or message.get("from")), False)


def _parse_message(message: Any, position: int, supply: _Supply) -> tuple[bool, Turn]:
    """Whether a message is a reply, and its turn."""
    if not isinstance(message, dict):
        raise BadRowError("bad_message", f"message {position} is a {type(message).__name__}, expected an object")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRowError(
            "unknown_role", f"message {position} is of role {role!r}, expected one of {', '.join(ROLES)}"
        )
    content = message.get("content") if "content" in message else message.get("value")
    turn: Turn = []
    for part in [content] if isinstance(content, str) else _parts(content, position):
        turn += _parse_part(part, position, supply)
    if not turn:
        raise BadRowError("empty_message", f"message {position} has neither text nor image")
    return ROLES[role], turn


def _parts(content: Any, position: int) -> list[Any]:
    if content is None:
        return []
    if not isinstance(content, list):
        raise BadRowError(
            "bad_message",
            f"the content of message {position} is a {type(content).__name__}, expected a text or a list",
        )
    return content


def _parse_part(part: Any, position: int, supply: _Supply) -> Turn:
    if isinstance(part, str):
        return _parse_text(part, position, supply)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _parse_text(part["text"], position, supply)
    if kind == "image":
        given = next((part[key] for key in ("image", "path", "bytes") if part.get(key) is not None), None)
        if given is not None and type(given) is not int:
            return [supply.images.add(given)]
        index = part.get("index") if given is None else given
        if index is None or type(index) is int:
            return [supply.take(index)]
    url = part.get("image_url") if isinstance(part, dict) else None
    if url is not None:
        return [supply.images.add(url.get("url") if isinstance(url, dict) else url)]
    raise BadRowError(
        "bad_message", f"message {position} has a part that is neither text nor image: {printable(str(part)[:80])}"
    )


def _parse_text(text: str, position: int, supply: _Supply) -> Turn:
    """A text whose placeholders are the next images; blank texts are none."""
    check_text(text, f"message {position}")
    if PLACEHOLDER not in text:
        return [text] if text.strip() else []
    turn: Turn = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            turn.append(supply.take())
        if piece.strip():
            turn.append(piece.strip())
    return turn
