"""The schema of every task's data: dialogues with their tables of texts and images, and questions about images."""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_MISSING_SHARE = 0.01


class BadDataError(ValueError):
    """A file is absent or of the wrong shape; the message gives the path and the field."""


ABSENT = "image file absent"  # a reason of [`Missing`]


class TooMuchMissingError(ValueError):
    """More of the items cannot be evaluated than the allowed share."""


@dataclass
class Missing:
    """
    Items that cannot be evaluated, by reason, with the first few of each; every result reports them.

    `seen` counts all items, including those left out. `candidates` is the same for the pools' distinct candidates, in
    data sets where an item can be evaluated although its pool lacks a candidate.
    """

    seen: int = 0
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    candidates: "Missing | None" = None

    def add(self, reason: str, item: str) -> None:
        """Counts one item as left out, for a `reason` in words such as `"image file absent"`."""
        self.counts[reason] += 1
        known = self.examples.setdefault(reason, [])
        if len(known) < 3:
            known.append(item)

    @property
    def share(self) -> float:
        return self.counts.total() / max(self.seen, 1)

    def by_reason(self) -> dict[str, int]:
        """Counts of items and of candidates by reason, for a result's json."""
        counts = dict(self.counts)
        if self.candidates:
            counts |= {f"candidate: {reason}": count for reason, count in self.candidates.counts.items()}
        return counts

    def check(self, allowed: float = MAX_MISSING_SHARE) -> None:
        """
        Raises [`TooMuchMissingError`] with counts and examples where more than `allowed` of the items are left out, or
        of the candidates: a smaller pool is easier.
        """
        if max(self.share, self.candidates.share if self.candidates else 0) > allowed:
            raise TooMuchMissingError(
                f"{self}, more than the {allowed:.1%} allowed: complete the folder, or allow it with "
                "--max_missing_share and report the share"
            )

    def __str__(self) -> str:
        return self._summary("items") + (f"; {self.candidates._summary('candidates')}" if self.candidates else "")

    def _summary(self, what: str) -> str:
        reasons = "; ".join(
            f"{reason}: {count} (such as {', '.join(self.examples[reason])})"
            for reason, count in self.counts.most_common()
        )
        summary = f"{self.counts.total()} of {self.seen} {what} left out ({self.share:.1%})"
        return summary + (f": {reasons}" if reasons else "")


@dataclass
class Dialogues:
    """
    Dialogues with a target turn each, and the tables their ids refer to.

    `dialogues`: dicts of
        - `dialogue_id` (str);
        - `turns`: `[{speaker, elements: [{type: "text" | "image", text, image_id}]}]`;
        - `target_turn` (int): the context is `turns[:target_turn]`; the target turn may lie beyond the last one;
        - `pool`, `gold`: `{text_ids, image_ids}`, lists of ids; dialogues may share one `pool` object;
        - `relevance` (only where the data has it): `[float]` along `pool["text_ids"]`.
    `texts`: id -> string. `images`: id -> anything `UniMuRProcessor.decode` takes; files stay paths until they are read.
    `captions`: id of an image -> its caption, where the data has them.
    """

    dialogues: list[dict[str, Any]]
    texts: Mapping[str, str]
    images: Mapping[str, Any]
    missing: Missing = field(default_factory=Missing)
    captions: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dialogues)

    def first(self, limit: int | None) -> "Dialogues":
        """The first `limit` dialogues over the same pools."""
        return self if limit is None else dataclasses.replace(self, dialogues=self.dialogues[:limit])

    @property
    def pool_hash(self) -> str:
        """Hash of the ids of every dialogue's pool, in order: results with equal hashes ranked the same candidates."""
        known: dict[int, str] = {}
        for d in self.dialogues:
            if id(d["pool"]) not in known:
                known[id(d["pool"])] = _hash(d["pool"])
        return _hash([known[id(d["pool"])] for d in self.dialogues])


