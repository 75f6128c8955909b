"""A saved pool is the one that was saved: damage, kills in the midst of a save, foreign references, pickling."""

import json
import os
import pickle
import shutil

import datasets
import numpy as np
import pytest

from modeling_unimur import CandidatePool
from modeling_unimur.images_unimur import BadImageError
from modeling_unimur.pool_arrow import Batch, write_arrow
from modeling_unimur.pool_files import Description, adopt
from tests.conftest import picture
from tests.modeling_unimur.pools import MADE_BY, unit
from tests.stress.pool_corruption import SAME, in_child, run

QUERIES = unit(4, 11)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a kill is tried in a forked process")


def pool_of(texts: int, seed: int = 1) -> CandidatePool:
    pool = CandidatePool.empty(MADE_BY).append("image", [picture(i) for i in range(6)], unit(6, seed))
    return pool.append("text", [f"{seed}.{i}" for i in range(texts)], unit(texts, seed + 1))


def answers(pool: CandidatePool) -> list:
    return [[(c.id, c.score, c.source) for c in reply.candidates] for reply in pool.search(QUERIES, top_k=30)]


# Damage


@needs_fork
def test_damage_is_refused_or_harmless():
    outcomes, bad = run(60, seed=1)
    assert not bad and outcomes.total() == 60 and outcomes[SAME] < 40


