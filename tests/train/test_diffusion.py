"""The miniature's diffusion model: its latent, its training by seed, and the pipeline folder that it leaves."""

import random

import pytest
import torch

from train.miniature.diffusion import PatchAutoencoder, pretrain_diffusion
from train.miniature.towers import draw_all, pretrain_clip
from train.miniature.world import splits


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return pretrain_clip(folder, splits()["train"][:200], steps=2, batch_size=16, width=32, progress=False)


def pretrain(folder, clip, seed=0, steps=3):
    return pretrain_diffusion(
        folder, splits()["train"][:100], clip, seed=seed, steps=steps, batch_size=8, widths=(16, 16), progress=False
    )


def test_the_latent_keeps_a_picture_of_another_split():
    signed = [draw_all(splits()[name][:400], random.Random(1), False) / 127.5 - 1 for name in ("train", "validation")]
    vae = PatchAutoencoder()
    vae.fit(signed[0])
    latents = vae.encode(signed[1])
    assert latents.shape == (400, 48, 8, 8) and 0.9 < latents.std() < 1.1
    error = (vae.decode(latents).sample - signed[1]).square().mean()
    assert 10 * torch.log10(4 / error) > 22  # dB
    spread = latents.std((0, 2, 3))
    assert 1 < spread.max() / spread.min() < 20  # neither as the pixels have it nor whitened


def test_the_folder_is_a_pipeline_that_draws_by_its_seed(clip, tmp_path):
    from diffusers import DiffusionPipeline

    drawn = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        pipeline = DiffusionPipeline.from_pretrained(pretrain(tmp_path / name, clip, seed))
        pipeline.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(0)}
        drawn.append(pipeline("a panda in a red hat", **given).images[0])
    assert drawn[0].size == (64, 64) and pipeline.safety_checker is None
    assert drawn[0].tobytes() == drawn[1].tobytes() != drawn[2].tobytes()


def test_training_lowers_the_loss(clip, tmp_path, monkeypatch):
    from train.miniature import diffusion

    losses, step = [], diffusion.take_step
    monkeypatch.setattr(diffusion, "take_step", lambda loss, *rest: (losses.append(loss.item()), step(loss, *rest)))
    pretrain(tmp_path, clip, steps=40)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
