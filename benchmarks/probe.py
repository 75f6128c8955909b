"""What a picture of the miniature shows, read by a linear probe on its pixels."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from train.miniature.world import Scene, draw

ATTRIBUTES = ("animal", "hat", "place", "object")
RIDGE = 10.0  # of the mean variance of a pixel


class PixelProbe:
    """
    One linear map a scene's attribute, ridge regression onto its values from the pixels of true pictures.

    Args:
        scenes: what it learns from; each is drawn once.
        seed: of the drawing.
        side: pixels a side that pictures are averaged down to.
    """

    def __init__(self, scenes: Sequence[Scene], seed: int = 0, side: int = 32):
        self.side, rng = side, random.Random(f"probe-{seed}")
        pixels = self._pixels([draw(scene, rng) for scene in scenes])
        self.mean = pixels.mean(0)
        centred = pixels - self.mean
        gram = centred.T @ centred
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram)
        self.values, self.maps = {}, {}
        for name in ATTRIBUTES:
            self.values[name] = sorted({getattr(scene, name) for scene in scenes})
            target = self._one_hot(name, scenes)
            self.maps[name] = torch.cholesky_solve(centred.T @ (target - target.mean(0)), factor), target.mean(0)

    def accuracy(self, pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
        """Attribute -> share of the pictures in which it is that of their scene, in percent."""
        centred, accuracies = self._pixels(pictures) - self.mean, {}
        for name in ATTRIBUTES:
            weight, bias = self.maps[name]
            read = (centred @ weight + bias).argmax(1)
            share = (read == self._one_hot(name, scenes).argmax(1)).double().mean()
            accuracies[name] = round(100 * float(share), 1)
        return accuracies

    def chance(self) -> dict[str, float]:
        """The same of a guess, in percent."""
        return {name: round(100 / len(values), 1) for name, values in self.values.items()}

    def _pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """`(n, 3 side side)` float32 in 0..1."""
        small = [np.asarray(p.convert("RGB").resize((self.side, self.side), Image.Resampling.BOX)) for p in pictures]
        return torch.from_numpy(np.stack(small)).flatten(1).float() / 255

    def _one_hot(self, name: str, scenes: Sequence[Scene]) -> torch.Tensor:
        rows = torch.tensor([self.values[name].index(getattr(scene, name)) for scene in scenes])
        return torch.nn.functional.one_hot(rows, len(self.values[name])).float()
