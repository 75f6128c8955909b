"""The VisDial reader: files of its layout made here, and the real sample where it is."""

import json
import shutil

import pytest

from benchmarks.data.visdial import read_visdial, read_visdial_answers
from benchmarks.schema import ABSENT, TooMuchMissingError
from tests.benchmarks.layouts import dump, stand_ins, turn_texts, visdial, visdial_name
from train.json_files import BadDataError


def without_answers(content):
    for dialogue in content["data"]["dialogs"]:
        for key in ("answer", "gt_index", "answer_options"):
            dialogue["dialog"][-1].pop(key)
            dialogue["dialog"][0].pop(key) if key != "answer" else None
    content["data"]["dialogs"][1]["dialog"] = content["data"]["dialogs"][1]["dialog"][:1]


def test_visdial_retrieval(tmp_path):
    data = read_visdial(visdial(tmp_path), progress=False)
    first = data.dialogues[0]
    assert turn_texts(first) == [("Q", "what is it"), ("A", "a cat"), ("Q", "is it old"), ("A", "yes, very")]
    assert first["target_turn"] == 4 and first["gold"] == {"text_ids": [], "image_ids": ["7"]}
    assert first["pool"] is data.dialogues[1]["pool"] and first["pool"]["image_ids"] == ["7", "8"]
    assert data.images["8"] == tmp_path / "VisualDialog_val2018" / visdial_name(8) and data.missing.seen == 2
    with_caption = read_visdial(tmp_path, caption=True, progress=False).dialogues[1]
    assert turn_texts(with_caption)[0] == ("C", "caption 8") and with_caption["target_turn"] == 5


def test_visdial_images_next_to_the_file_and_absent_ones(tmp_path):
    visdial(tmp_path)
    whole = read_visdial(tmp_path, progress=False)
    (tmp_path / "VisualDialog_val2018" / visdial_name(7)).rename(tmp_path / visdial_name(7))
    moved = read_visdial(tmp_path, progress=False)
    assert len(moved) == 2 and moved.images["7"].parent == tmp_path and moved.pool_hash == whole.pool_hash
    (tmp_path / visdial_name(7)).unlink()
    less = read_visdial(tmp_path, progress=False)
    assert [d["dialogue_id"] for d in less.dialogues] == ["8"] and less.dialogues[0]["pool"]["image_ids"] == ["8"]
    assert less.missing.counts == {ABSENT: 1} and less.missing.examples[ABSENT] == [visdial_name(7)]
    assert less.pool_hash != whole.pool_hash
    assert len(read_visdial_answers(tmp_path, progress=False)) == 2
    with pytest.raises(TooMuchMissingError, match="1 of 2 items"):
        less.missing.check()


def test_visdial_test_split_has_no_answers_to_rank(tmp_path):
    visdial(tmp_path, "test", change=without_answers, dense=False)
    data = read_visdial(tmp_path, "test", progress=False)
    assert turn_texts(data.dialogues[0]) == [("Q", "what is it"), ("A", "a cat"), ("Q", "is it old")]
    assert turn_texts(data.dialogues[1]) == [("Q", "what is it"), ("A", "a cat")]
    with pytest.raises(BadDataError, match="'test' is published without answers; 'val'"):
        read_visdial_answers(tmp_path, "test", progress=False)


