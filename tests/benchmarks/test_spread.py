"""Where a run lies among the published seeds, and the README's table, worked by hand."""

import json
from pathlib import Path

from benchmarks.spread import place, published, readme_table

DEMO = [{"UniMuR": {"overall R@1": 80.0, "overall R@5": 99.0, "CLIP-Sim": 0.8}, "chance": {"overall R@1": 0.1}},
        {"UniMuR": {"overall R@1": 90.0, "CLIP-Sim": 0.9}, "chance": {"overall R@1": 0.1}}]  # fmt: skip


def test_the_table_has_mean_least_and_most(tmp_path):
    for seed, demo in enumerate(DEMO):
        (tmp_path / f"demo-{seed}.json").write_text(json.dumps({"seed": seed, "columns": demo}))
    (tmp_path / "seed-2.json").write_text(json.dumps({"seed": 2}))
    seeds, columns = published(tmp_path)
    assert seeds == [0, 1]
    lines = readme_table(columns).splitlines()
    assert lines[0] == "|  | UniMuR | chance |"
    assert lines[2:] == ["| overall R@1 | 85.0 (80.0–90.0) | 0.1 |", "| CLIP-Sim | 0.850 (0.800–0.900) | - |"]


def test_a_run_inside_and_outside_the_seeds(tmp_path):
    values = {"overall R@1": [80.0, 90.0], "CLIP-Sim": [0.8, 0.9]}
    assert place({"overall R@1": 90.0, "CLIP-Sim": 0.8}, [0, 1], values).startswith("all 2 figures")
    outside = place({"overall R@1": 79.9, "CLIP-Sim": 0.8, "new": 1.0}, [0, 1], values)
    assert outside.startswith("1 of 2 figures") and outside.endswith("outside: overall R@1 79.9 (80.0 to 90.0)")
    assert place({"overall R@1": 1.0}, [], {}) == "no published seed to compare with"


def test_the_readme_holds_the_table_of_the_published_seeds():
    _, columns = published()
    assert readme_table(columns) in (Path(__file__).parents[2] / "README.md").read_text()
