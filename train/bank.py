"""A bank of past image embeddings: with CLIP frozen they stay exact, so they are negatives at almost no cost."""

import torch
import torch.nn.functional as F

from modeling_unimur.losses_unimur import gather_rows


class NegativesBank:
    """
    The last `size` image embeddings, of all processes, oldest first to go.

    Args:
        size: images kept, at least 1.

    Raises:
        ValueError: `size` is below 1.
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"a bank of {size} images holds nothing: give at least 1, or use none")
        self.size = size
        self._rows: torch.Tensor | None = None
        self._filled = self._next = 0

    @property
    def embeds(self) -> torch.Tensor | None:
        """`(m, q)` float32, L2-normalised, m up to `size`; `None` before the first `add`."""
        return None if self._rows is None else self._rows[: self._filled]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `load_state_dict` restores, in the same order, so that sums round the same."""
        rows = torch.empty(0, 0) if self._rows is None else self._rows[: self._filled].clone()
        return {"rows": rows, "next": torch.tensor(self._next), "size": torch.tensor(self.size)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over another bank's images. Raises `ValueError` where its size is another."""
        rows, size = state["rows"], int(state["size"])
        if size != self.size:
            raise ValueError(f"the checkpoint's bank is one of {size} images, not {self.size}: give the same size")
        self._rows, self._filled, self._next = None, len(rows), int(state["next"])
        if len(rows):
            self._rows = rows.new_empty(self.size, rows.shape[1])
            self._rows[: len(rows)] = rows

    @torch.no_grad()
    def add(self, image_embeds: torch.Tensor) -> None:
        """Adds the images of a step, `(n, q)` of each process, normalised or not."""
        rows = gather_rows(F.normalize(image_embeds.float(), dim=-1))[-self.size :]
        if self._rows is None:
            self._rows = torch.empty(self.size, rows.shape[1], device=rows.device)
        until = min(len(rows), self.size - self._next)
        self._rows[self._next : self._next + until] = rows[:until]
        self._rows[: len(rows) - until] = rows[until:]
        self._filled = min(self.size, self._filled + len(rows))
        self._next = (self._next + len(rows)) % self.size
