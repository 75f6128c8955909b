"""The course of a training run as a picture: losses, recalls and image rates by step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger("train")

NAMES = {
    "loss": "sum (eq. 7)", "loss_cap": "captioning (eq. 1-2)", "loss_vm": "images (eq. 3-5)", "loss_tm": "texts (eq. 6)",
    "image_rate": "replies with an image", "image_rate_text_only": "replies of words alone",
}  # fmt: skip
PANELS = (
    ("Losses", "loss", ("loss", "loss_cap", "loss_vm", "loss_tm")),
    ("A caption's image", "recall, %", ("image_R@1", "image_R@5", "image_R@10")),
    ("A conversation's reply", "recall, %", ("reply_R@1", "reply_R@5", "reply_R@10", "reply_image_R@1")),
    ("Replies that show an image", "share, %", ("image_rate", "image_rate_text_only")),
)
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f")


def draw_curves(log: Sequence[dict[str, Any]], path: Path, about: str = "") -> bool:
    """
    Draws the trainer's log: training's losses as thin lines, what is measured on held-out data thick, with points.

    Args:
        log: `trainer.state.log_history`.
        path: of the png.
        about: what was held out, as text.

    Returns:
        Whether it was drawn: not without matplotlib, which a warning says, and not where nothing was logged.
    """
    try:
        import matplotlib
    except ImportError:
        logger.warning("no curves are drawn: pip install matplotlib")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if any(_points(log, prefix + n) for n in panel[2] for prefix in ("", "eval_"))]
    if not panels:
        return False
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, unit, names) in zip(axes[0], panels, strict=True):
        _draw_panel(axis, log, names)
        axis.set(title=title, xlabel="step", ylabel=unit)
        if unit.endswith("%"):
            axis.set_ylim(0, 100)
        axis.grid(alpha=0.25), axis.spines[["top", "right"]].set_visible(False)
        # Below, where it stands beside no line.
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.suptitle("Training" + (f"; with points: measured on {about}" if about else ""), fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _draw_panel(axis: Any, log: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for colour, name in zip(COLOURS, names, strict=False):
        label = NAMES.get(name, name.removeprefix("image_").removeprefix("reply_").replace("image_", "image "))
        trained, held = _points(log, name), _points(log, f"eval_{name}")
        if trained:
            axis.plot(*trained, color=colour, linewidth=1, alpha=0.6, label=None if held else label)
        if held:
            axis.plot(*held, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)


def _points(log: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]] | None:
    points = {entry["step"]: entry[name] for entry in log if name in entry and "step" in entry}
    return (list(points), list(points.values())) if points else None
