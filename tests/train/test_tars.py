"""Tar archives: what each holds is given or counted, whatever their makers did, in bounded memory."""

import gzip
import io
import tarfile
import tracemalloc

import pytest

from tests.train.test_data import add, png, reasons
from train.data import read_tars
from train.tars import read_samples


def write(path, members, mode="w", **kwargs):
    """Members by order: `(name, bytes)`, or `(name, target, type)` of a link."""
    with tarfile.open(path, mode, **kwargs) as tar:
        for name, data, *kind in members:
            if kind:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind[0], data
                tar.addfile(info)
            else:
                add(tar, name, data)
    return path


def pair(key, caption="c", ending="png"):
    return [(f"{key}.{ending}", png(1)), (f"{key}.txt", caption.encode())]


def captions(path):
    return reasons(read_tars(path))


def test_one_key_again_is_another_sample(tmp_path):
    adjacent = [member for text in "abc" for member in pair("0", text)]
    assert captions(write(tmp_path / "0.tar", adjacent)) == ({}, [["a"], ["b"], ["c"]])
    apart = [*pair("0", "a"), *pair("1", "b"), *pair("0", "c")]
    assert captions(write(tmp_path / "1.tar", apart)) == ({}, [["a"], ["b"], ["c"]])
    by_ending = [(f"{i}.{ending}", png(1) if ending == "png" else b"c") for ending in ("png", "txt") for i in range(2)]
    assert captions(write(tmp_path / "2.tar", by_ending)) == ({}, [[], [], ["c"], ["c"]])  # counted in training


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("archives", [2, 3])
def test_archives_that_were_appended_are_read(tmp_path, mode, archives):
    parts = [
        write(tmp_path / f"{n}.part", [m for i in range(2) for m in pair(f"{n}{i}", f"{n}{i}")], mode).read_bytes()
        for n in range(archives)
    ]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    bad, good = captions(tmp_path / "all.tar")
    assert bad == {} and good == [[f"{n}{i}"] for n in range(archives) for i in range(2)]


def test_an_archive_that_breaks_off_in_a_sample_counts_it_once(tmp_path):
    whole = write(tmp_path / "0.tar", [*pair("0"), ("1.txt", b"first"), ("1.png", bytes(5000))]).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.index(b"1.png\0") + 2000])
    assert captions(tmp_path / "0.tar") == ({"broken_archive": 1}, [["c"]])


def test_what_follows_the_end_of_an_archive_and_is_none_is_counted(tmp_path):
    write(tmp_path / "0.tar", pair("0"))
    with (tmp_path / "0.tar").open("ab") as file:
        file.write(b"garbage" * 200)
    assert captions(tmp_path / "0.tar") == ({"broken_archive": 1}, [["c"]])


def test_side_pictures_and_dotted_keys(tmp_path):
    sides = [
        ("0.jpg", png(1)),
        ("0.mask.png", png(2)),
        ("0.seg.deep.png", png(3)),
        ("0.txt", b"zero"),
        *pair("1", "one"),
    ]
    dotted = [*pair("a", "a"), *pair("a.b", "b"), *pair("a.c", "c"), ("d.jpg", png(1)), *pair("d.e", "e")]
    assert captions(write(tmp_path / "0.tar", sides)) == ({}, [["zero"], ["one"]])
    bad, good = captions(write(tmp_path / "1.tar", dotted))
    assert bad == {} and sorted(good) == [[], ["a"], ["b"], ["c"], ["e"]]  # d has no caption
    orphan = [("0.jpg", png(1)), ("0.mask.png", png(2)), *pair("1", "one")]
    assert captions(write(tmp_path / "2.tar", orphan)) == ({"empty_caption": 1}, [[], ["one"]])


def test_captions_of_a_json(tmp_path):
    lists = [
        ("0.png", png(1)),
        ("0.json", b'{"captions": ["a", "b"]}'),
        ("1.png", png(1)),
        ("1.json", b'{"caption": ["c"]}'),
    ]
    odd = [("2.png", png(1)), ("2.json", b'{"caption": 5}'), ("3.png", png(1)), ("3.json", b'{"caption": "\\ud83d"}')]
    more = [("4.png", png(1)), ("4.txt", b"\xe9t\xe9"), ("5.png", png(1)), ("5.txt", b"\xef\xbb\xbfmarked")]
    bad, good = captions(write(tmp_path / "0.tar", [*lists, *odd, *more]))
    assert bad == {"bad_caption": 1, "half_character": 1, "not_utf8": 1} and good == [["a", "b"], ["c"], ["marked"]]


def test_names_and_links_that_lead_out_are_counted(tmp_path):
    members = [*pair("../up"), *pair("/root"), *pair("a/../../b"), *pair("fine/../in"), *pair("./good", "good")]
    links = [
        ("s.png", "../private.png", tarfile.SYMTYPE),
        ("s.txt", b"s"),
        ("h.png", "good.png", tarfile.LNKTYPE),
        ("h.txt", b"h"),
    ]
    bad, good = captions(write(tmp_path / "0.tar", [*members, *links]))
    assert bad == {"outside_folder": 4, "link": 2} and good == [["good"]]


def test_a_name_that_is_not_utf8_is_spelt_out(tmp_path):
    write(tmp_path / "0.tar", pair("\udce9t"), format=tarfile.GNU_FORMAT)
    (row,) = read_tars(tmp_path / "0.tar")
    assert row["id"] == "0/\\udce9t" and row["captions"] == ["c"]


@pytest.mark.parametrize("members", [[], [("LICENSE", b"no sample"), ("0.npy", b"1"), ("._0.png", b"an archiver's")]])
def test_an_archive_without_a_sample_is_counted(tmp_path, members):
    assert captions(write(tmp_path / "0.tar", members)) == ({"no_sample": 1}, [])


def test_memory_is_bounded_by_what_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr("train.tars.MAX_BYTES", 2**20)
    unwanted = [(f"0.x{i}", bytes(2**22)) for i in range(8)]
    images = [(f"0.{ending}", bytes(2**19)) for ending in ("jpg", "png", "webp", "gif", "bmp", "tif", "jp2", "avif")]
    large = [("1.png", bytes(2**23)), ("1.txt", b"large"), ("2.png", png(1)), ("2.txt", bytes(2**22))]
    write(tmp_path / "0.tgz", [*images, *unwanted, ("0.txt", b"c"), *large, *pair("3", "good")], "w:gz")
    tracemalloc.start()
    bad, good = captions(tmp_path / "0.tgz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bad == {"too_many_bytes": 2} and good == [["c"], ["good"]]
    assert peak < 2**22, peak  # 52 MiB unpacked


def test_a_header_of_endless_length_is_not_read(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 2**22}
    ) as tar:
        add(tar, "0.png", png(1))
    (tmp_path / "0.tgz").write_bytes(gzip.compress(buffer.getvalue()))
    assert captions(tmp_path / "0.tgz") == ({"broken_archive": 1}, [])


def test_other_endings_can_be_wanted(tmp_path):
    write(tmp_path / "0.tar", [("0.mp3", b"sound"), ("0.txt", b"words")])
    (sample,) = read_samples(tmp_path / "0.tar", ("mp3",))
    assert sample.files == {"mp3": b"sound"} and sample.image is None