@dataclass
class Questions:
    """
    `questions`: dicts of `question_id` (str), `image_id` (str), `question`, `answers` (`[str]`, the humans'; empty in
    a split without answers), and where the data has them `question_type`, `answer_type`, `multiple_choice_answer`.
    `images` as in [`Dialogues`].
    """

    questions: list[dict[str, Any]]
    images: Mapping[str, Any]
    missing: Missing = field(default_factory=Missing)

    def __len__(self) -> int:
        return len(self.questions)

    def first(self, limit: int | None) -> "Questions":
        """The first `limit` questions."""
        return self if limit is None else Questions(self.questions[:limit], self.images, self.missing)

    @property
    def pool_hash(self) -> str:
        """Hash of the questions' ids, in order."""
        return _hash([q["question_id"] for q in self.questions])


@dataclass(frozen=True)
class Protocol:
    """
    One way of measuring one task; a file of [`benchmarks.protocols`] holds a task's.

    Attributes:
        task, variant, version: what a result's json carries.
        kind: the module of [`benchmarks.tasks`] that runs it.
        data: the reader of [`benchmarks.data`].
        settings: what the module reads.
        about: of the variant, in a sentence.
        miniature: whether it is the form for the miniature; `why` then gives the reason for what differs from the real one.
    """

    task: str
    variant: str
    version: int
    kind: str
    data: str
    table: int | None
    settings: dict[str, Any]
    about: str
    miniature: bool = False
    why: str | None = None

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    @property
    def label(self) -> str:
        return f"{self.task}/{self.variant} v{self.version}"


def read_json(path: Path) -> Any:
    """A json file, or json lines. Raises [`BadDataError`] naming the path where it is absent or not json."""
    text = _read_text(path)
    try:
        # An array or an object over several lines is one value; json lines have one value per line.
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] != "{" or error.msg != "Extra data":
            raise BadDataError(f"{path}: not json ({error})") from error
    return list(_lines(text, path))


def read_items(path: Path) -> Iterator[Any]:
    """
    The items of a json array or of json lines (the first character tells which), one at a time: of a file of gigabytes
    only the text and one item are in memory.

    Raises:
        BadDataError: the path is absent, or not of this form; the message gives the position or the line.
    """
    text = _read_text(path)
    if text.lstrip()[:1] != "[":
        yield from _lines(text, path)
        return
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    ended = text[at : at + 1] == "]"
    while not ended:
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise BadDataError(f"{path}: not json ({error})") from error
        yield item
        at = _skip(text, at)
        ended = text[at : at + 1] == "]"
        if not ended:
            if text[at : at + 1] != ",":
                raise BadDataError(f"{path}: the array breaks off or lacks a comma at character {at}")
            at = _skip(text, at + 1)
    if _skip(text, at + 1) != len(text):
        raise BadDataError(f"{path}: more text after the array's end at character {at}")


def require(value: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`value[name]`, which must be of `kind`. Raises [`BadDataError`] that names `where` (path and item) and the field."""
    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    if not isinstance(value, dict) or name not in value:
        held = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise BadDataError(f"{where}: expected the field {name!r} ({names}), got {held}")
    of_kind = isinstance(value[name], kind)
    if isinstance(value[name], bool):  # which Python counts as an integer
        of_kind = bool in (kind if isinstance(kind, tuple) else (kind,))
    if not of_kind:
        raise BadDataError(f"{where}: the field {name!r} is {type(value[name]).__name__}, expected {names}")
    return value[name]


def list_files(*folders: Path) -> dict[str, Path]:
    """
    File name -> path over `folders`; a name in several is that of the first. Each folder is listed once, since a check
    of every file is slow. Absent folders are empty.
    """
    files: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file():
                        files.setdefault(entry.name, folder / entry.name)
    return files


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` (relative paths) in `folder`. Raises [`BadDataError`] that lists these names."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    state = "" if folder.is_dir() else " (there is no such folder)"
    raise BadDataError(f"{folder}{state}: none of the files looked for is there: {', '.join(names)}")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise BadDataError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 ({error})") from error


def _lines(text: str, path: Path) -> Iterator[Any]:
    # Not str.splitlines: it also splits at separators that may be inside a json string, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise BadDataError(f"{path}, line {number}: neither json nor json lines ({error})") from error


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
