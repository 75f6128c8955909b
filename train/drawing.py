"""What the mapper learns to foretell: the output of a diffusion model's own text encoder for a caption."""

from collections.abc import Sequence

import torch

from modeling_unimur.generation_unimur import load_pipeline


class DrawingTargets:
    """
    The frozen text encoder of a diffusion model, without its UNet and autoencoder, which training does not need.

    Args:
        name, revision: of the diffusion model, a folder or a name on the Hub.

    Raises:
        ImportError: diffusers is not installed.
        OSError: it could not be loaded.
        ValueError: it has no text encoder of CLIP's kind.
    """

    def __init__(self, name: str, revision: str | None = None):
        absent = dict.fromkeys(("unet", "vae", "scheduler", "safety_checker", "feature_extractor"))
        pipeline = load_pipeline(name, revision, **absent)
        self.tokenizer, self.encoder = (pipeline.components.get(part) for part in ("tokenizer", "text_encoder"))
        if self.tokenizer is None or not hasattr(getattr(self.encoder, "config", None), "hidden_size"):
            raise ValueError(
                f"the diffusion model {name!r} has no one text encoder of CLIP's kind, which GILL's mapper foretells"
            )
        self.encoder.requires_grad_(False)

    @property
    def length(self) -> int:
        """Positions of the conditioning."""
        return self.tokenizer.model_max_length

    @property
    def width(self) -> int:
        """Width of the conditioning."""
        return self.encoder.config.hidden_size

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> torch.Tensor:
        """
        Captions -> `(n, length, width)` float32 on `device`, as the pipeline conditions on a prompt: padded to its full
        length, and a caption beyond it cut at its end, which is what would be drawn.
        """
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )["input_ids"]
        return self.encoder.to(device)(ids.to(device))[0].float()
