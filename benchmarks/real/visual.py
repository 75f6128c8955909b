"""W_i2t for a frozen LLM: in closed form, and trained from there on natural captions (eq. 1-2)."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from train.cache import write_whole
from train.visual_words import start_visual_tokens

from .bench import Bench

RATE = 3e-3
STEPS, BATCH = 40, 32


def closed_form(bench: Bench, features: torch.Tensor) -> None:
    """
    Gives every visual token a word of the caption to hold; see [`train.visual_words`]. The map is kept beside the states,
    which depend on its last bits, and those on the number of threads.

    Args:
        features: CLIP's pooled outputs `(n, c)` of the first n train pictures.
    """
    model, path = bench.model, bench.folder / f"W_i2t-{len(features)}.safetensors"
    if _read(bench, path):
        return
    start_visual_tokens(model, [texts[0] for texts in bench.world.pairs[: len(features)]["captions"]], features)
    _keep(bench, path)


def train(bench: Bench, features: torch.Tensor, path: Path, seed: int = 0) -> float | None:
    """
    Trains W_i2t on the captions of the first n pictures, from its present value; read from `path` if an earlier call
    saved it.

    Args:
        features: as in `closed_form`.

    Returns:
        The mean loss of the last ten steps; `None` if it was read from disk.
    """
    model = bench.model
    if _read(bench, path):
        return None
    rows = bench.world.pairs[: len(features)]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.W_i2t.parameters(), lr=RATE)
    losses = []
    for step in tqdm(range(STEPS), "training W_i2t", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 5) * (1 - step / STEPS)
        chosen = torch.randint(len(features), (BATCH,), generator=generator).tolist()
        batch = model.processor.pairs(None, [rows["captions"][i][0] for i in chosen])
        loss = model(captions=batch["captions"], images={"features": features[chosen]}).loss_cap
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    _keep(bench, path)
    return sum(losses[-10:]) / 10


def _read(bench: Bench, path: Path) -> bool:
    """Whether W_i2t was at `path`; then the model has it."""
    if not path.is_file():
        return False
    with torch.no_grad():
        for name, value in load_file(path).items():
            getattr(bench.model.W_i2t, name).copy_(value)
    return True


def _keep(bench: Bench, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().clone() for name, p in bench.model.W_i2t.named_parameters()}
    write_whole(path, partial(save_file, weights))
