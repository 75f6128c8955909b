"""A dialogue as the mean of its text and its images, for the baselines that embed each alone."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.systems import System
from modeling_unimur.dialogues_unimur import parse_dialogue


class TextAndImages(System):
    """
    A system whose dialogue is the normalised mean of the embedding of its text and that of its images.

    A text longer than the encoder's positions loses its oldest tokens.

    Attributes:
        encoder: its name in the notes.
        text_positions: tokens of the longest text that it reads.
        width: q, the width of an embedding.
        truncated: how many texts lost tokens since the task began.
    """

    encoder: str
    text_positions: int
    width: int
    truncated: int = 0

    def one_per_image(self, images: Sequence[Any], **kwargs) -> torch.Tensor:
        """`(n, q)`: one vector per image."""
        return self.embed_images(images, **kwargs)

    def begin(self) -> None:
        self.truncated = 0

    @property
    def notes(self) -> list[str]:
        note = f"{self.truncated} texts exceeded {self.encoder}'s {self.text_positions} positions and lost their oldest tokens"
        return [note] if self.truncated else []

    def last_tokens(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """Each row's first token (the tokenizer's own) and its last ones, within the positions; counts the truncated."""
        limit = self.text_positions
        self.truncated += sum(len(row) > limit for row in rows)
        return [row if len(row) <= limit else row[:1] + row[1 - limit :] for row in rows]

    def embed_dialogues(self, dialogues: Sequence[Any], *, bos: str | None = None, **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised."""
        flat = [[element for turn in parse_dialogue(dialogue) for element in turn] for dialogue in dialogues]
        texts = [" ".join(element for element in elements if isinstance(element, str)) for elements in flat]
        sums = torch.zeros(len(flat), self.width)
        with_text = [i for i, text in enumerate(texts) if text]
        if with_text:
            sums[with_text] = self.embed_texts([texts[i] for i in with_text], **kwargs)
        images = [(i, e) for i, elements in enumerate(flat) for e in elements if not isinstance(e, str)]
        if images:
            rows = torch.tensor([i for i, _ in images])
            embeds = self.one_per_image([image for _, image in images], **kwargs)
            sums += F.normalize(torch.zeros_like(sums).index_add_(0, rows, embeds), dim=-1)
        return F.normalize(sums, dim=-1)
