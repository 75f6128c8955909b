"""Exact search streamed over Arrow's blocks: the order of a full sort, whatever the blocks, the kinds and the batch."""

import json

import numpy as np
import pytest
import torch

import modeling_unimur.pool_exact as exact
from modeling_unimur import CandidatePool
from modeling_unimur.pool_exact import Embeddings
from tests.conftest import picture

MADE_BY = {"towers": "t", "maps": "m", "dimension": 8}


def unit(n, seed=0, q=8):
    return torch.nn.functional.normalize(torch.randn(n, q, generator=torch.Generator().manual_seed(seed)), dim=-1)


def mixed_pool(sizes=(7, 13, 1, 40, 29)):
    """Runs of images and texts by turns, so that blocks hold both; every fifth embedding has a duplicate."""
    pool, picture_ = CandidatePool.empty(MADE_BY), picture(0)
    for i, n in enumerate(sizes):
        embeddings = unit(n, seed=i)
        embeddings[1::5] = embeddings[: len(embeddings[1::5])]
        pool = pool.append(
            *(("text", [f"{i}.{j}" for j in range(n)]) if i % 2 else ("image", [picture_] * n)), embeddings
        )
    return pool


def by_sorting(pool, queries, k, kind, banned=()):
    table = torch.tensor(pool.dataset["embedding"][:]).double()
    scores = (queries.double() @ table.T).float().numpy()
    rows = np.array([i for i, m in enumerate(pool.dataset["modality"][:]) if m == kind and i not in banned])
    order = np.argsort(-scores[:, rows], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores[:, rows], order, 1), rows[order]


@pytest.mark.parametrize("block", [1, 4, 16, 1000])
@pytest.mark.parametrize("saved", [False, True])
def test_every_blocking_gives_the_order_of_a_full_sort(monkeypatch, tmp_path, block, saved):
    monkeypatch.setattr(exact, "BLOCK", block)
    monkeypatch.setattr("modeling_unimur.pool_arrow.BATCH_ROWS", 11)
    pool = mixed_pool()
    if saved:
        pool.save_to_disk(tmp_path / "pool", max_shard_size=3000)
        pool = CandidatePool.load_from_disk(tmp_path / "pool")
        assert len(pool.embeddings.views) >= 90 // 11 and len(list((tmp_path / "pool").glob("*.arrow"))) > 1
    queries = torch.cat([unit(5, seed=9), pool_rows(pool, [0, 20])])
    for k in (1, 3, 60):
        for kinds in (("image",), ("text",), ("image", "text")):
            best = pool.embeddings.top(queries.numpy(), k, kinds, np.array([0, 3, 21, 70]))
            assert set(best) == set(kinds)
            for kind, (scores, rows) in best.items():
                expected = by_sorting(pool, queries, k, kind, {0, 3, 21, 70})
                assert np.array_equal(scores[:, : expected[0].shape[1]], expected[0])
                assert np.array_equal(rows[:, : expected[1].shape[1]], expected[1])
                assert (rows[:, expected[1].shape[1] :] == -1).all()


def pool_rows(pool, rows):
    return torch.from_numpy(pool.embeddings.take(np.array(rows)))


def test_equal_scores_come_lower_row_first_at_the_cut():
    pool = CandidatePool.empty(MADE_BY).append("text", [str(i) for i in range(50)], unit(1).repeat(50, 1))
    (reply,) = pool.search(unit(1), top_k=7, exclude=["text-2"])
    assert [c.id for c in reply.candidates] == [f"text-{i}" for i in (0, 1, 3, 4, 5, 6, 7)]


def test_the_batch_changes_no_score():
    pool, queries = mixed_pool(), unit(6, seed=3)
    together = pool.search(queries, top_k=20)
    for query, reply in zip(queries, together, strict=True):
        (alone,) = pool.search(query[None], top_k=20)
        assert [(c.id, c.score) for c in alone.candidates] == [(c.id, c.score) for c in reply.candidates]


def test_no_query_finds_nothing():
    assert mixed_pool().search(torch.empty(0, 8)) == []


def test_embeddings_are_views_on_the_mapped_file(tmp_path):
    mixed_pool().save_to_disk(tmp_path)
    table = CandidatePool.load_from_disk(tmp_path).dataset.data
    embeddings = Embeddings(table)
    buffers = [chunk.values.buffers()[1] for chunk in table.column("embedding").chunks]
    for view in embeddings.views:
        assert any(b.address <= view.ctypes.data < b.address + b.size for b in buffers)


def test_a_sliced_and_a_selected_dataset_are_searched_as_they_are():
    pool = mixed_pool()
    for rows in (range(5, 30), [40, 3, 20]):
        part = CandidatePool(pool.dataset.select(rows), MADE_BY)
        assert len(part) == len(rows) == len(part.embeddings)
        ids = {c.id for c in part.search(unit(1), top_k=50)[0].candidates}
        assert ids == {pool.dataset[i]["id"] for i in rows}


