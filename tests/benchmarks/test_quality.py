"""Time to quality on a small world: what is inside the clock, what is drawn, and when a recall counts as reached."""

import json

import pytest

from benchmarks.speed import quality
from benchmarks.speed.page import page


@pytest.fixture
def small(bench, monkeypatch):
    monkeypatch.setattr(quality, "Seed", lambda folder, seed: bench)
    monkeypatch.setattr(quality, "BATCH", 16)
    return bench


def test_every_way_is_run_drawn_and_reported(small, tmp_path):
    out = tmp_path / "out"
    given = ["--seeds", "0", "--rates", "1e-2", "3e-2", "--steps", "5", "--output", str(out)]
    result = quality.main(given)
    (seed,) = json.loads((out / "quality-speed.json").read_text())["seeds"]
    assert set(seed["points"]) == set(quality.WAYS)
    for way, points in seed["points"].items():
        marks = {quality.ALONE: [0] * len(quality.PARTS), quality.STEPPED: [0, 5]}.get(way, [5])
        assert [p["step"] for p in points] == marks, way
        assert all(p["seconds"] > 0 and 0 <= p[quality.RECALL] <= 1 for p in points)
    stepped, alone = (seed["points"][way] for way in (quality.STEPPED, quality.ALONE))
    assert stepped[0]["seconds"] < stepped[1]["seconds"]
    assert [p["part"] for p in alone] == list(quality.PARTS)
    searched = result["reference_rates_searched"]
    assert f"{result['rates'][quality.REFERENCE]:g}" == max(searched, key=searched.get)
    assert (out / "quality-speed.png").stat().st_size > 10_000
    text = page(out).read_text()
    assert "canonical correlation alone" in text and "quality-speed.png" in text


def test_steps_start_where_every_caption_is_read_as_a_conversation(small, monkeypatch):
    starts = []

    def start(model, rows, collator, skips, *, every_caption, **arguments):
        starts.append((collator.pair_contexts, every_caption))

    monkeypatch.setattr(quality, "start", start)
    for way in (quality.STEPPED, quality.ALONE):
        quality.run(way, small, {way: 1e-4}, 1, [1])
    assert starts == [("conversations", True)] + [("caption", False)] * len(quality.PARTS)


def test_the_reference_run_is_the_same_twice(small):
    points = [quality.reference_run(small, 1e-2, 3, [3]) for _ in range(2)]
    assert points[0][0][quality.RECALL] == points[1][0][quality.RECALL]


def test_a_recall_counts_from_the_first_measurement_that_has_it():
    def curve(*points):
        return [{"seconds": s, quality.RECALL: r} for s, r in points]

    points = {quality.REFERENCE: curve((10, 0.1), (50, 0.4), (100, 0.3)), "a": curve((2, 0.2), (5, 0.35)),
              "b": curve((1, 0.29))}  # fmt: skip
    assert quality.sooner(points, "a") == {"seconds": 5, "than_its_end": 20, "than_it_first_did": 10}
    assert quality.sooner(points, "b") == {"seconds": None, "than_its_end": None, "than_it_first_did": None}
