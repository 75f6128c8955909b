"""Eq. 1-7 and Table 5's alternatives against values worked by hand."""

import math

import pytest
import torch

from modeling_unimur.losses_unimur import (
    caption_loss,
    text_matching_loss,
    total_loss,
    visual_matching_loss,
)

A = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # not normalised: the losses take cosines
B = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # cosines with A: [[1, .6], [0, .8]]


def test_caption_loss_is_the_mean_negative_log_likelihood():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    loss = caption_loss(logits, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx((-math.log(0.5) - math.log(0.8)) / 2)


def test_caption_loss_without_captions_is_zero():
    assert caption_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).item() == 0


def test_visual_matching_is_symmetric_info_nce():
    s = 2.0
    forth = (-math.log(math.exp(s) / (math.exp(s) + math.exp(0.6 * s)))
             - math.log(math.exp(0.8 * s) / (math.exp(0.8 * s) + 1))) / 2  # fmt: skip
    back = (-math.log(math.exp(s) / (math.exp(s) + 1))
            - math.log(math.exp(0.8 * s) / (math.exp(0.6 * s) + math.exp(0.8 * s)))) / 2  # fmt: skip
    assert visual_matching_loss(A, B, s).item() == pytest.approx(forth + back, rel=1e-5)


@pytest.mark.parametrize(
    ("target", "reduction", "expected"),
    [
        ("raw", "sum", ((2 - 1) ** 2 + 0 + 1.2**2 + (3 - 1.6) ** 2) / 2),
        ("raw", "mean", ((2 - 1) ** 2 + 0 + 1.2**2 + (3 - 1.6) ** 2) / 4),
        ("normalized", "sum", ((2 - 1) ** 2 + 0 + 0.6**2 + (3 - 0.8) ** 2) / 2),
    ],
)
def test_text_matching_is_a_squared_distance(target, reduction, expected):
    texts = torch.tensor([[1.0, 0.0], [1.2, 1.6]])
    loss = text_matching_loss(A, texts, target=target, reduction=reduction)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_text_matching_as_max_margin():
    # rows: max(0, .2 - 1 + .6) = 0, max(0, .2 - .8 + 0) = 0; columns: max(0, .2 - 1 + 0) = 0, max(0, .2 - .8 + .6) = 0
    assert text_matching_loss(A, B, kind="max_margin", margin=0.2).item() == pytest.approx(0, abs=1e-6)
    # margin .7: rows .3 and 0, columns 0 and .5
    assert text_matching_loss(A, B, kind="max_margin", margin=0.7).item() == pytest.approx((0.3 + 0.5) / 2, rel=1e-5)


def test_text_matching_as_info_nce_is_the_visual_loss_on_texts():
    assert text_matching_loss(A, B, kind="infonce", logit_scale=3.0) == visual_matching_loss(A, B, 3.0)


def test_total_weighs_the_parts():
    assert total_loss(1.0, 2.0, 3.0, lambda1=1.0, lambda2=10.0) == 33.0


@pytest.mark.parametrize("loss", [lambda a, b: visual_matching_loss(a, b, 1.0), text_matching_loss])
def test_rows_that_do_not_match_are_refused(loss):
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 2\)"):
        loss(A, B[:1])


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='cosine'"):
        text_matching_loss(A, B, kind="cosine")
