"""
Seconds to a recall: the reference-style run against the paper's form of ours, and against canonical correlation.

    python -m benchmarks.speed.quality --output benchmarks/results

On the miniature's caption pairs, one thread. The reference (see [`benchmarks.speed.reference`]) decodes each image in each
epoch and trains [RET]'s row too; its learning rate is the best of four by the recall it ends with on the first seed. The
others are `train/run.py`'s trainer at the miniature's settings, in the paper's form (random maps, CLIP's own space) or from
canonical correlation; start and steps then read pairs as conversations. Every run makes the same number of steps over the
same batch size, but for canonical correlation alone, which makes none and sees one caption of each image: its points are runs
of their own, each over a larger part of the pairs. Recall is dialogue to image R@1 on validation, whose queries are text
alone; its measuring is not timed. What a run needs before its first step is timed: the cache of images, or of images and
captions, and the closed form. Loading the towers, the same for all, is not.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_cosine_schedule_with_warmup, set_seed
from transformers.trainer_utils import IntervalStrategy

from benchmarks.output import write_json
from modeling_unimur import UniMuRModel
from train.arguments import parse
from train.closed_form import start
from train.collate import PairCollator, SkipCounter
from train.command import run_command
from train.features import cache_caption_states, cache_image_features
from train.trainer import UniMuRTrainer

from .. import ablation
from ..ablate import NEAR, SPACE
from ..ablation import Row, Seed
from .reference import ReferenceStep, padded

STEPS, BATCH, WARMUP = 320, 128, 30
MARKS = (5, 10, 20, 40, 80, 160, 240, STEPS)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PARTS = (1 / 8, 1 / 4, 1 / 2, 1)  # of the pairs, for canonical correlation alone
# The steps of miniature.yaml.
FROM_CANONICAL = ("--matching_learning_rate=2e-4", *(f"--{name}={value}" for name, value in NEAR.items()))
RECALL = "dialogue to image R@1"
MEASURES = (RECALL, "contextual image R@1", "overall R@1", "image retrieval rate")
REFERENCE, PAPER, CACHED = "reference style", "the paper's form", "the paper's form, cached"
STEPPED, ALONE = "canonical correlation, then steps", "canonical correlation alone"
WAYS = (REFERENCE, PAPER, CACHED, STEPPED, ALONE)

Look = Callable[[int, UniMuRModel], None]


class Stopwatch:
    """
    Seconds of training, without those spent on measuring the model.

    Attributes:
        points: of each measurement its `step`, `seconds` and measures.
    """

    def __init__(self, bench: Seed):
        self.bench, self.points, self._seconds, self._since = bench, [], 0.0, time.perf_counter()

    def look(self, step: int, model: UniMuRModel) -> None:
        """Measures validation recall after `step` steps."""
        self._seconds += time.perf_counter() - self._since
        model.eval()
        with torch.no_grad():
            measures = self.bench.measure(model, "validation")
        model.train()
        point = {"step": step, "seconds": self._seconds} | {k: measures[k].value for k in MEASURES}
        self.points.append(point)
        self._since = time.perf_counter()


class _Looks(TrainerCallback):
    def __init__(self, look: Look, marks: Sequence[int]):
        self.look, self.marks = look, marks

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.marks:
            self.look(state.global_step, model)


def reference_run(bench: Seed, rate: float, steps: int, marks: Sequence[int]) -> list[dict[str, float]]:
    """The points of a run that computes each step as FROMAGe does."""
    model = bench.model(Row("reference", {}))
    model.train()
    watch = Stopwatch(bench)
    step = ReferenceStep(model)
    optimizer = torch.optim.AdamW(step.trained(), lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP, steps // 2), steps)
    collator = PairCollator(model.processor, seed=bench.seed, pack=False)
    generator = torch.Generator().manual_seed(bench.seed)
    loader = DataLoader(
        bench.miniature.pairs, BATCH, shuffle=True, drop_last=True, collate_fn=collator, generator=generator
    )
    done = 0
    while done < steps:
        for batch in loader:
            step(padded(batch, model.config.n_visual_tokens)).backward()
            step.update(optimizer)
            schedule.step()
            done += 1
            if done in marks:
                model.ret_embedding.data.copy_(step.table[-1].detach())
                watch.look(done, model)
            if done == steps:
                break
        collator.epoch += 1
    return watch.points


def our_run(
    bench: Seed, rate: float, steps: int, marks: Sequence[int], *, cached: bool, canonical: bool, part: float = 1
) -> list[dict[str, float]]:
    """The points of `train/run.py`'s trainer over the first `part` of the pairs, its caches and the closed form timed."""
    model = bench.model(Row("ours", SPACE if canonical else {}))
    _, _, args = parse([
        *ablation.PAPER, *(FROM_CANONICAL if canonical else ()), f"--learning_rate={rate}", f"--max_steps={max(steps, 1)}",
        f"--per_device_train_batch_size={BATCH}", "--gradient_accumulation_steps=1", f"--seed={bench.seed}",
        f"--warmup_steps={min(WARMUP, steps // 2)}", f"--output_dir={bench.runs}", "--disable_tqdm=true",
        "--logging_steps=1000",
    ])  # fmt: skip
    args.eval_strategy = IntervalStrategy.NO  # it is looked at by its own watch
    with tempfile.TemporaryDirectory() as folder:
        watch, rows = Stopwatch(bench), bench.miniature.pairs
        rows = rows.select(range(round(part * len(rows))))
        collator = PairCollator(model.processor, seed=bench.seed, pack=True)
        if cached:
            rows = cache_image_features(rows, model, SkipCounter(), folder=Path(folder) / "images")
        if cached and not canonical:
            rows = cache_caption_states(rows, model, Path(folder) / "captions")
        if canonical:  # with steps as in miniature.yaml; alone as quickly as it can be had
            collator.pair_contexts = "conversations" if steps else "caption"
            start(model, rows, collator, SkipCounter(), batch_size=BATCH, every_caption=bool(steps))
            watch.look(0, model)
        if steps:
            trainer = UniMuRTrainer(
                model=model, args=args, train_dataset=rows, data_collator=collator,
                callbacks=[_Looks(watch.look, marks)],
            )  # fmt: skip
            trainer.train()
    return watch.points


