"""The miniature's test split: every task of the demo's table, for the model, for CLIP alone and for chance."""

from dataclasses import dataclass

from PIL import Image

from modeling_unimur import UniMuRModel
from train.miniature import pictures
from train.miniature.dialogues import DialogueSet, figure1, responses, visdial, without_context_images
from train.miniature.world import splits

from .baselines.clip import ClipBaseline
from .retrieval import KS, image_retrieval, image_to_itself, multimodal_response

SEED = 7  # of the dialogues that are measured, whatever the model's seed


@dataclass
class Split:
    """Dialogues of one split with their pictures drawn."""

    responses: DialogueSet
    visdial: DialogueSet
    facts: DialogueSet
    images: dict[str, Image.Image]


def load_split(name: str, size: int = 1000) -> Split:
    """`size` dialogues of each kind on scenes of the `"validation"` or `"test"` split."""
    scenes = splits()[name]
    sets = responses(scenes, size, SEED), visdial(scenes, size, SEED), figure1(scenes, SEED)
    images = {k: v for s in sets for k, v in pictures(s.images, SEED).items()}
    return Split(*sets, images)


def measure(model: UniMuRModel | ClipBaseline, clip: ClipBaseline, split: Split) -> dict[str, float]:
    """One column of the table; percent, but for CLIP-Sim."""
    said, seen = split.responses, split.visdial
    wanting = [d for d in said.dialogues if d["wants_image"]]
    informed = [d for d in wanting if d["image_informs"]]
    result = multimodal_response(model, clip, said.dialogues, said.texts, split.images)
    tasks = {
        "contextual image": image_retrieval(model, wanting, split.images),
        "contextual image, image informs": image_retrieval(model, informed, split.images),
        "contextual image, image informs but is removed": image_retrieval(
            model, without_context_images(informed), split.images
        ),
        "dialogue to image": image_retrieval(model, seen.dialogues, split.images),
        "image to itself": image_to_itself(model, [split.images[i] for i in seen.dialogues[0]["pool"]["image_ids"]]),
    }
    return result | {f"{task} {k}": value for task, values in tasks.items() for k, value in values.items()}


def chance(split: Split) -> dict[str, float]:
    """What a random order of the pool gives."""
    pool = split.responses.dialogues[0]["pool"]
    n_texts, n_images = len(pool["text_ids"]), len(pool["image_ids"])
    shown = n_images / (n_texts + n_images - 1)  # the first of what remains beside the best text
    wanting = sum(d["wants_image"] for d in split.responses.dialogues)
    n = len(split.responses.dialogues)
    result = {
        "image retrieval rate": 100 * shown,
        "image retrieval rate on text-only turns": 100 * shown,
        "image R@1": 100 * shown / n_images,
        "text R@1": 100 / n_texts,
        "overall R@1": 100 * (wanting * shown / n_images + n / n_texts) / (wanting + n),
    }
    sizes = dict.fromkeys(("contextual image", "contextual image, image informs",
                           "contextual image, image informs but is removed"), n_images)  # fmt: skip
    sizes |= dict.fromkeys(("dialogue to image", "image to itself"), len(split.visdial.dialogues))
    return result | {f"{task} R@{k}": 100 * k / size for task, size in sizes.items() for k in KS}


def table(columns: dict[str, dict[str, float]]) -> str:
    """A markdown table, a row a measure; a dash where a column does not have it."""
    rows = list(dict.fromkeys(name for values in columns.values() for name in values))
    width = max(map(len, rows))
    lines = [f"| {'':{width}} | " + " | ".join(f"{name:>12}" for name in columns) + " |"]
    lines.append(f"|{'-' * (width + 2)}|" + "|".join("-" * 13 + ":" for _ in columns) + "|")
    for row in rows:
        cells = []
        for values in columns.values():
            value = values.get(row)
            cells.append("-" if value is None else f"{value:.3f}" if row == "CLIP-Sim" else f"{value:.1f}")
        lines.append(f"| {row:{width}} | " + " | ".join(f"{cell:>12}" for cell in cells) + " |")
    return "\n".join(lines)
