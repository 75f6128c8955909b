"""The one command, on real data in its published layout and on the miniature."""

import json
import shutil

import pytest

from benchmarks.run import main
from benchmarks.schema import TooMuchMissingError
from tests.benchmarks.layouts import (
    dump,
    media,
    mmdialog,
    sentence,
    stand_ins,
    text,
    visdial,
    visdial_name,
    vist,
    vqav2,
)


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny().save_pretrained(path, with_towers=True)
    return str(path)


@pytest.fixture
def run(checkpoint, tmp_path):
    def go(task, data, *more):
        given = ["--task", task, "--model", checkpoint, "--baseline", "clip", "--output", str(tmp_path / "out")]
        results = main([*given, *(["--data", str(data)] if data else []), *more])
        assert json.loads((tmp_path / "out" / f"{task}.json").read_text()) == results
        table = (tmp_path / "out" / f"{task}.md").read_text()
        assert all(r["protocol"]["variant"] in table and r["system"] in table for r in results)
        assert all(r["revision"] and r["data"]["pool"] and r["protocol"]["settings"] for r in results)
        return results

    return go


def values(results, variant, system, metric):
    (result,) = (r for r in results if r["protocol"]["variant"] == variant and r["system"] == system)
    return result["metrics"][metric]


def test_visdial_on_the_sample(run, samples, tmp_path):
    folder = tmp_path / "visdial"
    shutil.copytree(samples / "visdial", folder)
    dialogues = json.loads((folder / "visdial_1.0_val_slice.json").read_text())["data"]["dialogs"]
    stand_ins(samples, folder / "VisualDialog_val2018", [visdial_name(d["image_id"]) for d in dialogues])
    results = run("visdial", folder)
    assert {(r["protocol"]["variant"], r["system"]) for r in results} == {
        (v, s) for v in ("corrected", "fromage-compat") for s in ("UniMuR", "CLIP")
    }
    assert values(results, "corrected", "UniMuR", "R@10")["n"] == 12
    ranked = run("visdial_answers", folder, "--limit", "7")
    assert values(ranked, "corrected", "UniMuR", "mean rank")["n"] == 7
    assert values(ranked, "fromage-compat", "UniMuR", "NDCG")["n"] == 1  # the one round of the seven with relevances
    assert values(ranked, "embedding", "CLIP", "MRR")["value"] > 0
    assert not next(r for r in ranked if r["system"] == "CLIP")["applies"]  # no language model, no likelihood


def test_mmdialog_over_the_photographs(run, samples, tmp_path):
    photos = [json.loads(line) for line in (samples / "photos" / "metadata.jsonl").read_text().splitlines()]
    keys = [f"{-i if i % 2 else i}" for i in range(1, len(photos) + 1)]
    conversations = [
        {"conversation_id": i, "conversation": [
            {"turn": [text(photos[i]["captions"][0])]}, {"turn": [text(photos[i]["captions"][1]), media(keys[i])]},
            {"turn": [text(photos[i]["captions"][2])]}],
         "negative_candidate_media_keys": keys[i + 1 : i + 9],
         "negative_candidate_texts": [p["captions"][3] for p in photos[i + 1 : i + 9]]}
        for i in range(10)
    ]  # fmt: skip
    mmdialog(tmp_path / "mm", conversations, keys=())
    for key, photo in zip(keys, photos, strict=True):
        shutil.copy(samples / "photos" / photo["file_name"], tmp_path / "mm" / "test" / f"{key}.jpg")
    results = run("mmdialog", tmp_path / "mm")
    assert values(results, "conversation-pool", "UniMuR", "text R@1")["n"] == 20
    assert values(results, "split-pool", "CLIP", "image retrieval rate")["n"] == 10
    pools = {r["data"]["pool"] for r in results}
    assert len(pools) == 2  # a hash a variant
    contextual = run("mmdialog_image", tmp_path / "mm")
    assert values(contextual, "conversation-pool", "UniMuR", "R@10")["value"] == 1  # nine candidates and itself is ten


def test_vqav2_on_the_sample(run, samples, tmp_path):
    folder = tmp_path / "vqa"
    shutil.copytree(samples / "vqav2", folder)
    asked = json.loads((folder / "questions.json").read_text())["questions"]
    stand_ins(samples, folder / "train2014", {f"COCO_train2014_{q['image_id']:012d}.jpg" for q in asked})
    results = run("vqav2", folder, "--split", "train2014")
    assert values(results, "corrected", "UniMuR", "accuracy")["n"] == 3
    assert values(results, "candidates", "CLIP", "accuracy")["value"] is not None


