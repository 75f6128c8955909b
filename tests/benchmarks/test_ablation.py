"""The ablations' machinery on a small world: cached training equals the plain one, and rates are chosen on validation."""

import pytest
import torch

from benchmarks import ablate
from benchmarks.ablation import Row
from benchmarks.baselines.clip import ClipBaseline
from benchmarks.data import miniature
from benchmarks.load import UniMuR
from benchmarks.protocols import protocols
from benchmarks.tasks import image, response
from train.collate import PairCollator, SkipCounter
from train.features import MatchingStates, cache_image_features


def test_cached_states_give_the_losses_of_the_plain_batch(bench):
    model = bench.model(Row("DAT")).eval()
    rows = cache_image_features(bench.miniature.pairs, model, SkipCounter())
    states, collator = MatchingStates(rows, model, seed=3), PairCollator(model.processor, seed=3)
    states.epoch = collator.epoch = 2
    picked = [5, 0, 17, 250]
    cached = states.collate(picked)
    plain = collator([rows[i] for i in picked])
    for batch in (cached, plain):
        del batch["skipped"], batch["n_seen"]
    plain = {k: v for k, v in plain.items() if k != "captions"}
    with torch.no_grad():
        a, b = model(**cached), model(**plain)
    torch.testing.assert_close(a.loss_vm, b.loss_vm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.loss_tm, b.loss_tm, rtol=1e-4, atol=1e-6)


def test_states_are_refused_while_ret_is_trained(bench):
    model = bench.model(Row("x", {"train_ret_embedding": True}))
    with pytest.raises(ValueError, match=r"\[RET\] is trained"):
        MatchingStates(bench.pairs(model), model)


def test_a_part_trains_its_own_map_only(bench):
    start = bench.model(Row("DAT"))
    matched = bench._tensors(Row("DAT"), 1e-2)
    captioned = bench._tensors(Row("x", part="captioning"), 1e-2)
    assert torch.equal(matched["W_i2t.weight"], start.W_i2t.weight)
    assert not torch.equal(matched["W_t2m.weight"], start.W_t2m.weight)
    assert torch.equal(captioned["W_t2m.weight"], start.W_t2m.weight)
    assert not torch.equal(captioned["W_i2t.weight"], start.W_i2t.weight)
    both = bench.trained(Row("DAT"), 1e-2)
    assert torch.equal(both.W_i2t.weight, captioned["W_i2t.weight"])
    assert torch.equal(both.W_t2m.weight, matched["W_t2m.weight"])


def test_a_run_is_kept_and_is_the_same_when_made_again(bench):
    first = bench._tensors(Row("VM", {"lambda2": 0.0}), 1e-2)
    (path,) = bench.runs.glob("*.safetensors")
    path.unlink()
    again = bench._tensors(Row("another name", {"lambda2": 0.0}), 1e-2)
    assert [p.name for p in bench.runs.glob("*.safetensors")] == [path.name]
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_the_cached_measures_are_those_of_the_tasks(bench):
    model = bench.trained(Row("DAT"), 1e-2)
    cached = bench.measure(model, "validation")
    data = miniature.mmdialog("validation")
    system = UniMuR(model)
    plain = response.run(system, data, protocols("mmdialog", True)[0], ClipBaseline(model))
    plain |= {
        f"dialogue to image {k}": m
        for k, m in image.run(system, miniature.visdial("validation"), protocols("visdial", True)[0]).items()
    }
    data.dialogues = [d for d in data.dialogues if d["wants_image"]]
    plain["contextual image R@1"] = image.run(system, data, protocols("mmdialog_image", True)[0])["R@1"]
    for name, measure in plain.items():
        assert cached[name].value == pytest.approx(measure.value, abs=1e-6, nan_ok=True), name
    other = bench.trained(Row("candidates", {"text_candidates": "clip_text"}), 1e-2)
    words = list(data.texts.values())
    wanted = other.embed_texts([data.texts[i] for i in bench.embedded(other, "validation", "mmdialog").text_rows])
    assert torch.equal(bench.embedded(other, "validation", "mmdialog").texts, wanted) and len(wanted) == len(words)


def test_the_rate_is_chosen_on_validation_and_test_is_measured_once(monkeypatch, tmp_path):
    rows = [Row("DAT"), Row("VM", {"lambda2": 0.0})]
    monkeypatch.setattr(ablate, "TABLES", {"4": ("asks", "overall R@1", ("overall R@1",), rows)})
    best = {rows[0].key: 1e-2, rows[1].key: 3e-2}
    calls = []

    def in_process(jobs):
        return [type("Done", (), {"result": function(**given)}) for function, given in jobs]

    def validation(folder, seed, rows):
        return {
            r.key + "null": {f"{x:g}": {"overall R@1": float(x == best[r.key]) + seed / 100} for x in r.rates}
            for r in rows
        }

    def test(folder, seed, rows, rates, biases):
        calls.append((seed, rates))
        return [{"seed": seed, "row": r.name, "rate": x, "metrics": {}} for r, x in zip(rows, rates, strict=True)]

    monkeypatch.setattr(ablate, "side_by_side", in_process)
    monkeypatch.setattr(ablate, "run_validation", validation)
    monkeypatch.setattr(ablate, "run_test", test)
    results = ablate.ablate(["4"], [0, 1], tmp_path)
    assert calls == [(0, [1e-2, 3e-2]), (1, [1e-2, 3e-2])]
    assert [row["rate"] for row in results["4"]["rows"]] == [1e-2, 3e-2]
    assert [s["seed"] for s in results["4"]["rows"][0]["seeds"]] == [0, 1]
    assert results["4"]["rows"][0]["validation"]["0.01"] == pytest.approx(1.005)


def test_rows_that_differ_only_in_name_or_pool_share_their_training():
    assert Row("a").key == Row("b").key == Row("c", {"text_candidates": "clip_text"}).key
    assert len({Row("a").key, Row("a", {"lambda2": 0.0}).key, Row("a", part="joint").key}) == 3