def test_statistics_are_those_of_the_whole_and_stay_with_the_pool(monkeypatch, tmp_path):
    monkeypatch.setattr(exact, "CHUNK", 4)
    pool = mixed_pool()
    table = torch.tensor(pool.dataset["embedding"][:])
    images = torch.tensor([m == "image" for m in pool.dataset["modality"][:]])
    for kind, mine in (("image", table[images]), ("text", table[~images])):
        mean, covariance = pool.embeddings.statistics(kind)
        assert np.allclose(mean, mine.mean(0), atol=1e-6)
        assert np.allclose(covariance, torch.cov(mine.T, correction=0), atol=1e-6)
    before = pool.search(unit(2, 5), calibrate=True)
    pool.save_to_disk(tmp_path)
    again = CandidatePool.load_from_disk(tmp_path)
    monkeypatch.setattr(Embeddings, "statistics", lambda *a: pytest.fail("computed again"))
    after = again.search(unit(2, 5), calibrate=True)
    assert [[c.score for c in r.candidates] for r in before] == [[c.score for c in r.candidates] for r in after]


def test_ids_are_not_read_again_when_a_pool_is_loaded_or_searched(monkeypatch, tmp_path):
    mixed_pool().save_to_disk(tmp_path)
    monkeypatch.setattr("pyarrow.compute.count_distinct", lambda *a, **k: pytest.fail("checked again"))
    pool = CandidatePool.load_from_disk(tmp_path)
    pool.search(unit(1))
    assert pool._rows is None
    pool.search(unit(1), exclude=["text-7"])
    assert pool._rows is not None


def test_saving_over_a_pool_replaces_it_whole_or_not_at_all(monkeypatch, tmp_path):
    mixed_pool().save_to_disk(tmp_path, max_shard_size=2000)
    (tmp_path / "mine.txt").write_text("kept")
    short = CandidatePool.empty(MADE_BY).append("text", ["a"], unit(1))

    def full(*a):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("os.fsync", full)
        short.save_to_disk(tmp_path)
    assert len(CandidatePool.load_from_disk(tmp_path)) == 90
    short.save_to_disk(tmp_path)
    assert len(CandidatePool.load_from_disk(tmp_path)) == 1 and (tmp_path / "mine.txt").exists()
    assert sorted(f.name.split("-of-")[0] for f in tmp_path.iterdir()) == [
        "data-00000",
        "dataset_info.json",
        "mine.txt",
        "pool.json",
        "state.json",
    ]
    loaded = CandidatePool.load_from_disk(tmp_path)
    with pytest.raises(PermissionError, match="save it elsewhere"):
        loaded.append("text", ["b"], unit(1)).save_to_disk(tmp_path)


def test_pools_that_datasets_itself_saved_still_load(tmp_path):
    pool = mixed_pool()
    pool.dataset.save_to_disk(str(tmp_path))  # as the first version of save_to_disk did
    (tmp_path / "pool.json").write_text(json.dumps(MADE_BY))
    again = CandidatePool.load_from_disk(tmp_path)
    assert [c.id for c in again.search(unit(1))[0].candidates] == [c.id for c in pool.search(unit(1))[0].candidates]


def test_an_empty_pool_is_saved_and_extended(tmp_path):
    CandidatePool.empty(MADE_BY).save_to_disk(tmp_path)
    pool = CandidatePool.load_from_disk(tmp_path)
    assert len(pool) == 0
    assert pool.append("text", ["a"], unit(1)).search(unit(1))[0].text == "a"


def test_large_images_make_short_record_batches(monkeypatch, tmp_path):
    monkeypatch.setattr("modeling_unimur.pool_arrow.BATCH_BYTES", 1000)
    pool = CandidatePool.empty(MADE_BY).append("image", [bytes(600), bytes(600), bytes(300), bytes(5000)], unit(4))
    pool.save_to_disk(tmp_path)
    assert [len(v) for v in CandidatePool.load_from_disk(tmp_path).embeddings.views] == [1, 2, 1]


def test_above_a_size_exact_search_names_the_index_once(monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_unimur.pool_unimur.ADVISE_INDEX", 50)
    monkeypatch.setattr("modeling_unimur.pool_unimur.logger.warning", messages.append)
    pool = mixed_pool()
    pool.search(unit(1)), pool.search(unit(1))
    assert len(messages) == 1 and "build_index" in messages[0]


def test_more_equal_candidates_than_are_kept_pending(monkeypatch):
    monkeypatch.setattr(exact, "PENDING", 5)
    monkeypatch.setattr(exact, "BLOCK", 16)
    nearer = torch.nn.functional.normalize(unit(1) + 1e-7 * unit(1, 4), dim=-1)
    pool = CandidatePool.empty(MADE_BY).append("text", [str(i) for i in range(200)], unit(1).repeat(200, 1))
    pool = pool.append("text", ["nearly"], nearer)
    queries = torch.cat([unit(1), unit(1, 2)])
    scores, rows = pool.embeddings.top(queries.numpy(), 7, ("text",))["text"]
    expected = by_sorting(pool, queries, 7, "text")
    assert np.array_equal(rows, expected[1]) and np.array_equal(scores, expected[0])
