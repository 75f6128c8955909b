"""The readers, on small files of every layout that a test makes itself."""

import gzip
import io
import json
import logging
import tarfile
import zlib
from collections import Counter

import pytest

from tests.conftest import picture
from train import data
from train.data import load_pairs, read_image_folder, read_tars, streamed_length
from train.rows import FEATURES
from train.tars import find_tars


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def reasons(rows):
    """How many rows have each problem, and the good ones' captions."""
    bad = Counter(row["problem"].partition(":")[0] for row in rows if row["problem"])
    return dict(bad), [row["captions"] for row in rows if not row["problem"]]


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
    assert pairs.features == FEATURES
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
    for header in ("file_name,label", "name,caption"):
        (tmp_path / "metadata.csv").write_text(f"{header}\na.png,3\n")
        with pytest.raises(ValueError, match=r"metadata\.csv has the columns .*expected 'file_name'"):
            load_pairs(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,caption,caption\na.png,b,c\n")
    with pytest.raises(ValueError, match="has a duplicate column"):
        load_pairs(tmp_path)
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,caption\na.png,from a spreadsheet\n", encoding="utf-8")
    assert load_pairs(tmp_path)[0]["captions"] == ["from a spreadsheet"]
    (tmp_path / "metadata.csv").write_text("file_name,caption\n")
    with pytest.raises(ValueError, match=r"there is no pair in .*metadata\.csv"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{bad", "not_json: not JSON"),
        ("[1]", "not_json: expected an object, got a list"),
        ('{"file_name": "a", "caption": 5}', "bad_caption: 'caption' must be a text or a list of texts, got '5'"),
        ('{"file_name": "a", "captions": ["x", 5]}', "bad_caption: 'captions' must be a text"),
        ('{"file_name": "a", "captions": "[x"}', None),
        ('{"file_name": "a", "captions": "[x]"}', "bad_caption: 'captions' has the brackets of a list"),
        ('{"file_name": "a", "label": 1}', "no_caption_column: none of 'captions', 'caption', 'text'"),
        ('{"file_name": 5, "caption": "x"}', "no_file_name"),
        ('{"file_name": "a", "caption": "half \\ud83d"}', "half_character: 'caption' has half a character"),
        ('{"file_name": "\\ud83d.png", "caption": "x"}', "half_character: 'file_name' has half a character"),
        ('{"file_name": "../private.png", "caption": "x"}', "outside_folder: '../private.png' is outside"),
        ('{"file_name": "/etc/hostname", "caption": "x"}', "outside_folder: '/etc/hostname' is outside"),
        ('{"file_name": "a\\u0000", "caption": "x"}', None),
    ],
)
def test_a_broken_metadata_row_is_counted_and_named(tmp_path, line, problem):
    text = '{"file_name": "a", "caption": "x"}\n\n' + line + '\n{"file_name": "b", "caption": "y"}'
    (tmp_path / "metadata.jsonl").write_text(text)
    rows = list(load_pairs(tmp_path))
    assert [row["captions"] for row in (rows[0], rows[2])] == [["x"], ["y"]] and len(rows) == 3
    if problem is None:
        assert rows[1]["problem"] is None
    else:
        assert rows[1]["problem"].startswith(problem) and rows[1]["id"].endswith("metadata.jsonl, line 3")


def test_quotes_that_are_not_closed_take_no_other_row(tmp_path):
    lines = ["a.png,plain", 'b.png,"not closed', 'c.png,"closed, here"', "d.png,plain", 'e.png,"over', 'two lines"']
    lines += ["f.png,one,two", 'g.png,"last is open', "h.png,12", 'i.png,3" long']
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    rows = list(load_pairs(tmp_path))
    bad, good = reasons(rows)
    assert bad == {"broken_row": 3}
    assert good == [["plain"], ["closed, here"], ["plain"], ["over\ntwo lines"], ["12"], ['3" long']]
    assert [row["id"].rpartition(" ")[2] for row in rows if row["problem"]] == ["3", "8", "9"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_of_any_separator_and_encoding(tmp_path, encoding, separator):
    rows = [["file_name", "captions"], ["a.png", "un été"], ["b.png", '"[""one"", ""two""]"'], ["c.png", "['it''s']"]]
    text = "\r\n".join(separator.join(row) for row in rows)
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    bad, good = reasons(load_pairs(tmp_path))
    one = [] if encoding == "latin-1" else [["un été"]]  # only the line that shows it
    assert bad == ({"not_utf8": 1} if encoding == "latin-1" else {})
    assert good == [*one, ["one", "two"], ["its"]]


def test_an_encoding_that_is_not_read_is_refused(tmp_path):
    for encoding in ("utf-16-le", "utf-32"):
        (tmp_path / "metadata.csv").write_bytes("file_name,caption\na,b".encode(encoding))
        with pytest.raises(ValueError, match=r"metadata\.csv is neither UTF-8 nor UTF-16 with a mark"):
            load_pairs(tmp_path)


def test_long_fields_are_read_and_overlong_ones_counted(tmp_path, monkeypatch):
    (tmp_path / "metadata.csv").write_text(
        f"file_name,caption\na.png,{'x' * 200_000}\nb.png,{'y' * 1_100_000}\nc.png,z"
    )
    bad, good = reasons(load_pairs(tmp_path))
    assert bad == {"broken_row": 1} and list(map(len, good[0])) == [200_000] and good[1] == ["z"]
    (tmp_path / "t.tsv").write_text(f"{'x' * 200_000}\ta.png\n{'y' * 1_100_000}\tb.png\nz\tc.png")
    bad, good = reasons(load_pairs(tmp_path / "t.tsv", tmp_path))
    assert bad == {"long_caption": 1} and list(map(len, good[0])) == [200_000] and good[1] == ["z"]
    monkeypatch.setattr("train.text_files.MAX_LINE", 100)
    lines = [json.dumps({"file_name": "a", "caption": c * n}) for c, n in (("x", 10), ("y", 500), ("z", 10))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    bad, good = reasons(load_pairs(tmp_path))
    assert bad == {"long_line": 1} and good == [["x" * 10], ["z" * 10]]


def test_metadata_as_parquet_and_by_its_path(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "file_name": ["a.png", "b.png", "../c.png"],
        "captions": [["one", "two"], None, ["x"]],
        "text": ["-", "b", "-"],
    }
    pq.write_table(pa.table(rows), tmp_path / "metadata.parquet")
    bad, good = reasons(load_pairs(tmp_path))
    assert bad == {"outside_folder": 1} and good == [["one", "two"], ["b"]]
    (tmp_path / "mine.jsonl").write_text('{"file_name": "a.png", "caption": "by its path"}')
    assert load_pairs(tmp_path / "mine.jsonl")[0]["captions"] == ["by its path"]
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"metadata\.parquet cannot be read as parquet"):
        load_pairs(tmp_path)


def test_links_that_lead_out_of_the_folder_are_counted(tmp_path):
    folder, other = tmp_path / "photos", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (other / "private.png").write_bytes(png(1)), (folder / "a.png").write_bytes(png(2))
    (folder / "out.png").symlink_to(other / "private.png")
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder / "sub").symlink_to(other)
    names = ("a.png", "out.png", "in.png", "sub/private.png", "sub/../a.png")
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "caption": n}) for n in names))
    bad, good = reasons(load_pairs(folder))
    # A link's parent is that of what it leads to, as for every program that opens the path.
    assert bad == {"outside_folder": 3} and good == [["a.png"], ["in.png"]]


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "datasets--me--mine" / "snapshots" / "abc", tmp_path / "datasets--me--mine" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "1").write_bytes(png(1)), (tmp_path / "private").write_bytes(png(1))
    (snapshot / "a.png").symlink_to("../../blobs/1"), (snapshot / "b.png").symlink_to("../../../private")
    (snapshot / "metadata.csv").write_text("file_name,caption\na.png,a\nb.png,b\n")
    assert reasons(load_pairs(snapshot)) == ({"outside_folder": 1}, [["a"]])


