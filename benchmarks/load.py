"""Loads a system of a given kind from a folder."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from modeling_unimur import UniMuRModel

from .baselines.blip2 import Blip2Baseline
from .baselines.clip import ClipBaseline
from .baselines.fromage import Fromage, FromageModel
from .baselines.frozen import Frozen, FrozenModel
from .baselines.perplexity import FromagePerplexity
from .language import LanguageSystem
from .systems import DoesNotApplyError, Embedder, System


class UniMuR(Embedder, LanguageSystem):
    """A [`UniMuRModel`] as the tasks see it."""

    def __init__(self, model: UniMuRModel, name: str = "UniMuR"):
        super().__init__(model, name)

    def draw(self, dialogues: Sequence[Any], captions: Sequence[str | None] = ()) -> list[Image.Image]:
        """By the model's [IMG] tokens, where it has them."""
        if not self.model.config.n_drawing_tokens:
            raise DoesNotApplyError
        with suppress(ImportError):  # without diffusers the model says what to install
            # The miniature's diffusion model has an autoencoder of its own, and diffusers imports nothing that a folder names.
            importlib.import_module("train.miniature.diffusion")
        return self.model.draw_each(dialogues, show_progress_bar=True)


# kind -> what loads it from a folder or a name on the Hub; a new baseline is one line here.
SYSTEMS: dict[str, Callable[[str], System]] = {
    "unimur": lambda path: UniMuR(UniMuRModel.from_pretrained(path)),
    "clip": lambda path: ClipBaseline(UniMuRModel.from_pretrained(path)),  # the CLIP inside that checkpoint
    "fromage": lambda path: Fromage(FromageModel.from_pretrained(path)),
    "fromage-ppl": lambda path: FromagePerplexity(FromageModel.from_pretrained(path)),
    "blip2": Blip2Baseline.from_pretrained,
    "frozen": lambda path: Frozen(FrozenModel.from_pretrained(path)),
}


def load(kind: str, path: str, name: str | None = None) -> System:
    """
    Args:
        kind: one of `SYSTEMS`.
        path: a folder or a name on the Hub.
        name: of the row; the kind's own by default.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in SYSTEMS:
        raise ValueError(f"no system {kind!r}; there are {', '.join(SYSTEMS)}")
    system = SYSTEMS[kind](path)
    system.name = name or system.name
    return system
