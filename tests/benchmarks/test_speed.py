"""The timed ways compute the same before they are timed; the json and the page say what was measured."""

import json
import os
import socket

import pytest
import torch

from benchmarks.speed import embedding, milvus, models, profiles, step
from benchmarks.speed import reference as reference_module
from benchmarks.speed.__main__ import main
from benchmarks.speed.memory import status
from benchmarks.speed.milvus_server import check_free
from benchmarks.speed.page import page
from benchmarks.speed.timing import interleaved, ratio

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def small(monkeypatch):
    """Every shape is a tiny one."""
    monkeypatch.setattr(models, "SHAPES", {"small": (2, 32, 600)})
    monkeypatch.setattr(step, "SHAPES", models.SHAPES)
    monkeypatch.setattr(step, "STEP_SHAPES", {"V1.6k": "small"})
    monkeypatch.setattr(step, "BATCH", 6)
    monkeypatch.setattr(step, "TOWER", TOWER)


def test_every_variant_of_the_step_computes_the_same(small):
    model = step.make_model("V1.6k")
    (batch,) = step.batches(model, 1)
    loss, expected = step.gradients(step.REFERENCE, model, batch)
    assert set(expected) == {"W_i2t.weight", "W_i2t.bias", "W_t2m.weight", "W_t2m.bias"}
    for variant in step.VARIANTS:
        other, grads = step.gradients(variant, model, batch)
        assert other == pytest.approx(loss, abs=1e-5), variant
        for name, gradient in expected.items():
            assert torch.allclose(grads[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), (
                variant,
                name,
            )


def test_the_reference_trains_the_whole_matrix_and_keeps_ret_alone(small):
    model = step.make_model("V1.6k")
    (batch,) = step.batches(model, 1)
    reference = step.ReferenceStep(model)
    before = reference.table.detach().clone()
    optimizer = torch.optim.SGD(reference.trained(), lr=1.0)
    reference(step.padded(batch, model.config.n_visual_tokens)).backward()
    assert reference.table.grad[:-1].abs().sum() > 0 and len(reference.table) == 601
    reference.update(optimizer)
    assert torch.equal(reference.table[:-1], before[:-1]) and not torch.allclose(reference.table[-1], before[-1])
    assert float(reference.table[-1].detach().norm()) == pytest.approx(float(before[:-1].norm(dim=1).mean()), rel=1e-5)


def test_the_retrieval_pass_of_the_reference_computes_its_next_token_loss(small, monkeypatch):
    model = step.make_model("V1.6k")
    (batch,) = step.batches(model, 1)
    seen, plain = [], reference_module.next_token_loss
    monkeypatch.setattr(reference_module, "next_token_loss", lambda *a: seen.append(plain(*a)) or seen[-1])
    inputs = step.padded(batch, model.config.n_visual_tokens)
    step.ReferenceStep(model)(inputs)
    assert len(seen) == 2
    ids, mask = batch["contexts"]["input_ids"], batch["contexts"]["attention_mask"]
    logits = model.language_model(inputs_embeds=model.input_embeddings(ids), attention_mask=mask).logits
    words = ids.masked_fill((mask == 0) | (ids == model.config.ret_token_id), -100)
    assert float(seen[1].detach()) == pytest.approx(float(plain(logits, words).detach()), rel=1e-4)


def test_the_step_and_embedding_parts_write_json_and_the_page(small, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "peak_memory", lambda variant, shape: 2**20)
    monkeypatch.setattr(embedding, "make_model", step.make_model)
    monkeypatch.setattr(embedding, "VIT_L", TOWER | {"patch_size": 32})
    monkeypatch.setattr(embedding, "PHOTOS", 4)
    main(["--part", "step", "--part", "embedding", "--rounds", "2", "--output", str(tmp_path)])
    measured = json.loads((tmp_path / "step-speed.json").read_text())
    (shape,) = measured["shapes"]
    assert shape["ratios"][step.REFERENCE] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert all(r["low"] <= r["median"] <= r["high"] for r in shape["ratios"].values())
    photos = json.loads((tmp_path / "embedding-speed.json").read_text())["decoding"]
    assert 120_000 < photos["bytes"] < 180_000 and photos["ratios"]["ViT-L/14 / decoding"]["median"] > 0
    text = page(tmp_path).read_text()
    assert "+ packed (ours)" in text and "full pass / tenth turn" in text
    absent = ("step-profile", "quality-speed", "gpu-speed", "text-retrieval-speed", "pool-speed")
    assert "Not measured here: " + ", ".join(f"`{name}.json`" for name in absent) in text


def test_profiles_count_the_time_of_every_operator(small, tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "STEP_SHAPES", step.STEP_SHAPES)
    (shape,) = profiles.main(["--output", str(tmp_path), "--threads", "1"])["shapes"]
    assert list(shape["ways"]) == [step.REFERENCE, step.OURS, step.CACHED]
    assert all("aten::addmm" in times and times["others"] > 0 for times in shape["ways"].values())
    assert "| `aten::addmm` |" in page(tmp_path).read_text()


def test_ways_are_timed_once_per_round_and_compared_within_it():
    calls = {"a": 0, "b": 0}

    def way(name):
        def call(number):
            calls[name] += 1

        return call

    measured = interleaved({"a": way("a"), "b": way("b")}, 5, repeats={"b": 3})
    assert calls == {"a": 1 + 5, "b": 1 + 15} and len(measured["a"]["seconds"]) == 5
    made = {"x": {"seconds": [2.0, 9.0, 4.0]}, "y": {"seconds": [1.0, 3.0, 4.0]}}
    assert ratio(made, "x", "y") == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_the_gpu_script_works_at_small_shapes_anywhere(tmp_path):
    from benchmarks.speed import gpu

    flags = ["--small", "--device", "cpu", "--batch", "32", "--rounds", "5", "--output", str(tmp_path)]
    result = gpu.main(flags)
    assert result["losses"][step.OURS] == pytest.approx(result["losses"][step.REFERENCE], rel=1e-4)
    assert all(each > 0 for each in result["pairs_per_second"].values())
    # Every call of the closed form's pass adds new pairs: one to warm up, one a round.
    assert result["closed_form"]["pairs"] == 32 * 6 and 0 < result["closed_form"]["held_out"] < 60
    written = page(tmp_path).read_text()
    assert f"| {step.REFERENCE} | 1.00 (1.00–1.00) |" in written and f"| {gpu.SUMMING} |" in written
    model = gpu.make_model(True, torch.device("cpu"), torch.bfloat16)
    gpu.check(model, gpu.make_batch(model, 4, 0), 2e-2)
    model = gpu.make_model(True, torch.device("cpu"), torch.float32)
    batch = gpu.make_batch(model, 4, 0)
    with pytest.raises(AssertionError, match="CLIP cached gives the loss"):
        gpu.check(model, batch | {"images": batch["images"] | {"features": batch["images"]["features"] + 1}}, 1e-4)


def test_memory_is_read_in_bytes_of_a_process_that_lives():
    assert status("VmHWM") >= status("VmRSS") == pytest.approx(status("VmRSS", os.getpid()), rel=0.2)
    assert status("VmRSS") > 2**20
    with pytest.raises(OSError):
        status("VmRSS", 2**22 + 1)  # above the kernel's largest
    with pytest.raises(OSError, match="has no VmNone"):
        status("VmNone")


def test_the_page_has_a_row_for_each_index_of_the_server_and_of_the_faiss_pool(tmp_path):
    index = {"built_in_s": 6.2, "recall_at_10": 0.9914, "p50_ms": 71.6, "p99_ms": 102.4, "searches_per_second": 11.25}
    server = {"version": "v2.3.5", "indexes": {"HNSW": index | {"server_gib": 4.52}}, "loading": {
        "candidates_per_second": 1354.48, "killed_after": 10_000, "kept": 9_000, "restarted_in_s": 38.5}}  # fmt: skip
    pool = {"indexes": {"exact": index | {"process_gib": 3.11, "search": ""}}}
    about = {"size": 20_000, "dimension": 768, "clients": 8, "queries": 256, "cores": 2}
    (tmp_path / "milvus-speed.json").write_text(json.dumps(about | {"milvus": server, "faiss": pool}))
    text = page(tmp_path).read_text()
    assert "| Milvus, HNSW | ef=128 | 6 | 0.991 | 72 | 102 | 11.2 | 4.5 |" in text
    assert "| faiss pool, exact |  | 6 | 0.991 | 72 | 102 | 11.2 | 3.1 |" in text
    assert "1,354 candidates a second" in text and "after 10,000, held 9,000" in text and "(38 s)" in text
    (tmp_path / "milvus-speed.json").write_text(json.dumps(about | {"milvus": server}))
    with pytest.raises(ValueError, match="--parts faiss"):
        page(tmp_path)


def test_a_port_that_another_server_has_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"port {port} is taken: end the etcd"):
            check_free(port)
    check_free(port)


def test_a_part_measured_again_leaves_the_other(tmp_path):
    path, about = tmp_path / "milvus-speed.json", {"size": 20_000, "cores": 2}
    assert milvus.kept(path, about, ["faiss"]) == {}
    path.write_text(json.dumps(about | {"milvus": {"version": "1"}, "faiss": {"indexes": {}}}))
    assert milvus.kept(path, about, ["faiss"]) == {"milvus": {"version": "1"}}
    assert milvus.kept(path, about | {"size": 1}, ["milvus", "faiss"]) == {}
    with pytest.raises(ValueError, match=r"another run \(size differ\)"):
        milvus.kept(path, about | {"size": 1}, ["faiss"])
