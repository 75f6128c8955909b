"""Batches of one kind: caption pairs, documents of words, documents with images."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """
    Shuffled indices whose every run of `batch_size` is of one group, the groups spread evenly.

    Pairs are several times shorter than documents, and only documents with images need a gradient through the LLM, so a
    mixed batch would pad and differentiate rows for nothing. Each group's remainder below a batch is left out of the
    epoch, another one each time; `left_out` counts it.

    Args:
        groups: the group of each row.
        batch_size: rows of a global batch, over all processes.
        seed: of the shuffles; the order of an epoch depends on it and on the epoch alone.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int):
        self.groups, self.batch_size, self.seed, self.epoch = torch.as_tensor(groups), batch_size, seed, 0
        sizes = [int((self.groups == g).sum()) for g in self.groups.unique()]
        self._length = sum(size // batch_size * batch_size for size in sizes)
        self.left_out = len(groups) - self._length
        if not self._length:
            raise ValueError(f"no group of {sizes} rows fills a batch of {batch_size}")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        placed: list[tuple[float, torch.Tensor]] = []
        for group in self.groups.unique():
            rows = torch.nonzero(self.groups == group).flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            batches = [b for b in rows.split(self.batch_size) if len(b) == self.batch_size]
            # Each kind is spread evenly over the epoch, so that accumulated steps hold the kinds in their proportion.
            places = (torch.arange(len(batches)) + torch.rand(len(batches), generator=generator)) / max(
                len(batches), 1
            )
            placed += zip(places.tolist(), batches, strict=True)
        for _, batch in sorted(placed, key=lambda item: item[0]):
            yield from batch.tolist()


def set_epoch(loader: Any, epoch: int) -> None:
    """
    Tells the innermost sampler of a loader its epoch. accelerate's loaders do so themselves, but where several processes
    skip the batches before an interruption they do not reach it.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    sampler: Any = getattr(batches, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
