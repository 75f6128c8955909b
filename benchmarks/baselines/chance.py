"""Random embeddings: the level of chance in each task."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.systems import System


class Chance(System):
    """Every dialogue, image and text at a random point of the sphere, drawn again at each call, from one generator."""

    name = "chance"

    def __init__(self, seed: int = 0, width: int = 64):
        self.generator, self.width = torch.Generator().manual_seed(seed), width

    def _draw(self, items: Sequence[Any], **kwargs) -> torch.Tensor:
        return F.normalize(torch.randn(len(items), self.width, generator=self.generator), dim=-1)

    embed_dialogues = embed_images = embed_texts = _draw
