"""Steps from a closed form: noise on the states, a rate of their own for the matching maps, and configurations in layers."""

import pytest
import torch
import yaml

from tests.tiny import make_model
from tests.train.test_trainer import pairs, trainer_of
from train.arguments import CONFIGS, parse
from train.collate import PairCollator


def test_the_matching_maps_have_a_rate_of_their_own(tmp_path):
    model = make_model(tmp_path / "t")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_of(model, tmp_path, max_steps=1, learning_rate=1e-2, matching_learning_rate=1e-4)
    trainer.train()
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters() if n in before}
    # Adam's first step is as long as its rate.
    for name, step in moved.items():
        expected = 1e-2 if name.startswith("W_i2t") else 1e-4
        assert step == pytest.approx(expected, rel=0.05), name
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(before)


def test_noise_moves_the_states_in_training_alone(tmp_path):
    model = make_model(tmp_path / "t")
    batch = PairCollator(model.processor)(pairs())
    batch.pop("skipped"), batch.pop("n_seen")
    with torch.no_grad():
        plain = model.train()(**batch).ret_embeds
        contexts = batch["contexts"]
        states = model.ret_states(contexts["input_ids"], contexts["attention_mask"])
        trainer_of(model, tmp_path, state_noise=0.5)
        torch.manual_seed(0)
        noisy = model.train()(**batch).ret_embeds
        torch.manual_seed(0)
        deviation = (states - states.mean(0)).square().mean().sqrt()
        by_hand = model.eval().W_t2m(states + 0.5 * deviation * torch.randn_like(states))
        assert torch.equal(model(**batch).ret_embeds, plain)
    torch.testing.assert_close(noisy, by_hand, atol=1e-5, rtol=1e-5)
    assert (noisy - plain).abs().max() > 1e-3


def test_past_images_of_a_map_that_is_trained_are_refused(tmp_path):
    model = make_model(tmp_path / "t", alignment="canonical", shared_width=5, train_image_map=True)
    with pytest.raises(ValueError, match="--negatives_bank keeps past embeddings of images, which --train_image_map"):
        trainer_of(model, tmp_path, negatives_bank=8)


def test_a_later_file_wins_and_null_is_the_default(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"lambda2": 3, "ret_init": "#", "warmup_steps": 7}))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"lambda2": 4, "ret_init": None}))
    model, _, args = parse(["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert model.lambda2 == 4 and model.ret_init is None and args.warmup_steps == 7
    model, _, args = parse([str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--lambda2=5"])
    assert model.lambda2 == 5


@pytest.mark.parametrize("name", ["miniature", "opt-1.3b", "opt-6.7b", "opt-13b"])
def test_the_papers_form_of_a_configuration_is_the_papers(name):
    model, _, args = parse(["--config", str(CONFIGS / f"{name}.yaml")])
    assert model.alignment == "canonical" and model.init == "cca" and args.state_noise > 0
    model, _, args = parse(["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(CONFIGS / "paper.yaml")])
    assert (model.alignment, model.init, model.lambda1, model.lambda2, model.temperature) == (
        "paper", "random", 1, 10, 0.07)  # fmt: skip
    assert args.state_noise == 0 and args.matching_learning_rate is None and args.negatives_bank == 0
