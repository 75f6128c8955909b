"""Recall at k with ties in random order: the probability that a gold candidate is among the first k."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

# Numbers compared at once: bounds the memory on top of the scores themselves.
BLOCK = 2**22

DESCRIPTION = """
Recall at k of a ranking, as retrieval papers report it: the share of the queries for which at least one gold candidate
is among the first k (a hit of any of them; not the share of them that is retrieved). Candidates of equal score
are taken in random order, and each query counts with the exact probability of a hit.
"""

CITATION = """
@inproceedings{wang-etal-2024-unified,
    title = {Unified Embeddings for Multimodal Retrieval via Frozen {LLM}s},
    author = {Wang, Ziyang and Elfardy, Heba and Dreyer, Markus and Small, Kevin and Bansal, Mohit},
    booktitle = {Findings of the Association for Computational Linguistics: EACL 2024},
    pages = {1537--1547},
    year = {2024},
    url = {https://aclanthology.org/2024.findings-eacl.105},
}
"""

INPUTS = """
Args:
    predictions: for each query the scores of its candidates (list of float, higher is better; lengths may differ).
    references: for each query the indices of its gold candidates (list of int; any number, also none).
    ks: the cut-offs, 1, 5 and 10 unless given.

Returns:
    `R@k` for each k, in 0..1, the mean over the queries that have a gold candidate (nan where no query has);
    `n`, how many these are; `without_answer`, how many queries had none and were left out.

Examples:

    >>> metric = load("recall_at_k")
    >>> metric.compute(predictions=[[0.9, 0.5, 0.1], [0.2, 0.2]], references=[[1], [0]], ks=[1, 2])
    {'R@1': 0.25, 'R@2': 1.0, 'n': 2, 'without_answer': 0}
"""


def hit_rate_per_item(
    scores: np.ndarray | Sequence[Any], gold: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)
) -> np.ndarray:
    """
    The probability that at least one gold candidate is among the first k, ties in random order.

    Let `a` candidates score above the best gold one, `t` have its score (itself included), `r` of these gold, and
    `j = k - a` places be left for the tie. A random order fills them with others only with the hypergeometric
    probability `C(t - r, j) / C(t, j)`; the value is one minus that.

    Args:
        scores: `(n, m)` real, higher is better; or `n` rows of any lengths. Infinities are scores like others.
        gold: for each query the indices of the gold candidates, `0 <= index < m`; a duplicate counts once.
        ks: cut-offs, at least 1.

    Returns:
        `(n, len(ks))` float64; nan for a query without a gold candidate.

    Raises:
        ValueError: a NaN score, an index outside the candidates, lengths that differ, or k < 1.
    """
    if len(scores) != len(gold):
        raise ValueError(f"{len(scores)} rows of scores for {len(gold)} lists of gold candidates: expected one each")
    if any(operator.index(k) < 1 for k in ks):
        raise ValueError(f"ks {list(ks)}: a cut-off is at least 1")
    lengths = np.array([len(row) for row in scores], dtype=np.int64)
    hits = np.full((len(scores), len(ks)), np.nan)
    for m in np.unique(lengths):
        same = np.flatnonzero(lengths == m)
        step = max(1, BLOCK // max(m, 1))
        for start in range(0, len(same), step):
            rows = same[start : start + step]
            block = scores[rows] if isinstance(scores, np.ndarray) else np.stack([np.asarray(scores[i]) for i in rows])
            hits[rows] = _hit_rates(block, [gold[i] for i in rows], rows, np.asarray(ks))
    return hits


def _hit_rates(scores: np.ndarray, gold: list[Sequence[int]], queries: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """`(rows, m)` scores -> `(rows, len(ks))`; `queries` are the rows' numbers, for messages."""
    if np.isnan(scores).any():
        raise ValueError(f"query {queries[np.isnan(scores).any(1).argmax()]}: a score is NaN; a rank needs numbers")
    n, m = scores.shape
    pairs = [(i, index) for i, indices in enumerate(gold) for index in {operator.index(index) for index in indices}]
    for i, index in pairs:
        if not 0 <= index < m:
            raise ValueError(f"query {queries[i]}: gold candidate {index}, but it has candidates 0 to {m - 1}")
    if not pairs:
        return np.full((n, len(ks)), np.nan)
    row, column = np.array(pairs).T
    values = scores[row, column]
    has = np.bincount(row, minlength=n) > 0
    # Each query's best gold score: the last of its pairs in order of score.
    order = np.argsort(values, kind="stable")
    best = np.zeros(n, dtype=scores.dtype)
    best[row[order]] = values[order]

    above = (scores > best[:, None]).sum(1)
    tied = (scores == best[:, None]).sum(1)
    tied_gold = np.bincount(row, weights=values == best[row], minlength=n).astype(np.int64)
    places = np.clip(ks[None, :] - above[:, None], 0, tied[:, None])
    # C(t - r, j) / C(t, j) is the same with r and j exchanged, and the shorter product of the two has min(r, j) factors.
    shorter, longer = np.minimum(places, tied_gold[:, None]), np.maximum(places, tied_gold[:, None])
    missed = np.ones((n, len(ks)))
    for i in range(shorter.max()):
        left = np.maximum(tied[:, None] - i, 1)
        missed *= np.where(i < shorter, np.maximum(tied[:, None] - longer - i, 0) / left, 1)
    return np.where(has[:, None], 1 - missed, np.nan)


def _rows(column: Any) -> list[Any]:
    """Views of an arrow column's lists, without a Python object for each number; a plain list stays as it is."""
    if isinstance(column, list):
        return column
    rows = []
    for chunk in column.chunks:
        # Offsets point into all the numbers, also where the chunk is a slice of a longer one.
        numbers, ends = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        rows += [numbers[a:b] for a, b in itertools.pairwise(ends)]
    return rows


class RecallAtK(evaluate.Metric):
    """See `DESCRIPTION`."""

    def _info(self):
        info = evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )
        # As Python lists, 50,000 queries of 2,000 candidates would take over 3 GB. `MetricInfo` itself accepts a format
        # other than lists only where every feature is a single value.
        info.format = "arrow"
        return info

    def _compute(self, predictions, references, ks=(1, 5, 10)):
        hits = hit_rate_per_item(_rows(predictions), _rows(references), ks)
        scored = ~np.isnan(hits).any(1)
        means = hits[scored].mean(0) if scored.any() else np.full(len(ks), np.nan)
        result = {f"R@{k}": float(mean) for k, mean in zip(ks, means, strict=True)}
        return result | {"n": int(scored.sum()), "without_answer": int((~scored).sum())}
