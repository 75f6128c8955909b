"""Protocols as data: for each task one versioned file that says how it is measured, in every variant."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
TASKS = ("mmdialog", "mmdialog_image", "visdial", "visdial_answers", "vist", "vqav2")
_FIELDS = {"name", "version", "task", "data", "table", "about", "settings", "variants", "miniature", "paper"}
_SETTINGS = {
    "response": {"split", "serialisation", "pool", "first_image", "ties"},
    "image": {"split", "serialisation", "pool", "first_image", "ties", "direction", "squash", "context", "caption",
              "seen_images"},
    "answers": {"split", "serialisation", "pool", "ties", "by", "option", "own_bos", "shift", "reduction", "scope",
                "squash", "relevance"},
    "vqa": {"split", "by", "prompt", "max_new_tokens", "cut"},
}  # fmt: skip
_OPTIONAL = {"caption", "seen_images"}
TIES = "expected"  # the only rule the metrics have: the expectation over random orders of what ties


@dataclass(frozen=True)
class Protocol:
    """
    One way of measuring one task.

    Attributes:
        task, variant, version: what a result's json carries.
        kind: `"response"`, `"image"`, `"answers"` or `"vqa"`, the module of [`benchmarks.tasks`] that runs it.
        data: the reader of [`benchmarks.data`].
        settings: what the module reads.
        about: of the variant, in a sentence.
        miniature: whether it is the form for the miniature; `why` then says how and why it differs from the real one.
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


def read(task: str) -> dict[str, Any]:
    """
    The task's file.

    Raises:
        ValueError: an unknown task, or a file with an unknown field, which names it.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    path = FOLDER / f"{task}.yaml"
    given = yaml.safe_load(path.read_text())
    allowed = _SETTINGS.get(given.get("task"), set())
    unknown = set(given) ^ _FIELDS
    stand_in = {k: v for k, v in given["miniature"].items() if k not in ("variants", "why")}
    unknown |= set(stand_in) - {"settings", *given["variants"]}
    for part in [given["settings"], *given["variants"].values(), *stand_in.values()]:
        unknown |= set(part) - allowed - {"about"}
    if given["settings"].get("ties", TIES) != TIES:
        raise ValueError(f"{path.name}: ties are broken by {TIES!r} values only, not {given['settings']['ties']!r}")
    if unknown:
        raise ValueError(f"{path.name}: unknown or absent fields {', '.join(sorted(unknown))}")
    return given


def protocols(task: str, miniature: bool = False) -> list[Protocol]:
    """Every variant of a task, for the real data or for the miniature."""
    given = read(task)
    stand_in = given["miniature"] if miniature else {}
    found = []
    for name, variant in given["variants"].items():
        if name not in stand_in.get("variants", given["variants"]):
            continue
        settings = given["settings"] | {k: v for k, v in variant.items() if k != "about"}
        settings |= stand_in.get("settings", {}) | stand_in.get(name, {})
        missing = _SETTINGS[given["task"]] - set(settings) - _OPTIONAL
        if settings.get("by") == "embedding":
            missing -= {"own_bos", "shift", "reduction", "scope", "max_new_tokens", "cut"}
        if missing:
            raise ValueError(f"{task}.yaml: the variant {name!r} lacks {', '.join(sorted(missing))}")
        found.append(
            Protocol(
                task=task, variant=name, version=given["version"], kind=given["task"], data=given["data"],
                table=given["table"], settings=settings, about=variant["about"], miniature=miniature,
                why=stand_in.get("why"),
            )
        )  # fmt: skip
    return found


def paper(task: str) -> tuple[list[str], dict[str, list[float]]]:
    """The published columns and rows of a task (percent; CLIP-Sim a cosine); empty where the paper has none."""
    given = read(task)["paper"]
    return given["columns"], given["rows"]
