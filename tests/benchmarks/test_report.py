"""The page says what the json says: means, ranges, differences and verdicts worked by hand."""

import json

import pytest
from PIL import Image

from benchmarks import claims, report
from benchmarks.output import write_json
from benchmarks.protocols import protocols, read


def result(task, system, seed, metrics, variant=None, difference=None, second=None, applies=True):
    protocol = protocols(task, miniature=True)[0]
    row = {
        "task": task, "protocol": {"variant": variant or protocol.variant, "version": 1, "miniature": True, "settings": {}},
        "data": {"source": "miniature", "items": 10, "pool": "x", "left_out": "", "left_out_by_reason": {}},
        "system": system, "revision": {}, "seed": seed, "applies": applies, "notes": [],
        "metrics": {k: {"value": v, "low": v - 0.01, "high": v + 0.01, "n": 10} for k, v in metrics.items()},
    }  # fmt: skip
    for name, less in (("first", difference), ("second", second)):
        if less is not None:
            row[f"{name}_less_this"] = {k: dict(zip(("mean", "low", "high"), less, strict=True)) for k in metrics}
    return row


def ablation(name, rows):
    return {
        "asks": name, "chosen_by": "overall R@1 on validation", "shown": ["overall R@1"], "rates": [0.1, 1.0, 2.0],
        "rows": [{"name": row, "rate": rate, "fields": {}, "validation": {}, "seeds": [
            {"seed": s, "metrics": {m: {"value": v} for m in ("overall R@1", "text R@1", "image retrieval rate")},
             "bias": [{"image_bias": b, "image retrieval rate": 0.5 + b, "image R@1": 0.2, "text R@1": 0.3,
                       "overall R@1": 0.25, "image retrieval rate on text-only turns": 0.4} for b in (-0.1, 0.0, 0.1)]}
            for s, v in enumerate(values)]} for row, rate, values in rows],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for seed, (ours, theirs) in enumerate([(0.30, 0.20), (0.50, 0.40)]):
        results = [
            result("visdial", "UniMuR", seed, {"R@1": ours, "R@5": 0.6, "R@10": 0.7}),
            result("visdial", "FROMAGe", seed, {"R@1": theirs, "R@5": 0.5, "R@10": 0.6}, difference=(0.1, 0.04, 0.15)),
            result("visdial", "CLIP", seed, {"R@1": 0.35}, difference=(ours - 0.35, ours - 0.4, ours - 0.3),
                   second=(-0.2, -0.3, -0.1 + seed)),
            result("visdial", "Frozen", seed, {}, applies=False),
            result("vqav2", "FROMAGe", seed, {"accuracy": 0.1}),
            result("vqav2", "Frozen", seed, {"accuracy": 0.2}, difference=(-0.1, -0.2, -0.01)),
            result("mmdialog", "UniMuR", seed, {"overall R@1": 0.4, "CLIP-Sim": 0.7123}),
        ]  # fmt: skip
        write_json(
            tmp_path / f"seed-{seed}.json",
            {"seed": seed, "seconds": {"total": 100 + seed} if seed else {}, "results": results},
        )
    rows = [("DAT", 1.0, [0.3, 0.5]), ("VM", 2.0, [0.4, 0.4]), ("TM", 1.0, [0.1, 0.1])]
    write_json(tmp_path / "ablation-4.json", ablation("Table 4: the training strategy", rows))
    return tmp_path


def test_the_page(folder):
    text = report.page(folder).read_text()
    assert "| UniMuR | 40.0 (30.0–50.0) | 60.0 (60.0–60.0) | 70.0 (70.0–70.0) |  |" in text
    assert "| FROMAGe | 30.0 (20.0–40.0) |" in text and "10.0 (10.0–10.0); above zero on 2 of 2 |" in text
    # UniMuR against CLIP, and pairs alone against it
    assert "5.0 (-5.0–15.0); above zero on 1 of 2 | -20.0 (-20.0–-20.0); above zero on 0 of 2, below on 1 |" in text
    assert "| Frozen | - | - | - | - | - |" in text
    assert "| UniMuR | 24.7 | 49.8 | 60.9 |" in text  # the paper's own row
    assert "0.712 (0.712–0.712)" in text and "measuring took 101 s (seed 1) on two cores" in text
    assert "on validation; 2 seeds." in text
    assert "| DAT | 1 | 40.0 (30.0–50.0) |" in text and "| VM | 2 (edge) |" in text
    for name in ("systems.png", "bias.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 800 and f"]({name})" in text


def test_verdicts(folder):
    text = report.page(folder).read_text()
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.endswith("seeds |")}
    (line,) = (v for k, v in lines.items() if "UniMuR finds more images from dialogues than FROMAGe" in k)
    assert line.endswith("| 24.7 > 20.8 | 40.0 > 30.0 | holds: 2 of 2 seeds |")
    (line,) = (v for k, v in lines.items() if "UniMuR finds more images from dialogues than CLIP" in k)
    assert line.endswith("| 40.0 > 35.0 | open: 1 of 2 seeds |")
    (line,) = (v for k, v in lines.items() if "FROMAGe answers better than Frozen" in k)
    assert line.endswith("| 10.0 < 20.0 | does not hold: 0 of 2 seeds |")
    (line,) = (v for k, v in lines.items() if "DAT's overall R@1 is above VM's" in k)
    assert line.endswith("| 32.3 > 27.6 | 40.0 = 40.0 | open: 1 of 2 seeds |")
    assert not any("BLIP-2" in k for k in lines)  # it was not measured


