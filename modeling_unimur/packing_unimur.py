"""Packing: several short sequences share a row, so that no position is padding; a block mask keeps them apart."""

from collections.abc import Sequence

import torch

from .batch_unimur import Packing

ROW_LENGTH = 128  # positions a row aims at: attention's share stays small, and so does what a row's end wastes


def plan_packing(lengths: Sequence[int], row_length: int = ROW_LENGTH, width: int | None = None) -> Packing:
    """
    Where each position of right-padded sequences goes.

    Args:
        lengths: of n sequences, each at least 1.
        row_length: positions that a row aims at; a longer sequence has a row as long as itself.
        width: of the padded sequences, where it is more than the longest.

    Returns:
        `index` `(rows, length)` int64: which position of the flattened `(n, width)` a packed one holds; `segments`
        `(rows, length)` int64: which sequence of its row, from 1, and 0 where it is padding; `unpack` `(n, width)`
        int64: where a position went in the flattened packed rows, any where it was padding.
    """
    longest = max(lengths)
    width = width or longest
    rows: list[list[int]] = [[] for _ in range(max(1, round(sum(lengths) / max(row_length, longest))))]
    held = [0] * len(rows)
    # The longest first, each to the emptiest row: rows come out about equally long.
    for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = held.index(min(held))
        rows[row].append(sequence)
        held[row] += lengths[sequence]
    index = torch.zeros(len(rows), max(held), dtype=torch.long)
    segments, unpack = torch.zeros_like(index), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sequences in enumerate(rows):
        at = 0
        for number, sequence in enumerate(sequences, 1):
            size = lengths[sequence]
            index[row, at : at + size] = torch.arange(size) + sequence * width
            segments[row, at : at + size] = number
            unpack[sequence, :size] = torch.arange(size) + row * index.shape[1] + at
            at += size
    return {"index": index, "segments": segments, "unpack": unpack}


def block_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    `(rows, 1, length, length)` additive mask: a position sees the earlier ones of its own sequence, and itself.

    Floats, and four dimensions: a boolean mask is read wrongly by eager attention, and positions alone let sequences
    see each other.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = (segments[:, :, None] == segments[:, None, :]) & causal
    masked = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=segments.device)
    return torch.where(visible, torch.zeros_like(masked), masked)[:, None]


def positions(segments: torch.Tensor) -> torch.Tensor:
    """`(rows, length)` int64: positions that start again at 0 with each sequence."""
    at = torch.arange(segments.shape[1], device=segments.device)
    starts = torch.zeros_like(segments)
    starts[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], at[1:], 0)
    return at - starts.cummax(dim=1).values
