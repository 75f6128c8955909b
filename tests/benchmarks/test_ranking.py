"""Ranks and recall against cases worked by hand."""

import math

import torch

from benchmarks.ranking import ranks, recall

SCORES = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [0.1, 0.5, 0.5]])


def test_ranks_count_ties_half():
    assert ranks(SCORES, torch.tensor([1, 0, 2])).tolist() == [2.0, 2.0, 1.5]


def test_the_best_of_several_right_answers_counts():
    right = torch.tensor([[False, True, True], [True, True, True], [False, False, False]])
    assert ranks(SCORES, right).tolist() == [2.0, 1.0, math.inf]


def test_a_constant_model_gains_nothing_from_ties():
    found = ranks(torch.zeros(100, 100), torch.arange(100))
    assert recall(found, 1) == 0 and recall(found, 49) == 0 and recall(found, 51) == 100


def test_recall():
    assert recall(torch.tensor([1.0, 3.0, 5.0, math.inf]), 3) == 50
