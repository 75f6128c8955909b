"""Dialogues about the miniature's scenes, in the project's one schema.

A dialogue is a dict of `dialogue_id`, `turns` (`[{speaker, elements: [{type, text, image_id}]}]`; the last turn is the
reply), `target_turn`, `gold` and `pool` (both `{text_ids, image_ids}`), and three keys of the miniature's own: `kind`
("response", "visdial", "described" or "fact"), `wants_image` (the context asks to see something) and `image_informs`
(the context shows an image without which its words fit several candidates).

Whether a reply holds an image follows from the context's last words alone: "show me", against "thanks!" or "how old
is it?".
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.miniature.sentences import (
    ASK_IMAGE,
    ASK_TEXT,
    IDLE_QUESTIONS,
    IMAGINE,
    LISTEN,
    NAMES,
    NUMBERS,
    QUESTIONS,
    REPLY_IMAGE,
    REPLY_TEXT,
    SHOW_FRIEND,
    TELL_THERE,
    TELL_WHAT,
    TELL_WHERE,
    TELL_WHO,
)
from train.miniature.world import FAVOURITES, Scene, facts, phrases, plural


@dataclass
class DialogueSet:
    """Dialogues beside the tables their ids point into.

    `texts` maps a text id to a string, `images` an image id to the scene it shows (`train.miniature.world.draw` makes
    the picture), `scenes` the id of a dialogue or of a text to the scene it is about.
    """

    dialogues: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    images: dict[str, Scene] = field(default_factory=dict)
    scenes: dict[str, Scene] = field(default_factory=dict)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "image_id": None}


def _image(image_id: str) -> dict[str, Any]:
    return {"type": "image", "text": None, "image_id": image_id}


def _turns(contents: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Two speakers in turn."""
    return [{"speaker": "AB"[i % 2], "elements": elements} for i, elements in enumerate(contents)]


def _reply(scene: Scene, ask: str, rng: random.Random) -> str:
    """The gold reply's words: the scene in other words."""
    template = rng.choice(REPLY_IMAGE if ask in ASK_IMAGE else REPLY_TEXT[ask])
    extra = {"n": rng.choice(NUMBERS), "name": rng.choice(NAMES), "plural": plural(scene.animal)}
    return template.format(**phrases(scene, rng), **extra)


def _in_words(scene: Scene, ask: str, rng: random.Random) -> list[list[dict[str, Any]]]:
    """A context of words: the scene in two turns, the other speaker between, the request at the end."""
    words = phrases(scene, rng)
    openings, endings = rng.choice(((TELL_WHO, TELL_WHAT), (TELL_WHERE, TELL_THERE)))
    first, second = rng.choice(openings).format(**words), rng.choice(endings).format(**words)
    return [[_text(first)], [_text(rng.choice(LISTEN))], [_text(second)], [_text(ask)]]


def _with_picture(scene: Scene, image_id: str, ask: str, rng: random.Random) -> list[list[dict[str, Any]]]:
    """A context whose picture gives the animal and its hat, and whose words give the rest."""
    contents = [[_text(rng.choice(SHOW_FRIEND)), _image(image_id)]]
    moved = _text(rng.choice(IMAGINE).format(**phrases(scene, rng)))
    if rng.random() < 0.5:
        return [*contents, [_text(rng.choice(LISTEN))], [moved], [_text(ask)]]
    contents[0].append(_text(" " + moved["text"]))
    return [*contents, [_text(ask)]]


def _crowded(scenes: Sequence[Scene], count: int, group: int, rng: random.Random) -> list[Scene]:
    """`count` scenes in groups of `group` that share activity and place, as far as the scenes reach."""
    cells = defaultdict(list)
    for scene in scenes:
        cells[scene.object, scene.place].append(scene)
    full = [members[:group] for members in cells.values() if len(members) >= group]
    rng.shuffle(full)
    return [scene for members in full for scene in members][:count]


