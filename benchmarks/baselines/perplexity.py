"""FROMAGe with its texts ranked by the LLM's perplexity instead of by embedding."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.baselines.fromage import Fromage, FromageModel
from benchmarks.language import LanguageSystem, Likelihoods
from modeling_unimur.dialogues_unimur import parse_dialogue

# The paper does not define its "FROMAGe-ppl" further. FROMAGe's own score is the mean over context and candidate.
SCORES = {
    "mean": {"shift": True, "reduction": "mean", "scope": "candidate"},
    "sum": {"shift": True, "reduction": "sum", "scope": "candidate"},
    "mean with context": {"shift": True, "reduction": "mean", "scope": "all"},
    "mean, unshifted": {"shift": False, "reduction": "mean", "scope": "candidate"},
}


class FromagePerplexity(Fromage):
    """
    Images as [`Fromage`]; texts by likelihood after the context.

    Args:
        score: one of `SCORES`.
        known: likelihoods already computed, shared by systems that differ in the score only.
    """

    def __init__(self, model: FromageModel, score: str = "mean", known: dict | None = None):
        super().__init__(model)
        self.name = f"FROMAGe, text by perplexity ({score})"
        self.score = SCORES[score]
        self.known: dict[Any, Likelihoods] = {} if known is None else known

    def text_scores(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        """`(n, texts)`, higher is more likely."""
        keys = [_key(context) for context in contexts]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        texts = list(texts)
        computed = LanguageSystem.likelihoods(
            self, [contexts[i] for i in new], [texts] * len(new), show_progress_bar=True
        )
        self.known |= {keys[i]: likelihoods for i, likelihoods in zip(new, computed, strict=True)}
        return torch.stack([self.known[key].scores(**self.score) for key in keys])


def _key(context: Any) -> tuple:
    # A picture is identified by its Python object: the data set has one for each id.
    return tuple(tuple(e if isinstance(e, str) else id(e) for e in turn) for turn in parse_dialogue(context))
