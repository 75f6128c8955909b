"""The readers, on files the tests make in every layout and on the real samples."""

import io
import json
import logging
import tarfile
import zlib

import pytest

from tests.conftest import picture
from train.data import load_pairs, read_shards, streamed_length

COLUMNS = {"id", "image", "captions", "source", "license", "url"}


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_image_folder(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "unnamed.png"):
        (tmp_path / name).write_bytes(png(1))
    rows = [
        {"file_name": "a.png", "captions": ["one", "two"], "license": "CC BY", "flickr_url": "u"},
        {"file_name": "sub/b.png", "caption": 'say "NA"'},
        {"file_name": "gone.png", "text": "three"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(tmp_path)
    assert set(pairs.column_names) == COLUMNS
    assert [row["captions"] for row in pairs] == [["one", "two"], ['say "NA"'], ["three"]]
    assert pairs[0]["license"] == "CC BY" and pairs[0]["url"] == "u" and pairs[1]["id"] == "sub/b.png"
    assert "1 images have no row" in caplog.text and "unnamed.png" in caplog.text


def test_image_folder_csv_and_its_errors(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,caption\na.png,"hats, red"\n')
    assert load_pairs(tmp_path)[0]["captions"] == ["hats, red"]
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,3\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, row 1: none of 'captions'"):
        load_pairs(tmp_path)
    (tmp_path / "metadata.csv").write_text("name,caption\na.png,b\n")
    with pytest.raises(ValueError, match="row 1: no 'file_name'"):
        load_pairs(tmp_path)


def test_fromages_tsv(tmp_path):
    (tmp_path / "t.tsv").write_text('caption\timage\na "quoted\t0_11\nnull\t1_22\nNA\t2_33\n')
    (tmp_path / "0_11").write_bytes(png(1))
    (tmp_path / "1_22.jpg").write_bytes(png(2))
    pairs = load_pairs(tmp_path / "t.tsv", tmp_path)
    assert [row["captions"][0] for row in pairs] == ['a "quoted', "null", "NA"]
    assert [row["image"]["path"] for row in pairs] == [str(tmp_path / n) for n in ("0_11", "1_22.jpg", "2_33")]


def test_googles_tsv(tmp_path):
    urls = ["http://a.example/x.jpg?b=1", "https://b.example/y.png"]
    (tmp_path / "t.tsv").write_text(f"first\t{urls[0]}\nsecond\t{urls[1]}\n")
    name = f"1_{zlib.crc32(urls[1].encode())}"
    (tmp_path / name).write_bytes(png(1))
    pairs = load_pairs(tmp_path / "t.tsv", tmp_path)
    assert pairs[1]["image"]["path"] == str(tmp_path / name) and pairs[1]["url"] == urls[1]
    assert [row["captions"][0] for row in pairs] == ["first", "second"]


def test_a_tsv_with_a_broken_line_names_it(tmp_path):
    (tmp_path / "t.tsv").write_text("caption\timage\na\tb\nonly one\n")
    with pytest.raises(ValueError, match="row 1: expected two columns"):
        load_pairs(tmp_path / "t.tsv", tmp_path)
    with pytest.raises(ValueError, match="--image_folder"):
        load_pairs(tmp_path / "t.tsv")


def test_shards_stream_in_order_and_survive_truncation(tmp_path, caplog):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "000.jpg", png(1)), add(tar, "000.txt", b"first"), add(tar, "000.json", b'{"url": "u", "license": "l"}')
        add(tar, "a.b.png", png(2)), add(tar, "a.b.txt", b"dotted")
        add(tar, "a.c.png", png(3)), add(tar, "a.c.txt", b"dotted too")
    with tarfile.open(tmp_path / "00001.tar", "w") as tar:
        add(tar, "1.png", png(3)), add(tar, "1.json", b'{"caption": "from json"}')
        add(tar, "2.png", png(4))
        add(tar, "3.txt", b"no image")
        add(tar, "4.png", bytes(5000)), add(tar, "4.txt", b"cut")
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: whole.index(bytes(4000)) + 1000])
    with tarfile.open(tmp_path / "00002.tar", "w") as tar:
        add(tar, "9.webp", png(5)), add(tar, "9.txt", b"after")
    with caplog.at_level(logging.WARNING):
        rows = list(load_pairs(tmp_path))
    assert [(r["id"], r["captions"]) for r in rows] == [
        ("00000/000", ["first"]), ("00000/a.b", ["dotted"]), ("00000/a.c", ["dotted too"]), ("00001/1", ["from json"]),
        ("00001/2", []), ("00001/3", ["no image"]), ("00002/9", ["after"]),
    ]  # fmt: skip
    assert rows[0]["url"] == "u" and rows[0]["image"]["bytes"] == png(1)
    assert rows[5]["image"]["bytes"] == b""
    assert "00001.tar ends early" in caplog.text


def test_workers_share_the_shards(tmp_path):
    from torch.utils.data import DataLoader

    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            add(tar, "x.png", png(shard)), add(tar, "x.txt", b"c")
    loader = DataLoader(read_shards(tmp_path), batch_size=None, num_workers=2)
    assert sorted(row["id"] for row in loader) == [f"{i}/x" for i in range(4)]


def test_stats_give_the_length(tmp_path):
    (tmp_path / "0.tar").touch(), (tmp_path / "1.tar").touch()
    (tmp_path / "0_stats.json").write_text('{"successes": 40}')
    assert streamed_length(tmp_path) is None
    (tmp_path / "1_stats.json").write_text('{"successes": 2}')
    assert streamed_length(tmp_path) == 42


def test_an_unknown_layout_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"has no known layout(.|\n)*metadata\.jsonl(.|\n)*\.tar(.|\n)*\.tsv"):
        load_pairs(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_pairs(tmp_path / "nowhere")


def test_real_photos_and_emoji(samples):
    photos = load_pairs(samples / "photos")
    assert len(photos) == 51 and all(len(row["captions"]) == 5 for row in photos)
    assert "License" in photos[0]["license"] and photos[0]["url"].startswith("http")
    emoji = load_pairs(samples / "emoji")
    assert len(emoji) == 1360 and emoji[0]["captions"] == ["double exclamation mark"]


def test_real_shard_and_tsv(samples, tmp_path):
    rows = list(load_pairs(samples / "img2dataset_shard"))
    assert len(rows) == 40 == streamed_length(samples / "img2dataset_shard")
    assert all(row["captions"] and row["image"]["bytes"][:2] == b"\xff\xd8" for row in rows)
    pairs = load_pairs(samples / "cc3m" / "cc3m_val.tsv", tmp_path)
    assert pairs[0]["captions"] == ["author : a life in photography -- in pictures"]
    assert pairs[3]["id"] == "8_1666482269"