@pytest.mark.parametrize("at_once", [True, False])
def test_a_damaged_block_is_named_when_it_is_opened_or_read(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("modeling_unimur.pool_digests.BLOCK", 256)
    monkeypatch.setattr("modeling_unimur.pool_arrow.CHECKED_AT_ONCE", 2**30 if at_once else 0)
    pool = pool_of(20)
    pool.save_to_disk(tmp_path)
    expected = answers(pool)
    (path,) = tmp_path.glob("*.arrow")
    good = path.read_bytes()
    picture_at = good.index(pool[3].source.encode() if pool[3].source else pool.dataset[3]["image"]["bytes"]) + 300
    vector_at = good.index(np.float32(unit(6, 1)[2].numpy()).tobytes())
    for place in (picture_at, vector_at):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        if at_once:
            with pytest.raises(ValueError, match=r"data-.*\.arrow' is damaged \(the content from byte \d+"):
                CandidatePool.load_from_disk(tmp_path)
            continue
        again = CandidatePool.load_from_disk(tmp_path)
        with pytest.raises(ValueError, match=r"data-.*\.arrow' is damaged \(the content from byte \d+"):
            again.verify()
        if place == vector_at:
            with pytest.raises(ValueError, match="damaged"):
                again.search(QUERIES)
            with pytest.raises(ValueError, match="damaged"):
                again.embeddings.take(np.array([2]))
        else:  # what is not read of it is as good as ever
            assert again[2].item.tobytes() == picture(2).tobytes() and again.ids == pool.ids
            with pytest.raises(ValueError, match="damaged"):
                again[3]
            with pytest.raises(ValueError, match="damaged"):
                again.append("text", ["x"], unit(1))[3]
    path.write_bytes(good)
    again = CandidatePool.load_from_disk(tmp_path)
    assert answers(again) == expected
    again.verify()


def test_a_missing_or_foreign_description_is_named(tmp_path):
    pool_of(3).save_to_disk(tmp_path)
    path = tmp_path / "pool.json"
    good = path.read_text()
    for text in ("", "[]", "{}", "{", good[:-40], good.replace('"dimension": 8', '"dimension": 9'), '{"towers": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"pool\.json' is damaged"):
            CandidatePool.load_from_disk(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no pool"):
        CandidatePool.load_from_disk(tmp_path)


def test_a_pool_saved_before_there_were_digests_opens_and_is_called_unchecked(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_unimur.pool_files.logger.warning", messages.append)
    pool = pool_of(20)
    former_format(pool, tmp_path)
    again = CandidatePool.load_from_disk(tmp_path)
    assert answers(again) == answers(pool) and "saved without digests" in messages.pop()
    again.save_to_disk(tmp_path)  # in place: its rows as they lie, and digests
    assert (tmp_path / "data-00000-of-00001.arrow").is_file()
    assert answers(CandidatePool.load_from_disk(tmp_path)) == answers(pool) and not messages


def former_format(pool: CandidatePool, folder) -> None:
    """As pools were saved at first."""
    pool.dataset.save_to_disk(str(folder))
    (folder / "pool.json").write_text(json.dumps(MADE_BY))


# Kills


def at_change(patch: pytest.MonkeyPatch, number: int, act) -> list:
    """Acts at the n-th change of a folder; all changes so far."""
    changes = []

    def patched(real):
        def call(*arguments, **named):
            changes.append(real.__name__)
            if len(changes) == number:
                act()
            return real(*arguments, **named)

        return call

    for name in ("replace", "unlink", "rmdir"):
        patch.setattr(os, name, patched(getattr(os, name)))
    return changes


def full() -> None:
    raise OSError(28, "No space left on device")


@needs_fork
@pytest.mark.parametrize("how", ["kill", "full disk"])
@pytest.mark.parametrize("change", ["another pool", "an index added", "an index dropped"])
def test_a_save_that_ends_anywhere_leaves_the_old_pool_or_the_new_one(tmp_path, monkeypatch, change, how):
    monkeypatch.setattr("modeling_unimur.pool_arrow.BATCH_ROWS", 15)
    start, folder = tmp_path / "start", tmp_path / "pool"
    old = pool_of(20)
    if change != "another pool":
        pytest.importorskip("faiss")
    (old.build_index("sq8") if change == "an index dropped" else old).save_to_disk(start, max_shard_size=1)

    def save():
        if change == "another pool":
            pool = pool_of(4, seed=5)
        else:
            pool = CandidatePool.load_from_disk(folder, index=False)
            pool = pool.build_index("sq8") if change == "an index added" else pool
        return pool.save_to_disk(folder)

    def state():
        pool = CandidatePool.load_from_disk(folder)
        return answers(pool), None if pool.index is None else pool.index.about["kind"]

    monkeypatch.setattr("os.fsync", lambda handle: None)
    shutil.copytree(start, folder)
    before = state()
    with monkeypatch.context() as patch:
        changes = at_change(patch, 0, full)
        save()
    after, names = state(), sorted(f.name for f in folder.iterdir())
    assert before != after and not [name for name in names if name.startswith(".saving")]

    def dies(number):
        at_change(monkeypatch, number, full if how == "full disk" else lambda: os._exit(1))
        save()
        return 0

    states = []
    for number in range(1, len(changes) + 1):
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
        in_child(lambda number=number: dies(number))
        states.append(state())
        assert states[-1] in (before, after), number
        save()  # goes through, and cleans up after the one that did not
        assert state() == after and sorted(f.name for f in folder.iterdir()) == names, number
    assert before in states and after in states and len(states) > 5


# Foreign pools


def with_path(folder, path: str) -> None:
    """A saved pool whose first image is a reference to a file."""
    folder.mkdir(exist_ok=True)
    pool = pool_of(2)
    rows = pool.dataset.to_list()
    rows[0]["image"] = {"bytes": None, "path": path}
    rows = datasets.Dataset.from_list(rows, features=pool.dataset.features)
    write_arrow(rows, folder / "data-0.arrow", [Batch(0, len(rows), 0)], copy_images=False)
    adopt(folder, ["data-0.arrow"], MADE_BY)


def test_a_foreign_pool_reads_no_local_file(tmp_path):
    secret = tmp_path / "secret.png"
    picture(9).save(secret)
    folder = tmp_path / "foreign"
    for path in (str(secret), "../secret.png", "/etc/hostname"):
        with_path(folder, path)
        with pytest.raises(ValueError, match=r"1 images .* row 0 only names .*image_folder="):
            CandidatePool.load_from_disk(folder)
        pool = CandidatePool.load_from_disk(folder, image_folder=folder)
        for leak in (lambda pool=pool: pool[0], lambda pool=pool: pool.save_to_disk(tmp_path / "copy")):
            with pytest.raises(ValueError, match="is outside"):
                leak()
        assert not list((tmp_path / "copy").glob("*.arrow"))
    (folder / "photos").mkdir()
    (folder / "photos" / "link.png").symlink_to(secret)
    picture(3).save(folder / "photos" / "own.png")
    for name, good in (("link.png", False), ("own.png", True)):
        shutil.rmtree(folder / "rows", ignore_errors=True)
        with_path(folder / "rows", name)
        pool = CandidatePool.load_from_disk(folder / "rows", image_folder=folder / "photos")
        if good:
            assert pool[0].item.tobytes() == picture(3).tobytes()
            pool.save_to_disk(tmp_path / "copy")
            assert CandidatePool.load_from_disk(tmp_path / "copy")[0].item.tobytes() == picture(3).tobytes()
        else:
            with pytest.raises(ValueError, match="is outside"):
                pool[0]


def test_a_foreign_pool_names_no_file_outside_its_folder(tmp_path):
    former_format(pool_of(2), tmp_path / "good")
    (arrow,) = (tmp_path / "good").glob("*.arrow")
    shutil.copyfile(arrow, tmp_path / "x.arrow")
    for name in ("../x.arrow", str(tmp_path / "x.arrow")):
        state = json.loads((tmp_path / "good" / "state.json").read_text())
        state["_data_files"] = [{"filename": name}]
        (tmp_path / "good" / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match=r"x\.arrow' is outside"):
            CandidatePool.load_from_disk(tmp_path / "good")
    pool_of(2).save_to_disk(tmp_path / "new")
    (arrow,) = (tmp_path / "new").glob("*.arrow")
    shutil.move(arrow, tmp_path / "outside.arrow")
    arrow.symlink_to(tmp_path / "outside.arrow")
    with pytest.raises(ValueError, match="is outside"):
        CandidatePool.load_from_disk(tmp_path / "new")


def test_a_hub_downloads_links_are_its_own(tmp_path):
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "r1", tmp_path / "repo" / "blobs"
    pool_of(2).save_to_disk(snapshot / "pool")
    blobs.mkdir()
    for file in (snapshot / "pool").iterdir():
        shutil.move(file, blobs / file.name)
        file.symlink_to(f"../../../blobs/{file.name}")
    assert answers(CandidatePool.load_from_disk(snapshot / "pool")) == answers(pool_of(2))


def test_only_images_are_copied(tmp_path):
    (tmp_path / "words.png").write_text("not a picture")
    picture(1).save(tmp_path / "good.png")
    pool = CandidatePool.empty(MADE_BY).append("image", [tmp_path / "good.png", tmp_path / "words.png"], unit(2))
    with pytest.raises(BadImageError, match=r"candidate 'words\.png': .*not an image"):
        pool.save_to_disk(tmp_path / "pool")
    assert not list((tmp_path / "pool").iterdir())
    pool = CandidatePool.empty(MADE_BY).append("image", [tmp_path / "good.png"], unit(1))
    assert pool[0].source == str(tmp_path / "good.png")
    pool.save_to_disk(tmp_path / "pool")
    again = CandidatePool.load_from_disk(tmp_path / "pool")
    assert again[0].source == "good.png" and again.ids == ["good.png"]  # and no folder of this machine's
    assert str(tmp_path).encode() not in next((tmp_path / "pool").glob("*.arrow")).read_bytes()


# Pickling


def test_a_pickled_pool_reopens_its_files(tmp_path):
    images = [picture(i) for i in range(3)]
    pool = CandidatePool.empty(MADE_BY).append("image", images, unit(3)).append("text", ["a"] * 3000, unit(3000, 2))
    pool.save_to_disk(tmp_path)
    loaded = CandidatePool.load_from_disk(tmp_path)
    expected = answers(loaded)
    loaded.search(QUERIES, exclude=["text-5"], calibrate=True)
    assert len(pickle.dumps(loaded)) < 3000
    assert answers(pickle.loads(pickle.dumps(loaded))) == expected
    longer = loaded.append("text", ["b"], unit(1, 7))
    assert len(pickle.dumps(longer)) < 10_000 and answers(pickle.loads(pickle.dumps(longer))) == answers(longer)
    assert answers(pickle.loads(pickle.dumps(pool))) == expected  # out of memory
    data = pickle.dumps(loaded)
    pool_of(2).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="another pool was saved"):
        pickle.loads(data)


def test_a_pickled_index_comes_along(tmp_path):
    pytest.importorskip("faiss")
    pool_of(20).save_to_disk(tmp_path)
    indexed = CandidatePool.load_from_disk(tmp_path).build_index("sq8")
    again = pickle.loads(pickle.dumps(indexed))  # in memory alone
    assert again.index.about == indexed.index.about and answers(again) == answers(indexed)
    indexed.save_to_disk(tmp_path)
    assert len(pickle.dumps(indexed)) < 4000
    again = pickle.loads(pickle.dumps(indexed))
    assert again.index.about == indexed.index.about and answers(again) == answers(indexed)


def test_a_saved_pool_is_a_dataset_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_unimur.pool_arrow.BATCH_ROWS", 3)
    pool = pool_of(5)
    pool.save_to_disk(tmp_path, max_shard_size=1)
    rows = datasets.load_from_disk(str(tmp_path))
    assert rows["id"][:] == pool.ids and len(Description.read(tmp_path).rows) > 1
