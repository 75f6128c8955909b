"""How often an image is shown, on the turns that have one and on those that have none."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Image retrieval rate of multimodal response retrieval: of the turns whose true reply has an image, the share for which an
image is shown, whichever it is. Showing always would score 1, so the same share over the text-only turns stands beside
it, where it should be low.
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
    predictions: for each turn whether an image is shown (bool; or the probability that it is, such as 0.5 where an image
        and a text tie for the place).
    references: for each turn whether the true reply has an image (bool).

Returns:
    `image_retrieval_rate` over the turns with an image and `on_text_only_turns` over the others, in 0..1 (nan where there
    are no such turns); `image_turns` and `text_only_turns`, how many there are.

Examples:

    >>> metric = load("image_retrieval_rate")
    >>> metric.compute(predictions=[True, False, False], references=[True, True, False])
    {'image_retrieval_rate': 0.5, 'on_text_only_turns': 0.0, 'image_turns': 2, 'text_only_turns': 1}
"""


def shown_per_item(shown: Sequence[float], has_image: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """
    Splits what was shown by what the reply has.

    Args:
        shown: `(n,)` bool, or the probability in 0..1 that an image is shown.
        has_image: `(n,)` bool.

    Returns:
        Two `(n,)` float64: `shown` on the turns with an image, and on the text-only turns; nan on the other turns.

    Raises:
        ValueError: shapes differ, or a value outside 0..1.
    """
    shown, has_image = np.asarray(shown, dtype=np.float64), np.asarray(has_image, dtype=bool)
    if shown.ndim != 1 or shown.shape != has_image.shape:
        raise ValueError(
            f"shapes {shown.shape} of shown, {has_image.shape} of has_image: expected one value a turn each"
        )
    bad = ~((shown >= 0) & (shown <= 1))
    if bad.any():
        raise ValueError(f"turn {bad.argmax()}: shown is {shown[bad][0]}, expected a bool or a probability")
    return np.where(has_image, shown, np.nan), np.where(has_image, np.nan, shown)


class ImageRetrievalRate(evaluate.Metric):
    """See `DESCRIPTION`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("bool")}
            ),
        )

    def _compute(self, predictions, references):
        groups = [values[~np.isnan(values)] for values in shown_per_item(predictions, references)]
        with_image, text_only = (float(g.mean()) if len(g) else float("nan") for g in groups)
        return {
            "image_retrieval_rate": with_image,
            "on_text_only_turns": text_only,
            "image_turns": len(groups[0]),
            "text_only_turns": len(groups[1]),
        }
