"""
Drawing on the miniature, end to end: a diffusion model is pre-trained, the models of Table A.2 learn to draw with it, and
they are measured on the task `generation`.

    python -m benchmarks.generate --seed 0
    python -m benchmarks.generate --seeds 0 1 2 3 4 --rows GILL "GILL + dual alignment" --results benchmarks/results

What an earlier call left in a seed's folder is taken from there.
"""

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_unimur import Retrieval, UniMuRModel
from train.arguments import CONFIGS
from train.command import run_command
from train.miniature.dialogues import visdial
from train.miniature.diffusion import pretrain_diffusion
from train.miniature.prepare import prepare_towers
from train.miniature.world import captions, splits
from train.run import main as train

from .baselines.clip import ClipBaseline
from .baselines.drawing import Chooses, Retrieves, TextToImage
from .data import load_data
from .gallery import draw_gallery
from .load import UniMuR
from .markdown import table
from .miniature import SEED
from .output import write_json
from .probe import PixelProbe
from .protocols import paper, protocols
from .run import compare
from .schema import Dialogues
from .systems import System
from .tables import markdown
from .tasks.contexts import Contexts

OUTPUT = Path("runs/generate")
SAMPLES = 200  # pictures that the probe reads
LEARNED_ON = 200  # validation dialogues for the rule of generate="auto"
PAIRS = ("--interleaved=false", "--pair_contexts=caption")
JOINT = ("--schedule=joint", "--train_ret_embedding=true", "--cache_captions=false", "--drawing_learning_rate=2e-3",
         "--max_steps=320", "--gradient_accumulation_steps=2", "--learning_rate=1e-2")  # fmt: skip