def test_images_with_a_text_of_the_same_name(tmp_path, caplog):
    (tmp_path / "more").mkdir()
    for name in ("1.jpg", "2.PNG", "more/1.webp", "3.jpg"):
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "1.txt").write_text("one\n"), (tmp_path / "2.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "more" / "1.json").write_text('{"captions": ["two", "deux"], "url": "u"}')
    (tmp_path / "README.txt").write_text("not a caption")
    with caplog.at_level(logging.WARNING):
        rows = list(load_pairs(tmp_path))
    assert [row["id"] for row in rows] == ["1.jpg", "2.PNG", "3.jpg", "more/1.webp"]
    assert reasons(rows) == ({"not_utf8": 1}, [["one"], [], ["two", "deux"]]) and rows[3]["url"] == "u"
    assert "1 texts are beside no image and are not used, such as README.txt" in caplog.text


def test_more_rows_than_a_chunk_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 100)
    rows = "".join(f"caption {i}\t{i}\n" for i in range(201))
    (tmp_path / "t.tsv").write_text("caption\timage\n" + rows)
    pairs = load_pairs(tmp_path / "t.tsv", tmp_path)
    assert [row["captions"] for row in pairs] == [[f"caption {i}"] for i in range(201)]


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


def test_cc12ms_tsv_has_its_columns_the_other_way(tmp_path):
    url = "https://b.example/y.png"
    for text in (f"{url}\ta cat\n", f"url\tcaption\n{url}\ta cat\n", f"\ufeffcaption\turl\na cat\t{url}\n"):
        (tmp_path / "t.tsv").write_text(text, encoding="utf-8")
        pairs = load_pairs(tmp_path / "t.tsv", tmp_path)
        assert pairs["captions"][:] == [["a cat"]] and pairs["url"][:] == [url]
        assert pairs["id"][:] == [f"0_{zlib.crc32(url.encode())}"]


