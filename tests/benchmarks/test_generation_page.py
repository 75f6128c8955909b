"""What is said of drawn pictures over the seeds: differences, verdicts and tables worked by hand; runs of several seeds."""

import json
import re

import numpy as np
import pytest

from benchmarks import claims, generate, generation_page, report
from benchmarks.generate import ROWS
from benchmarks.measure import Measure, difference
from benchmarks.output import write_json
from benchmarks.protocols import read
from benchmarks.run import compare
from tests.benchmarks.test_generation import CLIP, DATA, PROTOCOL, Draws
from tests.benchmarks.test_generation import ROWS as ROWS_OF_CLIP
from tests.benchmarks.test_report import result

DUAL, GILL = "GILL + dual alignment", "GILL"


def row(system, seed, metrics, values=None, less=None, items=200):
    made = result("generation", system, seed, metrics)
    made["data"]["items"] = items
    if values is not None:
        made["values"] = {"CLIP-Sim": values}
    if less is not None:
        made["first_less_this"] = {"CLIP-Sim": dict(zip(("mean", "low", "high"), less, strict=True))}
    return made


def drawn(seed, retrieval, sims, less, **fields):
    """The json of a seed whose first row is GILL's with dual alignment."""
    rows = [row(DUAL, seed, {"CLIP-Sim": sims[0], "R@1": retrieval[0]}),
            row(GILL, seed, {"CLIP-Sim": sims[1], "R@1": retrieval[1]}, less=less)]  # fmt: skip
    probe = {
        "true pictures": {"animal": 100.0},
        "samples": {"animal": 80.0 + 10 * seed},
        "chance": {"animal": 8.3},
        "n": 20,
    }
    rule = {"draw_below": 0.5, "drawn share": 0.25, "rule": 0.8, "retrieved": 0.7, "drawn": 0.6, "better of the two": 0.9,
            "n": 30}  # fmt: skip
    return {"seed": seed, "probe": probe, "rule": rule, "results": rows} | fields


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "generation-0.json", drawn(0, (0.5, 0.4), (0.61, 0.62), (-0.01, -0.03, 0.01)))
    write_json(tmp_path / "generation-1.json", drawn(1, (0.3, 0.2), (0.51, 0.60), (-0.09, -0.12, -0.06)))
    # A trial of seed 0 on other items: it has a table of its own, and seed 0's own file is the one that is judged.
    trial = {"seed": 0, "about": "A trial.", "results": drawn(0, (0.1, 0.9), (0.2, 0.3), (0, 0, 0))["results"]}
    for r in trial["results"]:
        r["data"]["items"] = 50
    write_json(tmp_path / "generation-0-trial.json", trial)
    return tmp_path


def test_both_claims_of_the_table_are_judged_over_the_seeds(folder):
    retrieval, pictures = claims.judge([], {}, generation_page.read(folder))
    assert (retrieval.paper, retrieval.ours, retrieval.verdict) == (
        "24.6 > 21.7",
        "40.0 > 30.0",
        "holds: 2 of 2 seeds",
    )
    assert (pictures.ours, pictures.verdict) == ("0.560 < 0.610", "open: 1 of 2 seeds")
    (folder / "generation-1.json").unlink()
    assert [j.verdict for j in claims.judge([], {}, generation_page.read(folder))] == ["holds: 1 of 1 seeds"] * 2
    (folder / "generation-0.json").unlink()  # the trial alone
    retrieval, _ = claims.judge([], {}, generation_page.read(folder))
    assert (retrieval.ours, retrieval.verdict) == ("10.0 < 90.0", "does not hold: 0 of 1 seeds")


def test_a_claim_whose_rows_were_not_measured_is_not_judged_and_one_without_intervals_is_open(folder):
    alone = {"seed": 0, "results": [row("UniMuR, drawn", 0, {"CLIP-Sim": 0.7}), row(GILL, 0, {"CLIP-Sim": 0.6})]}
    assert claims.judge([], {}, [alone]) == []
    # Both are compared with a third row only.
    third = drawn(0, (0.5, 0.4), (0.61, 0.62), (0.1, 0.0, 0.2))
    third["results"][0]["first_less_this"] = third["results"][1]["first_less_this"]
    assert claims.judge([], {}, [third])[1].verdict == "open: no paired interval"


def test_claims_name_rows_that_are_trained_and_columns_that_are_measured():
    for *_, better, worse, measure, kind in claims.DRAWING_CLAIMS:
        assert {better, worse} <= set(ROWS) and measure in read("generation")["columns"] and kind in (">", "level")
    assert set(re.findall(r'--rows (\w+) "([^"]+)"', generation_page.COMMAND)[0]) <= set(ROWS)


def test_a_difference_is_of_what_each_item_has_or_as_the_json_has_it():
    a, b = np.array([0.5, 0.9, 0.7]), np.array([0.4, 0.5, 0.9])
    first = row(DUAL, 3, {"CLIP-Sim": 0.7}, values=a.tolist())
    second = row(GILL, 3, {"CLIP-Sim": 0.6}, values=b.tolist(), less=(9, 9, 9))
    assert difference(first, second, "CLIP-Sim") == Measure(a).against(Measure(b), 3)
    assert difference(first, second, "CLIP-Sim")["mean"] == pytest.approx(0.1)
    del first["values"]
    assert difference(first, second, "CLIP-Sim") == {"mean": 9, "low": 9, "high": 9}
    second["first_less_this"] = {"CLIP-Sim": {"mean": 0.1, "low": -0.2, "high": 0.3}}
    assert difference(second, first, "CLIP-Sim") == {"mean": -0.1, "low": -0.3, "high": 0.2}
    del second["values"]
    assert difference(second, second, "CLIP-Sim") is None and difference(first, second, "R@1") is None