def test_visdial_answers(tmp_path):
    data = read_visdial_answers(visdial(tmp_path), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["7-1", "7-2", "8-1", "8-2"]
    assert turn_texts(data.dialogues[0]) == [("I", "/7"), ("Q", "what is it")]
    last = data.dialogues[3]
    assert turn_texts(last) == [("I", "/8"), ("Q", "what is it"), ("A", "a cat"), ("Q", "is it old")]
    assert last["target_turn"] == 4 and last["pool"]["text_ids"] == ["a1", "a0", "a3"]
    assert last["gold"]["text_ids"] == ["a3"] and data.texts["a3"] == "yes, very"
    assert last["relevance"] == [0.5, 0.0, 1.0]
    assert all("relevance" not in d for d in data.dialogues[:3])
    assert data.missing.seen == 4 and data.missing.counts.total() == 0


def test_visdial_round_without_options_is_counted(tmp_path):
    visdial(tmp_path, change=lambda f: f["data"]["dialogs"][0]["dialog"][0].pop("answer_options"))
    data = read_visdial_answers(tmp_path, progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["7-2", "8-1", "8-2"]
    assert data.missing.counts == {"no answer options": 1} and turn_texts(data.dialogues[0])[2] == ("A", "a cat")


def _set(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("data"), "visdial_1.0_val.json: expected the field 'data'"),
        (lambda f: f["data"].pop("dialogs"), "data: expected the field 'dialogs'"),
        (_set("split", value="test2018"), "of the split 'test2018', expected 'val'"),
        (_set("data", "dialogs", 1, "image_id", value="8"), "dialogue 1: the field 'image_id' is str, expected int"),
        (_set("data", "dialogs", 1, "image_id", value=7), "second of image 7"),
        (
            _set("data", "dialogs", 1, "dialog", 0, "question", value=9),
            "dialogue 1.*round 1, question: 9 is not an index",
        ),
        (_set("data", "dialogs", 1, "dialog", 1, "answer", value=-1), "round 2, answer: -1 is not an index"),
        (_set("data", "dialogs", 1, "dialog", 1, "gt_index", value=3), "round 2: gt_index is 3, expected 0 to 2"),
        (_set("data", "dialogs", 0, "dialog", 0, "answer_options", value=[0, 4]), "answer_options: 4 is not an index"),
        (_set("data", "dialogs", 0, "dialog", value={}), "dialogue 0: the field 'dialog' is dict"),
    ],
)
def test_visdial_of_the_wrong_shape(tmp_path, change, message):
    visdial(tmp_path, change=change)
    with pytest.raises(BadDataError, match=message):
        read_visdial_answers(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image_id": 8, "round_id": 2, "gt_relevance": [0, 1]}], "8-2: gt_relevance holds 2 values, expected 3"),
        ([{"image_id": 8, "round_id": 2}], "annotation 0: expected the field 'gt_relevance'"),
        ([{"image_id": 9, "round_id": 2, "gt_relevance": [0, 0, 1]}], "no annotation belongs to a round"),
        ([{"image_id": 8, "round_id": 2, "gt_relevance": [0, 0, 1]}] * 2, "8-2 is annotated twice"),
    ],
)
def test_visdial_dense_annotations_of_the_wrong_shape(tmp_path, rows, message):
    visdial(tmp_path)
    dump(tmp_path / "visdial_1.0_val_dense_annotations.json", rows)
    with pytest.raises(BadDataError, match=message):
        read_visdial_answers(tmp_path, progress=False)


def test_visdial_names_the_files_it_expects(tmp_path):
    with pytest.raises(BadDataError, match=r"looked for is there: visdial_1.0_val.json"):
        read_visdial(tmp_path, progress=False)
    with pytest.raises(BadDataError, match="no such folder"):
        read_visdial(tmp_path / "none", progress=False)
    with pytest.raises(BadDataError, match="'train': expected one of val, test"):
        read_visdial(tmp_path, "train", progress=False)
    dump(tmp_path / "visdial_1.0_val_a.json", {})
    dump(tmp_path / "visdial_1.0_val_b.json", {})
    with pytest.raises(BadDataError, match=r"several in its place: visdial_1.0_val_a.json, visdial_1.0_val_b.json"):
        read_visdial(tmp_path, progress=False)


def test_visdial_sample(samples, tmp_path):
    shutil.copytree(samples / "visdial", tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "visdial_1.0_val_slice.json").read_text())["data"]
    ids = [d["image_id"] for d in content["dialogs"]]
    stand_ins(samples, tmp_path / "VisualDialog_val2018", map(visdial_name, ids))
    data = read_visdial(tmp_path, progress=False)
    assert (
        len(data) == 12 and not data.missing.counts and data.dialogues[0]["pool"]["image_ids"] == [str(i) for i in ids]
    )
    assert {d["target_turn"] for d in data.dialogues} == {20}
    first = content["dialogs"][0]["dialog"][0]
    assert turn_texts(data.dialogues[0])[:2] == [
        ("Q", content["questions"][first["question"]]), ("A", content["answers"][first["answer"]])
    ]  # fmt: skip
    ranked = read_visdial_answers(tmp_path, progress=False)
    assert len(ranked) == 120 and {len(d["pool"]["text_ids"]) for d in ranked.dialogues} == {100}
    dense = {d["dialogue_id"]: d["relevance"] for d in ranked.dialogues if "relevance" in d}
    assert len(dense) == 12 and dense["239030-6"][54] == 1.0 and {len(r) for r in dense.values()} == {100}
