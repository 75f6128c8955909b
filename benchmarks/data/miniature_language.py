"""The miniature's tasks for a language model: a hundred answers to rank, as in VisDial, and questions as in VQAv2."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.schema import Dialogues, Questions
from train.json_files import BadDataError
from train.miniature import pictures
from train.miniature.dialogues import DialogueSet
from train.miniature.dialogues import visdial as visdial_dialogues
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

# Of all data, for every seed of the model; also in `benchmarks.miniature`, which imports this package.
SEED = 7
N_OPTIONS = 100
RIVALS = 60  # most options with another value of the attribute asked for
SAME_SENTENCE, OTHER_SENTENCE = (
    0.8,
    0.4,
)  # relevance of a correct answer in other words; VisDial's are multiples of 0.2
UNMARKED = 10  # in one of so many rounds the human's own answer has relevance 0, as in VisDial
HUMANS = 10

# What is asked of a scene, and every value it can have.
VALUES: dict[str, list[Any]] = {
    "animal": list(ANIMALS),
    "hat": list(HATS),
    "activity": [(verb, name) for verb, (_, objects) in ACTIVITIES.items() for name in objects],
    "place": list(PLACES),
}
# VQAv2's types are a question's first words. The strings are the dialogues', except the colour's, which they lack.
_ASKED = {
    "animal": ("what animal", "what animal is it?"),
    "hat": ("what colour", "what colour is the hat?"),
    "activity": ("what is it doing", "what is it doing?"),
    "place": ("where is", "where is it?"),
}
_YES_NO = ("animal", "activity", "place")


def scenes_of(split: str) -> list[Scene]:
    """Scenes of `"validation"` or `"test"`. Raises [`BadDataError`] for another split: nothing is measured on train."""
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
    return [f"{phrase} {ACTIVITIES[verb][1][name][1]}" for phrase in VERB_PHRASES[verb]]


def read_answers(split: str, n: int = 250) -> Dialogues:
    """
    One item per dialogue, each about its own scene: the image (speaker `"I"`), the rounds before and a question about
    an attribute of the scene, then the correct one of 100 answers.

    Options are every wording of the correct value, up to 60 of other values, uninformative answers and answers to the
    other questions, shuffled. Equal strings have the same id in every pool. `relevance`: 1 for the gold answer, 0.8 for
    its sentence in other words, 0.4 for another sentence with the same value, else 0; in a tenth of the items the gold
    answer itself has 0.

    Raises:
        BadDataError: another split.
        ValueError: more dialogues than scenes.
    """
    scenes, rng = scenes_of(split), random.Random(f"answers-{SEED}")
    source = visdial_dialogues(scenes, n, SEED, name="answers")
    # From all the scenes, so that the options do not depend on n.
    sentences, uninformative = read_sentences(visdial_dialogues(scenes, len(scenes), SEED))
    values = {
        sentence.format(words): (attribute, value, sentence)
        for attribute, sentence in sentences.values()
        for value in VALUES[attribute]
        for words in wordings(attribute, value)
    }
    ids = {text: f"answer-{i}" for i, text in enumerate(sorted([*values, *uninformative]))}
    unmarked = set(rng.sample(range(n), n // UNMARKED))
    items = []
    for i, dialogue in enumerate(source.dialogues):
        (image_id,) = dialogue["gold"]["image_ids"]
        rounds = list(rounds_of(dialogue))
        at = rng.choice([r for r, (question, _) in enumerate(rounds) if question in sentences])
        gold = rounds[at][1]
        turns = [{"speaker": "I", "elements": [{"type": "image", "text": None, "image_id": image_id}]}]
        turns += [{**turn, "speaker": "QA"[t % 2]} for t, turn in enumerate(dialogue["turns"][: 2 * at + 1])]
        options = _options(gold, values, uninformative, rng)
        relevance = [_relevance(text, gold, values) for text in options]
        if i in unmarked:
            relevance[options.index(gold)] = 0.0
        items.append(
            {"dialogue_id": dialogue["dialogue_id"], "turns": turns, "target_turn": len(turns),
             "pool": {"text_ids": [ids[text] for text in options], "image_ids": []},
             "gold": {"text_ids": [ids[gold]], "image_ids": []}, "relevance": relevance}
        )  # fmt: skip
    return Dialogues(items, {name: text for text, name in ids.items()}, pictures(source.images, SEED))


def rounds_of(dialogue: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`(question, answer)` of each round before the target."""
    lines = [turn["elements"][0]["text"] for turn in dialogue["turns"][: dialogue["target_turn"]]]
    return zip(lines[::2], lines[1::2], strict=True)


