"""Every kind of system from a folder, through the one command."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import Blip2ForImageTextRetrieval, CLIPVisionConfig

from benchmarks.baselines.blip2_miniature import bert_tokenizer, blip2_config
from benchmarks.baselines.fromage import FromageModel
from benchmarks.baselines.frozen import FrozenModel
from benchmarks.data import miniature
from benchmarks.load import SYSTEMS, UniMuR, load
from benchmarks.run import main
from tests.tiny import image_processor, make_processor, make_towers


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    tiny().save_pretrained(folder / "unimur", with_towers=True)
    text, clip = make_towers(folder / "towers")
    FromageModel.from_pretrained_towers(text, clip, make_processor(1), shared_dim=8).save_pretrained(
        folder / "fromage"
    )
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              image_size=32, patch_size=16)  # fmt: skip
    FrozenModel.from_pretrained_towers(text, clip, make_processor(2), vision_config=vision).save_pretrained(
        folder / "frozen"
    )
    tokenizer = bert_tokenizer(["a panda in a red hat"] * 3)
    model = Blip2ForImageTextRetrieval(blip2_config(len(tokenizer), 32, 1, 2, 8))
    for part in (model, tokenizer, image_processor(64)):
        part.save_pretrained(folder / "blip2")
    return {kind: str(folder / {"clip": "unimur", "fromage-ppl": "fromage"}.get(kind, kind)) for kind in SYSTEMS}


def test_every_kind_is_a_row(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(miniature.READERS, "mmdialog", lambda split: miniature.mmdialog(split, 40))
    others = [f"--baseline={kind}={checkpoints[kind]}" for kind in SYSTEMS if kind != "unimur"]
    results = main(["--task", "mmdialog", "--model", checkpoints["unimur"], *others, "--limit", "4", "--split",
                    "validation", "--output", str(tmp_path), "--device", "cpu"])  # fmt: skip
    assert [r["system"] for r in results] == [
        "UniMuR", "CLIP", "FROMAGe", "FROMAGe, text by perplexity (mean)", "BLIP-2", "Frozen"
    ]  # fmt: skip
    assert [r["system"] for r in results if not r["applies"]] == ["Frozen"]
    assert all(r["metrics"]["text R@1"]["n"] == 4 for r in results if r["applies"])
    rates = [r["metrics"]["image retrieval rate"]["value"] for r in results if "FROMAGe" in r["system"]]
    assert rates[0] == rates[1]  # both show an image where the model says [RET]
    assert len({str(r["revision"]) for r in results if r["system"] != "FROMAGe, text by perplexity (mean)"}) == 5


def test_an_unknown_kind_is_named(checkpoints):
    with pytest.raises(ValueError, match="no system 'gill'"):
        load("gill", checkpoints["unimur"])


def test_the_miniatures_diffusion_model_is_imported_where_a_checkpoint_draws(monkeypatch):
    imported = []
    monkeypatch.setattr("benchmarks.load.importlib", SimpleNamespace(import_module=imported.append))
    config = SimpleNamespace(n_drawing_tokens=4)
    system = UniMuR.__new__(UniMuR)
    system.model = SimpleNamespace(config=config, draw_each=lambda dialogues, show_progress_bar: list(imported))
    (name,) = system.draw(["a panda"])  # before anything is drawn
    assert name == "train.miniature.diffusion" and find_spec(name) is not None