def test_claims_take_the_main_variant():
    main = protocols("mmdialog", True)[0].variant
    results = [
        result("mmdialog", "UniMuR", 0, {"overall R@1": 0.9}, variant=f"{main}, first 100 dialogues"),
        result("mmdialog", "FROMAGe", 0, {"overall R@1": 0.5}, variant=f"{main}, first 100 dialogues"),
        result("mmdialog", "UniMuR", 0, {"overall R@1": 0.2}),
        result("mmdialog", "FROMAGe", 0, {"overall R@1": 0.3}),
    ]
    (judged,) = claims.judge(results, {})
    assert judged.ours == "20.0 < 30.0"


def test_every_claim_names_rows_that_exist():
    from benchmarks.ablate import TABLES
    from benchmarks.miniature import ROWS, SHOWN_OTHERWISE

    names = {row.name for row in ROWS} | {*SHOWN_OTHERWISE, "CLIP", "chance"}
    for _, _, table, better, worse, measure in claims.ABLATION_CLAIMS:
        _, _, columns, rows = TABLES[table]
        assert {better, worse} <= {row.name for row in rows} and measure in columns
    for _, _, task, better, worse, measure in claims.TASK_CLAIMS:
        assert {better, worse} <= names and measure in read(task)["columns"]


def test_every_row_has_a_loader_and_its_own_folder():
    from benchmarks.load import SYSTEMS
    from benchmarks.miniature import ROWS

    assert {row.kind for row in ROWS} <= set(SYSTEMS)
    assert len({row.at for row in ROWS}) == len({row.name for row in ROWS}) == len(ROWS)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no seed-\*\.json"):
        report.page(tmp_path)


def test_speed_checks_the_packed_form_and_writes_ratios(tmp_path):
    from benchmarks.speed import texts as speed

    measured = speed.main(
        ["--candidates", "12", "--rounds", "2", "--shape", next(iter(speed.SHAPES)), "--output", str(tmp_path)]
    )
    assert json.loads((tmp_path / "text-retrieval-speed.json").read_text()) == measured
    (shape,) = measured["shapes"]
    assert all(r["low"] <= r["median"] <= r["high"] for r in shape["ratios"].values())
    assert len(shape["seconds"]["naive"]["seconds"]) == 2
