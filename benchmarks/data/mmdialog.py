"""MMDialog: conversations of texts and images, each turn the reply to those before it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.schema import ABSENT, Dialogues, Missing
from train.json_files import BadDataError, find_file, list_files, read_items, require
from train.published import mmdialog_turn

POOLS = ("conversation", "split")
BLANK = "blank text"
_NAMES = {"valid": ("valid", "val"), "val": ("valid", "val")}


def read_mmdialog(
    folder: str | Path, split: str = "test", pool: str = "conversation", progress: bool = True
) -> Dialogues:
    """
    One item per turn after the first: the texts and images of that turn, given the turns before.

    Args:
        folder: holds `{split}/conversations.json` (an array or json lines) and next to it the images `<media_key>.jpg`.
        split: `"train"`, `"valid"` (some copies have `val`; both are read) or `"test"`.
        pool: `"conversation"`: that conversation's negatives and the item's own reply; `"split"`: every text and image
            of the split's turns, one pool for all. Ids are sorted, so that their order contains no information.

    Returns:
        Turns of speakers `"A"` and `"B"` by turn, elements in the order given; `turns[target_turn]` is the reply and
        the last one. A text's id is a function of the string, `t` and 16 digits of its SHA-1, so that equal texts are
        one candidate; an image's id is its media key. Items whose context or reply has an absent image or a blank
        text, and those without content in either, are left out and counted. An absent or blank negative is left out of its
        pools only; `missing.candidates` counts each such text or image once, among all distinct ones.

    Raises:
        ValueError: an unknown `pool`.
        BadDataError: a file is absent or of the wrong shape; negatives are asked for where a split has none (train).
    """
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r}: expected one of {', '.join(POOLS)}")
    folder = Path(folder)
    path = find_file(folder, *(f"{name}/conversations.json" for name in _NAMES.get(split, (split,))))
    table = _Candidates(list_files(path.parent))
    missing, items, shared = Missing(), [], {"text_ids": [], "image_ids": []}
    for n, conversation in enumerate(tqdm(read_items(path), "reading MMDialog", disable=not progress)):
        where = f"{path}: conversation {n}"
        name = require(conversation, "conversation_id", (int, str), where)
        turns = [
            {"speaker": "AB"[t % 2], "elements": mmdialog_turn(turn, f"{where} ({name}), turn {t}")}
            for t, turn in enumerate(require(conversation, "conversation", list, where))
        ]
        negatives = _negatives(conversation, table, where) if pool == "conversation" else None
        problems = [table.problem(turn) for turn in turns]
        replies = [table.add_all(turn["elements"]) for turn in turns]
        for t in range(1, len(turns)):
            missing.seen += 1
            problem = next((f"{why} in the context" for why in problems[:t] if why and why != EMPTY), None)
            if not any(turn["elements"] for turn in turns[:t]):
                problem = "context without content"
            problem = problem or (problems[t] and f"{problems[t]} in the reply")
            if problem:
                missing.add(problem, f"{name}-{t}")
                continue
            gold = replies[t]
            own = shared if negatives is None else {k: _with(negatives[k], gold[k]) for k in gold}
            items.append(
                {"dialogue_id": f"{name}-{t}", "turns": turns[: t + 1], "target_turn": t, "pool": own, "gold": gold}
            )
    if pool == "split":
        shared["text_ids"], shared["image_ids"] = sorted(table.texts), sorted(table.images)
    missing.candidates = table.missing
    table.missing.seen = len(table.texts) + len(table.images) + table.missing.counts.total()
    return Dialogues(items, table.texts, table.images, missing)


EMPTY = "nothing"


class _Candidates:
    """The tables of usable texts and images, and the unusable ones, each counted once."""

    def __init__(self, files: dict[str, Path]):
        self.files, self.missing = files, Missing()
        self.texts: dict[str, str] = {}
        self.images: dict[str, Path] = {}
        self._ids: dict[str, str] = {}  # one hash per distinct text, not per occurrence
        self._refused: set[tuple[str, str]] = set()

    def text(self, text: str) -> str | None:
        """Its id, or `None` where it is blank."""
        if not text.strip():
            return self._refuse(BLANK, text)
        if text not in self._ids:
            self._ids[text] = "t" + hashlib.sha1(text.encode()).hexdigest()[:16]
            self.texts[self._ids[text]] = text
        return self._ids[text]

    def image(self, key: str) -> str | None:
        """The key, or `None` where its file is absent."""
        if key not in self.images:
            if f"{key}.jpg" not in self.files:
                return self._refuse(ABSENT, f"{key}.jpg")
            self.images[key] = self.files[f"{key}.jpg"]
        return key

    def add_all(self, elements: Iterable[dict]) -> dict[str, list[str]]:
        """The ids of a turn's texts and images, in order, each once."""
        ids = {"text_ids": [], "image_ids": []}
        for e in elements:
            kind, i = (
                ("text_ids", self.text(e["text"])) if e["type"] == "text" else ("image_ids", self.image(e["image_id"]))
            )
            if i is not None and i not in ids[kind]:
                ids[kind].append(i)
        return ids

    def problem(self, turn: dict) -> str | None:
        """Why a turn cannot be used, or `None`."""
        if not turn["elements"]:
            return EMPTY
        for e in turn["elements"]:
            if e["type"] == "text" and not e["text"].strip():
                return BLANK
            if e["type"] == "image" and f"{e['image_id']}.jpg" not in self.files:
                return ABSENT
        return None

    def _refuse(self, reason: str, item: str) -> None:
        if (reason, item) not in self._refused:
            self._refused.add((reason, item))
            self.missing.add(reason, repr(item) if reason == BLANK else item)


def _negatives(conversation: Any, table: _Candidates, where: str) -> dict[str, list[str]]:
    negatives = {}
    for kind, field, add in (
        ("text_ids", "negative_candidate_texts", table.text),
        ("image_ids", "negative_candidate_media_keys", table.image),
    ):
        if field not in conversation:
            raise BadDataError(
                f"{where}: no {field!r}; valid and test have negatives, train has none: use pool='split' there"
            )
        given = require(conversation, field, list, where)
        for i, value in enumerate(given):
            if not isinstance(value, str):
                raise BadDataError(f"{where}: {field}[{i}] is {type(value).__name__}, expected str")
        negatives[kind] = sorted({i for i in map(add, given) if i is not None})
    return negatives


def _with(ids: list[str], gold: list[str]) -> list[str]:
    return sorted({*ids, *gold})