# The rows that are trained to draw: flags behind miniature.yaml and miniature-gill.yaml. GILL's head is the contrastive one of
# "image head trained" (see benchmarks/miniature.py), dual alignment is the paper's form; in both [RET] is the first [IMG]
# token and every loss trains it. UniMuR's own other tensors are done before it learns to draw.
ROWS: dict[str, tuple[str, ...]] = {
    "UniMuR": (),
    "GILL": (*JOINT, "--train_image_map=true", "--matching_learning_rate=2e-4"),
    "GILL + dual alignment": ("--config", str(CONFIGS / "paper.yaml"), *JOINT, "--state_noise=0.3"),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """The json of each seed. Raises `ValueError`: a folder holds what another seed made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="of everything that is trained")
    seeds.add_argument("--seeds", type=int, nargs="+", help="several, each in a folder of its own, OUTPUT/seed-N")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where everything goes")
    parser.add_argument("--results", type=Path, help="a folder that gets each seed's figures as generation-N.json")
    parser.add_argument("--rows", nargs="*", default=[], choices=ROWS, help="what is trained to draw beside UniMuR")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    folders = {arguments.seed: arguments.output}
    if arguments.seeds:
        folders = {seed: arguments.output / f"seed-{seed}" for seed in arguments.seeds}
    for seed, folder in folders.items():  # before anything is trained
        check_folder(folder, seed)
    made = []
    for seed, folder in folders.items():
        made.append(run_seed(folder, seed, arguments.rows))
        if arguments.results:
            path = arguments.results / f"generation-{seed}.json"
            write_json(path, made[-1], long_lists=True)
            print(f"figures: {path}")
    return made


def check_folder(folder: Path, seed: int) -> None:
    """Refuses with a `ValueError` a folder whose towers another seed made: what stands beside them is that seed's too."""
    stamp = folder / "towers" / "made.json"
    made = json.loads(stamp.read_text())["seed"] if stamp.is_file() else seed
    if made != seed:
        raise ValueError(
            f"{folder} holds what seed {made} made: give another --output for seed {seed}, or use --seeds"
        )


def run_seed(folder: Path, seed: int, rows: Sequence[str] = ()) -> dict[str, Any]:
    """One seed made, trained and measured in `folder`: its figures as `generation.json`, `checkpoint` and `drawn.png`."""
    seconds: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    prepare_towers(folder, seed)
    seconds["towers"] = time.perf_counter() - start
    diffusion = make_diffusion(folder, seed, seconds)
    names = dict.fromkeys(["UniMuR", *rows])  # the probe, the rule and the other systems are of UniMuR's
    models = {row: make_model(folder, row, diffusion, seed, seconds) for row in names}
    model = models["UniMuR"]
    result: dict[str, Any] = {"seed": seed, "probe": probe(model)}
    result["rule"] = learn_rule(model)
    model.save_pretrained(folder / "checkpoint", golden=True)
    result["results"] = measure(models, seed)
    result["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(folder / "generation.json", result, long_lists=True)
    grid(model, folder / "drawn.png")
    print(report(result))
    print(f"checkpoint: {folder / 'checkpoint'}\npictures: {folder / 'drawn.png'}")
    return result


def make_diffusion(folder: Path, seed: int, seconds: dict[str, float]) -> Path:
    """The miniature's diffusion model, pre-trained unless it is there."""
    path = folder / "diffusion"
    if not (path / "model_index.json").is_file():
        start = time.perf_counter()
        pretrain_diffusion(path, splits()["train"], folder / "towers" / "clip", seed=seed)
        seconds["diffusion model"] = time.perf_counter() - start
    return path


def make_model(folder: Path, row: str, diffusion: Path, seed: int, seconds: dict[str, float]) -> UniMuRModel:
    """A row's model, trained unless it is there."""
    path, start = folder / row.lower().replace(" ", "-"), time.perf_counter()
    if not (path / "checkpoint" / "model.safetensors").is_file():
        base = ["--config", str(CONFIGS / "miniature.yaml")]
        common = [f"--seed={seed}", f"--miniature={folder}", *PAIRS, "--evaluate_pairs=0"]
        learn = [
            "--config",
            str(CONFIGS / "miniature-gill.yaml"),
            f"--drawing_model_name_or_path={diffusion.resolve()}",
        ]
        if not ROWS[row]:  # retrieval first, then drawing beside it
            plain = folder / "plain"
            if not (plain / "checkpoint" / "model.safetensors").is_file():
                train([*base, *common, f"--output_dir={plain}"])
            learn.append(f"--model={plain / 'checkpoint'}")
        train([*base, *learn, *ROWS[row], *common, f"--output_dir={path}"])
        seconds[row] = time.perf_counter() - start
    model = UniMuRModel.from_pretrained(path / "checkpoint")
    model.config.drawing_model_name_or_path = str(diffusion.resolve())
    return model


def probe(model: UniMuRModel, n: int = SAMPLES) -> dict[str, Any]:
    """What the diffusion model draws from captions of test scenes, read by a linear probe on pixels; percent."""
    scenes = splits()["test"][:n]
    rng = random.Random(f"probe-{SEED}")
    texts = [captions(scene, rng, 1, 0)[0] for scene in scenes]
    start = time.perf_counter()
    drawn = TextToImage(model, "caption").draw([], texts)
    seconds = (time.perf_counter() - start) / n
    reader = PixelProbe(splits()["train"][:6_000])
    from train.miniature.world import draw as true_picture

    return {
        "true pictures": reader.accuracy([true_picture(scene, rng) for scene in scenes], scenes),
        "samples": reader.accuracy(drawn, scenes),
        "chance": reader.chance(),
        "seconds a picture": round(seconds, 3),
        "n": n,
    }


def learn_rule(model: UniMuRModel, n: int = LEARNED_ON) -> dict[str, float]:
    """
    Sets `config.draw_below` by validation dialogues, half of which have their true image in the pool: of all cosines of the
    best retrieved image, the one for which the pictures are nearest to the true ones by CLIP.

    Returns:
        The threshold, and the mean CLIP-Sim there of the rule, of always retrieving and of always drawing.
    """
    (protocol,) = protocols("generation", miniature=True)
    data = _half_absent(load_data(protocol, split="validation").first(n))
    contexts, clip = Contexts(data, "turns"), ClipBaseline(model)
    names = data.dialogues[0]["pool"]["image_ids"]
    embedded = clip.embed_images([data.images[name] for name in names])
    true = clip.embed_images([data.images[d["gold"]["image_ids"][0]] for d in data.dialogues])
    scores, best = (model.embed_dialogues(contexts) @ model.embed_images([data.images[i] for i in names]).T).max(1)
    retrieved = (embedded[best] * true).sum(1).numpy()
    drawn = (clip.embed_images(model.draw_each(contexts, show_progress_bar=True)) * true).sum(1).numpy()
    return choose_threshold(model, scores.numpy(), retrieved, drawn)


def choose_threshold(
    model: UniMuRModel, scores: np.ndarray, retrieved: np.ndarray, drawn: np.ndarray
) -> dict[str, float]:
    """Sets and returns the threshold among `scores` `(n,)` that is best in mean similarity; see `learn_rule`."""
    order = np.argsort(scores)
    # Drawing below the k-th score draws the first k.
    gains = np.concatenate([[0.0], np.cumsum((drawn - retrieved)[order])])
    k = int(gains.argmax())
    ends = np.concatenate([scores[order], [scores.max() + 1e-3]])
    model.config.draw_below = float(ends[k])
    chosen = np.where(scores < model.config.draw_below, drawn, retrieved)
    return {"draw_below": model.config.draw_below, "drawn share": float((scores < model.config.draw_below).mean()),
            "rule": float(chosen.mean()), "retrieved": float(retrieved.mean()), "drawn": float(drawn.mean()),
            "better of the two": float(np.maximum(drawn, retrieved).mean()), "n": len(scores)}  # fmt: skip


def _half_absent(data: Dialogues) -> Dialogues:
    """The dialogues over a pool without the true image of every other one."""
    gone = {d["gold"]["image_ids"][0] for d in data.dialogues[::2]}
    pool = {"text_ids": [], "image_ids": [i for i in data.dialogues[0]["pool"]["image_ids"] if i not in gone]}
    return replace(data, dialogues=[d | {"pool": pool} for d in data.dialogues])


def measure(models: Mapping[str, UniMuRModel], seed: int, split: str = "test") -> list[dict[str, Any]]:
    """Every row on the task's protocols, with what each item scored; `seed` is the models'."""
    model = models["UniMuR"]
    systems: list[System] = [
        UniMuR(model, "UniMuR, drawn"), *(UniMuR(m, name) for name, m in models.items() if name != "UniMuR"),
        Chooses(model), Retrieves(model, "UniMuR, retrieved"), TextToImage(model, "caption"), TextToImage(model),
    ]  # fmt: skip
    results: list[dict[str, Any]] = []
    for task in ("generation", "generation_vist"):
        for protocol in protocols(task, miniature=True):
            data = load_data(protocol, split=split)
            results += compare(systems, data, protocol, clip=ClipBaseline(model), seed=seed, values=True)
    return results


def report(result: Mapping[str, Any]) -> str:
    """The probe's accuracies, the rule and the tables, as markdown."""
    read = result["probe"]
    rows = [
        [name, *(f"{value:.1f}" for value in read[name].values())] for name in ("true pictures", "samples", "chance")
    ]
    parts = [f"A linear probe on pixels, of {read['n']} pictures, percent:", table(["", *read["samples"]], rows),
             "The rule of generate=\"auto\" on validation: " + json.dumps(result["rule"])]  # fmt: skip
    for task in dict.fromkeys(r["task"] for r in result["results"]):
        parts.append(markdown(task, [r for r in result["results"] if r["task"] == task], paper(task)))
    return "\n\n".join(parts)


def grid(model: UniMuRModel, path: Path, n: int = 6) -> None:
    """Conversations of test, each with the picture retrieved and, on the card after it, the one drawn."""
    dialogues = visdial(splits()["test"], 400, SEED)
    from train.miniature import pictures

    images: Any = pictures(dialogues.images, SEED)
    chosen = dialogues.dialogues[:n]
    # Every other dialogue's own picture is not in the pool.
    ids = [i for i in images if i not in {d["gold"]["image_ids"][0] for d in chosen[::2]}]
    pool = model.build_pool(images=[images[i] for i in ids], image_ids=ids, show_progress_bar=False)
    contexts = Contexts(Dialogues(chosen, dialogues.texts, images), "turns")
    rows: list[tuple[dict, Retrieval]] = []
    for dialogue, context in zip(chosen, contexts, strict=True):
        for when in ("never", "always"):
            rows.append((dialogue, model.retrieve(context, pool, modality="image", generate=when)))
    draw_gallery(rows, dialogues.texts, images, path, columns=4)


if __name__ == "__main__":
    run_command(main)
