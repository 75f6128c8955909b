"""The report's pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .protocols import TASKS, read

COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#9b9a97", "#37352f", "#dfab01", "#8c564b")


def systems(results: list[Mapping[str, Any]], path: Path) -> None:
    """R@1 of every system on every retrieval task: a dot per seed, a bar for their mean."""
    tasks = [(task, given["lead"], given["drawn"]) for task, given in ((t, read(t)) for t in TASKS) if given["drawn"]]
    left_out = ("perplexity", "shown as", "Frozen")
    names = [n for n in dict.fromkeys(r["system"] for r in results) if not any(part in n for part in left_out)]
    names.sort(key=lambda name: not name.startswith("UniMuR"))  # ours beside each other, before the baselines
    figure, axis = plt.subplots(figsize=(10, 4.8))
    width = 0.8 / len(names)
    for place, (task, measure, _) in enumerate(tasks):
        mine = [r for r in results if r["task"] == task and r["applies"] and "," not in r["protocol"]["variant"]]
        first = mine[0]["protocol"]["variant"] if mine else None
        for i, name in enumerate(names):
            values = [
                100 * r["metrics"][measure]["value"]
                for r in mine
                if r["system"] == name and r["protocol"]["variant"] == first
            ]
            if not values:
                continue
            x = place - 0.4 + width * (i + 0.5)
            axis.bar(x, np.mean(values), width * 0.9, color=COLOURS[i % len(COLOURS)], alpha=0.45,
                     label=name if place == 0 else None)  # fmt: skip
            axis.plot([x] * len(values), values, "o", markersize=3.5, color=COLOURS[i % len(COLOURS)])
    axis.set_xticks(range(len(tasks)), [label for *_, label in tasks])
    axis.set_ylabel("R@1, %")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bias(table: Mapping[str, Any], path: Path) -> None:
    """Image retrieval rate against R@1 of images, texts and both, for each modality bias; a line per row."""
    measures = ("image R@1", "text R@1", "overall R@1")
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8))
    for colour, row in zip(COLOURS, table["rows"], strict=False):
        curves = [s["bias"] for s in row["seeds"]]
        mean = {k: 100 * np.mean([[point[k] for point in curve] for curve in curves], axis=0) for k in curves[0][0]}
        biases = mean["image_bias"] / 100
        plain = int(np.abs(biases).argmin())
        for axis, measure in zip(axes, (*measures, "image retrieval rate on text-only turns"), strict=True):
            axis.plot(mean["image retrieval rate"], mean[measure], color=colour, label=row["name"])
            axis.plot(mean["image retrieval rate"][plain], mean[measure][plain], "o", color=colour)
    for axis, measure in zip(axes, (*measures, "rate on text-only turns"), strict=True):
        axis.set_xlabel("image retrieval rate, %")
        axis.set_title(f"{measure}, %", fontsize=11)
        axis.set_xlim(0, 100)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
