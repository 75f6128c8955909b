"""The readers, on files the tests make in every layout and on the real samples."""

import gzip
import io
import json
import logging
import tarfile
import zlib

import pytest

from tests.conftest import picture
from train.data import load_pairs, read_image_folder, read_shards, shards, streamed_length

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
        {"file_name": "./gone.png", "text": "three"},
        {"file_name": "sub/b.png", "caption": None, "license": 3},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(tmp_path)
    assert set(pairs.column_names) == COLUMNS
    assert [row["captions"] for row in pairs] == [["one", "two"], ['say "NA"'], ["three"], []]
    assert pairs[0]["license"] == "CC BY" and pairs[0]["url"] == "u" and pairs[1]["id"] == "sub/b.png"
    assert pairs[3]["license"] is None
    assert "1 images have no row" in caplog.text and "unnamed.png" in caplog.text
    assert "1 images that metadata.jsonl names are absent, such as gone.png" in caplog.text
    rows.append({"file_name": "unnamed.png", "caption": "four"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_pairs(tmp_path)) == 5  # read again, not from a cache


def test_image_folder_csv_and_its_errors(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,caption\na.png,"hats, red"\n')
    assert load_pairs(tmp_path)[0]["captions"] == ["hats, red"]
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,3\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, row 1: none of 'captions'"):
        load_pairs(tmp_path)
    (tmp_path / "metadata.csv").write_text("name,caption\na.png,b\n")
    with pytest.raises(ValueError, match="row 1: no 'file_name'"):
        load_pairs(tmp_path)
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,caption\na.png,from a spreadsheet\n", encoding="utf-8")
    assert load_pairs(tmp_path)[0]["captions"] == ["from a spreadsheet"]
    (tmp_path / "metadata.csv").write_text("file_name,caption\n")
    with pytest.raises(ValueError, match=r"no pair found in .*metadata\.csv"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "row 2: not JSON"),
        ("[1]", "row 2: expected an object, got a list"),
        ('{"file_name": "a", "caption": 5}', "row 2: 'caption' must be a text or a list of texts, got 5"),
        ('{"file_name": "a", "captions": ["x", 5]}', "row 2: 'captions' must be a text"),
        ('{"file_name": 5, "caption": "x"}', "row 2: no 'file_name'"),
    ],
)
def test_a_broken_metadata_row_is_named(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a", "caption": "x"}\n\n' + line)
    with pytest.raises(ValueError, match=message):
        load_pairs(tmp_path)


def test_more_rows_than_a_chunk_keep_their_order(tmp_path):
    rows = "".join(f"caption {i}\t{i}\n" for i in range(20_001))
    (tmp_path / "t.tsv").write_text("caption\timage\n" + rows)
    pairs = load_pairs(tmp_path / "t.tsv", tmp_path)
    assert len(pairs) == 20_001
    assert [pairs[i]["captions"] for i in (0, 9_999, 10_000, 20_000)] == [
        [f"caption {i}"] for i in (0, 9_999, 10_000, 20_000)
    ]


def test_fromages_tsv(tmp_path, caplog):
    (tmp_path / "t.tsv").write_text('caption\timage\na "quoted\t0_11\nnull\t1_22\nNA\t2_33\n\n')
    (tmp_path / "0_11").write_bytes(png(1))
    (tmp_path / "1_22.jpg").write_bytes(png(2))
    pairs = load_pairs(tmp_path / "t.tsv", tmp_path)
    assert [row["captions"][0] for row in pairs] == ['a "quoted', "null", "NA"]
    assert [row["image"]["path"] for row in pairs] == [str(tmp_path / n) for n in ("0_11", "1_22.jpg", "2_33")]
    assert "1 images that t.tsv names are absent, such as 2_33" in caplog.text


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_googles_tsv(tmp_path, header):
    urls = ["http://a.example/x.jpg?b=1", "https://b.example/y.png"]
    (tmp_path / "t.tsv").write_text(f'{header}"first\t{urls[0]}\nnull\t{urls[1]}\n')
    plain, ended = f"0_{zlib.crc32(urls[0].encode())}", f"1_{zlib.crc32(urls[1].encode())}.jpg"
    (tmp_path / plain).write_bytes(png(1)), (tmp_path / ended).write_bytes(png(1))
    pairs = load_pairs(tmp_path / "t.tsv", tmp_path)
    assert pairs["url"][:] == urls
    assert [row["image"]["path"] for row in pairs] == [str(tmp_path / plain), str(tmp_path / ended)]
    assert [row["captions"][0] for row in pairs] == ['"first', "null"]


def test_a_tsv_with_a_broken_line_names_it(tmp_path):
    (tmp_path / "t.tsv").write_text("caption\timage\na\tb\nonly one\n")
    with pytest.raises(ValueError, match="line 3: expected two columns"):
        load_pairs(tmp_path / "t.tsv", tmp_path)
    with pytest.raises(ValueError, match="--image_folder"):
        load_pairs(tmp_path / "t.tsv")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_pairs(tmp_path / "t.tsv", tmp_path / "nowhere")


def test_shards_stream_in_order_and_survive_truncation(tmp_path, caplog):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "000.jpg", png(1)), add(tar, "000.txt", b"first")
        add(tar, "000.json", b'{"url": "u", "license": "l"}')
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
        ("00001/2", []), ("00001/3", ["no image"]), ("00001/4", []), ("00002/9", ["after"]),
    ]  # fmt: skip
    assert rows[0]["url"] == "u" and rows[0]["image"]["bytes"] == png(1)
    assert rows[5]["image"] is None
    assert "00001.tar ends early, 3 samples in, at '4'" in caplog.text and "00000.tar" not in caplog.text


