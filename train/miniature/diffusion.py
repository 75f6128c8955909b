"""The miniature's diffusion model: a Stable Diffusion in small, pre-trained on train scenes over the miniature's CLIP.

Saved as a folder of diffusers' `StableDiffusionPipeline`: its own UNet and scheduler, CLIP's text encoder and tokenizer as
they are. In the autoencoder's place are patches of the picture in their principal components, a fixed linear latent: a
convolutional autoencoder of the same cost makes blurrier pictures. `DiffusionPipeline.from_pretrained(folder)` loads it once
this module is imported, since diffusers imports no module because a folder names it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import trange
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .towers import adamw, batches_of, draw_all, take_step
from .world import SIZE, Scene, captions

try:
    from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput
except ImportError as error:
    raise ImportError(
        "the miniature's diffusion model needs diffusers: pip install 'modeling-unimur[generate]'"
    ) from error

PATCH = 8  # pixels a side
STEPS = 1_000
BATCH = 32
UNCONDITIONAL = 0.1  # share of the pictures whose caption is left empty, which guidance contrasts with
CAPTIONS = {"n": 5, "n_keywords": 1}  # of each scene, one of which is drawn at every visit


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """
    A fixed linear autoencoder: every patch of `patch` x `patch` pixels becomes its leading principal components.

    Args:
        patch: pixels a side.
        latent_channels: components kept.
        scaling_factor: what the pipeline multiplies latents by; they come at unit mean variance, so 1.
        block_out_channels: no widths of this model. The pipeline takes its scale of 2 to the power of their number less 1
            from pixels to latents from here.
    """

    @register_to_config
    def __init__(
        self,
        patch: int = PATCH,
        latent_channels: int = 48,
        scaling_factor: float = 1.0,
        block_out_channels: Sequence[int] = (0, 0, 0, 0),
    ):
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, patch, patch)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, patch, patch, bias=False)
        self.mean = nn.Parameter(torch.zeros(3, patch, patch))
        self.requires_grad_(False)

    @torch.no_grad()
    def fit(self, pixels: torch.Tensor) -> None:
        """
        Takes the components from pictures `(n, 3, h, w)` float32 in [-1, 1]. Each is divided by the root of its own
        deviation: as they are, the few that hold colour would be all that a loss sees; at equal variance, mostly noise.
        """
        patch, kept = self.encoder.kernel_size[0], self.encoder.out_channels
        rows = F.unfold(pixels, patch, stride=patch).transpose(1, 2).flatten(0, 1).double()
        mean = rows.mean(0)
        variance, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        variance, directions = variance.flip(0)[:kept], directions.flip(1)[:, :kept]
        scale = variance.clamp(min=1e-8) ** -0.25
        scale /= (scale.square() * variance).mean().sqrt()
        shape = (kept, 3, patch, patch)
        self.encoder.weight.copy_((directions * scale).T.reshape(shape))
        self.encoder.bias.copy_(-(directions * scale).T @ mean)  # type: ignore[union-attr]  # it has one
        self.decoder.weight.copy_((directions / scale).T.reshape(shape))
        self.mean.copy_(mean.reshape(shape[1:]))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(n, 3, h, w)` in [-1, 1] -> latents `(n, latent_channels, h / patch, w / patch)`."""
        return self.encoder(pixels)

    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents `(n, latent_channels, h, w)` -> pixels `(n, 3, patch h, patch w)` near [-1, 1]; nothing is drawn."""
        pixels = self.decoder(latents) + self.mean.repeat(1, *latents.shape[2:])
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def pretrain_diffusion(
    folder: str | Path,
    scenes: Sequence[Scene],
    clip: str | Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    batch_size: int = BATCH,
    lr: float = 2e-3,
    widths: tuple[int, int] = (64, 96),
    progress: bool = True,
) -> Path:
    """Trains a latent diffusion model from scratch on pictures of `scenes` and their captions, and saves its pipeline.

    Args:
        folder: where to save; made if absent.
        scenes: training scenes only.
        clip: folder of the miniature's CLIP, whose text encoder conditions it and stays as it is.
        seed: of weights, pictures, captions, noise and order.
        steps, batch_size, lr: optimiser steps, pictures a step, peak learning rate.
        widths: channels at 8 x 8 and at 4 x 4 patches.
        progress: show a bar.

    Returns:
        The folder.
    """
    rng = random.Random(f"diffusion-{seed}")
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pixels = draw_all(scenes, rng, progress)
        encoder = CLIPModel.from_pretrained(clip).text_model.eval().requires_grad_(False)
        pipeline = _pipeline(encoder, tokenizer, widths)
        pipeline.vae.fit(_signed(pixels[:2_000]))
        latents = torch.cat([pipeline.vae.encode(_signed(part)) for part in pixels.split(500)])
        texts = [captions(scene, rng, **CAPTIONS) for scene in scenes]
        _train(pipeline, latents, texts, steps, batch_size, lr, progress)
    pipeline.save_pretrained(folder)
    return Path(folder)


# diffusers' pipelines name their parts at run time alone, hence `Any`.
def _pipeline(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, widths: tuple[int, int]) -> Any:
    vae = PatchAutoencoder()
    unet = UNet2DConditionModel(
        sample_size=SIZE // PATCH,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )
    # x0 prediction from pure noise on: few steps do, and the first one decides what is in the picture.
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _train(
    pipeline: Any,
    latents: torch.Tensor,
    texts: list[list[str]],
    steps: int,
    batch_size: int,
    lr: float,
    progress: bool,
) -> None:
    """Squared distance of the predicted to the true latent, at every noise level alike."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    ids = _caption_ids(pipeline.tokenizer, texts)
    empty = _caption_ids(pipeline.tokenizer, [[""]])[0, 0]
    optimizer, schedule = adamw(unet, lr, steps)
    order = batches_of(len(latents), batch_size, steps)
    bar = trange(steps, desc="diffusion", disable=not progress)
    for step in bar:
        rows, which = order[step], torch.randint(ids.shape[1], (batch_size,))
        drawn = ids[rows, which]
        drawn[torch.rand(batch_size) < UNCONDITIONAL] = empty
        with torch.no_grad():
            condition = pipeline.text_encoder(drawn)[0]
        clean, noise = latents[rows], torch.randn(batch_size, *latents.shape[1:])
        at = torch.randint(scheduler.config.num_train_timesteps, (batch_size,))
        predicted = unet(scheduler.add_noise(clean, noise, at), at, condition, return_dict=False)[0]
        loss = F.mse_loss(predicted, clean)
        take_step(loss, unet, optimizer, schedule)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    unet.eval()


def _caption_ids(tokenizer: CLIPTokenizer, texts: list[list[str]]) -> torch.Tensor:
    """`(scenes, captions, positions)` int64, padded to the encoder's full length, as the pipeline pads a prompt."""
    flat = tokenizer([t for row in texts for t in row], padding="max_length", truncation=True, return_tensors="pt")
    return flat["input_ids"].view(len(texts), len(texts[0]), -1)
