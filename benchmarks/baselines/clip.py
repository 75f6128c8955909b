"""CLIP alone: a dialogue is the mean of its text and its images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from modeling_unimur import UniMuRModel

from .text_and_images import TextAndImages


class ClipBaseline(TextAndImages):
    """The CLIP inside a [`UniMuRModel`], without the LLM."""

    name = encoder = "CLIP"

    def __init__(self, model: UniMuRModel):
        self.model = model

    @property
    def revision(self) -> dict[str, Any]:
        return {name: self.model.fingerprint[name] for name in ("towers", "preprocessing", "dimension")}

    @property
    def text_positions(self) -> int:
        return self.model.clip.config.text_config.max_position_embeddings

    @property
    def width(self) -> int:
        return self.model.config.clip_width

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any], batch_size: int = 64, **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised: CLIP's own, not the model's."""
        parts = [torch.empty(0, self.width)]
        for start in range(0, len(images), batch_size):
            pixels = self.model.processor.pixels(images[start : start + batch_size])
            parts.append(self.model.encode_images(pixels.to(self.model.device))[1].cpu())
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64, **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised, from the last tokens of each text."""
        tokenizer, parts = self.model.processor.clip_tokenizer, []
        for start in range(0, len(texts), batch_size):
            rows = self.last_tokens(tokenizer(list(texts[start : start + batch_size]))["input_ids"])
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
            parts.append(self.model.encode_clip_texts(batch["input_ids"], batch["attention_mask"]).cpu())
        return F.normalize(torch.cat(parts), dim=-1)
