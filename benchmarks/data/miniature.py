"""
The miniature's substitute for every data set: dialogues, stories and questions about validation or test scenes.

Pictures are drawn here. A scene is the target of at most one item of a task, and every call gives the same data.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable

from benchmarks.schema import Dialogues, Questions
from train.miniature import pictures
from train.miniature.dialogues import responses
from train.miniature.dialogues import visdial as visdial_dialogues
from train.miniature.world import Scene, captions, phrases

from .miniature_language import SEED, read_answers, read_questions, scenes_of

LENGTH = 5  # pictures per story
FIT = 4  # stories that end with the same words, each about a different animal or hat

_FIRST = ("here is my friend.", "look who i met.", "this is my friend.")
_THEN = ("do you remember this one?", "look who i met again.", "here is my friend again.")
_LAST = ("now imagine it {v} {p}.", "later i saw it again, {v} {p}.", "think of it {p}, {v}.")


def mmdialog(split: str, n: int = 1000) -> Dialogues:
    """The `n` response dialogues of [`benchmarks.miniature.load_split`], with its pool and its pictures."""
    source = responses(scenes_of(split), n, SEED)
    return Dialogues(source.dialogues, source.texts, pictures(source.images, SEED))


def mmdialog_image(split: str, n: int = 1000) -> Dialogues:
    """Those of `n` [`mmdialog`] dialogues whose reply has an image, over the same pool."""
    source = responses(scenes_of(split), n, SEED)
    dialogues = [d for d in source.dialogues if d["gold"]["image_ids"]]
    needed = {e["image_id"] for d in dialogues for turn in d["turns"] for e in turn["elements"]}
    images = {i: scene for i, scene in source.images.items() if i in needed}
    return Dialogues(dialogues, source.texts, pictures(images, SEED))


def visdial(split: str, n: int = 1000) -> Dialogues:
    """
    The `n` question-and-answer dialogues of [`benchmarks.miniature.load_split`], with its pictures; the speakers are
    `"Q"` and `"A"` as in VisDial, and `"I"` of the target turn, which is the image.
    """
    source = visdial_dialogues(scenes_of(split), n, SEED)
    for dialogue in source.dialogues:
        for i, turn in enumerate(dialogue["turns"]):
            turn["speaker"] = "I" if i == dialogue["target_turn"] else "QA"[i % 2]
    rng = random.Random(f"captions-{SEED}")
    texts = {name: captions(scene, rng, 1, 0)[0] for name, scene in source.images.items()}
    return Dialogues(source.dialogues, source.texts, pictures(source.images, SEED), captions=texts)


def visdial_answers(split: str, n: int = 250) -> Dialogues:
    """`n` questions with 100 answers each: [`miniature_language.read_answers`]."""
    return read_answers(split, n)


def vist(split: str, n: int = 400) -> Dialogues:
    """
    Stories of one animal in one hat: four captions, each with its picture, then the fifth caption, whose picture is
    retrieved from all pictures of all stories.

    The first captions contain little information, as many of VIST's do, and the last gives only activity and place; the
    animal and its hat are in the pictures alone. (With an activity and a place in each caption, the text is unlike
    anything the miniature's language model was trained on, and it fails.) Groups of four stories end in the same activity
    and place with different animals or hats, so that the last caption fits at least four pictures of the pool, and the
    whole context fits one. A story has no scene twice; the scene that ends a story is in no other picture, and the scenes
    before it are used again in other stories where the split has too few.

    Args:
        split: `"validation"` or `"test"`.
        n: number of stories, a multiple of 4.

    Returns:
        Turns of speaker `"A"`, `[text, image]` and last `[text]`; one pool of `5 n` pictures, shuffled.

    Raises:
        BadDataError: another split.
        ValueError: `n` is no multiple of 4, or the split has too few scenes.
    """
    if n % FIT:
        raise ValueError(f"{n} stories: expected a multiple of {FIT}, since {FIT} share their last words")
    rng = random.Random(f"vist-{SEED}")
    scenes = rng.sample(scenes := scenes_of(split), len(scenes))
    ends = _ends(scenes, n)
    rng.shuffle(ends)
    by_looks = defaultdict(list)
    for scene in sorted(set(scenes) - set(ends), key=lambda s: s.key):
        by_looks[scene.animal, scene.hat].append(scene)
    dialogues, scenes_by_id, used = [], {}, Counter()
    pool: dict[str, list[str]] = {"text_ids": [], "image_ids": []}
    for i, end in enumerate(ends):
        others = by_looks[end.animal, end.hat]
        if len(others) < LENGTH - 1:
            raise ValueError(f"{split} has {len(others)} scenes for a story that ends in {end.key}, expected 4")
        rng.shuffle(others)
        # Those used least, in random order.
        story = [*sorted(others, key=used.__getitem__)[: LENGTH - 1], end]
        used.update(story)
        ids = [f"vist-{i}-{k}" for k in range(1, LENGTH + 1)]
        scenes_by_id |= zip(ids, story, strict=True)
        captions = [rng.choice(_THEN if k else _FIRST) for k in range(LENGTH - 1)]
        captions.append(rng.choice(_LAST).format(**phrases(end, rng)))
        turns = [
            {"speaker": "A", "elements": [
                {"type": "text", "text": caption, "image_id": None},
                {"type": "image", "text": None, "image_id": name}]}
            for name, caption in zip(ids, captions, strict=True)
        ]  # fmt: skip
        turns[-1]["elements"].pop()
        gold = {"text_ids": [], "image_ids": ids[-1:]}
        dialogues.append(
            {"dialogue_id": f"vist-{i}", "turns": turns, "target_turn": LENGTH, "pool": pool, "gold": gold}
        )
    pool["image_ids"] += rng.sample(list(scenes_by_id), len(scenes_by_id))
    return Dialogues(dialogues, {}, pictures(scenes_by_id, SEED))


def _ends(scenes: list[Scene], n: int) -> list[Scene]:
    """`n` scenes in fours that share activity and place; raises [`ValueError`] where there are fewer."""
    # At most a third of the scenes of one animal in one hat, so that enough are left for the rest of the stories.
    left = {looks: count // 3 for looks, count in Counter((s.animal, s.hat) for s in scenes).items()}
    cells, ends = defaultdict(list), []
    for scene in scenes:
        cells[scene.verb, scene.object, scene.place].append(scene)
    for cell in cells.values():
        # Those with most scenes left come first: a rare one is taken only to complete a group of four.
        cell = sorted((s for s in cell if left[s.animal, s.hat]), key=lambda s: -left[s.animal, s.hat])
        taken = cell[: len(cell) // FIT * FIT]
        left |= {(s.animal, s.hat): left[s.animal, s.hat] - 1 for s in taken}
        ends += taken
    if len(ends) < n:
        raise ValueError(f"{n} stories need scenes that share activity and place in fours, there are {len(ends)}")
    return ends[:n]


def vqav2(split: str, n: int = 600) -> Questions:
    """`n` questions with ten answers each: [`miniature_language.read_questions`]."""
    return read_questions(split, n)


READERS: dict[str, Callable[[str], Dialogues | Questions]] = {
    "mmdialog": mmdialog,
    "mmdialog_image": mmdialog_image,
    "generation": visdial,
    "generation_vist": vist,
    "visdial": visdial,
    "visdial_answers": visdial_answers,
    "vist": vist,
    "vqav2": vqav2,
}
