"""Dialogues drawn with the retrieved reply beside the gold one."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from modeling_unimur import Retrieval

CORRECT, WRONG, PLAIN = "#1a7f37", "#c62828", "#8a8a8a"


def draw_gallery(
    rows: Sequence[tuple[dict, Retrieval]],
    texts: Mapping[str, str],
    images: Mapping[str, Image.Image],
    path: str | Path,
) -> None:
    """
    Writes a picture with a row per dialogue: its context, the retrieved reply, the gold reply.

    Args:
        rows: dialogues of [`benchmarks.schema`], and what was retrieved for them.
        texts, images: the tables their ids refer to.
        path: of the PNG.

    A retrieved text or image is green where it is the gold one and red where it is not.
    """
    figure, axes = plt.subplots(len(rows), 3, figsize=(15, 2.15 * len(rows) + 0.6), width_ratios=(1.25, 1, 1))
    for title, axis in zip(("dialogue", "retrieved", "gold"), axes[0], strict=True):
        axis.set_title(title, fontsize=13, fontweight="bold", pad=14)
    for (dialogue, reply), (context_axis, reply_axis, gold_axis) in zip(rows, axes, strict=True):
        context = dialogue["turns"][: dialogue["target_turn"]]
        lines = [f"{t['speaker']}: " + "".join(e["text"] or "[image]" for e in t["elements"]) for t in context]
        context_images = [images[e["image_id"]] for t in context for e in t["elements"] if e["type"] == "image"]
        _panel(
            context_axis,
            "\n".join(textwrap.fill(line, 50, subsequent_indent="    ") for line in lines),
            context_images[:1],
            PLAIN,
            PLAIN,
        )
        gold_texts = [texts[i] for i in dialogue["gold"]["text_ids"]]
        gold_images = [images[i] for i in dialogue["gold"]["image_ids"][:1]]
        same = bool(gold_images) and reply.image is not None and reply.image.tobytes() == gold_images[0].tobytes()
        reply_images = [] if reply.image is None else [reply.image]
        # Without a gold text there is nothing to compare the reply's text with.
        text_colour = PLAIN if not gold_texts else CORRECT if reply.text in gold_texts else WRONG
        image_colour = CORRECT if same else WRONG
        _panel(reply_axis, textwrap.fill(reply.text or "", 38), reply_images, text_colour, image_colour)
        _panel(gold_axis, textwrap.fill(" / ".join(gold_texts), 38), gold_images, PLAIN, PLAIN)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(axis: Any, text: str, images: Sequence[Image.Image], text_colour: str, image_colour: str) -> None:
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 3)
    axis.axis("off")
    axis.text(
        0.05, 1.5, text, va="center", ha="left", fontsize=9.5, color="black" if text_colour == PLAIN else text_colour
    )
    for image in images:
        inset = axis.inset_axes([0.72, 0.02, 0.28, 0.96])
        inset.imshow(image.resize((192, 192), Image.NEAREST))
        inset.set_xticks([])
        inset.set_yticks([])
        for spine in inset.spines.values():
            spine.set_color(image_colour)
            spine.set_linewidth(3 if image_colour != PLAIN else 1)