def responses(
    scenes: Sequence[Scene],
    n: int,
    seed: int = 0,
    *,
    name: str = "response",
    image_share: float = 0.42,
    informed_share: float = 0.45,
) -> DialogueSet:
    """Dialogues in the manner of MMDialog: turns about a scene, then a reply of text, or of text and an image.

    Every dialogue has a reply of its own, so the joint pool holds `n` texts and `round(n * image_share)` images. In
    `informed_share` of the dialogues the context shows another scene with the same animal and hat, and its words tell
    activity and place only; their scenes come in groups that share activity and place, so that several candidates of
    the pool fit the words.

    Args:
        scenes: of one split. A scene is the target of one dialogue at most.
        n: number of dialogues, at most `len(scenes)`.
        seed: of the draw.
        name: prefix of all ids.
        image_share: share of the replies that hold an image.
        informed_share: share of the contexts that hold an image.

    Raises:
        ValueError: too few scenes.
    """
    if n > len(scenes):
        raise ValueError(f"{n} dialogues need as many scenes, there are {len(scenes)}")
    rng = random.Random(f"{name}-{seed}")
    scenes = rng.sample(scenes, len(scenes))
    by_looks = defaultdict(list)
    for scene in scenes:
        by_looks[scene.animal, scene.hat].append(scene)
    chosen, wants, crowded = _targets(scenes, n, round(n * image_share), informed_share, rng)
    result, seen = DialogueSet(), set()
    for i, (scene, wanted) in enumerate(zip(chosen, wants, strict=True)):
        ask = rng.choice(ASK_IMAGE if wanted else ASK_TEXT)
        text = _reply(scene, ask, rng)
        while text in seen:
            text = _reply(scene, ask, rng)
        seen.add(text)
        dialogue_id, text_id, image_id = f"{name}-{i}", f"{name}-text-{i}", f"{name}-image-{i}"
        friends = [s for s in by_looks[scene.animal, scene.hat] if s.object != scene.object and s.place != scene.place]
        informs = i < crowded and bool(friends)
        if informs:
            shown_id = f"{name}-context-{i}"
            result.images[shown_id] = rng.choice(friends)
            contents = _with_picture(scene, shown_id, ask, rng)
        else:
            contents = _in_words(scene, ask, rng)
        result.texts[text_id] = text
        result.scenes[text_id] = result.scenes[dialogue_id] = scene
        reply = [_text(text)]
        if wanted:
            result.images[image_id] = scene
            reply.append(_image(image_id))
        gold = {"text_ids": [text_id], "image_ids": [image_id] if wanted else []}
        result.dialogues.append(_dialogue(dialogue_id, "response", [*contents, reply], gold, wanted, informs))
    rng.shuffle(result.dialogues)
    text_ids = sorted(result.texts)
    image_ids = sorted(i for d in result.dialogues for i in d["gold"]["image_ids"])
    for dialogue in result.dialogues:
        dialogue["pool"] = {"text_ids": text_ids, "image_ids": image_ids}
    return result


def _targets(
    scenes: Sequence[Scene], n: int, n_images: int, informed_share: float, rng: random.Random
) -> tuple[list[Scene], list[bool], int]:
    """
    The scenes that `n` replies are about, and which of these hold an image; the first ones, as many as the last number
    says, come in groups for contexts that show an image.
    """
    crowded = _crowded(scenes, round(n * informed_share), 4, rng)
    taken = set(crowded)
    chosen = crowded + [scene for scene in scenes if scene not in taken][: n - len(crowded)]
    # The request alternates over whole groups, so that the image pool keeps them together.
    informed_images = min(round(n_images * informed_share), len(crowded)) // 4 * 4
    wants = [i < informed_images for i in range(len(crowded))]
    others = [i < n_images - informed_images for i in range(n - len(crowded))]
    rng.shuffle(others)
    return chosen, wants + others, len(crowded)


def visdial(scenes: Sequence[Scene], n: int, seed: int = 0, *, name: str = "visdial", rounds: int = 6) -> DialogueSet:
    """Dialogues in the manner of VisDial: shuffled questions and answers; the target is the image they speak of.

    No answer names more than one attribute. The pool is the `n` images.

    Args:
        scenes: of one split, at least `n`.
        n: number of dialogues.
        seed: of the draw.
        name: prefix of all ids.
        rounds: questions a dialogue, the four that tell the scene among them.

    Raises:
        ValueError: too few scenes or rounds.
    """
    if n > len(scenes) or rounds < len(QUESTIONS):
        raise ValueError(f"{n} dialogues of {rounds} rounds need {n} scenes (have {len(scenes)}) and 4 rounds")
    rng = random.Random(f"{name}-{seed}")
    result = DialogueSet()
    for i, scene in enumerate(rng.sample(scenes, n)):
        words = phrases(scene, rng)
        questions = [rng.choice(options) for options in QUESTIONS.values()]
        questions += rng.sample(IDLE_QUESTIONS, rounds - len(questions))
        rng.shuffle(questions)
        contents = [[_text(line.format(**words))] for pair in questions for line in pair]
        image_id = f"{name}-image-{i}"
        result.images[image_id] = result.scenes[f"{name}-{i}"] = scene
        gold = {"text_ids": [], "image_ids": [image_id]}
        result.dialogues.append(
            _dialogue(f"{name}-{i}", "visdial", [*contents, [_image(image_id)]], gold, True, False)
        )
    pool = {"text_ids": [], "image_ids": list(result.images)}
    for dialogue in result.dialogues:
        dialogue["pool"] = pool
    return result


