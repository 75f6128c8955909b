"""The schema of every task's data: dialogues with their tables of texts and images, and questions about images."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_MISSING_SHARE = 0.01
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


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
