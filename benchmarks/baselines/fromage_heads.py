"""FROMAGe's two heads trained on frozen inputs: the states at [RET] of all captions, and their images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks.baselines.fromage import FromageModel
from modeling_unimur.losses_unimur import info_nce
from train.canonical import STATE, Correlations
from train.closed_form import pair_rows
from train.collate import PairCollator
from train.moments import Moments

BETAS, MAX_GRADIENT = (0.9, 0.95), 1.0  # FROMAGe's own


@dataclass
class CaptionStates:
    """
    h([RET]) of captions, or of conversations of them, and CLIP's pooled output of their images.

    Args:
        states: `(captions, d)` float32, those of one image in consecutive rows.
        features: `(images, c)` float32.
        counts: `(images,)` int64, how many states each image has, at least one.
    """

    states: torch.Tensor
    features: torch.Tensor
    counts: torch.Tensor

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` images (all, where there are fewer) and one caption of each: states `(n, d)` and features `(n, c)`."""
        images = torch.randperm(len(self.features), generator=generator)[:n]
        counts = self.counts[images]
        which = (torch.rand(len(images), generator=generator) * counts).long().clamp(max=counts - 1)
        return self.states[(self.counts.cumsum(0) - self.counts)[images] + which], self.features[images]


@torch.no_grad()
def caption_states(
    model: FromageModel, captions: Sequence[Sequence[str]], features: torch.Tensor, batch_size: int = 256
) -> CaptionStates:
    """Runs the LLM once over each image's `captions`; `features` `(images, c)` are CLIP's."""
    flat = [caption for row in captions for caption in row]
    states = torch.empty(len(flat), model.config.text_width)
    # Captions of one length share a batch, so that little is padded.
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    for start in tqdm(range(0, len(order), batch_size), "states at [RET]"):
        rows = order[start : start + batch_size]
        inputs = model.processor.texts([flat[i] for i in rows]).to(model.device)
        states[rows] = model.ret_states(inputs["input_ids"], inputs["attention_mask"]).cpu()
    return CaptionStates(states, features, torch.tensor([len(row) for row in captions]))


def conversation_states(model: FromageModel, rows: Dataset, seed: int, batch_size: int = 64) -> CaptionStates:
    """
    As `caption_states`, of pairs with cached features, where each caption counts once more behind its image or another caption
    (see [`train.collate.conversations`]); `seed` is of that draw.
    """
    collator = PairCollator(model.processor, seed=seed)
    collator.every_caption, collator.pair_contexts = True, "conversations"
    states, features, counts = [], [], []
    for batch in tqdm(DataLoader(rows, batch_size, collate_fn=collator), "states at [RET]"):
        states.append(pair_rows(model, batch, (STATE,))[STATE].cpu())
        features.append(batch["images"]["features"])
        counts.append(batch["targets"]["image_indices"].bincount())
    return CaptionStates(torch.cat(states), torch.cat(features), torch.cat(counts))


@torch.no_grad()
def start_canonical(model: FromageModel, data: CaptionStates, *, width: int, ridge: float, power: float) -> None:
    """
    Puts `W_t2m` and `W_v2m` at the canonical correlation of all captions with their images (see [`train.canonical`]),
    rotated at random into FROMAGe's wider space, which keeps every cosine and leaves no row of the maps at zero.

    Args:
        width, ridge, power: of [`train.canonical.Setting`].

    Raises:
        ValueError: there are fewer directions than `width`, or the space is narrower.
    """
    moments = Moments({STATE: data.states.shape[1], "pooled": data.features.shape[1]})
    images = torch.arange(len(data.counts)).repeat_interleave(data.counts)
    moments.add({STATE: data.states, "pooled": data.features[images]})
    directions, s = Correlations(moments).directions("pooled", ridge)
    shared = model.config.shared_dim
    if not 1 <= width <= min(shared, len(s)):
        raise ValueError(f"width={width}: there are {len(s)} canonical directions, and shared_dim={shared}")
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(shared, width, generator=generator, dtype=torch.float64))[0]
    for linear, view in ((model.W_t2m, STATE), (model.W_v2m, "pooled")):
        weight = rotation @ (s[:width, None] ** power * directions[view][:, :width].T)
        linear.weight.copy_(weight)
        linear.bias.copy_(-weight @ moments.mean(view))


def train_heads(
    model: FromageModel, data: CaptionStates, *, noise: float, learning_rate: float, steps: int, batch_size: int,
    seed: int,
) -> list[float]:  # fmt: skip
    """
    Trains `W_t2m`, `W_v2m` and the temperature by FROMAGe's contrastive loss, from their present values; nothing else in
    the model changes.

    Args:
        noise: of the Gaussian noise on the states, in units of their mean standard deviation: a conversation's state is
            farther from a caption's than captions do from each other.
        learning_rate: of Adam at the start; it falls to zero by a cosine.

    Returns:
        The loss of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = noise * data.states.std(0).mean()
    trained = [*model.W_t2m.parameters(), *model.W_v2m.parameters(), model.logit_scale]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in tqdm(range(steps), "heads"):
        states, features = data.draw(batch_size, generator)
        states = states + scale * torch.randn(states.shape, generator=generator)
        temperature = model.logit_scale.exp().clamp(max=100)
        loss = info_nce(model.W_t2m(states), model.W_v2m(features), temperature) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
