"""Ranks and recall over a pool, ties broken without favour."""

import torch


def ranks(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    Rank, from 1, of each query's best right answer.

    Args:
        scores: `(n, m)` float, higher is better.
        right: `(n, m)` bool, which candidates are right; or `(n,)` int64, the one that is.

    Returns:
        `(n,)` float64: candidates scored above, plus half of those tied with it, plus 1. A query without a right answer
        has rank infinity.
    """
    if right.dtype != torch.bool:
        right = torch.nn.functional.one_hot(right, scores.shape[1]).bool()
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    above = (scores > best).sum(1)
    tied = ((scores == best) & ~right).sum(1)
    found = above.double() + tied.double() / 2 + 1
    return found.masked_fill(~right.any(1), torch.inf)


def recall(found: torch.Tensor, k: int) -> float:
    """Share of the queries whose rank is at most `k`, in percent."""
    return 100 * (found <= k).double().mean().item()
