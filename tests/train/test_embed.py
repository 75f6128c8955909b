"""Candidates embedded by one or two processes, interrupted or not, are the same files, and make the same pool."""

import json
import os
from pathlib import Path

import pytest
import torch

import train.embed as embed
from modeling_unimur import CandidatePool, UniMuRModel
from tests.conftest import picture, two_processes
from tests.tiny import make_model
from train.collate import TooManyBadPairsError

TEXTS = ["a red fox", "two dogs", "the sea", "", "my old hat", "one panda", "sky"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    make_model(folder / "towers").save_pretrained(folder / "model", with_towers=True)
    (folder / "photos" / "more").mkdir(parents=True)
    for i in range(11):
        picture(i).save(folder / "photos" / ("more" if i % 2 else "") / f"{i}.png")
    (folder / "photos" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--model={data}/model", f"--output={out}", f"--images={data}/photos", f"--texts={data}/texts.txt",
        "--shard_size=4", "--batch_size=3", "--max_bad_share=0.5", *more,
    ]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def whole(data):
    """A run in one go."""
    embed.main(flags(data, data / "whole"))
    return data / "whole"


def test_the_pool_is_that_of_build_pool(data, whole, capsys):
    pool = embed.main(flags(data, whole))
    assert "2 of 19 candidates left out" in capsys.readouterr().out
    assert [f.stem for f in sorted(whole.glob("*.arrow"))] == [
        "data-image-00000", "data-image-00001", "data-image-00002", "data-text-00000", "data-text-00001",
    ]  # fmt: skip
    left_out = [x for f in sorted((whole / "manifests").glob("*")) for x in json.loads(f.read_text())["left_out"]]
    assert left_out == [["bad.jpg", "undecodable"], ["text-3", "empty"]]
    model = UniMuRModel.from_pretrained(data / "model")
    names = sorted(f.relative_to(data / "photos").as_posix() for f in (data / "photos").rglob("*.png"))
    texts = [text for text in TEXTS if text]
    expected = model.build_pool([data / "photos" / n for n in names], texts, image_ids=names, show_progress_bar=False)
    assert pool.made_by == expected.made_by == model.fingerprint
    assert pool.dataset["id"][:] == [*names, *(f"text-{i}" for i in range(7) if i != 3)]
    assert torch.allclose(
        torch.tensor(pool.dataset["embedding"][:]), torch.tensor(expected.dataset["embedding"][:]), atol=1e-6
    )
    assert {Path(f["filename"]).parent for f in pool.dataset.cache_files} == {whole}  # mapped where the shards lie
    one, other = (model.retrieve(["a fox", picture(3)], p) for p in (pool, expected))
    assert one.text == other.text and [c.score for c in one.candidates] == pytest.approx(
        [c.score for c in other.candidates]
    )
    assert (
        CandidatePool.load_from_disk(whole).dataset["image"][0]["bytes"] == (data / "photos" / names[0]).read_bytes()
    )


def test_two_processes_write_the_same_files(data, whole, tmp_path, capfd):
    two_processes(embed.main, flags(data, tmp_path / "two"))
    written = capfd.readouterr().err
    assert "shards of process 0" in written and "shards of process 1" in written
    assert files(tmp_path / "two") == files(whole)


def test_a_full_disk_stops_with_the_position_and_the_run_goes_on(data, whole, tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:  # two shards and their manifests are written
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            OSError, match=r"stopped at shard image-00002 \(images 8 to 11 of 12\).*No space.* 2 shards are complete"
        ),
    ):
        patch.setattr("os.fsync", full)
        embed.main(flags(data, tmp_path / "out"))
    assert sorted(files(tmp_path / "out")) == [
        "data-image-00000.arrow", "data-image-00001.arrow", "manifests/image-00000.json", "manifests/image-00001.json",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="not a pool"):
        CandidatePool.load_from_disk(tmp_path / "out")
    embedded = []
    run = embed.embed
    monkeypatch.setattr(embed, "embed", lambda model, shard, *a: embedded.append(shard.name) or run(model, shard, *a))
    embed.main(flags(data, tmp_path / "out"))
    assert embedded == ["image-00002", "text-00000", "text-00001"]
    assert files(tmp_path / "out") == files(whole)


def test_a_corrupt_or_foreign_shard_is_named(data, tmp_path):
    out = tmp_path / "out"
    embed.main(flags(data, out))
    path = out / "data-text-00000.arrow"
    good = path.read_bytes()
    path.write_bytes(good[:-100] + bytes(100))
    with pytest.raises(ValueError, match=r"shard text-00000 is corrupt: .*data-text-00000\.arrow"):
        embed.main(flags(data, out))
    path.unlink()
    with pytest.raises(ValueError, match="shard text-00000 is corrupt"):
        embed.main(flags(data, out))
    (out / "manifests" / "text-00000.json").unlink()
    embed.main(flags(data, out))  # as the message says
    assert path.read_bytes() == good
    with pytest.raises(ValueError, match=r"image-00000 .* other candidates or with other settings"):
        embed.main(flags(data, out, "--shard_size=5"))
    make_model(tmp_path / "towers", seed=1).save_pretrained(tmp_path / "model", with_towers=True)
    with pytest.raises(ValueError, match=r"image-00000 .* made by another model"):
        embed.main(flags(data, out, f"--model={tmp_path}/model"))


