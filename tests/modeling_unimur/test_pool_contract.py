"""What every pool does, whatever holds its candidates: in Arrow files, indexed, in Milvus, or in a list of a test's own."""

import os
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.speed.milvus_server import LoopbackMilvus
from modeling_unimur import Candidate, CandidatePool, MilvusPool
from modeling_unimur.pool_base import Pool
from tests.conftest import picture
from tests.modeling_unimur.pools import MADE_BY, ListPool, Q, unit
from tests.processes import ROOT, run_script


class Indexed(CandidatePool):
    """A pool that is indexed again at each `append`."""

    def insert(self, *arguments):
        longer = super().insert(*arguments)
        pool = Indexed(longer.dataset, MADE_BY)
        pool.index = longer.build_index("sq8", oversample=50).index
        return pool


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("milvus", reason="the package milvus, which bundles a real server, is not installed")
    with LoopbackMilvus(tmp_path_factory.mktemp("server")) as running:
        yield running.address


@pytest.fixture(params=["exact", "faiss", "milvus-lite", "milvus", "list"])
def empty(request, tmp_path):
    """An empty pool of a backend; each test has its own."""
    if request.param == "exact":
        return CandidatePool.empty(MADE_BY)
    if request.param == "faiss":
        pytest.importorskip("faiss")
        return Indexed(CandidatePool.empty(MADE_BY).dataset, MADE_BY)
    if request.param == "list":
        return ListPool(MADE_BY)
    pytest.importorskip("pymilvus")
    if request.param == "milvus-lite":
        pytest.importorskip("milvus_lite")
        pool = MilvusPool.create(str(tmp_path / "pool.db"), "p", MADE_BY)
    else:
        pool = MilvusPool.create(request.getfixturevalue("server"), f"p_{abs(hash(request.node.name))}", MADE_BY)
    request.addfinalizer(pool.close)
    return pool


IMAGES, TEXTS = unit(30, 1), unit(40, 2)


def filled(empty: Pool) -> Pool:
    pool = empty.append("image", [picture(i) for i in range(30)], IMAGES)
    return pool.append("text", [f"text {i}" for i in range(40)], TEXTS, range(100, 140))


def ranking(reply):
    return [(c.id, c.modality, c.rank) for c in reply.candidates]


def test_search_ranks_as_a_full_sort(empty):
    """One pool, all that a search is asked for: a real server takes seconds a collection."""
    pool, oracle, queries = filled(empty), filled(ListPool(MADE_BY)), unit(6, 3)
    table = torch.cat([IMAGES, TEXTS])
    names = [*(f"image-{i}" for i in range(30)), *map(str, range(100, 140))]
    for query, reply in zip(queries, pool.search(queries, top_k=70), strict=True):
        order = (table @ query).sort(descending=True)
        assert [c.id for c in reply.candidates] == [names[i] for i in order.indices]
        assert [c.score for c in reply.candidates] == pytest.approx(order.values.tolist(), abs=1e-4)
        assert [c.rank for c in reply.candidates] == [*range(1, 71)]
    for arguments in (
        {}, {"top_k": 1}, {"top_k": 1000}, {"modality": "image"}, {"modality": "text", "top_k": 3}, {"image_bias": 0.3},
        {"calibrate": True}, {"calibrate": True, "image_bias": -1.0}, {"calibrate": True, "modality": "text"},
        {"exclude": ["image-3", "nobody", *map(str, range(100, 110))]}, {"exclude": range(100, 139), "modality": "text"},
    ):  # fmt: skip
        for mine, other in zip(pool.search(queries, **arguments), oracle.search(queries, **arguments), strict=True):
            assert ranking(mine) == ranking(other), arguments
            assert [c.score for c in mine.candidates] == pytest.approx([c.score for c in other.candidates], abs=2e-4)
            assert mine.text == other.text and (mine.image is None) == (other.image is None)
            assert mine.image is None or mine.image.tobytes() == other.image.tobytes()
    # Ids are strings and integers alike, in lists, sets, arrays and tensors.
    for exclude in ([105], ["105"], {105}, np.array([105]), torch.tensor([105]), np.array(["105"]), (np.int64(105),)):
        assert "105" not in {c.id for c in pool.search(TEXTS[5], exclude=exclude)[0].candidates}
    # Queries of any form.
    expected = ranking(pool.search(queries)[0])
    for query in (
        queries[0], queries[0].numpy(), queries[0].tolist(), queries[:1].double(), 3 * queries[0],
        queries[0].clone().requires_grad_(),
    ):  # fmt: skip
        (reply,) = pool.search(query)
        assert ranking(reply) == expected
    assert pool.search(torch.empty(0, Q)) == []


