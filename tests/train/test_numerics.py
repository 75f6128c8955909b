"""A loss or gradient that is not finite stops the run or is left out, with the step, the culprit and the pairs."""

import pytest
import torch

from tests.tiny import make_model
from tests.train.test_trainer import pairs, trained_tensors, trainer_of
from train.numerics import IN_A_ROW, NonFiniteError, is_finite


def spoilt(trainer, at, value=float("nan")):
    """The trainer, whose losses at some calls are not finite."""
    compute, calls = trainer.compute_loss, []

    def computes(*args, **kwargs):
        loss = compute(*args, **kwargs)
        calls.append(0)
        return loss * value if len(calls) - 1 in at else loss

    trainer.compute_loss = computes
    trainer.data_collator.named = True
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_it_stops_with_the_step_and_the_pairs(tmp_path, value):
    model = make_model(tmp_path / "t")
    trainer = spoilt(trainer_of(model, tmp_path, pairs(8)), [2], value)
    with pytest.raises(
        NonFiniteError, match=r"step 3: the gradient of .*W_t2m\.weight.* is NaN or infinite, on a batch of"
    ):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in trained_tensors(model).values())


def test_a_step_is_left_out_by_choice(tmp_path):
    model = make_model(tmp_path / "t")
    trainer = spoilt(trainer_of(model, tmp_path, pairs(8), non_finite="skip"), [2, 4])
    trainer.train()
    assert trainer.skipped_steps == 2 and trainer.state.global_step == 6
    assert all(tensor.isfinite().all() for tensor in trained_tensors(model).values())
    assert all(log["loss"] == log["loss"] for log in trainer.state.log_history if "loss" in log)


def test_weights_that_are_lost_are_not_skipped_for_ever(tmp_path):
    trainer = trainer_of(make_model(tmp_path / "t"), tmp_path, pairs(8), non_finite="skip", max_steps=50)
    with pytest.raises(NonFiniteError, match="comes of the weights"):
        spoilt(trainer, range(50)).train()
    assert trainer.state.global_step == IN_A_ROW - 1


def test_a_gradient_alone_counts():
    layer = torch.nn.Linear(2, 2)
    assert is_finite(torch.tensor(1.0), layer)
    layer.weight.grad = torch.tensor([[1.0, float("inf")], [0.0, 0.0]])
    assert not is_finite(torch.tensor(1.0), layer) and not is_finite(torch.tensor(float("nan")), torch.nn.Linear(1, 1))
