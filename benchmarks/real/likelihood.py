"""
Texts by the real LLM's likelihood ("FROMAGe-ppl"): the miniature's replies, and VisDial's answers as they are published.

    python -m benchmarks.real.likelihood --visdial ../shared/samples/visdial

The pictures of a VisDial sample are not available, so its contexts are text alone.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.baselines.perplexity import SCORES
from benchmarks.data import miniature
from benchmarks.data.visdial import read_visdial_answers
from benchmarks.load import UniMuR
from benchmarks.measure import Measure
from benchmarks.metrics import hit_rate_per_item
from benchmarks.output import write_json
from benchmarks.protocols import protocols
from benchmarks.schema import Dialogues
from benchmarks.tasks import answers
from benchmarks.tasks.contexts import context_of
from train.command import run_command
from train.miniature.dialogues import without_context_images

from .bench import make_bench
from .fetch import ABOUT

DIALOGUES, TEXTS = 24, 100


def replies(system: UniMuR, split: str, dialogues: int = DIALOGUES, texts: int = TEXTS) -> dict[str, Any]:
    """
    Ranks the gold reply of dialogues without an image among `texts` replies, by each form of the score.

    Returns:
        score -> `R@1`, `R@5` with their intervals.
    """
    data = miniature.mmdialog(split)
    chosen = [d for d in data.dialogues if not d["image_informs"]][:dialogues]
    golds = [d["gold"]["text_ids"][0] for d in chosen]
    pool = [*golds, *(i for i in data.texts if i not in set(golds))][:texts]
    options = [data.texts[i] for i in pool]
    contexts = [context_of(d, data.images) for d in chosen]
    # The reply is a turn of its own: a line break precedes it, as between all turns.
    likelihoods = system.likelihoods(
        contexts, [["\n" + text for text in options]] * len(contexts), show_progress_bar=True
    )
    result = {}
    for name, score in SCORES.items():
        rows = torch.stack([each.scores(**score) for each in likelihoods]).numpy()
        hits = hit_rate_per_item(rows, [[i] for i in range(len(chosen))], (1, 5))
        result[name] = {f"R@{k}": Measure(hits[:, i]).summary() for i, k in enumerate((1, 5))}
    return {"dialogues": len(chosen), "texts": len(options), "scores": result}


def visdial_answers(system: UniMuR, folder: Path, limit: int | None) -> dict[str, Any]:
    """VisDial's answer options by likelihood, `corrected` and `fromage-compat`, each with its interval; text alone."""
    data = without_pictures(folder).first(limit)
    variants = {}
    for protocol in protocols("visdial_answers", miniature=False):
        if protocol["by"] == "likelihood":
            measures = answers.run(system, data, protocol)
            variants[protocol.variant] = {name: m.summary() for name, m in measures.items()}
    return {"rounds": len(data), "variants": variants}


def without_pictures(folder: Path) -> Dialogues:
    """A folder's rounds without pictures: blank ones replace the absent files while reading, and are then removed."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.glob("*.json"):
            (Path(scratch) / path.name).symlink_to(path.resolve())
        for path in folder.glob("visdial_1.0_val*.json"):
            if "dense" not in path.name:
                for dialogue in json.loads(path.read_text())["data"]["dialogs"]:
                    blank = Path(scratch) / f"VisualDialog_val2018_{dialogue['image_id']:012d}.jpg"
                    Image.new("RGB", (8, 8)).save(blank)
        data = read_visdial_answers(scratch, progress=False)
    return Dialogues(without_context_images(data.dialogues), data.texts, {}, data.missing)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="of the LLM and the states")
    parser.add_argument("--miniature", type=Path, help="of the miniature's towers; by default in the folder")
    parser.add_argument("--visdial", type=Path, help="folder of VisDial's json files; without it the miniature alone")
    parser.add_argument("--limit", type=int, help="only the first N rounds")
    parser.add_argument("--output", type=Path, default=Path("runs/real/real-likelihood.json"))
    arguments = parser.parse_args(argv)
    bench = make_bench(arguments.folder, arguments.miniature, seed=0)
    system = UniMuR(bench.model)
    result: dict[str, Any] = {"about": ABOUT, "miniature": replies(system, "test")}
    write_json(arguments.output, result)
    if arguments.visdial:
        result["visdial_answers"] = visdial_answers(system, arguments.visdial, arguments.limit)
        write_json(arguments.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_command(main)
