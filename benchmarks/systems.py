"""What every task asks of a system, be it UniMuR or a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image


class DoesNotApplyError(Exception):
    """A system has no such answer. Its own class: torch says `NotImplementedError` of an operation a device lacks."""


@dataclass
class ImageReplies:
    """
    Replies whose images a system decides on itself.

    Args:
        shown: `(n,)` bool, whether the reply holds an image.
        queries: `(n, q)` float32, L2-normalised, what that image is sought with; read only where `shown`.
    """

    shown: torch.Tensor
    queries: torch.Tensor


class System:
    """
    A model as the tasks see it. A system answers with what it can; the rest raises [`DoesNotApplyError`], and the task
    says that it does not apply.

    Attributes:
        name: of the row in a table.
        revision: what identifies the weights, for the result's json.
        draw_below: of a system that draws, the score from which on the pool's best image is taken instead; `None`: never.
        notes: what a reader must know of this row, such as how many dialogues were truncated.
    """

    name: str = "?"
    draw_below: float | None = None

    @property
    def revision(self) -> dict[str, Any]:
        return {}

    @property
    def notes(self) -> list[str]:
        return []

    def begin(self) -> None:
        """Forgets what was counted for `notes`: a new task begins."""

    def embed_dialogues(self, dialogues: Sequence[Any], **kwargs) -> torch.Tensor:
        """
        Each as [`parse_dialogue`] takes it -> `(n, q)` float32, L2-normalised. `bos` may be given by a protocol; a system
        that has its own place for BOS, or none, ignores it.
        """
        raise DoesNotApplyError

    def embed_images(self, images: Sequence[Any], **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised (or `(n, vectors, q)`, see `similarity`)."""
        raise DoesNotApplyError

    def embed_texts(self, texts: Sequence[str], **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised."""
        raise DoesNotApplyError

    def similarity(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """`(n, q)`, `(m, q)` -> `(n, m)`: cosine. A candidate of several vectors counts by its best one."""
        if candidates.ndim == 2:
            return queries @ candidates.T
        return torch.einsum("nq,mvq->nmv", queries, candidates).amax(-1)

    def image_replies(self, dialogues: Sequence[Any]) -> ImageReplies | None:
        """Where the system itself decides which replies hold an image; `None`: the pool does (3.4)."""
        return None

    def draw(self, dialogues: Sequence[Any], captions: Sequence[str | None] = ()) -> list[Image.Image]:
        """
        A picture for each dialogue, drawn. `captions` are the true images', for a system that measures what a diffusion
        model draws from them.
        """
        raise DoesNotApplyError

    def text_scores(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor | None:
        """`(n, texts)` where the system does not rank texts by embedding; `None` where it does."""
        return None

    def log_likelihoods(
        self, contexts: Sequence[Any], options: Sequence[Sequence[str]], **protocol
    ) -> list[torch.Tensor]:
        """For each context, a score an option `(options,)`, higher is likelier; see [`benchmarks.language`]."""
        raise DoesNotApplyError

    def answers(self, contexts: Sequence[Any], max_new_tokens: int = 10) -> list[str]:
        """What the language model says after each context, greedily, up to a line's end."""
        raise DoesNotApplyError


class Embedder(System):
    """A system around anything with the model's `embed_*`."""

    def __init__(self, model: Any, name: str):
        self.model, self.name = model, name

    @property
    def revision(self) -> dict[str, Any]:
        return dict(self.model.fingerprint)

    def embed_dialogues(self, dialogues, *, bos=None, **kwargs):
        return self.model.embed_dialogues(dialogues, **kwargs)

    def embed_images(self, images, **kwargs):
        return self.model.embed_images(images, **kwargs)

    def embed_texts(self, texts, **kwargs):
        return self.model.embed_texts(texts, **kwargs)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row by row: `(n, q)`, `(n, q)` -> `(n,)`."""
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