def test_a_broken_line_of_a_tsv_is_counted_by_its_number(tmp_path):
    text = b"caption\timage\na\tb\nonly one\nthree\tin\tall\n\xe9\tc\nd\t../e\nf\tg\n"
    (tmp_path / "t.tsv").write_bytes(text)
    rows = list(load_pairs(tmp_path / "t.tsv", tmp_path))
    assert reasons(rows) == ({"broken_row": 2, "not_utf8": 1, "outside_folder": 1}, [["a"], ["f"]])
    assert [row["id"].rpartition(" ")[2] for row in rows if row["problem"]] == ["3", "4", "5", "6"]
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
    assert "00001.tar ends early, 4 samples in, at '4'" in caplog.text and "00000.tar" not in caplog.text
    assert reasons(rows)[0] == {"broken_archive": 1} and rows[6]["problem"]


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
    rows = list(load_pairs(tmp_path))
    assert [row["id"] for row in rows[-4:]] == [f"1/{i}" for i in range(4)]
    bad, good = reasons(rows)
    assert bad == {"broken_archive": 1} and (samples is None or len(good) == samples + 4)
    assert "0.tar ends early" in caplog.text and "1.tar ends" not in caplog.text


def test_a_sample_with_odd_metadata_is_still_read(tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "LICENSE", b"no sample"), add(tar, "._0.png", b"an archiver's"), add(tar, "__MACOSX/._0.png", b"")
        odd = (b"{bad", b"[1]", b"\xff\xfe\xfa", b'{"caption": 5, "url": 3, "license": {"a": 1}}')
        for i, about in enumerate(odd):
            add(tar, f"d.x/{i}.PNG", png(i)), add(tar, f"d.x/{i}.json", about)
            add(tar, f"d.x/{i}.txt", b" \xc3\xa9 \n")
        add(tar, "4.png", png(4)), add(tar, "4.txt", b" "), add(tar, "4.json", b'{"caption": "from json"}')
    rows = list(read_tars(tmp_path / "0.tar"))
    assert [row["id"] for row in rows] == [*(f"0/d.x/{i}" for i in range(4)), "0/4"]
    assert [row["captions"] for row in rows] == [["é"]] * 4 + [["from json"]]
    assert all(row["url"] is None and row["license"] is None for row in rows) and not caplog.text