def run(way: str, bench: Seed, rates: dict[str, float], steps: int, marks: Sequence[int]) -> list[dict[str, float]]:
    """The points of one way."""
    set_seed(bench.seed)
    if way == REFERENCE:
        return reference_run(bench, rates[way], steps, marks)
    if way == ALONE:
        return [
            our_run(bench, rates[way], 0, marks, cached=True, canonical=True, part=part)[0] | {"part": part}
            for part in PARTS
        ]
    return our_run(
        bench, rates[way], steps, marks, cached=way in (CACHED, STEPPED), canonical=way == STEPPED
    )  # fmt: skip


def sooner(points: dict[str, list[dict[str, float]]], way: str) -> dict[str, float | None]:
    """
    When a way first reaches the recall at which the reference ends.

    Returns:
        `seconds`; `than_its_end` and `than_it_first_did`, how many times sooner than the reference was done and than the
        reference first reached it; `None` where the way never does.
    """
    level = points[REFERENCE][-1][RECALL]
    reached = next((p["seconds"] for p in points[way] if p[RECALL] >= level), None)
    first = next(p["seconds"] for p in points[REFERENCE] if p[RECALL] >= level)
    if reached is None:
        return {"seconds": None, "than_its_end": None, "than_it_first_did": None}
    end = points[REFERENCE][-1]["seconds"]
    return {"seconds": reached, "than_its_end": end / reached, "than_it_first_did": first / reached}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Recall against seconds, a curve per way and seed."""
    from ..plots import COLOURS, plt  # here, so that the other measurements need no matplotlib

    figure, axis = plt.subplots(figsize=(8.4, 5.2))
    for way, colour in zip(WAYS, (COLOURS[n] for n in (5, 1, 0, 2, 3)), strict=True):
        for number, result in enumerate(results):
            points = result["points"][way]
            axis.plot(
                [p["seconds"] for p in points], [100 * p[RECALL] for p in points], color=colour, marker="o", ms=4,
                lw=1.6, alpha=0.85, label=None if number else way, zorder=3 if way == ALONE else 2,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("seconds of training, one thread, cache and closed form counted")
    axis.set_ylabel("dialogue to image R@1 on validation, %")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )  # below, where it lies over no line
    axis.set_title(f"Time to quality on the miniature's pairs, {len(results)} seed(s)", loc="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(RATES), help="of the reference; of several the best"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/report"), help="of each seed's miniature, which is made if absent"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps = arguments.steps
    marks = [m for m in MARKS if m < steps] + [steps]
    rates = {REFERENCE: arguments.rates[0], PAPER: 1e-2, CACHED: 1e-2, STEPPED: 1e-4, ALONE: 0.0}
    results, searched = [], {}
    for seed in arguments.seeds:
        bench = Seed(arguments.folder / f"seed-{seed}", seed)
        bench.measure(bench.model(Row("warm", {})), "validation")  # the data and the pictures are read once
        if len(arguments.rates) > 1 and not searched:
            tried = {f"{rate:g}": reference_run(bench, rate, steps, marks) for rate in arguments.rates}
            searched = {rate: points[-1][RECALL] for rate, points in tried.items()}
            rates[REFERENCE] = float(max(searched, key=searched.get))
            print(f"the reference ends at {searched}; {rates[REFERENCE]:g} is used", flush=True)
        points = {}
        for way in WAYS[seed % len(WAYS) :] + WAYS[: seed % len(WAYS)]:  # so that none is always the first
            points[way] = run(way, bench, rates, steps, marks)
            end = points[way][-1]
            print(f"seed {seed}, {way}: {end['seconds']:.0f} s, R@1 {100 * end[RECALL]:.1f} %", flush=True)
        gains = {way: sooner(points, way) for way in WAYS if way != REFERENCE}
        results.append({"seed": seed, "points": points, "sooner": gains})
        for way, gain in gains.items():
            print(f"  {way}: {gain}", flush=True)
        about = {
            "steps": steps, "batch": BATCH, "rates": rates, "reference_rates_searched": searched,
            "torch": torch.__version__, "measure": RECALL,
        }  # fmt: skip
        result = summary(about, results)
        write_json(arguments.output / "quality-speed.json", result)  # a seed takes a quarter of an hour: none is lost
    draw(results, arguments.output / "quality-speed.png")
    return result


def summary(about: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: `about` the runs, the seeds so far, and how many times sooner each way is by the median of them."""
    ways = [way for way in WAYS if way != REFERENCE]
    median = {way: float(np.median([r["sooner"][way]["than_its_end"] or 0 for r in results])) for way in ways}
    return about | {"seeds": results, "median_sooner": median}


if __name__ == "__main__":
    run_command(main)
