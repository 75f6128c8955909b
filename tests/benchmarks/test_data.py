"""The readers of the real data sets: small files of each layout made here, and the real samples where they are."""

import hashlib
import json
import shutil

import pytest

from benchmarks.data.mmdialog import read_mmdialog
from benchmarks.data.visdial import read_visdial, read_visdial_answers
from benchmarks.data.vist import read_vist, write_manifest
from benchmarks.data.vqav2 import read_vqav2
from benchmarks.schema import ABSENT, BadDataError, Missing, TooMuchMissingError, read_items, read_json, require


def dump(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "\n".join(json.dumps(v, ensure_ascii=False) for v in value) if lines else json.dumps(value, ensure_ascii=False)
    )
    path.write_text(text, encoding="utf-8")
    return path


def touch(folder, *names):
    """Files that are no images: a reader that opened one would fail."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def stand_ins(samples, folder, names):
    """The sample photographs under other names."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = sorted((samples / "photos" / "images").glob("*.jpg"))
    for i, name in enumerate(names):
        shutil.copy(photos[i % len(photos)], folder / name)


def said(dialogue):
    return [(t["speaker"], *(e["text"] or "/" + e["image_id"] for e in t["elements"])) for t in dialogue["turns"]]


# VisDial


def visdial_name(image_id, split="val"):
    return f"VisualDialog_{split}2018_{image_id:012d}.jpg"


def visdial(folder, split="val", images=(7, 8), change=None, dense=True):
    rounds = [
        {"question": 1, "answer": 0, "gt_index": 1, "answer_options": [2, 0, 3]},
        {"question": 0, "answer": 3, "gt_index": 2, "answer_options": [1, 0, 3]},
    ]
    found = {"version": "1.0", "split": f"{split}2018", "data": {
        "questions": ["is it old", "what is it"], "answers": ["a cat", "no", "a dog", "yes, very"],
        "dialogs": [{"image_id": i, "caption": f"caption {i}", "dialog": json.loads(json.dumps(rounds))} for i in images],
    }}  # fmt: skip
    if change:
        change(found)
    dump(folder / f"visdial_1.0_{split}.json", found)
    touch(folder / f"VisualDialog_{split}2018", *(visdial_name(i, split) for i in images))
    if dense:
        rows = [{"image_id": 8, "round_id": 2, "gt_relevance": [0.5, 0, 1.0]}]
        dump(folder / f"visdial_1.0_{split}_dense_annotations.json", rows)
    return folder


def without_answers(found):
    for dialogue in found["data"]["dialogs"]:
        for key in ("answer", "gt_index", "answer_options"):
            dialogue["dialog"][-1].pop(key)
            dialogue["dialog"][0].pop(key) if key != "answer" else None
    found["data"]["dialogs"][1]["dialog"] = found["data"]["dialogs"][1]["dialog"][:1]


def test_visdial_retrieval(tmp_path):
    data = read_visdial(visdial(tmp_path), progress=False)
    first = data.dialogues[0]
    assert said(first) == [("Q", "what is it"), ("A", "a cat"), ("Q", "is it old"), ("A", "yes, very")]
    assert first["target_turn"] == 4 and first["gold"] == {"text_ids": [], "image_ids": ["7"]}
    assert first["pool"] is data.dialogues[1]["pool"] and first["pool"]["image_ids"] == ["7", "8"]
    assert data.images["8"] == tmp_path / "VisualDialog_val2018" / visdial_name(8) and data.missing.seen == 2
    with_caption = read_visdial(tmp_path, caption=True, progress=False).dialogues[1]
    assert said(with_caption)[0] == ("C", "caption 8") and with_caption["target_turn"] == 5


def test_visdial_images_beside_the_file_and_absent_ones(tmp_path):
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
    assert said(data.dialogues[0]) == [("Q", "what is it"), ("A", "a cat"), ("Q", "is it old")]
    assert said(data.dialogues[1]) == [("Q", "what is it"), ("A", "a cat")]
    with pytest.raises(BadDataError, match="'test' is published without answers; 'val'"):
        read_visdial_answers(tmp_path, "test", progress=False)


