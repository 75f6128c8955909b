"""How often an image is retrieved, on turns whose gold reply has one and on text-only turns."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Image retrieval rate of multimodal response retrieval: of the turns whose gold reply has an image, the share for which any
image is retrieved. Retrieving one always would score 1, so the same share over the text-only turns is given too; it
should be low.
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
    predictions: for each turn whether an image is retrieved (bool; or the probability, such as 0.5 where an image and a
        text tie).
    references: for each turn whether the gold reply has an image (bool).

Returns:
    `image_retrieval_rate` over the turns with an image and `on_text_only_turns` over the others, in 0..1 (nan where there
    are no such turns); `image_turns` and `text_only_turns`, how many there are.

Examples:

    >>> metric = load("image_retrieval_rate")
    >>> metric.compute(predictions=[True, False, False], references=[True, True, False])
    {'image_retrieval_rate': 0.5, 'on_text_only_turns': 0.0, 'image_turns': 2, 'text_only_turns': 1}
"""


def image_rate_per_item(with_image: Sequence[float], has_image: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """
    Splits `with_image` by whether the gold reply has an image.

    Args:
        with_image: `(n,)` bool, whether an image is retrieved, or its probability in 0..1.
        has_image: `(n,)` bool, whether the gold reply has an image.

    Returns:
        Two `(n,)` float64: `with_image` on the turns with an image, and on the text-only turns; nan on the other turns.

    Raises:
        ValueError: shapes differ, or a value outside 0..1.
    """
    with_image, has_image = np.asarray(with_image, dtype=np.float64), np.asarray(has_image, dtype=bool)
    if with_image.ndim != 1 or with_image.shape != has_image.shape:
        raise ValueError(
            f"shapes {with_image.shape} of with_image, {has_image.shape} of has_image: expected one value per turn"
        )
    bad = ~((with_image >= 0) & (with_image <= 1))
    if bad.any():
        raise ValueError(f"turn {bad.argmax()}: with_image is {with_image[bad][0]}, expected a bool or a probability")
    return np.where(has_image, with_image, np.nan), np.where(has_image, np.nan, with_image)


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
        groups = [values[~np.isnan(values)] for values in image_rate_per_item(predictions, references)]
        image_turns, text_only = (float(g.mean()) if len(g) else float("nan") for g in groups)
        return {
            "image_retrieval_rate": image_turns,
            "on_text_only_turns": text_only,
            "image_turns": len(groups[0]),
            "text_only_turns": len(groups[1]),
        }
