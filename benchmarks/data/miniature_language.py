"""What the miniature asks of a language model: a hundred answers to rank, as in VisDial, and VQAv2's questions."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.schema import Dialogues, Questions
from train.json_files import BadDataError
from train.miniature import pictures
from train.miniature.dialogues import DialogueSet
from train.miniature.dialogues import visdial as say_visdial
from train.miniature.world import (
    ACTIVITIES,
    ANIMALS,
    HAT_NOUNS,
    HATS,
    PLACE_PHRASES,
    PLACES,
    VERB_PHRASES,
    Scene,
    article,
    plural,
    splits,
)

SEED = (
    7  # of all that is measured, whatever the model's seed; also in `benchmarks.miniature`, which imports this package
)
N_OPTIONS = 100
RIVALS = 60  # at most so many options that tell another value of what is asked
SAME_SENTENCE, OTHER_SENTENCE = 0.8, 0.4  # relevance of a right answer in other words; VisDial's go in fifths
UNMARKED = 10  # in one round of so many the human's own answer has relevance 0, as in VisDial
HUMANS = 10

# What is asked of a scene, and every value it can have.
VALUES: dict[str, list[Any]] = {
    "animal": list(ANIMALS),
    "hat": list(HATS),
    "activity": [(verb, name) for verb, (_, objects) in ACTIVITIES.items() for name in objects],
    "place": list(PLACES),
}
# VQAv2's types are a question's first words. Strings of the dialogues, but for the colour, which they never ask alone.
_ASKED = {
    "animal": ("what animal", "what animal is it?"),
    "hat": ("what colour", "what colour is the hat?"),
    "activity": ("what is it doing", "what is it doing?"),
    "place": ("where is", "where is it?"),
}
_YES_NO = ("animal", "activity", "place")


def scenes_of(split: str) -> list[Scene]:
    """Scenes of `"validation"` or `"test"`. Raises [`BadDataError`] for another split: train is not measured on."""
    if split not in ("validation", "test"):
        raise BadDataError(f"miniature split {split!r}: expected 'validation' or 'test'")
    return splits()[split]


def value_of(scene: Scene, attribute: str) -> Any:
    """The scene's value of one of `VALUES`."""
    return (scene.verb, scene.object) if attribute == "activity" else getattr(scene, attribute)


def wordings(attribute: str, value: Any) -> list[str]:
    """Every way the dialogues put a value into words, the plainest first."""
    if attribute == "animal":
        return [article(value)]
    if attribute == "hat":
        return [article(f"{value} {noun}") for noun in HAT_NOUNS]
    if attribute == "place":
        return list(PLACE_PHRASES[value])
    verb, name = value
    return [f"{said} {ACTIVITIES[verb][1][name][1]}" for said in VERB_PHRASES[verb]]


