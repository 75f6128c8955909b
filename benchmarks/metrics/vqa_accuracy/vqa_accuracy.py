"""The VQA accuracy of open-ended answers, with the answer normalisation of its public definition."""

import re
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
VQA accuracy: an answer counts min(1, m / 3), m being how many of the other humans gave it, averaged over leaving each of
the (ten) humans out. Where the humans differ, all answers are first normalised: punctuation, number words, articles,
contractions, case.
"""

CITATION = """
@inproceedings{antol2015vqa,
    title = {{VQA}: Visual Question Answering},
    author = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
        Zitnick, C. Lawrence and Parikh, Devi},
    booktitle = {Proceedings of the IEEE International Conference on Computer Vision},
    year = {2015},
}
@inproceedings{goyal2017making,
    title = {Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
    author = {Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
    booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
    year = {2017},
}
"""

INPUTS = """
Args:
    predictions: an answer for each question (str).
    references: for each question the humans' answers (list of str; ten in VQA, any number here).
    answer_types: optionally the type of each question's answer (list of str, such as "yes/no"), for accuracies by type.

Returns:
    `accuracy`, in 0..1, over the questions that have answers (nan where none has); `n`, how many these are;
    `without_answers`, how many have none and were left out; and, given types, `accuracy (type)` and `n (type)` of each.

Examples:

    >>> metric = load("vqa_accuracy")
    >>> metric.compute(predictions=["A red hat."], references=[["red hat"] * 2 + ["hat"] * 8])["accuracy"]
    0.6
"""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
# Meant to spare a full stop after a digit too, but the published pattern only looks at what follows.
FULL_STOP = re.compile(r"\.(?!\d)")
# The published call passes a flag of value 32 as the number of replacements.
MOST_FULL_STOPS = 32
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(NUMBER_WORDS.split())}
# Each is restored where any one of its apostrophes is missing. The published table also has "let's" and "she's" (as they
# are) and "I'm", "I've", "I'd've" under keys in capitals, which no lower-cased word can meet.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the published table


def normalise_answer(answer: str) -> str:
    """
    The published normalisation, quirks included.

    1. A punctuation mark (not the apostrophe, colon or full stop) is removed everywhere if, anywhere in the answer, it
       is next to a space, or if a comma is between two digits; else it becomes a space.
    2. A full stop is removed unless a digit follows, at most 32 of them.
    3. Lower case; number words up to ten become digits, and "none" 0; articles are removed; contractions get their apostrophe.
    """
    comma = DIGITS_AROUND_COMMA.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or comma else " ")
    text = FULL_STOP.sub("", text, count=MOST_FULL_STOPS)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy_per_item(answer: str, humans: Sequence[str]) -> float:
    """
    Mean over leaving one human out of `min(1, matches among the rest / 3)`.

    Newlines and tabs become spaces and the ends are stripped, always. The rest of the normalisation is skipped where all
    humans give the same answer, as published: there "Yes" does not match "yes".

    Returns:
        In 0..1; nan without humans. With a single human there is nobody left to match, hence 0; `h` humans give at most
        `min(1, (h - 1) / 3)`.

    Raises:
        ValueError: `humans` is a string, or an answer is not one.
    """
    if isinstance(humans, str) or not all(isinstance(text, str) for text in (answer, *humans)):
        raise ValueError(f"answer {answer!r}, humans {humans!r}: expected a string and a list of strings")
    if not len(humans):
        return float("nan")
    answer, *humans = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *humans))
    if len(set(humans)) > 1:
        answer, *humans = (normalise_answer(text) for text in (answer, *humans))
    total, matches = len(humans), humans.count(answer)
    # Leaving out one who matches, and one who does not.
    return (matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)) / total


class VQAAccuracy(evaluate.Metric):
    """See `DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, answer_types=None):
        values = np.array([vqa_accuracy_per_item(*item) for item in zip(predictions, references, strict=True)])
        scored = ~np.isnan(values)
        result = _mean(values[scored], "") | {"without_answers": int((~scored).sum())}
        if answer_types is None:
            return result
        if len(answer_types) != len(values):
            raise ValueError(f"{len(answer_types)} answer_types for {len(values)} questions: expected one each")
        kinds = np.array(answer_types, dtype=str)
        for kind in sorted(set(kinds.tolist())):
            result |= _mean(values[scored & (kinds == kind)], f" ({kind})")
        return result


def _mean(values: np.ndarray, suffix: str) -> dict[str, float]:
    return {f"accuracy{suffix}": float(values.mean()) if len(values) else float("nan"), f"n{suffix}": len(values)}
