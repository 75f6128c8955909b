"""BLIP-2 (Li et al., ICML 2023): the Q-Former's embeddings of images, texts and dialogues."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval

from modeling_unimur.images_unimur import decode_image

from .text_and_images import TextAndImages

NAME = "Salesforce/blip2-itm-vit-g"  # the checkpoint with the projections of image-text contrast


class Blip2Baseline(TextAndImages):
    """
    An image is embedded as the Q-Former's query outputs, of which the best counts; a text as its [CLS] output. A dialogue
    is the embedding of its text; where it has images, the mean of that and theirs (each the mean of its queries). The
    paper does not say how it uses BLIP-2; this is how BLIP-2's own retrieval embeds.
    """

    name, encoder = "BLIP-2", "the Q-Former"

    def __init__(self, model: Blip2ForImageTextRetrieval, image_processor: Any, tokenizer: Any):
        self.model, self.image_processor, self.tokenizer = model.eval(), image_processor, tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str = NAME, **kwargs) -> "Blip2Baseline":
        """From a folder or a name on the Hub. Raises `OSError` if it cannot be loaded."""
        return cls(
            Blip2ForImageTextRetrieval.from_pretrained(name_or_path, **kwargs),
            AutoImageProcessor.from_pretrained(name_or_path),
            AutoTokenizer.from_pretrained(name_or_path),
        )

    @property
    def revision(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "name": config.name_or_path.rsplit("/", 1)[-1],
            "commit": getattr(config, "_commit_hash", None),
            "dimension": self.width,
        }

    @property
    def text_positions(self) -> int:
        return self.model.config.qformer_config.max_position_embeddings

    @property
    def width(self) -> int:
        return self.model.config.image_text_hidden_size

    @torch.no_grad()
    def embed_images(
        self, images: Sequence[Any], batch_size: int = 32, show_progress_bar: bool = False
    ) -> torch.Tensor:
        """`(n, queries, q)` float32, L2-normalised. Raises `ValueError` naming a bad image."""
        parts = []
        for start in tqdm(range(0, len(images), batch_size), "embedding images", disable=not show_progress_bar):
            decoded = []
            for i, image in enumerate(images[start : start + batch_size], start):
                try:
                    decoded.append(decode_image(image))
                except ValueError as error:
                    raise ValueError(f"image {i}: {error}") from error
            pixels = self.image_processor(decoded, return_tensors="pt")["pixel_values"].to(self.model.device)
            parts.append(F.normalize(image_queries(self.model, pixels).float(), dim=-1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64, show_progress_bar: bool = False) -> torch.Tensor:
        """`(n, q)` float32, L2-normalised."""
        parts = []
        for start in tqdm(range(0, len(texts), batch_size), "embedding texts", disable=not show_progress_bar):
            rows = self.last_tokens(self.tokenizer(list(texts[start : start + batch_size]))["input_ids"])
            batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
            embeds = text_outputs(self.model, batch["input_ids"], batch["attention_mask"])
            parts.append(F.normalize(embeds.float(), dim=-1).cpu())
        return torch.cat(parts)

    def one_per_image(self, images: Sequence[Any], **kwargs) -> torch.Tensor:
        """`(n, q)`: the mean of each image's queries, normalised again."""
        return F.normalize(self.embed_images(images, **kwargs).mean(1), dim=-1)


def image_queries(model: Blip2ForImageTextRetrieval, pixel_values: torch.Tensor) -> torch.Tensor:
    """The projected outputs of the Q-Former's queries, `(n, queries, q)`, not normalised."""
    patches = model.vision_model(pixel_values=pixel_values.to(model.vision_model.dtype)).last_hidden_state
    queries = model.query_tokens.expand(len(patches), -1, -1)
    outputs = model.qformer(query_embeds=queries, encoder_hidden_states=patches.to(queries.dtype)).last_hidden_state
    return model.vision_projection(outputs.to(model.vision_projection.weight.dtype))


def text_outputs(
    model: Blip2ForImageTextRetrieval, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The projected output at [CLS], `(n, q)`, not normalised."""
    embeds = model.embeddings(input_ids=input_ids)
    outputs = model.qformer(query_embeds=embeds, query_length=0, attention_mask=attention_mask).last_hidden_state
    return model.text_projection(outputs[:, 0].to(model.text_projection.weight.dtype))