def test_visdial_answers(tmp_path):
    data = read_visdial_answers(visdial(tmp_path), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["7-1", "7-2", "8-1", "8-2"]
    assert said(data.dialogues[0]) == [("I", "/7"), ("Q", "what is it")]
    last = data.dialogues[3]
    assert said(last) == [("I", "/8"), ("Q", "what is it"), ("A", "a cat"), ("Q", "is it old")]
    assert last["target_turn"] == 4 and last["pool"]["text_ids"] == ["a1", "a0", "a3"]
    assert last["gold"]["text_ids"] == ["a3"] and data.texts["a3"] == "yes, very"
    assert last["relevance"] == [0.5, 0.0, 1.0]
    assert all("relevance" not in d for d in data.dialogues[:3])
    assert data.missing.seen == 4 and data.missing.counts.total() == 0


def test_visdial_round_without_options_is_counted(tmp_path):
    visdial(tmp_path, change=lambda f: f["data"]["dialogs"][0]["dialog"][0].pop("answer_options"))
    data = read_visdial_answers(tmp_path, progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["7-2", "8-1", "8-2"]
    assert data.missing.counts == {"no answer options": 1} and said(data.dialogues[0])[2] == ("A", "a cat")


def _set(*path, value):
    def change(found):
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("data"), "visdial_1.0_val.json: expected the field 'data'"),
        (lambda f: f["data"].pop("dialogs"), "data: expected the field 'dialogs'"),
        (_set("split", value="test2018"), "of the split 'test2018', expected 'val'"),
        (_set("data", "dialogs", 1, "image_id", value="8"), "dialogue 1: the field 'image_id' is str, expected int"),
        (_set("data", "dialogs", 1, "image_id", value=7), "second of image 7"),
        (_set("data", "dialogs", 1, "dialog", 0, "question", value=9), "dialogue 1.*round 1, question: 9 is no index"),
        (_set("data", "dialogs", 1, "dialog", 1, "answer", value=-1), "round 2, answer: -1 is no index"),
        (_set("data", "dialogs", 1, "dialog", 1, "gt_index", value=3), "round 2: gt_index is 3, expected 0 to 2"),
        (_set("data", "dialogs", 0, "dialog", 0, "answer_options", value=[0, 4]), "answer_options: 4 is no index"),
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


def test_visdial_names_what_it_looked_for(tmp_path):
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
    found = json.loads((tmp_path / "visdial_1.0_val_slice.json").read_text())["data"]
    ids = [d["image_id"] for d in found["dialogs"]]
    stand_ins(samples, tmp_path / "VisualDialog_val2018", map(visdial_name, ids))
    data = read_visdial(tmp_path, progress=False)
    assert (
        len(data) == 12 and not data.missing.counts and data.dialogues[0]["pool"]["image_ids"] == [str(i) for i in ids]
    )
    assert {d["target_turn"] for d in data.dialogues} == {20}
    first = found["dialogs"][0]["dialog"][0]
    assert said(data.dialogues[0])[:2] == [
        ("Q", found["questions"][first["question"]]), ("A", found["answers"][first["answer"]])
    ]  # fmt: skip
    ranked = read_visdial_answers(tmp_path, progress=False)
    assert len(ranked) == 120 and {len(d["pool"]["text_ids"]) for d in ranked.dialogues} == {100}
    dense = {d["dialogue_id"]: d["relevance"] for d in ranked.dialogues if "relevance" in d}
    assert len(dense) == 12 and dense["239030-6"][54] == 1.0 and {len(r) for r in dense.values()} == {100}


# MMDialog


def text(value):
    return {"__TEXT__": value}


def media(value):
    return {"__MEDIA__": value}


def text_id(value):
    return "t" + hashlib.sha1(value.encode()).hexdigest()[:16]


CONVERSATION = {
    "conversation_id": 5,
    "conversation": [
        {"turn": [media("-12"), text("look")]},
        {"turn": [text("nice"), media("3"), media("-4"), text("more")]},
        {"turn": [text("thanks")]},
    ],
    "negative_candidate_media_keys": ["9", "-8"],
    "negative_candidate_texts": ["thanks", "no", "no"],
}
KEYS = ("-12", "3", "-4", "9", "-8")


def mmdialog(folder, conversations=(CONVERSATION,), split="test", lines=False, keys=KEYS):
    dump(folder / split / "conversations.json", list(conversations), lines)
    touch(folder / split, *(f"{key}.jpg" for key in keys))
    return folder


@pytest.mark.parametrize("lines", [False, True])
def test_mmdialog(tmp_path, lines):
    other = {**CONVERSATION, "conversation_id": "six", "conversation": CONVERSATION["conversation"][1:]}
    data = read_mmdialog(mmdialog(tmp_path, [CONVERSATION, other], lines=lines), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["5-1", "5-2", "six-1"] and data.missing.seen == 3
    first, second, third = data.dialogues
    assert said(first) == [("A", "/-12", "look"), ("B", "nice", "/3", "/-4", "more")] and first["target_turn"] == 1
    assert said(second)[2:] == [("A", "thanks")] and second["target_turn"] == 2
    assert said(third)[1:] == [("B", "thanks")]
    assert first["gold"] == {"text_ids": [text_id("nice"), text_id("more")], "image_ids": ["3", "-4"]}
    assert first["pool"]["image_ids"] == sorted(["3", "-4", "9", "-8"])
    assert first["pool"]["text_ids"] == sorted(map(text_id, ["nice", "more", "thanks", "no"]))
    # The reply "thanks" is also a negative: one candidate, not two of the same words.
    assert second["pool"]["text_ids"] == sorted(map(text_id, ["thanks", "no"]))
    assert second["pool"]["image_ids"] == ["-8", "9"] and second["gold"]["image_ids"] == []
    assert data.texts[text_id("thanks")] == "thanks" and data.images["-12"] == tmp_path / "test" / "-12.jpg"


def test_mmdialog_pool_of_the_split(tmp_path):
    data = read_mmdialog(mmdialog(tmp_path), pool="split", progress=False)
    pool = data.dialogues[0]["pool"]
    assert pool is data.dialogues[1]["pool"] and pool["image_ids"] == sorted(["-12", "3", "-4"])
    assert pool["text_ids"] == sorted(map(text_id, ["look", "nice", "more", "thanks"]))
    assert data.pool_hash == read_mmdialog(tmp_path, pool="split", progress=False).pool_hash
    assert data.pool_hash != read_mmdialog(tmp_path, progress=False).pool_hash
    with pytest.raises(ValueError, match="'all': expected one of conversation, split"):
        read_mmdialog(tmp_path, pool="all", progress=False)


def test_mmdialog_absent_images(tmp_path):
    mmdialog(tmp_path)
    whole = read_mmdialog(tmp_path, progress=False)
    (tmp_path / "test" / "9.jpg").unlink()
    thinned = read_mmdialog(tmp_path, progress=False)
    assert len(thinned) == 2 and thinned.dialogues[1]["pool"]["image_ids"] == ["-8"]
    assert not thinned.missing.counts and thinned.missing.candidates.counts == {ABSENT: 1}
    assert thinned.missing.candidates.seen == 10 and "1 of 10 candidates left out (10.0%)" in str(thinned.missing)
    assert thinned.pool_hash != whole.pool_hash
    with pytest.raises(TooMuchMissingError, match=r"9\.jpg"):
        thinned.missing.check()
    # Two conversations that name the same absent image lack one candidate, not two.
    mmdialog(tmp_path, [CONVERSATION, {**CONVERSATION, "conversation_id": 6}], keys=())
    assert read_mmdialog(tmp_path, progress=False).missing.candidates.counts == {ABSENT: 1}
    mmdialog(tmp_path, keys=())
    (tmp_path / "test" / "3.jpg").unlink()
    no_reply = read_mmdialog(tmp_path, progress=False)
    assert not len(no_reply) and no_reply.missing.seen == 2
    assert no_reply.missing.counts == {f"{ABSENT} in the reply": 1, f"{ABSENT} in the context": 1}


def test_mmdialog_blank_texts_and_empty_turns(tmp_path):
    turns = [[text("a")], [], [text("b")], [text(" ")], [text("c")]]
    odd = {**CONVERSATION, "conversation": [{"turn": t} for t in turns]}
    first_empty = {**CONVERSATION, "conversation_id": 6, "conversation": [{"turn": t} for t in turns[1:3]]}
    data = read_mmdialog(mmdialog(tmp_path, [odd, first_empty]), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["5-2"] and data.missing.seen == 5
    assert data.missing.counts == {
        "nothing in the reply": 1, "blank text in the reply": 1, "blank text in the context": 1,
        "context without content": 1,
    }  # fmt: skip


def test_mmdialog_splits(tmp_path):
    mmdialog(tmp_path, split="val")
    assert len(read_mmdialog(tmp_path, "valid", progress=False)) == 2
    train = {k: v for k, v in CONVERSATION.items() if not k.startswith("negative")}
    mmdialog(tmp_path, [train], "train")
    assert len(read_mmdialog(tmp_path, "train", "split", progress=False)) == 2
    with pytest.raises(BadDataError, match=r"conversation 0: no 'negative_candidate_texts'.*pool='split'"):
        read_mmdialog(tmp_path, "train", progress=False)
    with pytest.raises(BadDataError, match=r"looked for is there: test/conversations.json"):
        read_mmdialog(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversation_id": None}, "conversation 0: the field 'conversation_id' is NoneType, expected int or str"),
        ({"conversation": {}}, "conversation 0: the field 'conversation' is dict"),
        ({"conversation": [{"turns": []}]}, "turn 0: expected the field 'turn'"),
        ({"conversation": [{"turn": [{"__VIDEO__": "x"}]}]}, "turn 0, element 0: expected the field '__TEXT__'"),
        ({"conversation": [{"turn": [{**text("a"), **media("3")}]}]}, "element 0: expected one of __TEXT__"),
        ({"conversation": [{"turn": [media(3)]}]}, "element 0: the field '__MEDIA__' is int, expected str"),
        ({"negative_candidate_media_keys": ["9", -8]}, r"negative_candidate_media_keys\[1\] is int, expected str"),
    ],
)
def test_mmdialog_of_the_wrong_shape(tmp_path, change, message):
    mmdialog(tmp_path, [{**CONVERSATION, **change}])
    with pytest.raises(BadDataError, match=message):
        read_mmdialog(tmp_path, progress=False)


def test_mmdialog_sample(samples, tmp_path):
    shutil.copytree(samples / "mmdialog_stub", tmp_path, dirs_exist_ok=True)
    found = json.loads((tmp_path / "test" / "conversations.json").read_text())
    keys = {e["__MEDIA__"] for c in found for t in c["conversation"] for e in t["turn"] if "__MEDIA__" in e}
    keys |= {k for c in found for k in c["negative_candidate_media_keys"]}
    stand_ins(samples, tmp_path / "test", [f"{key}.jpg" for key in keys])
    data = read_mmdialog(tmp_path, progress=False)
    assert len(data) == 2 * len(found) and not data.missing.counts and set(data.images) == keys
    assert data.dialogues[0]["gold"]["image_ids"] == ["78499"]
    assert len(data.dialogues[0]["pool"]["image_ids"]) == 21
    assert all(set(d["gold"][k]) <= set(d["pool"][k]) for d in data.dialogues for k in ("text_ids", "image_ids"))


# VIST


def sentence(story, order, photo, words="text"):
    return [{"story_id": story, "worker_arranged_photo_order": order, "photo_flickr_id": photo,
             "text": f"{words} {order} .", "original_text": "Not this one."}]  # fmt: skip


def vist(folder, annotations=None, where="", images="images/val", suffix=".jpg"):
    whole = [sentence("s1", i, f"{10 + i}") for i in (3, 0, 4, 2, 1)]  # not in order in the file
    second = [sentence("s2", i, f"{p}") for i, p in enumerate((20, 11, 22, 23, 24))]
    broken = [sentence("s3", i, f"{30 + i}") for i in range(4)]
    found = {"images": [], "albums": [], "annotations": annotations or [*whole, *second, *broken]}
    dump(folder / where / "val.story-in-sequence.json", found)
    touch(folder / images, *(f"{i}{suffix}" for i in (*range(10, 15), 20, *range(22, 25), *range(30, 34))))
    return folder


@pytest.mark.parametrize(("where", "images", "suffix"), [("", "images/val", ".jpg"), ("sis", "images", ".png")])
def test_vist(tmp_path, where, images, suffix):
    data = read_vist(vist(tmp_path, None, where, images, suffix), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["s1", "s2"]
    first = data.dialogues[0]
    assert said(first) == [("A", f"text {i} .", f"/{10 + i}") for i in range(4)] + [("A", "text 4 .")]
    assert first["target_turn"] == 5 and first["gold"]["image_ids"] == ["14"]
    # The photos of an incomplete story are the split's all the same.
    assert first["pool"]["image_ids"] == [str(i) for i in (*range(10, 15), 20, *range(22, 25), *range(30, 34))]
    assert data.missing.seen == 3 and data.missing.counts == {"story incomplete": 1}
    assert data.images["14"] == tmp_path / images / f"14{suffix}"


def test_vist_absent_photo_and_manifest(tmp_path):
    whole = read_vist(vist(tmp_path), progress=False)
    (tmp_path / "images" / "val" / "23.jpg").unlink()
    less = read_vist(tmp_path, progress=False)
    assert less.missing.counts == {"story incomplete": 1, ABSENT: 1}
    assert "s2 (23.jpg)" in less.missing.examples[ABSENT] and less.pool_hash != whole.pool_hash
    write_manifest(less, tmp_path / "ids.txt")
    assert (tmp_path / "ids.txt").read_text().split()[:2] == ["10", "11"]
    touch(tmp_path / "images" / "val", "23.jpg")
    frozen = read_vist(tmp_path, manifest=tmp_path / "ids.txt", progress=False)
    assert frozen.pool_hash == less.pool_hash and "23" not in frozen.images
    assert frozen.missing.counts == {"story incomplete": 1, "not in the manifest": 1}
    dump(tmp_path / "ids.json", [*frozen.images, 99])
    extra = read_vist(tmp_path, manifest=tmp_path / "ids.json", progress=False)
    assert extra.pool_hash == less.pool_hash
    assert extra.missing.candidates.counts == {"no photo of this split's stories": 1}
    (tmp_path / "images" / "val" / "33.jpg").unlink()
    assert read_vist(tmp_path, manifest=tmp_path / "ids.txt", progress=False).missing.candidates.counts == {ABSENT: 1}


@pytest.mark.parametrize(
    ("manifest", "message"), [("", "names no photo"), ("{}", "a json list of photo ids"), (None, "no such manifest")]
)
def test_vist_bad_manifest(tmp_path, manifest, message):
    vist(tmp_path)
    if manifest is not None:
        (tmp_path / "ids").write_text(manifest)
    with pytest.raises(BadDataError, match=message):
        read_vist(tmp_path, manifest=tmp_path / "ids", progress=False)


def test_vist_incomplete_in_other_ways(tmp_path):
    twice = [sentence("s1", min(i, 3), f"{10 + i}") for i in range(5)]
    six = [sentence("s2", i, f"{10 + min(i, 4)}") for i in range(6)]
    blank = [sentence("s3", i, f"{10 + i}") for i in range(5)]
    blank[2][0]["text"] = " "
    data = read_vist(vist(tmp_path, [*twice, *six, *blank]), progress=False)
    assert not len(data) and data.missing.counts == {"story incomplete": 2, "blank caption": 1}


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (sentence("s1", 0, "1") * 2, "annotation 0: expected a list of one sentence"),
        (sentence("s1", 0, "1")[0], "annotation 0: expected a list of one sentence, found dict"),
        (sentence("s1", "0", "1"), "'worker_arranged_photo_order' is str, expected int"),
        ([{"story_id": "s1"}], "annotation 0: expected the field 'photo_flickr_id'"),
    ],
)
def test_vist_of_the_wrong_shape(tmp_path, annotation, message):
    with pytest.raises(BadDataError, match=message):
        read_vist(vist(tmp_path, [annotation]), progress=False)
    with pytest.raises(BadDataError, match=r"test.story-in-sequence.json, sis/test.story-in-sequence.json"):
        read_vist(tmp_path, "test", progress=False)


def test_vist_sample_record(samples, tmp_path):
    (tmp_path / "sis").mkdir()
    shutil.copy(samples / "vist" / "sis_record_excerpt.json", tmp_path / "sis" / "test.story-in-sequence.json")
    stand_ins(samples, tmp_path / "images" / "test", ["1741642.jpg"])
    data = read_vist(tmp_path, "test", progress=False)
    assert data.missing.seen == 1 and data.missing.examples == {"story incomplete": ["45530"]}
    assert list(data.images) == ["1741642"]


# VQAv2

NAMES = {"questions": "v2_OpenEnded_mscoco_{}_questions.json", "annotations": "v2_mscoco_{}_annotations.json"}


def vqav2(folder, split="val2014", official=True, questions=None, annotations=None, images=None):
    asked = [{"question_id": 100 + i, "image_id": 5 + i, "question": f"what is {i}?"} for i in range(3)]
    told = [{"question_id": 100 + i, "image_id": 5 + i, "question_type": "what is", "answer_type": "other",
             "multiple_choice_answer": "cat",
             "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(["cat", "dog"])]}
            for i in (2, 0)]  # fmt: skip
    for field, items in (("questions", questions or asked), ("annotations", annotations or told)):
        if field == "questions" or not split.startswith("test"):
            name = NAMES[field].format(split) if official else f"{field}.json"
            dump(folder / name, {"data_subtype": split, field: items})
    coco = split.replace("-dev", "")
    touch(folder / (images if images is not None else coco), *(f"COCO_{coco}_{i:012d}.jpg" for i in (5, 6, 7)))
    return folder


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
    found = json.loads((tmp_path / "questions.json").read_text())["questions"]
    stand_ins(samples, tmp_path / "train2014", {f"COCO_train2014_{q['image_id']:012d}.jpg" for q in found})
    with pytest.raises(BadDataError, match=r"'train2014'.*'val2014'"):
        read_vqav2(tmp_path, progress=False)
    data = read_vqav2(tmp_path, "train2014", progress=False)
    assert len(data) == 3 and not data.missing.counts and {len(q["answers"]) for q in data.questions} == {10}
    assert data.questions[0]["answers"][0] == "net"


# The schema's helpers


def test_json_and_json_lines(tmp_path):
    separator = "a\u2028b"  # a line break to str.splitlines, but not to json
    for lines in (False, True):
        path = dump(tmp_path / "x.json", [{"t": separator}, {"t": "c"}], lines)
        assert read_json(path) == list(read_items(path)) == [{"t": separator}, {"t": "c"}]
    path.write_text('\ufeff{"a":\n 1}', encoding="utf-8")
    assert read_json(path) == {"a": 1}
    path.write_text(" [ ] \n")
    assert list(read_items(path)) == []


@pytest.mark.parametrize(
    "content", ['[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": 1}] x', '{"a": 1}\n{"a"', ""]
)
def test_broken_json_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BadDataError, match=r"x\.json"):
        list(read_items(path) if content else read_json(path))
    with pytest.raises(BadDataError, match=r"x\.json"):
        read_json(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(BadDataError, match=r"x\.json: not UTF-8"):
        read_json(tmp_path / "x.json")


def test_a_truth_value_is_no_integer():
    assert require({"a": 1}, "a", int, "x") == 1 and require({"a": True}, "a", bool, "x") is True
    with pytest.raises(BadDataError, match="x: the field 'a' is bool, expected int or str"):
        require({"a": True}, "a", (int, str), "x")


def test_missing_without_candidates_reads_as_before():
    missing = Missing(seen=4)
    missing.add("absent", "one")
    assert str(missing) == "1 of 4 items left out (25.0%): absent: 1 (such as one)"
    missing.check(0.25)
    with pytest.raises(TooMuchMissingError, match=r"the 24\.0% allowed"):
        missing.check(0.24)
