"""
The main job end to end: the miniature is made, UniMuR trained on it, evaluated on the test split, and queried.

    python -m benchmarks.demo --seed 0
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.command import require, run_command

if __name__ == "__main__":
    require("bench", "accelerate", "evaluate", "matplotlib", "scipy", "yaml")

import torch

from modeling_unimur import CandidatePool, Retrieval, UniMuRModel
from train.arguments import CONFIGS
from train.miniature import encode, prepare
from train.miniature.world import Scene
from train.parallel import peak_memory, side_by_side
from train.run import main as train

from .baselines.clip import ClipBaseline
from .gallery import draw_gallery
from .miniature import Split, load_split, measure_columns, table
from .output import stage, write_json
from .spread import place, published
from .tasks.contexts import context_of

OUTPUT = Path("runs/miniature")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the towers, the training data and the maps")
    parser.add_argument(
        "--split", default="test", choices=["validation", "test"], help="settings are chosen on validation"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where everything goes")
    arguments = parser.parse_args()
    output = arguments.output
    seconds: dict[str, float] = {}
    torch.set_num_threads(1)

    with stage("world and towers", seconds):
        (output / "towers" / "made.json").unlink(missing_ok=True)  # the demo makes everything again
        world = prepare(output, arguments.seed)
    config = ["--config", str(CONFIGS / "miniature.yaml"), f"--seed={arguments.seed}", f"--miniature={output}"]
    variants = [
        [*config, f"--output_dir={output}"],
        [*config, "--interleaved=false", f"--output_dir={output / 'pairs_only'}"],
    ]
    with stage("maps, with interleaved documents and on pairs alone", seconds):
        both = side_by_side([(train, {"argv": argv}) for argv in variants])
    trained, pairs_only = (done.result for done in both)
    with stage(f"evaluation on the {arguments.split} split", seconds):
        split = load_split(arguments.split)
        model = UniMuRModel.from_pretrained(trained["checkpoint"])
        clip = ClipBaseline(model)
        columns = measure_columns(model, UniMuRModel.from_pretrained(pairs_only["checkpoint"]), clip, split)
    with stage("pool, replies and gallery", seconds):
        write_photos(split, output / "photos")
        # What the page, the pipeline and the endpoint search by default.
        model.save_pretrained(trained["checkpoint"], pool=packed(model, split), golden=True)
        rows, texts = replies(model, split), split.responses.texts | split.facts.texts
        draw_gallery(rows, texts, split.images, output / "gallery.png", columns=4)
        # One that shows a picture, one that asks for one, one that needs words alone.
        draw_gallery([rows[i] for i in (3, 6, 9)], texts, split.images, output / "three.png")

    # Every process counts: this one, and those that work beside it in two of the stages.
    own = peak_memory()
    memory = max(own + world.towers_memory, own + sum(done.memory for done in both))
    seconds["total"] = sum(seconds.values())
    report(output, {
        "seed": arguments.seed, "split": arguments.split, "results": columns, "seconds": seconds | world.seconds,
        "peak_memory_gib": memory, "clip_truncated_dialogues": clip.truncated,
        "checkpoint": trained["checkpoint"],
    })  # fmt: skip


def report(output: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, and prints the table, whether its figures lie among the published ones, and where things are."""
    write_json(output / "results.json", results)
    print(f"\n{results['split']} split, seed {results['seed']}; percent, CLIP-Sim a cosine")
    print(table(results["results"]))
    if results["split"] == "test":
        seeds, values = published()
        print(place(results["results"]["UniMuR"], seeds, values.get("UniMuR", {})))
    print("\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items()))
    print(f"peak memory: {results['peak_memory_gib']:.2f} GiB\ncheckpoint: {results['checkpoint']}\n"
          f"gallery: {output / 'gallery.png'}")  # fmt: skip


def replies(model: UniMuRModel, split: Split) -> list[tuple[dict, Retrieval]]:
    """Retrieves for a fixed choice of dialogues, each from the pool of its kind, built as a user builds it."""
    responses, visdial, facts = split.responses, split.visdial, split.facts
    wanting = [d for d in responses.dialogues if d["wants_image"]]
    chosen = [
        [d for d in facts.dialogues if "panda" in d["dialogue_id"]],
        [d for d in wanting if d["image_informs"]][:4] + [d for d in wanting if not d["image_informs"]][:3]
        + [d for d in responses.dialogues if not d["wants_image"]][:3],
        visdial.dialogues[:2],
    ]  # fmt: skip
    rows = []
    for dialogues, group in zip(chosen, (facts, responses, visdial), strict=True):
        ids = group.dialogues[0]["pool"]
        pool = model.build_pool(
            images=[split.images[i] for i in ids["image_ids"]], texts=[group.texts[i] for i in ids["text_ids"]]
        )
        rows += zip(dialogues, model.retrieve([context_of(d, split.images) for d in dialogues], pool), strict=True)
    return rows


def packed(model: UniMuRModel, split: Split, replies: int | None = None) -> CandidatePool:
    """
    One pool of the split's replies, its facts and their pictures; of the replies, those of the first `replies` dialogues
    that are answered by a picture, or all candidates.
    """
    facts, candidates = split.facts.dialogues[0]["pool"], split.responses.dialogues[0]["pool"]
    if replies is not None:
        gold = [d["gold"] for d in split.responses.dialogues if d["gold"]["image_ids"]][:replies]
        candidates = {kind: [i for ids in gold for i in ids[kind]] for kind in ("image_ids", "text_ids")}
    pools = [(split.responses, candidates), (split.facts, facts)]
    images = [i for _, pool in pools for i in pool["image_ids"]]
    scenes = {i: group.images[i] for group, pool in pools for i in pool["image_ids"]}
    texts = {i: group.texts[i] for group, pool in pools for i in pool["text_ids"]}
    return model.build_pool(
        images=[split.images[i] for i in images], texts=list(texts.values()), image_ids=names(scenes.values()),
        text_ids=list(texts),
    )  # fmt: skip


def names(scenes: Iterable[Scene]) -> list[str]:
    """What people read of the pictures: what they show, and a number where several show the same."""
    counts: Counter[str] = Counter()
    made = []
    for scene in scenes:
        name = f"{scene.animal} in a {scene.hat} hat, {scene.verb} {scene.object}, {scene.place}"
        counts[name] += 1
        made.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return made


def write_photos(split: Split, folder: Path, count: int = 60) -> None:
    """Some test pictures as an image folder with metadata: what the README's five lines search."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for image_id in list(split.visdial.images)[:count]:
        (folder / f"{image_id}.png").write_bytes(encode(split.images[image_id]))
        scene = split.visdial.images[image_id]
        caption = f"a {scene.animal} in a {scene.hat} hat, {scene.verb}: {scene.object}, {scene.place}"
        lines.append(json.dumps({"file_name": f"{image_id}.png", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(main)