def test_what_is_no_query_is_named(empty):
    pool = empty.append("text", ["a", "b"], unit(2), ["a", "b"])
    nan = unit(2)
    nan[1, 3] = float("nan")
    for query, message in (
        ("hello", r"not words: model\.retrieve"), (unit(2, q=Q + 1), rf"\(n, {Q}\) .*not \(2, {Q + 1}\)"),
        (nan, "queries hold NaN or infinity.*: row 1"), (torch.zeros(1, Q), "row of zeros.*: row 0"),
        (unit(2)[None], "not \\(1, 2, 8\\)"), (["a"], "must be an array"), (None, "must be an array"),
        (torch.full((1, Q), 1e308, dtype=torch.float64), "overflows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pool.search(query)
    for arguments, message in (
        ({"modality": "video"}, "modality='video'"), ({"top_k": 0}, "top_k=0"), ({"exclude": "a"}, "exclude='a' is one"),
        ({"exclude": 3}, "exclude=3 is of type int"), ({"exclude": [None]}, "exclude: the id None"),
        ({"exclude": [float("nan")]}, "the id nan"), ({"exclude": ["a", "b"]}, "no candidate remains"),
        ({"modality": "image"}, "no candidate remains"), ({"image_bias": float("nan")}, "image_bias=nan"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pool.search(unit(1), **arguments)


def test_what_is_no_candidate_is_named_and_nothing_is_added(empty):
    with pytest.raises(ValueError, match="the pool is empty"):
        empty.search(unit(1))
    pool = empty.append("text", ["a"], unit(1), [7])
    nan, zero = unit(2), unit(2)
    nan[1, 0], zero[0] = float("nan"), 0
    both = ["x", "y"]
    for arguments, message in (
        (("video", both, unit(2)), "modality='video' is not"), (("text", both, unit(1)), "2 texts and 1 embeddings"),
        (("text", both, nan, both), "NaN or infinity.*'y'"), (("text", both, zero, both), "row of zeros.*'x'"),
        (("text", both, unit(2, q=4)), rf"\(n, {Q}\)"), (("text", both, unit(2), ["x"]), "1 text ids and 2 texts"),
        (("text", both, unit(2), ["x", "x"]), "duplicate id 'x'"), (("text", both, unit(2), ["7", "x"]), "duplicate id '7'"),
        (("text", both, unit(2), [7, "x"]), "duplicate id '7'"), (("text", ["x", 3], unit(2)), "is of type int"),
        (("text", "xy", unit(2)), "expected a list of texts, got str"), (("text", both, unit(2), "xy"), "is one string"),
        (("image", [None, picture(1)], unit(2)), "missing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pool.append(*arguments)
    assert pool.ids == ["7"]
    # What poisoned calibrate: a second modality and a query make it show.
    pool = pool.append("image", [picture(1)], 5 * unit(1, 4).double().requires_grad_())
    (reply,) = pool.search(unit(1), calibrate=True)
    assert np.isfinite([c.score for c in reply.candidates]).all()
    assert pool.search(unit(1, 4), modality="image")[0].candidates[0].score == pytest.approx(1, abs=1e-5)


def test_a_pool_is_iterated_indexed_and_asked_for_its_ids(empty, tmp_path):
    paths = []
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "panda.jpg")
        picture(seed).save(paths[-1], "PNG")
    pool = empty.append("image", [*paths, str(paths[0]), picture(3)], unit(4))
    pool = pool.append("text", ["hello", "bye"], unit(2, 5))
    assert pool.ids == ["panda.jpg", "panda (2).jpg", "panda (3).jpg", "image-3", "text-4", "text-5"]
    pool = pool.append("image", [paths[1]], unit(1, 6))
    assert pool.ids[-1] == "panda (4).jpg" and len(pool) == 7
    candidates = list(pool)
    assert [c.id for c in candidates] == pool.ids and all(isinstance(c, Candidate) for c in candidates)
    assert [c.modality for c in candidates] == ["image"] * 4 + ["text"] * 2 + ["image"]
    assert pool["hello" if "hello" in pool else "text-4"].item == "hello" == pool[4].item == pool[np.int64(-3)].item
    assert isinstance(pool["panda (2).jpg"].item, Image.Image)
    assert pool["panda (2).jpg"].item.tobytes() == picture(2).tobytes()
    assert pool["panda (2).jpg"].source.endswith("panda.jpg") and pool[3].source is None and pool[4].source is None
    (reply,) = pool.search(unit(4)[1], modality="image")
    assert reply.candidates[0].source.endswith("panda.jpg")
    assert "text-5" in pool and "text-6" not in pool
    for key, error in ((7, IndexError), (-8, IndexError), ("nobody", KeyError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error):
            pool[key]


def test_what_was_appended_is_found_at_once(empty):
    pool = empty
    for i in range(4):
        pool = pool.append("text", [f"text {i}"], unit(1, i), [i])
        assert pool.search(unit(1, i), top_k=1)[0].candidates[0].id == str(i)


def test_a_server_s_pool_holds_what_another_process_inserted_before_it_was_opened(server, tmp_path):
    MilvusPool.create(server, "shared", MADE_BY).close()
    insert = """
        import sys, numpy as np
        from modeling_unimur import MilvusPool

        MilvusPool(sys.argv[1], "shared").append("text", ["hello"], np.load(sys.argv[2]))
        """
    np.save(tmp_path / "embedding.npy", unit(1))
    done = run_script(
        textwrap.dedent(insert), server, tmp_path / "embedding.npy", cwd=tmp_path,
        environment={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pool = MilvusPool(server, "shared")
    assert pool.search(unit(1))[0].text == "hello"
    pool.close()


def test_the_model_that_made_it_is_checked(empty):
    empty.check_made_by(MADE_BY)
    with pytest.raises(ValueError, match="these differ: maps"):
        empty.check_made_by(MADE_BY | {"maps": "other"})
    assert empty.dimension == Q and empty.made_by == MADE_BY


def test_a_pool_says_what_a_database_must_do():
    assert Pool.__abstractmethods__ == {
        "__len__", "present", "row_keys", "fetch", "nearest", "statistics", "insert",
    }  # fmt: skip
    with pytest.raises(TypeError, match="abstract"):
        partial(Pool, MADE_BY)()


def test_a_notebook_shows_both_ends(empty):
    assert "<figure" not in empty._repr_html_()
    page = filled(empty)._repr_html_()
    assert (
        page.count("<img ") == 5 and "text 39" in page and "text 34" not in page and "the first and the last 5" in page
    )
