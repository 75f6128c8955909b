"""The miniature on disk and in memory: its towers, its training pairs and its interleaved documents."""

import io
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from train.conversations import ImageId, parse_chat
from train.documents import InterleavedDocuments
from train.parallel import side_by_side
from train.rows import FEATURES, make_row

from .dialogues import chat_messages, interleaved
from .towers import pretrain_clip, pretrain_opt
from .world import Scene, captions, draw, splits

logger = logging.get_logger("train")

N_DOCUMENTS = 8_000


@dataclass
class Miniature:
    """
    What `train/run.py` needs of it, the seconds its parts took, and the peak memory of the processes that pre-trained
    the towers, in GiB (zero for towers that were on disk).
    """

    text_model: str
    clip_model: str
    pairs: datasets.Dataset
    documents: InterleavedDocuments
    seconds: dict[str, float]
    towers_memory: float


def prepare(folder: str | Path, seed: int = 0) -> Miniature:
    """
    Makes the miniature, or takes the towers an earlier call with the same seed left in `folder/towers`.

    Only scenes of the train split appear in pictures or words.

    Args:
        folder: where the towers go.
        seed: of everything that is drawn. The splits themselves do not change with it.
    """
    towers, scenes = Path(folder) / "towers", splits()["train"]
    seconds, memory = prepare_towers(folder, seed)
    start = time.perf_counter()
    pairs = training_pairs(scenes, seed)
    documents = training_documents(scenes, pairs, seed)
    seconds["pictures and texts"] = time.perf_counter() - start
    return Miniature(str(towers / "opt"), str(towers / "clip"), pairs, documents, seconds, memory)


def prepare_towers(folder: str | Path, seed: int = 0) -> tuple[dict[str, float], float]:
    """The towers alone, as [`prepare`] makes or takes them: the seconds of each, and their peak memory in GiB."""
    towers, scenes = Path(folder) / "towers", splits()["train"]
    seconds: dict[str, float] = {}
    memory = 0.0
    stamp = towers / "made.json"
    made = json.loads(stamp.read_text()) if stamp.is_file() else None
    if made != {"seed": seed}:
        if made is not None:
            logger.warning(f"{towers} holds the towers of seed {made['seed']}: those of seed {seed} take their place")
        stamp.unlink(missing_ok=True)
        names: dict[str, Callable[..., Path]] = {"CLIP": pretrain_clip, "OPT": pretrain_opt}
        jobs = [
            (pretrain, {"folder": towers / name.lower(), "scenes": scenes, "seed": seed})
            for name, pretrain in names.items()
        ]
        for name, done in zip(names, side_by_side(jobs), strict=True):
            seconds[f"pre-training of {name}"] = done.seconds
            memory += done.memory
        stamp.write_text(json.dumps({"seed": seed}))
    return seconds, memory


def training_pairs(scenes: list[Scene], seed: int) -> datasets.Dataset:
    """One picture a scene with its captions, in the schema of [`train.data`]; the id is the scene's key."""
    rng = random.Random(f"pairs-{seed}")
    rows = [
        make_row(
            scene.key, {"bytes": encode(draw(scene, rng)), "path": None}, captions(scene, rng), "miniature",
            license="Apache-2.0",
        )
        for scene in tqdm(scenes, "drawing training pictures")
    ]  # fmt: skip
    return datasets.Dataset.from_list(rows, features=FEATURES)


def training_documents(
    scenes: list[Scene], pairs: datasets.Dataset, seed: int, n: int = N_DOCUMENTS
) -> InterleavedDocuments:
    """Dialogues about train scenes, whose pictures are those of `pairs`."""
    made = interleaved(scenes, n, seed)
    keys = {image_id: scene.key for image_id, scene in made.images.items()}
    chats = (chat_messages(dialogue, keys) for dialogue in made.dialogues)
    return InterleavedDocuments.of((parse_chat(chat, chat["id"], _Keys) for chat in chats), pairs)


class _Keys:
    """The pictures of the pairs, by their ids."""

    add = staticmethod(ImageId)


def validation_data(seed: int, n: int) -> tuple[datasets.Dataset, InterleavedDocuments]:
    """Pairs of the validation split's scenes, and up to `n` dialogues about them; the test split is not read."""
    scenes = splits()["validation"]
    pairs = training_pairs(scenes, seed)
    return pairs, training_documents(scenes, pairs, seed, min(n, len(scenes)))


def pictures(images: Mapping[str, Scene], seed: int = 0) -> dict[str, Image.Image]:
    """Draws a table of scenes; an id gives the same picture whatever else is in the table."""
    return {name: draw(scene, random.Random(f"picture-{seed}-{name}")) for name, scene in images.items()}


def encode(image: Image.Image) -> bytes:
    """The image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
