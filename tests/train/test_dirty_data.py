"""A dirty set in every layout: each reason is counted exactly, in training and in caching, and no good sample is lost."""

import json
import tarfile
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from tests.conftest import picture
from tests.tiny import make_processor
from tests.train.test_data import png
from tests.train.test_tars import pair, write
from train.collate import PairCollator, SkipCounter, TooManyBadPairsError
from train.data import load_pairs


def photos(folder):
    """An image folder with jsonl metadata: 5 good of 14."""
    folder.mkdir()
    for i in range(5):
        picture(i).save(folder / f"{i}{('.png', '.jpg', '.webp', '.avif', '.TIFF')[i]}")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff"), (folder / "empty.png").write_bytes(b"")
    names = ["0.png", "1.jpg", "2.webp", "3.avif", "4.TIFF", "gone.png", "bad.jpg", "empty.png", "../x.png", "/x.png"]
    lines = [json.dumps({"file_name": name, "caption": name}) for name in names]
    lines += [
        '{"file_name": "0.png", "caption": "\\ud83d"}',
        '{"file_name": "0.png"',
        "[]",
        '{"file_name": "0.png", "text": " "}',
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    lost = {"missing": 1, "undecodable": 1, "empty": 1, "outside_folder": 2, "half_character": 1, "not_json": 2}
    return folder, None, lost | {"empty_caption": 1}, 5


def table(folder):
    """A csv of a spreadsheet: 3 good of 8."""
    folder.mkdir()
    picture(1).save(folder / "a.png")
    rows = ["a.png;un chat", 'a.png;"open', 'a.png;"un; chien"', "a.png;un;cheval", "a.png;été", ";sans nom", "a.png;"]
    text = "\r\n".join(["file_name;caption", *rows, 'a.png;"[""x"", ""y""]"'])
    (folder / "metadata.csv").write_bytes(text.encode("latin-1"))
    return folder, None, {"broken_row": 2, "not_utf8": 1, "no_file_name": 1, "empty_caption": 1}, 3


def alike(folder):
    """Pictures with a text beside each: 2 good of 5."""
    (folder / "in").mkdir(parents=True)
    for name in ("1.png", "2.jpg", "3.png", "in/4.png"):
        picture(1).save(folder / name)
    (folder / "5.heic").write_bytes(b"ftypheic")
    for name, text in (("1", b"one"), ("2", b"\xff\xfe"), ("in/4", b"four"), ("5", b"five")):
        (folder / f"{name}.txt").write_bytes(text)
    return folder, None, {"not_utf8": 1, "empty_caption": 1, "undecodable": 1}, 2


def links(folder):
    """CC12M's tsv: 2 good of 6."""
    import zlib

    folder.mkdir()
    urls = [f"http://x.example/{i}.jpg" for i in range(3)]
    for i in range(2):
        picture(i).save(folder / f"{i}_{zlib.crc32(urls[i].encode())}.jpg")
    lines = [f"{url}\tcaption".encode() for url in urls] + [
        b"http://x.example/3.jpg",
        b"http://\tcaf\xe9",
        b"http://y\ta\tb",
    ]
    (folder / "cc12m.tsv").write_bytes(b"\n".join(lines))
    return folder / "cc12m.tsv", folder, {"missing": 1, "broken_row": 2, "not_utf8": 1}, 2


def archives(folder):
    """Tar archives in folders, whole and broken, packed and appended: 12 good of 24."""
    (folder / "deep").mkdir(parents=True)
    good = [*pair("a.b"), *pair("a.c", ending="PNG"), ("json.png", png(1)), ("json.json", b'{"caption": ["x", "y"]}')]
    odd = [
        ("n.png", png(1)),
        ("o.txt", b"no image"),
        ("p.png", b""),
        ("p.txt", b"p"),
        ("q.png", b"\x89PNG"),
        ("q.txt", b"q"),
    ]
    more = [
        ("r.png", png(1)),
        ("r.txt", b"\xe9"),
        *pair("../s"),
        ("t.png", "a.b.png", tarfile.SYMTYPE),
        ("t.txt", b"t"),
    ]
    write(folder / "00000.tar", [*good, *odd, *more, *pair("0"), *pair("0")])  # 5 good, 7 bad
    write(
        folder / "deep" / "00001.TAR.gz", [*pair("1"), *pair("2", " "), ("3.png", png(1)), ("3.json", b"[]")], "w:gz"
    )  # 1, 2
    (folder / "00003.tar").touch()
    write(folder / "00004.tar", [("LICENSE", b"")])
    parts = [write(folder / f"{n}.part", pair(str(n))).read_bytes() for n in range(2)]
    (folder / "00005.tar").write_bytes(b"".join(parts))  # 2
    whole = write(folder / "x.part", [*pair("1"), *pair("2"), *pair("3")]).read_bytes()
    (folder / "00006.tar").write_bytes(whole[: whole.index(b"3.png\0") + 600])  # 2 good, 1 broken
    write(folder / "00007.tar", [*pair("w", ending="webp"), *pair("v", ending="jfif")])  # 2, PNG inside
    lost = {
        "empty_caption": 3,
        "missing": 1,
        "empty": 1,
        "undecodable": 1,
        "not_utf8": 1,
        "outside_folder": 1,
        "link": 1,
    }
    return folder, None, lost | {"broken_archive": 2, "no_sample": 1}, 12


LAYOUTS = (photos, table, alike, links, archives)


def collated(rows, workers=0):
    collator, skips, good = PairCollator(make_processor(), caption="first"), SkipCounter(), Counter()
    collator.named = True
    for batch in DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=workers):
        skips.update(batch["skipped"], batch["n_seen"])
        if batch["n_seen"] > sum(batch["skipped"].values()):
            good.update(batch["names"])
    return skips, good


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_every_reason_is_counted_and_no_good_sample_lost(make, tmp_path):
    path, images, lost, good = make(tmp_path / "data")
    rows = load_pairs(path, images)
    for workers in (0, 2) if make is archives else (0,):
        skips, names = collated(rows, workers)
        assert dict(skips.counts) == lost and names.total() == good and skips.seen == good + sum(lost.values())


def test_caching_counts_the_same(tmp_path, fresh):
    from train.features import cache_image_features

    model = fresh()
    for make in (photos, table):
        path, _, lost, good = make(tmp_path / make.__name__)
        skips = SkipCounter()
        cached = cache_image_features(load_pairs(path), model, skips)
        without_caption = lost.pop("empty_caption")  # their images are good; training counts them
        assert dict(skips.counts) == lost and len(cached) == good + without_caption


def test_too_large_a_share_stops_a_run_and_says_which(tmp_path):
    skips, _ = collated(load_pairs(table(tmp_path / "table")[0]))
    skips.check(0.63)
    with pytest.raises(TooManyBadPairsError, match=r"5 of 8 pairs left out \(62\.5%\): broken_row 2, not_utf8 1"):
        skips.check(0.62)
