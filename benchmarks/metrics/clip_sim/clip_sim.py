"""CLIP-Sim: how well the text and the image of one reply match."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
CLIP-Sim of multimodal response retrieval: the mean cosine between the CLIP embeddings of the text and of the image that
were returned together. The embeddings are the input; a reply without an image is not a row.
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
    predictions: for each reply with an image, the CLIP embedding of its text (list of float, of any length but zero).
    references: the CLIP embedding of its image, of the same length.

Returns:
    `clip_sim`, the mean cosine in -1..1 (nan without a row); `n`, the number of rows.

Examples:

    >>> metric = load("clip_sim")
    >>> metric.compute(predictions=[[2.0, 0.0], [3.0, 4.0]], references=[[1.0, 0.0], [4.0, 3.0]])
    {'clip_sim': 0.98, 'n': 2}
"""


def cosine_per_item(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """
    Cosine of each text with the image of its row, in float64.

    Args:
        texts, images: `(n, q)`, of any length but zero.

    Returns:
        `(n,)` float64.

    Raises:
        ValueError: shapes differ, or a vector is zero or not finite.
    """
    unit = []
    for name, rows in (("text", texts), ("image", images)):
        try:
            rows = np.asarray(rows, dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"{name} embeddings: rows of different lengths, or not numbers") from error
        rows = rows if len(rows) else rows.reshape(0, 0)
        if rows.ndim != 2:
            raise ValueError(f"{name} embeddings of shape {rows.shape}: expected (n, q)")
        # Divided by the largest entry first, so that no square overflows or vanishes.
        largest = np.abs(rows).max(1, initial=0, keepdims=True)
        bad = ~np.isfinite(largest[:, 0]) | (largest[:, 0] == 0)
        if bad.any():
            raise ValueError(f"{name} {bad.argmax()}: its embedding is zero or not finite, so it has no cosine")
        rows = rows / largest
        unit.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    if unit[0].shape != unit[1].shape:
        raise ValueError(f"texts {unit[0].shape} and images {unit[1].shape}: expected the same shape")
    # Rounding may pass 1 by a last digit.
    return (unit[0] * unit[1]).sum(1).clip(-1, 1)


class ClipSim(evaluate.Metric):
    """See `DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions, references):
        cosines = cosine_per_item(predictions, references)
        return {"clip_sim": float(cosines.mean()) if len(cosines) else float("nan"), "n": len(cosines)}
