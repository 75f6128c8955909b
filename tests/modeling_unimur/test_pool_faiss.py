"""Approximate search: exact scores, measured recall, exclusion, persistence, and the refusal of a stale index."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_unimur import CandidatePool
from modeling_unimur.pool_faiss import Recipe
from modeling_unimur.pool_files import Description

pytest.importorskip("faiss")
Q = 16
MADE_BY = {"towers": "t", "maps": "m", "dimension": Q}


def unit(n, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, Q, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def pool():
    empty = CandidatePool.empty(MADE_BY)
    texts = empty.append("text", [f"text {i}" for i in range(700)], unit(700, 1))
    return texts.append("image", [b"not decoded here"] * 900, unit(900, 2)).append("text", ["last"], unit(1, 3))


def ids(pool, queries, **arguments):
    return [[(c.id, c.score) for c in reply.candidates] for reply in pool.search(queries, **arguments)]


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "sq8", "pq", "PCA8,SQfp16"])
def test_each_kind_finds_nearly_what_exact_search_finds(pool, kind):
    queries = unit(50, 9)
    indexed = pool.build_index(kind, queries=queries)
    about = indexed.index.about
    assert about["recall_queries"] == "50 given" and set(about["recall_at_10"]) == {"image", "text"}
    assert pool.index is None
    approximate, exact = ids(indexed, queries, modality="text"), ids(pool, queries, modality="text")
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(approximate, exact, strict=True)])
    assert hits == pytest.approx(about["recall_at_10"]["text"], abs=1e-6)
    assert hits >= (0.95 if kind in ("hnsw", "sq8", "pq", "ivf") else 0.5)
    for one, other in zip(approximate, exact, strict=True):
        assert all(dict(other).get(i, s) == s for i, s in one)  # to the last bit


def test_the_joint_query_merges_the_modalities(pool, monkeypatch):
    monkeypatch.setattr("modeling_unimur.replies_unimur.decode_image", lambda image: "decoded")
    queries = unit(20, 5)
    indexed = pool.build_index("sq8")
    for arguments in ({}, {"calibrate": True}, {"image_bias": 0.1}, {"top_k": 1}, {"modality": "image"}):
        assert ids(indexed, queries, **arguments) == ids(pool, queries, **arguments)


def test_excluded_ids_never_come_and_their_places_are_filled(pool):
    indexed, queries = pool.build_index("hnsw"), unit(8, 6)
    first = {i for reply in ids(pool, queries, modality="text") for i, _ in reply}
    for reply in ids(indexed, queries, modality="text", exclude=first):
        assert len(reply) == 10 and not first & {i for i, _ in reply}
    scanned = pool.build_index("sq8")
    assert ids(scanned, queries, modality="text", exclude=first) == ids(pool, queries, modality="text", exclude=first)
    many = [f"text-{i}" for i in range(690)]
    assert ids(indexed, queries, modality="text", exclude=many) == ids(pool, queries, modality="text", exclude=many)
    assert len(ids(indexed, queries, modality="text", exclude=many)[0]) == 10


def test_where_the_index_returns_too_few_the_rest_is_exact(pool):
    indexed = pool.build_index("IVF64,Flat", search="nprobe=1", oversample=1)
    hits = ids(indexed, unit(30, 7), top_k=40, modality="text")
    assert all(len(reply) == 40 for reply in hits)


def test_effort_is_doubled_until_recall_is_good(pool, monkeypatch):
    few = {"hnsw": Recipe("HNSW16", "efSearch=2", 1), "ivf": Recipe("IVF32,Flat", "nprobe=1", 1)}
    monkeypatch.setattr("modeling_unimur.pool_faiss.recipe", lambda kind, *_: few[kind])
    for kind in few:
        name, least = few[kind].search.split("=")
        given = pool.build_index(kind, search=few[kind].search).index.about
        tuned = pool.build_index(kind).index.about
        for modality, search in tuned["search"].items():
            assert search in {f"{name}={int(least) * 2**i}" for i in range(1, 5)}
            assert tuned["recall_at_10"][modality] > given["recall_at_10"][modality] + 0.1
            half = f"{name}={int(search.split('=')[1]) // 2}"
            assert pool.build_index(kind, search=half).index.about["recall_at_10"][modality] < 0.95


def test_low_recall_is_a_warning(pool, monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_unimur.pool_faiss.logger.warning", messages.append)
    about = pool.build_index("PQ1x4fs", oversample=1).index.about
    assert max(about["recall_at_10"].values()) < 0.5 and "oversample=" in messages[0]
    assert about["recall_queries"] == "200 of the pool's own embeddings, each without itself"


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "pq"])
def test_an_index_is_saved_and_loaded_with_its_pool(pool, tmp_path, kind):
    indexed = pool.build_index(kind)
    indexed.save_to_disk(tmp_path / "pool")
    again = CandidatePool.load_from_disk(tmp_path / "pool")
    assert again.index.about == indexed.index.about and kind in repr(again)
    queries = unit(10, 8)
    assert ids(again, queries, modality="text") == ids(indexed, queries, modality="text")
    assert CandidatePool.load_from_disk(tmp_path / "pool", index=False).index is None


def test_an_index_is_added_to_a_saved_pool_without_writing_its_rows_again(pool, tmp_path):
    pool.save_to_disk(tmp_path)
    before = {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.arrow")}
    CandidatePool.load_from_disk(tmp_path).build_index("sq8").save_to_disk(tmp_path)
    loaded = CandidatePool.load_from_disk(tmp_path)
    assert loaded.index.about["kind"] == "sq8"
    assert {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("*.arrow")} == before
    CandidatePool.load_from_disk(tmp_path, index=False).save_to_disk(tmp_path)
    assert not list(tmp_path.glob("index*"))


def test_a_stale_index_is_refused_and_left_behind_on_append(pool, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_unimur.pool_unimur.logger.warning", messages.append)
    indexed = pool.build_index("sq8")
    longer = indexed.append("text", ["new"], unit(1, 99))
    assert longer.index is None and "does not cover the 1 new" in messages[0]
    assert longer.search(unit(1, 99), modality="text")[0].text == "new"
    indexed.save_to_disk(tmp_path)
    about = Description.read(tmp_path)
    for name, other in (("content", "0" * 16), ("made_by", MADE_BY | {"maps": "x"})):
        replace(about, index=about.index | {name: other}).write(tmp_path / "pool.json")
        with pytest.raises(ValueError, match=f"stale: its {name} is .* index=False"):
            CandidatePool.load_from_disk(tmp_path)
        assert CandidatePool.load_from_disk(tmp_path, index=False).index is None


def test_a_modality_of_too_few_is_searched_exactly(pool, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_unimur.pool_faiss.logger.warning", messages.append)
    few = CandidatePool.empty(MADE_BY).append("text", [str(i) for i in range(15)], unit(15, 4))
    mixed = few.append("image", [b"not decoded here"] * 900, unit(900, 2))
    for part in (few, mixed):  # with no index at all, and with one for images alone
        indexed = part.build_index("pq")
        assert "15 texts are too few to train a pq index with" in messages.pop()
        indexed.save_to_disk(tmp_path / str(len(part)))
        again = CandidatePool.load_from_disk(tmp_path / str(len(part)))
        assert set(again.index.indexes) == {"image"} - ({"image"} if part is few else set())
        for one in (indexed, again):
            assert ids(one, unit(5, 6), modality="text") == ids(part, unit(5, 6), modality="text")


def test_bad_requests_are_named(pool, monkeypatch):
    with pytest.raises(ValueError, match=r"kind='hnws' is neither .* dimension 16"):
        pool.build_index("hnws")
    with pytest.raises(ValueError, match="the pool is empty"):
        CandidatePool.empty(MADE_BY).build_index()
    real = builtins.__import__

    def without_faiss(name, *a, **k):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *a, **k)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        pool.build_index()