def described(scenes: Sequence[Scene], n: int, seed: int = 0, *, name: str = "described") -> DialogueSet:
    """An image, answered by words about it: the plainest document in which text follows a picture.

    Raises:
        ValueError: too few scenes.
    """
    if n > len(scenes):
        raise ValueError(f"{n} dialogues need as many scenes, there are {len(scenes)}")
    rng = random.Random(f"{name}-{seed}")
    result = DialogueSet()
    for i, scene in enumerate(rng.sample(scenes, n)):
        dialogue_id, text_id, image_id = f"{name}-{i}", f"{name}-text-{i}", f"{name}-image-{i}"
        result.texts[text_id] = _reply(scene, "tell me about it.", rng)
        result.images[image_id] = result.scenes[dialogue_id] = result.scenes[text_id] = scene
        gold = {"text_ids": [text_id], "image_ids": []}
        contents = [[_image(image_id)], [_text(result.texts[text_id])]]
        result.dialogues.append(_dialogue(dialogue_id, "described", contents, gold, False, True))
    pool = {"text_ids": list(result.texts), "image_ids": []}
    for dialogue in result.dialogues:
        dialogue["pool"] = pool
    return result


def figure1(scenes: Sequence[Scene], seed: int = 0, *, name: str = "fact") -> DialogueSet:
    """The questions of the paper's Figure 1: "what do pandas look like?" (an image) and "what do pandas eat?" (a
    text), for every animal. The pool is all answers and one image an animal."""
    rng = random.Random(f"{name}-{seed}")
    result = DialogueSet()
    answers = dict(zip(FAVOURITES, facts(), strict=True))
    shuffled = rng.sample(scenes, len(scenes))
    for animal, (question, answer) in answers.items():
        text_id, image_id = f"{name}-text-{animal}", f"{name}-image-{animal}"
        result.texts[text_id] = answer
        result.images[image_id] = next(s for s in shuffled if s.animal == animal and s.verb != "eating")
        look = f"what do {plural(animal)} look like?"
        gold = {"text_ids": [], "image_ids": [image_id]}
        contents = [[_text(look)], [_image(image_id)]]
        result.dialogues.append(_dialogue(f"{name}-look-{animal}", "fact", contents, gold, True, False))
        gold = {"text_ids": [text_id], "image_ids": []}
        contents = [[_text(question)], [_text(answer)]]
        result.dialogues.append(_dialogue(f"{name}-eat-{animal}", "fact", contents, gold, False, False))
    pool = {"text_ids": list(result.texts), "image_ids": list(result.images)}
    for dialogue in result.dialogues:
        dialogue["pool"] = pool
    return result


def _dialogue(
    dialogue_id: str,
    kind: str,
    contents: list[list[dict[str, Any]]],
    gold: dict[str, list[str]],
    wants_image: bool,
    image_informs: bool,
) -> dict[str, Any]:
    return {
        "dialogue_id": dialogue_id,
        "kind": kind,
        "turns": _turns(contents),
        "target_turn": len(contents) - 1,
        "gold": gold,
        "pool": {"text_ids": [], "image_ids": []},
        "wants_image": wants_image,
        "image_informs": image_informs,
    }


def interleaved(scenes: Sequence[Scene], n: int, seed: int = 0, *, name: str = "document") -> DialogueSet:
    """Training dialogues, shuffled: three fifths `responses` (with more images than in the evaluation), one fifth
    `visdial`, one fifth `described`, and beyond these `n` one `figure1` in twenty. Each keeps its own pool.

    Raises:
        ValueError: too few scenes.
    """
    fifth = n // 5
    parts = [
        responses(scenes, n - 2 * fifth, seed, name=f"{name}-r", image_share=0.6, informed_share=0.5),
        visdial(scenes, fifth, seed, name=f"{name}-v"),
        described(scenes, fifth, seed, name=f"{name}-d"),
        *(figure1(scenes, seed + i, name=f"{name}-f{i}") for i in range(n // (20 * 2 * len(FAVOURITES)))),
    ]
    result = DialogueSet()
    for part in parts:
        result.dialogues += part.dialogues
        result.texts |= part.texts
        result.images |= part.images
        result.scenes |= part.scenes
    random.Random(f"{name}-{seed}").shuffle(result.dialogues)
    return result


def chat_messages(dialogue: dict[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """A dialogue as chat messages, whose last turn alone is an assistant's; `images` gives each image id's reference."""
    messages = []
    for position, turn in enumerate(dialogue["turns"]):
        content = [
            {"type": "text", "text": e["text"]} if e["type"] == "text"
            else {"type": "image", "image": images[e["image_id"]]}
            for e in turn["elements"]
        ]  # fmt: skip
        role = "assistant" if position == dialogue["target_turn"] else "user"
        messages.append({"role": role, "content": content})
    return {"id": dialogue["dialogue_id"], "messages": messages}


def without_context_images(dialogues: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same dialogues, their context images taken out (the reply stays): what the words alone retrieve."""
    result = []
    for dialogue in dialogues:
        turns = [
            {**turn, "elements": [e for e in turn["elements"] if i == dialogue["target_turn"] or e["type"] == "text"]}
            for i, turn in enumerate(dialogue["turns"])
        ]
        result.append({**dialogue, "turns": turns})
    return result
