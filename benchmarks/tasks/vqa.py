"""VQAv2, zero-shot (Table 7): the frozen LLM's answers about an image, scored by the official accuracy."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Measure
from benchmarks.metrics import vqa_accuracy_per_item
from benchmarks.schema import Protocol, Questions
from benchmarks.systems import System
from train.json_files import BadDataError

SETTINGS = {"split", "by", "prompt"}
BY_LANGUAGE: set[str] = {"max_new_tokens", "cut"}
OPTIONAL: set[str] = set()


def run(system: System, data: Questions, protocol: Protocol, clip: System | None = None) -> dict[str, Measure]:
    """
    `accuracy`, and the same for each answer type in the data.

    By generation, the answer ends where `cut` matches. By embedding, the candidates are the most frequent answers to
    each question of the data (VQAv2's `multiple_choice_answer`), and the one closest to the image with its question is
    the answer.

    Raises:
        BadDataError: the questions come without answers, as VQAv2's test splits do.
        DoesNotApplyError: by generation, for a system without a language model.
    """
    if not any(q["answers"] for q in data.questions):
        raise BadDataError("these questions have no answers (VQAv2's test splits are published without): use val2014")
    contexts = [
        [{"role": "user", "content": [
            {"type": "image", "image": data.images[q["image_id"]]},
            {"type": "text", "text": protocol["prompt"].format(question=q["question"])}]}]
        for q in data.questions
    ]  # fmt: skip
    if protocol["by"] == "generation":
        answers = system.answers(contexts, max_new_tokens=protocol["max_new_tokens"])
        answers = [re.split(protocol["cut"], text.strip(), maxsplit=1)[0].strip() for text in answers]
    else:
        known = sorted({_most_frequent(q) for q in data.questions if q["answers"]})
        scores = [
            system.similarity(system.embed_dialogues(contexts[i : i + 256]), system.embed_texts(known))
            for i in range(0, len(contexts), 256)
        ]
        answers = [known[i] for i in torch.cat(scores).argmax(1)]
    values = np.array([vqa_accuracy_per_item(s, q["answers"]) for s, q in zip(answers, data.questions, strict=True)])
    kinds = [q.get("answer_type") for q in data.questions]
    measures = {"accuracy": Measure(values)}
    for kind in sorted({k for k in kinds if k}):
        measures[f"accuracy ({kind})"] = Measure(np.where([k == kind for k in kinds], values, np.nan))
    return measures


def _most_frequent(question: Mapping[str, Any]) -> str:
    """The data's own choice, or else the most frequent answer, the first of equals."""
    return question.get("multiple_choice_answer") or Counter(question["answers"]).most_common(1)[0][0]
