"""VisDial's ranking of answer options: R@k, MRR, mean rank and NDCG, with ties in random order."""

import operator
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

KS = (1, 5, 10)

DESCRIPTION = """
Visual Dialog's retrieval metrics over the options of a question: recall at 1, 5 and 10, mean reciprocal rank and mean
rank of the human's answer, and NDCG over the options' dense relevances where a question has them. Options of equal score
are taken in random order: every value is the exact expectation.
"""

CITATION = """
@inproceedings{das2017visual,
    title = {Visual Dialog},
    author = {Das, Abhishek and Kottur, Satwik and Gupta, Khushi and Singh, Avi and Yadav, Deshraj and Moura, Jos{\\'e}
        M. F. and Parikh, Devi and Batra, Dhruv},
    booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
    year = {2017},
}
"""

INPUTS = """
Args:
    predictions: for each question the scores of its options (list of float, higher is better; 100 in VisDial).
    references: for each question the index of the human's answer (int).
    relevance: for each question its options' relevances (list of float, along the options), or an empty list where it has
        no dense annotation.

Returns:
    `R@1`, `R@5`, `R@10`, `MRR`, in 0..1, and `mean rank`, from 1, over all questions; `NDCG`, in 0..1, over the questions
    with a relevance above zero (nan where there are no such questions); `n`, how many questions; `with_relevance`, how many
    counted for NDCG; `relevance_all_zero`, how many were left out of NDCG because every relevance is zero.

Examples:

    >>> metric = load("visdial")
    >>> metric.compute(predictions=[[3.0, 2.0, 1.0]], references=[1], relevance=[[1.0, 0.0, 0.0]])["MRR"]
    0.5
"""


def visdial_per_item(
    scores: Sequence[float], answer: int, relevance: Sequence[float] | None = None
) -> dict[str, float]:
    """
    One question's values, expected over random orders of equal scores.

    With `a` options above the answer and `t` at its score, the answer among them, its rank is `a + 1 .. a + t`, each as
    likely. NDCG as VisDial defines it: gains are the relevances, discounted by `log2(rank + 1)`, over the first k ranks,
    k being how many relevances are not zero, divided by the same for the best order. A rank inside a tie is expected to
    gain the mean of the tie.

    Args:
        scores: `(m,)`, higher is better.
        answer: index of the human's answer.
        relevance: `(m,)`, not negative; `None` or empty where there is no dense annotation.

    Returns:
        `R@1`, `R@5`, `R@10`, `MRR`, `mean rank` and `NDCG`. `NDCG` is nan without relevances, and where all are zero (the
        published code divides by zero there).

    Raises:
        ValueError: a NaN score, an answer outside the options, or relevances that are negative, not finite or not one per
            option.
    """
    scores = np.asarray(scores)
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(f"scores of shape {scores.shape}: expected one number per option, none of them NaN")
    answer = operator.index(answer)
    if not 0 <= answer < len(scores):
        raise ValueError(f"answer {answer}, but there are options 0 to {len(scores) - 1}")
    above, tied = int((scores > scores[answer]).sum()), int((scores == scores[answer]).sum())
    values = {f"R@{k}": min(max((k - above) / tied, 0.0), 1.0) for k in KS}
    values["MRR"] = float((1 / (above + np.arange(1, tied + 1))).mean())
    values["mean rank"] = above + (tied + 1) / 2
    values["NDCG"] = float("nan")
    if relevance is not None and len(relevance):
        values["NDCG"] = _ndcg(scores, np.asarray(relevance, dtype=np.float64))
    return values


def _ndcg(scores: np.ndarray, relevance: np.ndarray) -> float:
    if relevance.shape != scores.shape or not (np.isfinite(relevance) & (relevance >= 0)).all():
        raise ValueError(
            f"relevances of shape {relevance.shape} for {len(scores)} options: expected one per option, finite, at least 0"
        )
    k = np.count_nonzero(relevance)
    if not k:
        return float("nan")
    # Groups of equal score, best first; every rank of a group gains the group's mean.
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    means = np.bincount(group, weights=relevance) / sizes
    gains = np.repeat(means, sizes)[:k]
    best = np.sort(relevance)[::-1][:k]
    discounts = np.log2(np.arange(k) + 2)
    return float((gains / discounts).sum() / (best / discounts).sum())


class Visdial(evaluate.Metric):
    """See `DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                    "relevance": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions, references, relevance):
        items = []
        for i, item in enumerate(zip(predictions, references, relevance, strict=True)):
            try:
                items.append(visdial_per_item(*item))
            except ValueError as error:
                raise ValueError(f"question {i}: {error}") from error
        names = [*(f"R@{k}" for k in KS), "MRR", "mean rank", "NDCG"]
        columns = {name: np.array([item[name] for item in items]) for name in names}
        columns["NDCG"] = columns["NDCG"][~np.isnan(columns["NDCG"])]
        annotated = sum(bool(r) for r in relevance)
        return {name: float(values.mean()) if len(values) else float("nan") for name, values in columns.items()} | {
            "n": len(items),
            "with_relevance": len(columns["NDCG"]),
            "relevance_all_zero": annotated - len(columns["NDCG"]),
        }