@pytest.mark.parametrize(
    ("broken", "samples"),
    [
        (lambda whole, at: whole[:at], 2),  # cut between two files
        (lambda whole, at: whole[: at + 200], 2),  # in a header
        (lambda whole, at: whole[:at] + b"\7" * 512 + whole[at + 512 :], 2),  # a garbled header
        (lambda whole, at: whole[:300], 0),
        (lambda whole, at: b"", 0),
        (lambda whole, at: gzip.compress(whole)[:-20], None),
    ],
)
def test_no_shard_ends_early_in_silence(tmp_path, caplog, broken, samples):
    for name in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for i in range(4):
                add(tar, f"{i}.png", png(1)), add(tar, f"{i}.txt", b"c")
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(broken(whole, whole.index(b"2.png\0")))
    ids = [row["id"] for row in load_pairs(tmp_path)]
    assert ids[-4:] == [f"1/{i}" for i in range(4)]
    assert samples is None or len(ids) == samples + 4
    assert "0.tar ends early" in caplog.text and "1.tar ends" not in caplog.text


def test_a_sample_with_odd_metadata_is_still_read(tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "LICENSE", b"no sample"), add(tar, "._0.png", b"an archiver's"), add(tar, "__MACOSX/._0.png", b"")
        odd = (b"{bad", b"[1]", b"\xff\xfe\xfa", b'{"caption": 5, "url": 3, "license": {"a": 1}}')
        for i, about in enumerate(odd):
            add(tar, f"d.x/{i}.PNG", png(i)), add(tar, f"d.x/{i}.json", about)
            add(tar, f"d.x/{i}.txt", b" \xc3\xa9 \n")
        add(tar, "4.png", png(4)), add(tar, "4.txt", b" "), add(tar, "4.json", b'{"caption": "from json"}')
    rows = list(read_shards(tmp_path / "0.tar"))
    assert [row["id"] for row in rows] == [*(f"0/d.x/{i}" for i in range(4)), "0/4"]
    assert [row["captions"] for row in rows] == [["é"]] * 4 + [["from json"]]
    assert all(row["url"] is None and row["license"] is None for row in rows) and not caplog.text


def test_a_huge_file_in_a_shard_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.MAX_BYTES", 1000)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "0.jpg", bytes(50_000)), add(tar, "0.txt", b"c"), add(tar, "1.png", png(1)), add(tar, "1.txt", b"d")
    rows = list(read_shards(tmp_path))
    assert len(rows[0]["image"]["bytes"]) == 1001 and rows[1]["image"]["bytes"] == png(1)


def test_shards_by_file_folder_pattern_or_list(tmp_path):
    folder = tmp_path / "a [b]"
    folder.mkdir()
    for name in ("1.tar", "0.tar", "2.tar"):
        with tarfile.open(folder / name, "w") as tar:
            add(tar, "x.png", png(1)), add(tar, "x.txt", b"c")
    (folder / "notes.txt").touch()
    assert [path.name for path in shards(folder)] == ["0.tar", "1.tar", "2.tar"]
    assert [path.name for path in shards(str(tmp_path / "a*" / "*"))] == ["0.tar", "1.tar", "2.tar"]
    both = [folder / "2.tar", str(folder / "0.tar")]
    assert shards(both) == [folder / "2.tar", folder / "0.tar"]
    assert [row["id"] for row in load_pairs(both)] == ["2/x", "0/x"]
    for nothing in (folder / "9.tar", [], str(folder / "*.tgz")):
        with pytest.raises(ValueError, match=r"expected one of(.|\n)*\.tar"):
            read_shards(nothing)


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
    with pytest.raises(ValueError, match=r"neither metadata\.jsonl nor metadata\.csv"):
        read_image_folder(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_pairs(tmp_path / "nowhere")


def test_real_photos_and_emoji(samples):
    photos = load_pairs(samples / "photos")
    assert len(photos) == 51 and all(len(row["captions"]) == 5 for row in photos)
    assert "License" in photos[0]["license"] and photos[0]["url"].startswith("http")
    emoji = load_pairs(samples / "emoji")
    assert len(emoji) == 1360 and emoji[0]["captions"] == ["double exclamation mark"]


def test_real_shard_and_tsv(samples, tmp_path, caplog):
    rows = list(load_pairs(samples / "img2dataset_shard"))
    assert not caplog.text and len(rows) == 40 == streamed_length(samples / "img2dataset_shard")
    assert all(row["captions"] and row["image"]["bytes"][:2] == b"\xff\xd8" for row in rows)
    pairs = load_pairs(samples / "cc3m" / "cc3m_val.tsv", tmp_path)
    assert pairs[0]["captions"] == ["author : a life in photography -- in pictures"]
    assert pairs[3]["id"] == "8_1666482269"
