"""The VIST reader."""

import shutil

import pytest

from benchmarks.data.vist import read_vist, write_manifest
from benchmarks.schema import ABSENT
from tests.benchmarks.layouts import dump, sentence, stand_ins, touch, turn_texts, vist
from train.json_files import BadDataError


@pytest.mark.parametrize(("where", "images", "suffix"), [("", "images/val", ".jpg"), ("sis", "images", ".png")])
def test_vist(tmp_path, where, images, suffix):
    data = read_vist(vist(tmp_path, None, where, images, suffix), progress=False)
    assert [d["dialogue_id"] for d in data.dialogues] == ["s1", "s2"]
    first = data.dialogues[0]
    assert turn_texts(first) == [("A", f"text {i} .", f"/{10 + i}") for i in range(4)] + [("A", "text 4 .")]
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
        (sentence("s1", 0, "1")[0], "annotation 0: expected a list of one sentence, got dict"),
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
