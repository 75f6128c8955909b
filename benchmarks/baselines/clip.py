"""CLIP alone: a dialogue is the mean of its text and its images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.systems import System
from modeling_unimur import UniMuRModel
from modeling_unimur.dialogues_unimur import parse_dialogue


class ClipBaseline(System):
    """
    The CLIP inside a [`UniMuRModel`], without the LLM.

    A dialogue's text longer than CLIP's positions loses its oldest tokens (`truncated` counts those texts). Where the
    dialogue has images, its embedding is the mean of the normalised text and image embeddings, normalised again.
    """

    name = "CLIP"

    def __init__(self, model: UniMuRModel):
        self.model = model
        self.truncated = 0

    @property
    def revision(self) -> dict[str, Any]:
        return {name: self.model.fingerprint[name] for name in ("towers", "preprocessing", "dimension")}

    def begin(self) -> None:
        self.truncated = 0

    @property
    def notes(self) -> list[str]:
        limit = self.model.clip.config.text_config.max_position_embeddings
        cut = f"{self.truncated} texts exceeded CLIP's {limit} positions and lost their oldest tokens"
        return [cut] if self.truncated else []

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any], batch_size: int = 64, **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised: CLIP's own, not the model's."""
        parts = [torch.empty(0, self.model.config.clip_width)]
        for start in range(0, len(images), batch_size):
            pixels = self.model.processor.pixels(images[start : start + batch_size])
            parts.append(self.model.encode_images(pixels.to(self.model.device))[1].cpu())
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64, **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised, from the last tokens of each text."""
        tokenizer, parts = self.model.processor.clip_tokenizer, []
        limit = self.model.clip.config.text_config.max_position_embeddings
        for start in range(0, len(texts), batch_size):
            rows = tokenizer(list(texts[start : start + batch_size]))["input_ids"]
            self.truncated += sum(len(row) > limit for row in rows)
            rows = [row if len(row) <= limit else row[:1] + row[1 - limit :] for row in rows]
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
            parts.append(self.model.encode_clip_texts(batch["input_ids"], batch["attention_mask"]).cpu())
        return F.normalize(torch.cat(parts), dim=-1)

    def embed_dialogues(self, dialogues: Sequence[Any], **kwargs) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised."""
        flat = [[element for turn in parse_dialogue(dialogue) for element in turn] for dialogue in dialogues]
        texts = [" ".join(element for element in elements if isinstance(element, str)) for elements in flat]
        sums = torch.zeros(len(flat), self.model.config.clip_width)
        with_text = [i for i, text in enumerate(texts) if text]
        if with_text:
            sums[with_text] = self.embed_texts([texts[i] for i in with_text])
        images = [
            (i, element) for i, elements in enumerate(flat) for element in elements if not isinstance(element, str)
        ]
        if images:
            rows = torch.tensor([i for i, _ in images])
            embeds = torch.zeros_like(sums).index_add_(0, rows, self.embed_images([image for _, image in images]))
            sums += F.normalize(embeds, dim=-1)
        return F.normalize(sums, dim=-1)