def test_compare_writes_what_each_item_has_where_it_is_asked_to(tmp_path):
    systems = [Draws(ROWS_OF_CLIP), CLIP]
    plain = compare(systems, DATA, PROTOCOL, clip=CLIP, seed=4)
    found = compare(systems, DATA, PROTOCOL, clip=CLIP, seed=4, values=True)
    assert "values" not in plain[0] and found[0]["seed"] == 4
    assert found[1]["values"]["CLIP-Sim"] == [1.0, 0.0] != found[0]["values"]["CLIP-Sim"] and set(
        found[0]["values"]
    ) == set(found[0]["metrics"])
    assert difference(found[0], found[1], "CLIP-Sim") == found[1]["first_less_this"]["CLIP-Sim"]
    write_json(tmp_path / "found.json", found, long_lists=True)
    text = (tmp_path / "found.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(found)) and "[1.0, 0.0]" in text


def test_the_section_of_several_seeds(folder):
    text = generation_page.page(folder)
    assert "| GILL + dual alignment | 0.642 | 24.6 |" in text  # the paper's
    assert "200 items; seeds 0, 1.\n" in text and "50 items; seeds 0. A trial.\n" in text
    assert f"| {DUAL} | 0.560 [0.510, 0.610] | 40.0 [30.0, 50.0] |  |  |" in text
    assert (
        f"| {GILL} | 0.610 [0.600, 0.620] | 30.0 [20.0, 40.0] | -0.050; above zero on 0, below on 1 of 2 |  |" in text
    )
    assert (
        "| CLIP-Sim | 0.642, 0.645 | 0.560 [0.510, 0.610] | 0.610 [0.600, 0.620] | -0.050; above zero on 0, below on 1 of 2 |"
        in text
    )
    assert "| samples | 85.0 [80.0, 90.0] |" in text and "| chance | 8.3 |" in text and "--seeds 0 1 --rows" in text
    assert "| 0.500 | 0.800 | 0.700 | 0.600 | 0.900 | 25.0 |" in text and "drawn.png" not in text


def test_the_section_of_one_seed_has_intervals_and_copes_with_what_is_absent(folder):
    (folder / "generation-1.json").unlink()
    (folder / "generation-0-trial.json").unlink()
    (folder / "drawn.png").write_bytes(b"")
    text = generation_page.page(folder)
    assert "| -0.010 [-0.030, +0.010] |" in text and "](drawn.png)" in text
    neither = row("other", 0, {}) | {"applies": False}
    bare = [row("UniMuR, drawn", 0, {"CLIP-Sim": 0.7}), neither]
    write_json(folder / "generation-0.json", {"seed": 0, "results": bare})
    text = generation_page.page(folder)
    assert "| UniMuR, drawn | 0.700 |  |  |" in text and "| other | - |  |  |" in text
    assert "probe" not in text and "Dual alignment or none" not in text


def test_the_results_page_has_the_section_and_the_claims(folder):
    write_json(
        folder / "seed-0.json", {"seed": 0, "seconds": {}, "results": [result("visdial", "UniMuR", 0, {"R@1": 0.3})]}
    )
    text = report.page(folder).read_text()
    assert text.index("Which of the paper's orderings") < text.index("## A picture drawn (Appendix A.2)")
    assert "| 24.6 > 21.7 | 40.0 > 30.0 | holds: 2 of 2 seeds |" in text
    for path in folder.glob("generation-*.json"):
        path.unlink()
    assert "A picture drawn" not in report.page(folder).read_text()


def test_every_seed_has_a_folder_of_its_own_and_its_figures_where_they_are_asked_for(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        generate, "run_seed", lambda folder, seed, rows: made.append((folder, list(rows))) or {"seed": seed}
    )
    found = generate.main(
        ["--seeds", "3", "4", "--output", str(tmp_path), "--rows", GILL, "--results", str(tmp_path / "r")]
    )
    assert made == [(tmp_path / "seed-3", [GILL]), (tmp_path / "seed-4", [GILL])] and found == [
        {"seed": 3},
        {"seed": 4},
    ]
    assert [json.loads((tmp_path / "r" / f"generation-{n}.json").read_text()) for n in (3, 4)] == found
    generate.main(["--seed", "5", "--output", str(tmp_path / "one")])
    assert made[-1] == (tmp_path / "one", [])


def test_a_folder_of_another_seed_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "run_seed", lambda *given: pytest.fail("it began"))
    (tmp_path / "seed-1" / "towers").mkdir(parents=True)
    (tmp_path / "seed-1" / "towers" / "made.json").write_text('{"seed": 0}')
    with pytest.raises(ValueError, match="seed-1 holds what seed 0 made"):
        generate.main(["--seeds", "0", "1", "--output", str(tmp_path)])
