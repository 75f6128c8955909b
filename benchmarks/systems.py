"""The interface that the tasks need of a system: UniMuR or a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image


def cosine(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Of L2-normalised rows: `(n, q)`, `(m, q)` -> `(n, m)`."""
    return queries @ candidates.T


class DoesNotApplyError(Exception):
    """A task does not apply to a system. Not `NotImplementedError`, which torch raises where a device lacks an operation."""


@dataclass
class ImageReplies:
    """
    Whether each reply has an image, where the system itself decides this.

    Args:
        with_image: `(n,)` bool, whether the reply has an image.
        queries: `(n, q)` float32, L2-normalised, the query for that image; used only where `with_image`.
    """

    with_image: torch.Tensor
    queries: torch.Tensor


class System:
    """
    A model as the tasks see it. What a system cannot do raises [`DoesNotApplyError`], and the result then says that the
    task does not apply.

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
        """Resets the counts behind `notes`, at the start of a task."""

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
            return cosine(queries, candidates)
        return torch.einsum("nq,mvq->nmv", queries, candidates).amax(-1)

    def image_replies(self, dialogues: Sequence[Any]) -> ImageReplies | None:
        """The replies' images, where the system itself decides which replies have one; `None`: the pool decides (3.4)."""
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
        """For each context a score per option, `(options,)`, higher is more likely; see [`benchmarks.language`]."""
        raise DoesNotApplyError

    def answers(self, contexts: Sequence[Any], max_new_tokens: int = 10) -> list[str]:
        """The language model's greedy answer to each context, up to the end of the line."""
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


class ShownAs(Embedder):
    """What a model retrieves, shown where another system shows an image: the two then differ by what they retrieve."""

    def __init__(self, model: Any, other: System, name: str):
        super().__init__(model, name)
        self.other = other

    def image_replies(self, dialogues):
        replies = self.other.image_replies(dialogues)
        return replies and ImageReplies(replies.with_image, self.embed_dialogues(dialogues))
