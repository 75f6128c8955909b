"""The mapper trained by `train/run.py`: from a saved model on, and beside the other losses."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_unimur import UniMuRModel
from tests.tiny import make_pipeline
from tests.train.test_run import base, folder  # noqa: F401
from train.arguments import CONFIGS, parse
from train.drawing import DrawingTargets
from train.run import main

DRAWING = {
    "n_drawing_tokens": 4, "mapper_width": 16, "mapper_layers": 1, "mapper_heads": 2, "packing": False, "evaluate_pairs": 0,
}  # fmt: skip


@pytest.fixture
def settings(folder):  # noqa: F811
    make_pipeline().save_pretrained(folder / "diffusion")
    return base(folder) | {"drawing_model_name_or_path": str(folder / "diffusion"), "max_steps": 3}


def run(folder, settings):  # noqa: F811
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    summary = main([str(folder / "c.yaml")])
    return summary, load_file(f"{summary['checkpoint']}/model.safetensors")


def test_targets_are_what_the_pipeline_conditions_on(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    targets = DrawingTargets(str(tmp_path))
    assert (targets.length, targets.width) == (12, 32)
    own = pipeline.encode_prompt(["a dog", "a much longer caption"], "cpu", 1, False)[0]
    assert torch.equal(targets(["a dog", "a much longer caption"]), own)


def test_a_saved_model_learns_to_draw_and_nothing_else_moves(folder, settings):  # noqa: F811
    plain, before = run(folder, settings | {"evaluate_pairs": 0})
    more = {"model": plain["checkpoint"], "output_dir": str(folder / "more"), "schedule": "drawing", "max_steps": 40}
    drawn, after = run(folder, settings | DRAWING | more | {"logging_steps": 5})
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    losses = [row["loss_draw"] for row in drawn["log"] if "loss_draw" in row]
    assert losses[-1] < 0.7 * losses[0]
    model = UniMuRModel.from_pretrained(drawn["checkpoint"])
    assert model.generate("number 3 is dddd", steps=1).size == (16, 16)
    assert (after["drawing.tokens"] - after["ret_embedding"]).norm(dim=1).min() > 0.01


def test_the_mapper_trains_beside_captioning_and_matching(folder, settings):  # noqa: F811
    more = {"train_ret_embedding": True, "cache_features": True, "logging_steps": 1, "eval_share": 0.3}
    summary, weights = run(folder, settings | DRAWING | more)
    assert "eval_image_R@1" in summary["validation"]  # retrieval is validated on the way
    last = [row for row in summary["log"] if "loss_draw" in row][-1]
    assert {"loss_cap", "loss_vm", "loss_draw"} <= last.keys() and any(n.startswith("drawing.") for n in weights)
    parts = sum(last[name] for name in ("loss_cap", "loss_vm", "loss_draw"))
    assert last["loss"] == pytest.approx(parts, rel=1e-3)


def test_gills_config_parses_to_gills_settings():
    model, _, args = parse([str(CONFIGS / "opt-6.7b.yaml"), "--config", str(CONFIGS / "gill.yaml")])
    assert (model.n_drawing_tokens, model.mapper_width, model.mapper_layers, model.mapper_heads) == (8, 512, 4, 4)
    assert model.text_model == "facebook/opt-6.7b" and args.drawing_learning_rate == 1e-3


def test_tokens_without_a_diffusion_model_are_refused():
    with pytest.raises(ValueError, match="drawing_model_name_or_path"):
        parse(["--train_data", "x", "--n_drawing_tokens", "8"])
