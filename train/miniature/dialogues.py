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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.miniature.world import FAVOURITES, Scene, facts, phrases, plural

ASK_IMAGE = (
    "show me!",
    "can i see it?",
    "what does it look like?",
    "do you have a picture?",
    "please show it to me.",
    "i would love to see that.",
    "could you send a photo?",
    "let me have a look!",
)
ASK_TEXT = (
    "thanks!",
    "how old is it?",
    "what is it doing again?",
    "is it happy?",
    "what is its name?",
    "tell me about it.",
    "do you like it?",
    "who is its friend?",
)
_REPLY_IMAGE = (
    "sure, {an_a} in {an_h}, {v} {p}.",
    "here you are: the {a} with the {h} is {v} {p}.",
    "of course. {p}, {an_a} {v}, with {an_h} on.",
    "this is it, {v} {p}: {an_a} wearing {an_h}.",
)
_REPLY_TEXT = {
    "thanks!": (
        "you are welcome, and so says the {a} with the {h}, {v} {p}.",
        "any time! {v} {p} suits {an_a} in {an_h}.",
    ),
    "how old is it?": (
        "the {a} with the {h} is {n} years old, and still {v} {p}.",
        "{n} years, old enough for {v} {p}. such {an_a}, in {an_h}!",
    ),
    "what is it doing again?": ("{v} {p}, that {a} in the {h}.", "the {a} with the {h} on? it is {v} {p}."),
    "is it happy?": (
        "yes, {v} {p} makes {an_a} in {an_h} happy.",
        "very. the {a} loves its {h}, {p}, {v}.",
    ),
    "what is its name?": (
        "we call it {name}, the {a} with {an_h}, {v} {p}.",
        "{name}. {v} {p} is what this {a} in its {h} does.",
    ),
    "tell me about it.": (
        "well, it is {an_a} with {an_h}, {p}, and it is {v}.",
        "it wears {an_h}, it is {v} {p}, and it is {an_a}.",
    ),
    "do you like it?": (
        "i do! {an_a} {v} {p}, and what {an_h}!",
        "yes, i like {plural}, and this one is {v} {p} in {an_h}.",
    ),
    "who is its friend?": (
        "i am. i met the {a} in the {h} {p}, {v}.",
        "{name} is a friend of the {a}, {v} {p} in its {h}.",
    ),
}
_NAMES = ("bob", "lily", "max", "ruby", "otto", "nina", "tom", "ella")
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")

# Openings give a part of the scene each, so that only the whole context tells it.
_TELL_WHO = (
    "i met {an_a} today. it had {an_h} on.",
    "there was {an_a} with {an_h}.",
    "guess what: {an_a} in {an_h}!",
    "do you know the {a} with the {h}?",
    "my friend is {an_a}. it likes its {h}.",
)
_TELL_WHAT = (
    "it was {v} {p}.",
    "{p}, it was {v}.",
    "now it is {v} {p}.",
    "it is {p}, {v}.",
    "it spends the day {v} {p}.",
)
_TELL_WHERE = ("i was {p} today.", "i spent the morning {p}.", "we went for a walk {p}.")
_TELL_THERE = (
    "{an_a} with {an_h} was {v}.",
    "i saw {an_a} {v}. it had {an_h}.",
    "there was {an_a} in {an_h}, {v}.",
)
_LISTEN = ("oh, tell me more.", "really?", "and then?", "how nice.", "what was it up to?")
# With a picture: who it is stands in the picture, and the words move it elsewhere.
_SHOW_FRIEND = ("here is my friend.", "look who i met.", "this is my friend.", "do you remember this one?")
_IMAGINE = (
    "now imagine it {v} {p}.",
    "today it was {v} {p}.",
    "later i saw it again, {v} {p}.",
    "think of it {p}, {v}.",
)
_QUESTIONS = {
    "animal": (("what animal is it?", "it is {an_a}."), ("which animal do you see?", "{an_a}.")),
    "hat": (("what does it wear?", "{an_h}."), ("what is on its head?", "there is {an_h}.")),
    "activity": (("what is it doing?", "it is {v}."), ("what is going on?", "{v}.")),
    "place": (("where is it?", "it is {p}."), ("where was the picture taken?", "{p}.")),
}
_IDLE_QUESTIONS = (
    ("is it a good picture?", "yes."),
    ("are there any people?", "no."),
    ("is it sunny?", "i can not tell."),
    ("is the picture old?", "i do not think so."),
    ("does it look happy?", "yes, it does."),
    ("is it in colour?", "yes."),
)


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
    """The gold reply's words: the scene told anew."""
    template = rng.choice(_REPLY_IMAGE if ask in ASK_IMAGE else _REPLY_TEXT[ask])
    extra = {"n": rng.choice(_NUMBERS), "name": rng.choice(_NAMES), "plural": plural(scene.animal)}
    return template.format(**phrases(scene, rng), **extra)


