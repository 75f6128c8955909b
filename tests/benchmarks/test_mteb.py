"""mteb's own mock tasks for images and texts run through the interface."""

import pytest

from benchmarks.mteb_run import main, wrapped


def test_mtebs_mock_tasks_all_run(tiny, tmp_path):
    # Here, since its import takes seconds and every worker collects every file.
    pytest.importorskip("mteb", reason="mteb is optional: pip install 'modeling-unimur[embed]'")
    tiny().save_pretrained(tmp_path / "model", with_towers=True)
    results = main(["--model", str(tmp_path / "model"), "--mock", "--output", str(tmp_path / "out")])
    assert set(results.values()) == {"TaskResult"}
    needed = {
        "MockAny2AnyRetrievalT2I",
        "MockAny2AnyRetrievalI2T",
        "MockVisionCentricQA",
        "MockImageTextPairClassification",
    }
    assert needed <= set(results) and "MockRetrievalTask" in results
    assert wrapped(str(tmp_path / "model")).mteb_model_meta.modalities == ["text", "image"]
