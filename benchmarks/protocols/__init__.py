"""Protocols as data: for each task one versioned file with its settings in every variant."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.schema import Protocol
from benchmarks.tasks import KINDS

FOLDER = Path(__file__).parent
TASKS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
_FIELDS = {
    "name", "version", "kind", "data", "table", "about", "columns", "lead", "drawn", "settings", "variants", "miniature",
    "paper",
}  # fmt: skip
TIES = "expected"  # the only rule the metrics have: the expectation over random orders of what ties


def read(task: str) -> dict[str, Any]:
    """
    The task's file.

    Raises:
        ValueError: an unknown task, or a file with an unknown kind or field, which it names.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    path = FOLDER / f"{task}.yaml"
    given = yaml.safe_load(path.read_text())
    if given.get("kind") not in KINDS:
        raise ValueError(f"{path.name}: the kind {given.get('kind')!r} is not one of {', '.join(KINDS)}")
    kind = KINDS[given["kind"]]
    allowed = kind.SETTINGS | kind.BY_LANGUAGE | kind.OPTIONAL
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
    variants = []
    for name, variant in given["variants"].items():
        if name not in stand_in.get("variants", given["variants"]):
            continue
        settings = given["settings"] | {k: v for k, v in variant.items() if k != "about"}
        settings |= stand_in.get("settings", {}) | stand_in.get(name, {})
        kind = KINDS[given["kind"]]
        missing = kind.SETTINGS | (set() if settings.get("by") == "embedding" else kind.BY_LANGUAGE)
        missing -= set(settings)
        if missing:
            raise ValueError(f"{task}.yaml: the variant {name!r} lacks {', '.join(sorted(missing))}")
        variants.append(
            Protocol(
                task=task, variant=name, version=given["version"], kind=given["kind"], data=given["data"],
                table=given["table"], settings=settings, about=variant["about"], miniature=miniature,
                why=stand_in.get("why"),
            )
        )  # fmt: skip
    return variants


def paper(task: str) -> tuple[list[str], dict[str, list[float]]]:
    """The published columns and rows of a task (percent; CLIP-Sim a cosine); empty where the paper has none."""
    given = read(task)["paper"]
    return given["columns"], given["rows"]