def test_another_pool_is_not_touched_and_a_finished_one_keeps_its_index(data, whole, tmp_path):
    pytest.importorskip("faiss")
    pool = CandidatePool.load_from_disk(whole)
    pool.save_to_disk(tmp_path / "other")
    before = files(tmp_path / "other")
    with pytest.raises(ValueError, match=r"data-00000-of-00001-\w+\.arrow belongs to no shard"):
        embed.main(flags(data, tmp_path / "other"))
    assert files(tmp_path / "other") == before and not (tmp_path / "other" / "manifests").exists()
    embed.main(flags(data, tmp_path / "out"))
    CandidatePool.load_from_disk(tmp_path / "out").build_index("sq8").save_to_disk(tmp_path / "out")
    assert embed.main(flags(data, tmp_path / "out")).index is not None
    (tmp_path / "out" / "manifests" / "text-00001.json").unlink()
    assert embed.main(flags(data, tmp_path / "out")).index is None


def test_shards_of_other_pictures_are_refused_and_a_touched_file_is_not(data, tmp_path):
    import datasets

    (tmp_path / "photos").mkdir()
    for i in range(6):
        picture(i).save(tmp_path / "photos" / f"{i}.png")
    given = (f"--images={tmp_path}/photos",)
    embed.main(flags(data, tmp_path / "out", *given))
    os.utime(tmp_path / "photos" / "5.png", (1, 1))
    embed.main(flags(data, tmp_path / "out", *given))
    picture(9).save(tmp_path / "photos" / "5.png")
    with pytest.raises(ValueError, match=r"image-00001 .* other candidates"):
        embed.main(flags(data, tmp_path / "out", *given))
    for name, first in (("a", 0), ("b", 4)):  # without ids of their own
        rows = {"image": [picture(first + i) for i in range(3)]}
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / name)
    embed.main(flags(data, tmp_path / "saved", f"--images={tmp_path}/a"))
    with pytest.raises(ValueError, match=r"image-00000 .* other candidates"):
        embed.main(flags(data, tmp_path / "saved", f"--images={tmp_path}/b"))


def test_too_many_bad_candidates_stop_the_run(data, tmp_path):
    embed.main(flags(data, tmp_path / "shards", "--max_bad_share=0.2"))  # one of the first four; two of all 19
    with pytest.raises(TooManyBadPairsError, match=r"(?s)1 of 12 .*bad\.jpg"):
        embed.main(flags(data, tmp_path / "out", "--shard_size=20", "--max_bad_share=0.05"))


def test_jsonl_texts_a_saved_dataset_and_paths(data, tmp_path):
    import datasets

    rows = {"id": ["x", "y"], "image": [str(data / "photos" / "0.png"), str(data / "photos" / "2.png")]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "images")
    (tmp_path / "t.jsonl").write_text('{"text": "hi", "id": "greeting"}\n{"text": "bye"}\n')
    inputs = (f"--images={tmp_path}/images", f"--texts={tmp_path}/t.jsonl")
    pool = embed.main(flags(data, tmp_path / "out", *inputs))
    assert pool.dataset["id"][:] == ["x", "y", "greeting", "text-1"]
    by_path = embed.main(flags(data, tmp_path / "paths", f"--texts={tmp_path}/t.jsonl", "--keep_images=path"))
    image = by_path.dataset[0]["image"]
    assert image["bytes"] is None and Path(image["path"]) == data / "photos" / "0.png"
    (tmp_path / "t.jsonl").write_text('{"text": "hi", "id": "x"}\n')
    with pytest.raises(ValueError, match="duplicate id 'x'"):
        embed.main(flags(data, tmp_path / "twice", *inputs))
    with pytest.raises(ValueError, match="no candidates"):
        embed.main([f"--model={data}/model", f"--output={tmp_path}/none"])


def test_no_candidate_is_lost_without_a_count(data, tmp_path, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.avif", "b.webp", "c.jp2", "d.JFIF"):
        picture(1).save(photos / name, {"d.JFIF": "JPEG"}.get(name))
    for name in ("e.heic", "f.jpe"):
        (photos / name).write_bytes(b"no image")
    (photos / "g.svg").write_text("<svg/>"), (photos / "notes").touch()
    (photos / "h.png").symlink_to(data / "photos" / "0.png")
    (photos / "i.png").symlink_to(photos / "absent.png")
    lines = [
        b'{"text": "good"}',
        b'["no"]',
        b'{"text": "\xe9"}',
        b'{"text": "\\ud83d"}',
        b'{"text": 5}',
        b'{"text": " "}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    inputs = (f"--images={photos}", f"--texts={tmp_path}/t.jsonl", "--max_bad_share=0.9")
    pool = embed.main(flags(data, tmp_path / "out", *inputs))
    assert pool.dataset["id"][:] == ["a.avif", "b.webp", "c.jp2", "d.JFIF", "text-0"]
    left_out = dict(
        x for f in (tmp_path / "out" / "manifests").glob("*") for x in json.loads(f.read_text())["left_out"]
    )
    assert left_out == {
        "e.heic": "undecodable", "f.jpe": "undecodable", "h.png": "outside_folder", "i.png": "missing",
        "text-1": "not_json", "text-2": "not_utf8", "text-3": "half_character", "text-4": "no_text", "text-5": "empty",
    }  # fmt: skip
    assert "2 files have no image's ending and are passed over: 1 .svg, 1 without one" in caplog.text
    assert "t.jsonl, line 2 is left out (not_json)" in caplog.text