def test_vist_made_whole(run, samples, tmp_path):
    stories = [sentence(f"s{s}", i, f"{10 * s + i}", f"story {s}") for s in range(1, 5) for i in range(5)]
    vist(tmp_path / "vist", stories)
    stand_ins(
        samples, tmp_path / "vist" / "images" / "val", [f"{10 * s + i}.jpg" for s in range(1, 5) for i in range(5)]
    )
    results = run("vist", tmp_path / "vist")
    assert [r["protocol"]["variant"] for r in results if r["system"] == "UniMuR"] == [
        "story",
        "captions",
        "last-caption",
        "fromage-compat",
    ]
    assert values(results, "story", "UniMuR", "R@1")["n"] == 4
    kept = dump(tmp_path / "kept.json", [f"{10 * s + i}" for s in (1, 2) for i in range(5)])
    few = run("vist", tmp_path / "vist", "--manifest", str(kept), "--max_missing_share", "0.5")
    assert values(few, "story", "UniMuR", "R@1")["n"] == 2
    assert few[0]["data"]["left_out_by_reason"] == {"not in the manifest": 2}


def test_what_is_missing_is_refused_or_reported(run, samples, tmp_path):
    folder = visdial(tmp_path / "visdial", images=(7, 8))
    stand_ins(samples, folder / "VisualDialog_val2018", [visdial_name(7)])
    (folder / "VisualDialog_val2018" / visdial_name(8)).unlink()
    with pytest.raises(TooMuchMissingError, match=r"1 of 2 items left out \(50.0%\): image file absent: 1"):
        run("visdial", folder)
    results = run("visdial", folder, "--max_missing_share", "0.5")
    assert all(r["data"]["left_out_by_reason"] == {"image file absent": 1} for r in results)


def test_a_split_without_answers_is_refused(run, samples, tmp_path):
    folder = vqav2(tmp_path / "vqa", "test2015")
    stand_ins(samples, folder / "test2015", [f"COCO_test2015_{i:012d}.jpg" for i in (5, 6, 7)])
    with pytest.raises(ValueError, match="have no answers"):
        run("vqav2", folder, "--split", "test2015")


@pytest.mark.parametrize("task", ["mmdialog_image", "visdial", "vqav2"])
def test_the_miniature_is_the_default(run, task):
    results = run(task, None, "--limit", "6", "--split", "validation")
    assert all(r["data"]["source"] == "miniature" and r["protocol"]["miniature"] for r in results)
    assert {r["data"]["items"] for r in results} == {6}
    assert "first_less_this" in next(r for r in results if r["system"] == "CLIP" and r["applies"])


def test_an_unknown_variant_is_refused(run):
    with pytest.raises(ValueError, match="--variant wrong: visdial has corrected"):
        run("visdial", None, "--variant", "wrong")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_broken_images_are_counted_before_anything_is_measured(run, samples, tmp_path):
    folder = visdial(tmp_path / "visdial", images=(7, 8, 9))
    stand_ins(samples, folder / "VisualDialog_val2018", [visdial_name(i) for i in (7, 8, 9)])
    truncated(folder / "VisualDialog_val2018" / visdial_name(8))
    with pytest.raises(TooMuchMissingError, match=r"1 of 3 items left out .*image truncated: 1 \(such as 8\)"):
        run("visdial", folder)
    results = run("visdial", folder, "--max_missing_share", "0.5")
    assert values(results, "corrected", "UniMuR", "R@1")["n"] == 2
    assert results[0]["data"]["left_out_by_reason"] == {"image truncated": 1, "candidate: image truncated": 1}
    folder = vqav2(tmp_path / "vqa")
    stand_ins(samples, folder / "val2014", [f"COCO_val2014_{i:012d}.jpg" for i in (5, 6, 7)])
    truncated(folder / "val2014" / f"COCO_val2014_{5:012d}.jpg")
    results = run("vqav2", folder, "--max_missing_share", "0.7")
    assert results[0]["data"]["left_out_by_reason"]["image truncated"] == 1