def read_answers(split: str, n: int = 250) -> Dialogues:
    """
    One item a dialogue, each about a scene of its own: the image (speaker `"I"`), the rounds before and a question
    that asks for a part of the scene, then the right one of 100 answers.

    Options are every wording of the right value, up to 60 of other values, idle answers and answers to the other
    questions, shuffled. An option's id is that of its string, in every pool. `relevance`: 1 for the answer given, 0.8
    for its sentence in other words, 0.4 for another sentence that says the same, else 0; in a tenth of the items the
    answer given has 0 itself.

    Raises:
        BadDataError: another split.
        ValueError: more dialogues than scenes.
    """
    scenes, rng = scenes_of(split), random.Random(f"answers-{SEED}")
    said = say_visdial(scenes, n, SEED, name="answers")
    # From all the scenes, so that the options do not hang on how many dialogues are asked for.
    sentences, idle = read_sentences(say_visdial(scenes, len(scenes), SEED))
    told = {
        sentence.format(words): (attribute, value, sentence)
        for attribute, sentence in sentences.values()
        for value in VALUES[attribute]
        for words in wordings(attribute, value)
    }
    ids = {text: f"answer-{i}" for i, text in enumerate(sorted([*told, *idle]))}
    unmarked = set(rng.sample(range(n), n // UNMARKED))
    items = []
    for i, dialogue in enumerate(said.dialogues):
        (shown,) = dialogue["gold"]["image_ids"]
        rounds = list(rounds_of(dialogue))
        at = rng.choice([r for r, (question, _) in enumerate(rounds) if question in sentences])
        gold = rounds[at][1]
        turns = [{"speaker": "I", "elements": [{"type": "image", "text": None, "image_id": shown}]}]
        turns += [{**turn, "speaker": "QA"[t % 2]} for t, turn in enumerate(dialogue["turns"][: 2 * at + 1])]
        options = _options(gold, told, idle, rng)
        relevance = [_relevance(text, gold, told) for text in options]
        if i in unmarked:
            relevance[options.index(gold)] = 0.0
        items.append(
            {"dialogue_id": dialogue["dialogue_id"], "turns": turns, "target_turn": len(turns),
             "pool": {"text_ids": [ids[text] for text in options], "image_ids": []},
             "gold": {"text_ids": [ids[gold]], "image_ids": []}, "relevance": relevance}
        )  # fmt: skip
    return Dialogues(items, {name: text for text, name in ids.items()}, pictures(said.images, SEED))


def rounds_of(dialogue: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`(question, answer)` of each round before the target."""
    lines = [turn["elements"][0]["text"] for turn in dialogue["turns"][: dialogue["target_turn"]]]
    return zip(lines[::2], lines[1::2], strict=True)


def read_sentences(said: DialogueSet) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """
    What VisDial-like dialogues show of their own wording.

    Returns:
        Question -> what of `VALUES` it asks for and the sentence of its answers, `{}` where the value stands; and
        the distinct answers that tell nothing of the scene, sorted.
    """
    sentences, idle = {}, set()
    for dialogue in said.dialogues:
        scene = said.scenes[dialogue["dialogue_id"]]
        known = [(a, words) for a in VALUES for words in wordings(a, value_of(scene, a))]
        for question, answer in rounds_of(dialogue):
            found = [(attribute, answer.replace(words, "{}")) for attribute, words in known if words in answer]
            if found:
                (sentences[question],) = found
            else:
                idle.add(answer)
    return sentences, sorted(idle)


def _options(gold: str, told: Mapping[str, tuple], idle: Sequence[str], rng: random.Random) -> list[str]:
    attribute, value, _ = told[gold]
    right = [text for text, (a, v, _) in told.items() if (a, v) == (attribute, value)]
    rivals = [text for text, (a, v, _) in told.items() if a == attribute and v != value]
    others = [text for text, (a, _, _) in told.items() if a != attribute]
    options = [*right, *rng.sample(rivals, min(RIVALS, len(rivals))), *idle]
    options += rng.sample(others, N_OPTIONS - len(options))
    rng.shuffle(options)
    return options


def _relevance(text: str, gold: str, told: Mapping[str, tuple]) -> float:
    if text == gold:
        return 1.0
    if text not in told or told[text][:2] != told[gold][:2]:
        return 0.0
    return SAME_SENTENCE if told[text][2] == told[gold][2] else OTHER_SENTENCE


def read_questions(split: str, n: int = 600) -> Questions:
    """
    Questions about a picture each: four fifths for its animal, the hat's colour, the activity and the place in turn
    (`"other"`), one fifth to be confirmed or denied (`"yes/no"`, as often one as the other). The world has no numbers.

    Of ten answers 5 to 9 are `multiple_choice_answer` (7 to 9 of "yes/no"), up to 3 say the same in other words, and 1
    or 2 (up to 3 of "yes/no") something wrong.

    Raises:
        BadDataError: another split.
        ValueError: more questions than scenes.
    """
    scenes = scenes_of(split)
    if n > len(scenes):
        raise ValueError(f"{n} questions need as many scenes, {split} has {len(scenes)}")
    rng, questions, shown = random.Random(f"vqav2-{SEED}"), [], {}
    for i, scene in enumerate(rng.sample(scenes, n)):
        round_number, turn = divmod(i, len(_ASKED) + 1)
        if turn < len(_ASKED):
            attribute = list(_ASKED)[turn]
            (kind, question), answer_type = _ASKED[attribute], "other"
            answer, answers = _answers(attribute, value_of(scene, attribute), rng)
        else:
            kind, answer_type, attribute = "is it", "yes/no", rng.choice(_YES_NO)
            right, answer = value_of(scene, attribute), ("yes", "no")[round_number % 2]
            asked = right if answer == "yes" else rng.choice([v for v in VALUES[attribute] if v != right])
            question = f"is it {rng.choice(wordings(attribute, asked))}?"
            wrong = rng.randint(1, 3)
            answers = [answer] * (HUMANS - wrong) + ["no" if answer == "yes" else "yes"] * wrong
        rng.shuffle(answers)
        question_id, image_id = f"vqav2-{i}", f"vqav2-image-{i}"
        shown[image_id] = scene
        questions.append(
            {"question_id": question_id, "image_id": image_id, "question": question, "answers": answers,
             "question_type": kind, "answer_type": answer_type, "multiple_choice_answer": answer}
        )  # fmt: skip
    return Questions(questions, pictures(shown, SEED))


def _answers(attribute: str, value: Any, rng: random.Random) -> tuple[str, list[str]]:
    """The answer most humans give, and all ten."""
    main, *synonyms = _spoken(attribute, value)
    # One at least is wrong: where all ten agree, the official score leaves "a panda" apart from "panda".
    wrong = rng.sample([v for v in VALUES[attribute] if v != value], rng.randint(1, 2))
    answers = rng.choices(synonyms, k=rng.randint(0, 3)) + [_spoken(attribute, v)[0] for v in wrong]
    return main, [main] * (HUMANS - len(answers)) + answers


def _spoken(attribute: str, value: Any) -> list[str]:
    """A value as people answer with it, the commonest first."""
    if attribute == "animal":
        return [value, plural(value)]
    if attribute == "hat":
        return [value, *(f"{value} {noun}" for noun in HAT_NOUNS)]
    return wordings(attribute, value)
