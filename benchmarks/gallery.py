"""Conversations drawn as people see them: bubbles, the retrieved reply, and the gold one where it differs."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import TextPath
from PIL import Image

from modeling_unimur import Retrieval

# In pixels.
CARD, GAP, MARGIN, PAD = 420, 28, 18, 11
LINE, PICTURE = 17, 132  # a line of speech, and a picture's side
FONT = 11.0  # points at 100 dots an inch
PAPER, FIRST, SECOND, OURS = "#ffffff", "#eef0f3", "#dcebfb", "#e3f3e6"
INK, QUIET, GOOD, BAD, DRAWN = "#1f2328", "#6b7280", "#1a7f37", "#b42318", "#8250df"


def draw_gallery(
    rows: Sequence[tuple[dict, Retrieval]],
    texts: Mapping[str, str],
    images: Mapping[str, Image.Image],
    path: str | Path,
    columns: int = 3,
) -> None:
    """
    Writes a picture of conversations side by side, each a card: the turns before the reply, then what was retrieved.

    Args:
        rows: dialogues of the one schema and what was retrieved for them.
        texts, images: the tables their ids point into.
        path: of the PNG.
        columns: cards beside each other.

    The retrieved words and picture are marked where they are the gold ones; where they are not, the gold ones follow. A
    drawn picture says so, in a frame of a colour of its own.
    """
    cards = [_card(dialogue, reply, texts, images) for dialogue, reply in rows]
    lines = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card[-1].bottom for card in line) + MARGIN for line in lines]
    width = columns * CARD + (columns + 1) * GAP
    height = sum(heights) + (len(lines) + 1) * GAP
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor=PAPER)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)  # downwards
    axis.axis("off")
    top = GAP
    for line, tall in zip(lines, heights, strict=True):
        for place, card in enumerate(line):
            left = GAP + place * (CARD + GAP)
            _box(axis, left, top, CARD, tall, PAPER, edge="#d0d7de", rounding=14)
            for block in card:
                block.draw(axis, left, top)
        top += tall + GAP
    figure.savefig(path, dpi=100)
    plt.close(figure)


class _Block:
    """A bubble of words, a picture under them, both optional, at a height of its card."""

    def __init__(
        self, top: float, text: str = "", image: Image.Image | None = None, *, right: bool = False,
        colour: str = PAPER, ink: str = INK, edge: str | None = None, size: float = FONT,
    ):  # fmt: skip
        self.top, self.image, self.colour, self.ink, self.edge, self.size = top, image, colour, ink, edge, size
        self.lines = textwrap.wrap(text.strip(), 40) if text else []
        inner = max([_width(line, size) for line in self.lines] + [PICTURE if image is not None else 0])
        self.width = inner + 2 * PAD
        self.height = len(self.lines) * LINE + 2 * PAD - 3
        self.height += (PICTURE + (6 if self.lines else 0)) if image is not None else 0
        self.left = CARD - MARGIN - self.width if right else MARGIN
        self.bottom = top + self.height

    def draw(self, axis: Any, left: float, top: float) -> None:
        x, y = left + self.left, top + self.top
        if self.colour != PAPER:
            _box(axis, x, y, self.width, self.height, self.colour, rounding=10)
        y += PAD
        if self.image is not None:
            extent = (x + PAD, x + PAD + PICTURE, y + PICTURE, y)
            axis.imshow(self.image, extent=extent, interpolation="lanczos", zorder=3, aspect="auto")
            if self.edge:
                _box(axis, x + PAD, y, PICTURE, PICTURE, "none", edge=self.edge, rounding=1, line=2.5, level=5)
            y += PICTURE + 6
        for i, line in enumerate(self.lines):
            axis.text(x + PAD, y + i * LINE, line, va="top", fontsize=self.size, color=self.ink, zorder=4)


def _card(dialogue: dict, reply: Retrieval, texts: Mapping[str, str], images: Mapping[str, Any]) -> list[_Block]:
    context = dialogue["turns"][: dialogue["target_turn"]]
    first, top, blocks = context[0]["speaker"], float(MARGIN), []
    # A long exchange keeps its first and last turns, and says how many are between.
    kept = context if len(context) <= 6 else [*context[:2], None, *context[-3:]]
    for turn in kept:
        if turn is None:
            blocks.append(_Block(top, f"… {len(context) - 5} more turns", ink=QUIET, size=FONT - 2))
            top = blocks[-1].bottom
            continue
        second = turn["speaker"] != first
        for element in turn["elements"]:
            image = images[element["image_id"]] if element["type"] == "image" else None
            blocks.append(
                _Block(top, element["text"] or "", image, right=second, colour=SECOND if second else FIRST)
            )  # fmt: skip
            top = blocks[-1].bottom + 7
    return [*blocks, *_reply(top + 4, dialogue["gold"], reply, texts, images)]


def _reply(top: float, gold: dict, reply: Retrieval, texts, images) -> list[_Block]:
    gold_texts = [texts[i] for i in gold["text_ids"]]
    gold_images = [images[i] for i in gold["image_ids"][:1]]
    same_text = reply.text in gold_texts
    same_image = bool(gold_images) and reply.image is not None and reply.image.tobytes() == gold_images[0].tobytes()
    # A dialogue that seeks a picture alone has no gold text to compare with.
    text = reply.text if gold_texts or not gold_images else ""
    drawn = reply.image_source == "drawn"
    edge = None if reply.image is None else DRAWN if drawn else GOOD if same_image else BAD
    blocks = [_Block(top, "UniMuR draws" if drawn else "UniMuR replies", ink=QUIET, size=FONT - 2)]
    blocks.append(_Block(blocks[-1].bottom - 8, text or "", reply.image, colour=OURS, edge=edge))
    notes, missed = [], []
    if gold_texts:
        notes.append("the gold words" if same_text else "other words")
        missed += [] if same_text else gold_texts[:1]
    if drawn:
        notes.append("a drawn picture")
    elif gold_images:
        notes.append("the gold picture" if same_image else "another picture" if reply.image else "no picture")
    elif reply.image is not None:
        notes.append("a picture where none was due")
    good = (same_text or not gold_texts) and (same_image or (not gold_images and reply.image is None))
    note = " and ".join(notes) + (f"; gold: {missed[0]}" if missed else "")
    if gold_images and not same_image:
        note = note.rstrip(".") + (", and" if missed else "; gold:")  # the gold picture follows
    blocks.append(_Block(blocks[-1].bottom - 4, note, ink=DRAWN if drawn else GOOD if good else BAD, size=FONT - 2))
    if gold_images and not same_image:
        blocks.append(_Block(blocks[-1].bottom - 8, "", gold_images[0]))
    return blocks


def _width(line: str, size: float) -> float:
    return TextPath((0, 0), line, size=size).get_extents().width * 100 / 72 if line.strip() else 0.0


def _box(axis, x, y, width, height, colour, *, edge="none", rounding=8.0, line=1.0, level=2) -> None:
    axis.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={rounding}", facecolor=colour, edgecolor=edge,
            linewidth=line, zorder=level,
        )
    )  # fmt: skip