def read_sentences(source: DialogueSet) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """
    The sentences of VisDial-like dialogues.

    Returns:
        Question -> the attribute of `VALUES` it asks for and the sentence of its answers, with `{}` for the value; and
        the distinct answers without information about the scene, sorted.
    """
    sentences, uninformative = {}, set()
    for dialogue in source.dialogues:
        scene = source.scenes[dialogue["dialogue_id"]]
        known = [(a, words) for a in VALUES for words in wordings(a, value_of(scene, a))]
        for question, answer in rounds_of(dialogue):
            matches = [(attribute, answer.replace(words, "{}")) for attribute, words in known if words in answer]
            if matches:
                (sentences[question],) = matches
            else:
                uninformative.add(answer)
    return sentences, sorted(uninformative)


def _options(gold: str, values: Mapping[str, tuple], uninformative: Sequence[str], rng: random.Random) -> list[str]:
    attribute, value, _ = values[gold]
    correct = [text for text, (a, v, _) in values.items() if (a, v) == (attribute, value)]
    rivals = [text for text, (a, v, _) in values.items() if a == attribute and v != value]
    others = [text for text, (a, _, _) in values.items() if a != attribute]
    options = [*correct, *rng.sample(rivals, min(RIVALS, len(rivals))), *uninformative]
    options += rng.sample(others, N_OPTIONS - len(options))
    rng.shuffle(options)
    return options


def _relevance(text: str, gold: str, values: Mapping[str, tuple]) -> float:
    if text == gold:
        return 1.0
    if text not in values or values[text][:2] != values[gold][:2]:
        return 0.0
    return SAME_SENTENCE if values[text][2] == values[gold][2] else OTHER_SENTENCE


def read_questions(split: str, n: int = 600) -> Questions:
    """
    Questions, each about its own picture: four fifths about animal, colour of the hat, activity and place in turn
    (`"other"`), one fifth with the answer yes or no (`"yes/no"`, each as often). The world has no numbers.

    Of ten answers 5 to 9 are `multiple_choice_answer` (7 to 9 for "yes/no"), up to 3 are the same in other words, and 1
    or 2 (up to 3 for "yes/no") are wrong.

    Raises:
        BadDataError: another split.
        ValueError: more questions than scenes.
    """
    scenes = scenes_of(split)
    if n > len(scenes):
        raise ValueError(f"{n} questions need as many scenes, {split} has {len(scenes)}")
    rng, questions, scenes_by_id = random.Random(f"vqav2-{SEED}"), [], {}
    for i, scene in enumerate(rng.sample(scenes, n)):
        round_number, turn = divmod(i, len(_ASKED) + 1)
        if turn < len(_ASKED):
            attribute = list(_ASKED)[turn]
            (kind, question), answer_type = _ASKED[attribute], "other"
            answer, answers = _answers(attribute, value_of(scene, attribute), rng)
        else:
            kind, answer_type, attribute = "is it", "yes/no", rng.choice(_YES_NO)
            value, answer = value_of(scene, attribute), ("yes", "no")[round_number % 2]
            asked = value if answer == "yes" else rng.choice([v for v in VALUES[attribute] if v != value])
            question = f"is it {rng.choice(wordings(attribute, asked))}?"
            wrong = rng.randint(1, 3)
            answers = [answer] * (HUMANS - wrong) + ["no" if answer == "yes" else "yes"] * wrong
        rng.shuffle(answers)
        question_id, image_id = f"vqav2-{i}", f"vqav2-image-{i}"
        scenes_by_id[image_id] = scene
        questions.append(
            {"question_id": question_id, "image_id": image_id, "question": question, "answers": answers,
             "question_type": kind, "answer_type": answer_type, "multiple_choice_answer": answer}
        )  # fmt: skip
    return Questions(questions, pictures(scenes_by_id, SEED))


def _answers(attribute: str, value: Any, rng: random.Random) -> tuple[str, list[str]]:
    """The answer most humans give, and all ten."""
    main, *synonyms = _short_answers(attribute, value)
    # At least one is wrong: where all ten agree, the official score does not match "a panda" with "panda".
    wrong = rng.sample([v for v in VALUES[attribute] if v != value], rng.randint(1, 2))
    answers = rng.choices(synonyms, k=rng.randint(0, 3)) + [_short_answers(attribute, v)[0] for v in wrong]
    return main, [main] * (HUMANS - len(answers)) + answers


def _short_answers(attribute: str, value: Any) -> list[str]:
    """A value in the words of people's answers, the most common first."""
    if attribute == "animal":
        return [value, plural(value)]
    if attribute == "hat":
        return [value, *(f"{value} {noun}" for noun in HAT_NOUNS)]
    return wordings(attribute, value)