def _told(scene: Scene, ask: str, rng: random.Random) -> list[list[dict[str, Any]]]:
    """A context of words: the scene in two turns, the other speaker between, the request at the end."""
    words = phrases(scene, rng)
    first, second = rng.choice(((_TELL_WHO, _TELL_WHAT), (_TELL_WHERE, _TELL_THERE)))
    first, second = rng.choice(first).format(**words), rng.choice(second).format(**words)
    return [[_text(first)], [_text(rng.choice(_LISTEN))], [_text(second)], [_text(ask)]]


def _shown(scene: Scene, image_id: str, ask: str, rng: random.Random) -> list[list[dict[str, Any]]]:
    """A context whose picture gives the animal and its hat, and whose words give the rest."""
    contents = [[_text(rng.choice(_SHOW_FRIEND)), _image(image_id)]]
    told = _text(rng.choice(_IMAGINE).format(**phrases(scene, rng)))
    if rng.random() < 0.5:
        return [*contents, [_text(rng.choice(_LISTEN))], [told], [_text(ask)]]
    contents[0].append(_text(" " + told["text"]))
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
    crowded = _crowded(scenes, round(n * informed_share), 4, rng)
    taken = set(crowded)
    chosen = crowded + [scene for scene in scenes if scene not in taken][: n - len(crowded)]
    n_images = round(n * image_share)
    # The request alternates over whole groups, so that the image pool keeps them together.
    informed_images = min(round(n_images * informed_share), len(crowded)) // 4 * 4
    wants = [i < informed_images for i in range(len(crowded))]
    others = [i < n_images - informed_images for i in range(n - len(crowded))]
    rng.shuffle(others)
    result, seen = DialogueSet(), set()
    for i, (scene, wanted) in enumerate(zip(chosen, wants + others, strict=True)):
        ask = rng.choice(ASK_IMAGE if wanted else ASK_TEXT)
        text = _reply(scene, ask, rng)
        while text in seen:
            text = _reply(scene, ask, rng)
        seen.add(text)
        dialogue_id, text_id, image_id = f"{name}-{i}", f"{name}-text-{i}", f"{name}-image-{i}"
        friends = [s for s in by_looks[scene.animal, scene.hat] if s.object != scene.object and s.place != scene.place]
        informs = i < len(crowded) and bool(friends)
        if informs:
            shown_id = f"{name}-context-{i}"
            result.images[shown_id] = rng.choice(friends)
            contents = _shown(scene, shown_id, ask, rng)
        else:
            contents = _told(scene, ask, rng)
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
    if n > len(scenes) or rounds < len(_QUESTIONS):
        raise ValueError(f"{n} dialogues of {rounds} rounds need {n} scenes (have {len(scenes)}) and 4 rounds")
    rng = random.Random(f"{name}-{seed}")
    result = DialogueSet()
    for i, scene in enumerate(rng.sample(scenes, n)):
        words = phrases(scene, rng)
        asked = [rng.choice(options) for options in _QUESTIONS.values()]
        asked += rng.sample(_IDLE_QUESTIONS, rounds - len(asked))
        rng.shuffle(asked)
        contents = [[_text(line.format(**words))] for pair in asked for line in pair]
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
