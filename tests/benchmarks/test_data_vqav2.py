"""The VQAv2 reader."""

import json
import shutil

import pytest

from benchmarks.data.vqav2 import read_vqav2
from benchmarks.schema import ABSENT
from tests.benchmarks.layouts import stand_ins, vqav2
from train.json_files import BadDataError


@pytest.mark.parametrize(("official", "images"), [(True, "val2014"), (False, "")])
def test_vqav2(tmp_path, official, images):
    data = read_vqav2(vqav2(tmp_path, official=official, images=images), progress=False)
    assert data.questions[0] == {
        "question_id": "100", "image_id": "5", "question": "what is 0?", "answers": ["cat", "dog"],
        "question_type": "what is", "answer_type": "other", "multiple_choice_answer": "cat",
    }  # fmt: skip
    assert [q["question_id"] for q in data.questions] == ["100", "102"]
    assert data.images == {i: tmp_path / images / f"COCO_val2014_{int(i):012d}.jpg" for i in ("5", "7")}
    assert data.missing.seen == 3 and data.missing.examples == {"no annotation": ["101"]}


def test_vqav2_absent_image(tmp_path):
    vqav2(tmp_path)
    whole = read_vqav2(tmp_path, progress=False)
    (tmp_path / "val2014" / "COCO_val2014_000000000007.jpg").unlink()
    less = read_vqav2(tmp_path, progress=False)
    assert [q["question_id"] for q in less.questions] == ["100"] and less.pool_hash != whole.pool_hash
    assert less.missing.examples[ABSENT] == ["COCO_val2014_000000000007.jpg"]


@pytest.mark.parametrize("split", ["test2015", "test-dev2015"])
def test_vqav2_test_splits_come_without_answers(tmp_path, split):
    data = read_vqav2(vqav2(tmp_path, split), split, progress=False)
    assert [q["answers"] for q in data.questions] == [[], [], []] and not data.missing.counts
    assert data.images["5"].name == "COCO_test2015_000000000005.jpg"


def test_vqav2_refuses_another_split_and_absent_files(tmp_path):
    with pytest.raises(BadDataError, match=r"v2_OpenEnded_mscoco_val2014_questions.json, questions.json"):
        read_vqav2(tmp_path, progress=False)
    vqav2(tmp_path, official=False)
    with pytest.raises(BadDataError, match="'data_subtype' is 'val2014', but the split asked for is 'train2014'"):
        read_vqav2(tmp_path, "train2014", progress=False)
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(BadDataError, match=r"v2_mscoco_val2014_annotations.json, annotations.json"):
        read_vqav2(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"questions": [{"question_id": 100, "question": "?"}]}, "question 0: expected the field 'image_id'"),
        (
            {"questions": [{"question_id": 100, "image_id": 6, "question": "?"}]},
            "about image 6, its annotation about 5",
        ),
        ({"annotations": [{"question_id": 100}]}, "annotation 0: expected the field 'answers'"),
        ({"annotations": [{"question_id": 100, "answers": []}]}, "question 100 has no answer"),
        ({"annotations": [{"question_id": 100, "answers": ["cat"]}]}, "answers: expected the field 'answer'"),
        ({"annotations": [{"question_id": 9, "answers": [{"answer": "a"}]}]}, "no annotation belongs to a question"),
        ({"annotations": [{"question_id": 100, "answers": [{"answer": "a"}]}] * 2}, "question 100 is annotated twice"),
        (
            {"annotations": [{"question_id": 100, "answers": [{"answer": "a"}], "answer_type": 1}]},
            "'answer_type' is int",
        ),
    ],
)
def test_vqav2_of_the_wrong_shape(tmp_path, wrong, message):
    with pytest.raises(BadDataError, match=message):
        read_vqav2(vqav2(tmp_path, **wrong), progress=False)


def test_vqav2_sample(samples, tmp_path):
    shutil.copytree(samples / "vqav2", tmp_path, dirs_exist_ok=True)
    questions = json.loads((tmp_path / "questions.json").read_text())["questions"]
    stand_ins(samples, tmp_path / "train2014", {f"COCO_train2014_{q['image_id']:012d}.jpg" for q in questions})
    with pytest.raises(BadDataError, match=r"'train2014'.*'val2014'"):
        read_vqav2(tmp_path, progress=False)
    data = read_vqav2(tmp_path, "train2014", progress=False)
    assert len(data) == 3 and not data.missing.counts and {len(q["answers"]) for q in data.questions} == {10}
    assert data.questions[0]["answers"][0] == "net"
