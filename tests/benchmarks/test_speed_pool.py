"""The measurement of search runs on a small pool and reports its results."""

import json

import pytest

from benchmarks.speed import pool
from benchmarks.speed.timing import interleaved, ratio
from tests.tiny import make_model

pytest.importorskip("faiss")


def test_a_trial_measures_every_way(tmp_path, capsys, monkeypatch):
    def train(argv):  # on a clone nobody has run the demo in
        assert argv == []
        make_model(tmp_path / "towers").save_pretrained(pool.MINIATURE, with_towers=True)

    monkeypatch.setattr(pool, "MINIATURE", tmp_path / "miniature")
    monkeypatch.setattr(pool, "train", train)
    result = pool.main(["--size", "600", "--rounds", "2", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "pool-speed.json").read_text()) == json.loads(json.dumps(result))
    assert (result["size"], result["rounds"], result["dimension"]) == (600, 2, 768)
    for n in ("1 queries", "64 queries"):
        assert {len(w["seconds"]) for w in result["exact"][n]["seconds"].values()} == {2}
        assert set(result["exact"][n]["ratios"]) == {"faiss / streamed", "torch / streamed"}
    assert result["retrieve"]["ratios"]["retrieve / embed + faiss"]["median"] > 0
    indexes = result["approximate"]["indexes"]
    assert set(indexes) == {"hnsw", "ivf", "sq8", "pq"}
    assert indexes["sq8"]["recall_at_10"] >= 0.95
    assert (
        indexes["pq"]["share_of_float32"]
        < indexes["sq8"]["share_of_float32"]
        < 1
        < indexes["hnsw"]["share_of_float32"]
    )
    printed = capsys.readouterr().out
    assert "exact / hnsw" in printed and "pq: recall@10" in printed


def test_rounds_are_interleaved_and_ratios_are_taken_within_them():
    order = []
    measured = interleaved({way: lambda i, way=way: order.append((way, i)) for way in "abc"}, rounds=4)
    assert sorted(order[:3]) == [("a", 0), ("b", 0), ("c", 0)]  # the warming up
    rounds = [order[3 * i : 3 * i + 3] for i in range(1, 5)]
    assert [sorted(r) for r in rounds] == [[(w, i) for w in "abc"] for i in range(4)]
    assert len({tuple(w for w, _ in r) for r in rounds}) > 1
    measured = {"a": {"seconds": [2.0, 8.0, 3.0]}, "b": {"seconds": [1.0, 2.0, 3.0]}}
    assert ratio(measured, "a", "b") == {"median": 2.0, "low": 1.0, "high": 4.0}