def test_shards_by_file_folder_pattern_braces_or_list(tmp_path):
    folder = tmp_path / "a [b]"
    (folder / "deep").mkdir(parents=True)
    for name in ("1.tar", "0.TAR", "2.tgz", "deep/3.tar.gz"):
        with tarfile.open(folder / name, "w:gz" if "gz" in name else "w") as tar:
            add(tar, "x.png", png(1)), add(tar, "x.txt", b"c")
    (folder / "notes.txt").touch()
    assert [path.name for path in find_tars(folder)] == ["0.TAR", "1.tar", "2.tgz", "3.tar.gz"]
    assert [path.name for path in find_tars(str(tmp_path / "a*" / "*"))] == ["0.TAR", "1.tar", "2.tgz"]
    both = [folder / "2.tgz", str(folder / "0.TAR")]
    assert find_tars(both) == [folder / "2.tgz", folder / "0.TAR"]
    assert [row["id"] for row in load_pairs(both)] == ["2/x", "0/x"]
    assert [row["id"] for row in load_pairs(folder)] == ["0/x", "1/x", "2/x", "3/x"]
    for nothing in (folder / "9.tar", [], str(folder / "*.zip")):
        with pytest.raises(ValueError, match=r"expected one of(.|\n)*\.tar"):
            read_tars(nothing)
    for name in ("00008", "00009", "00010"):
        (tmp_path / f"{name}.tar").touch()
    braces = str(tmp_path / "{00008..00010}.tar")
    assert [path.name for path in find_tars(braces)] == ["00008.tar", "00009.tar", "00010.tar"]
    assert [path.name for path in find_tars(str(tmp_path / "{00010,00008}.tar"))] == ["00010.tar", "00008.tar"]
    with pytest.raises(ValueError, match=r"2 of its 5 archives do not exist, such as .*00011\.tar"):
        find_tars(str(tmp_path / "{00008..00012}.tar"))
    (folder / "deep" / "out.tar").symlink_to(tmp_path / "00008.tar")
    with pytest.raises(ValueError, match=r"out\.tar' is outside"):
        find_tars(folder)


def test_workers_share_the_shards(tmp_path):
    from torch.utils.data import DataLoader

    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            add(tar, "x.png", png(shard)), add(tar, "x.txt", b"c")
    loader = DataLoader(read_tars(tmp_path), batch_size=None, num_workers=2)
    assert sorted(row["id"] for row in loader) == [f"{i}/x" for i in range(4)]


def test_stats_give_the_length(tmp_path):
    (tmp_path / "0.tar").touch(), (tmp_path / "1.tar").touch()
    (tmp_path / "0_stats.json").write_text('{"successes": 40}')
    assert streamed_length(tmp_path) is None
    (tmp_path / "1_stats.json").write_text('{"successes": 2}')
    assert streamed_length(tmp_path) == 42
    (tmp_path / "2.tar.gz").touch(), (tmp_path / "2_stats.json").write_text('{"successes": 8}')
    assert streamed_length(tmp_path) == 50


@pytest.mark.parametrize("stats", ["", "[1]", '{"successes": "3"}', '{"count": 3}', '{"successes": -1}', "\xff"])
def test_odd_stats_give_no_length(tmp_path, stats, caplog):
    (tmp_path / "0.tar").touch(), (tmp_path / "0_stats.json").write_text(stats, encoding="latin-1")
    assert streamed_length(tmp_path) is None and "0_stats.json gives no number of 'successes'" in caplog.text


def test_an_unknown_layout_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"has no known layout(.|\n)*metadata\.jsonl(.|\n)*\.tar(.|\n)*\.tsv"):
        load_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl, metadata\.csv, metadata\.parquet"):
        read_image_folder(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_pairs(tmp_path / "nowhere")
