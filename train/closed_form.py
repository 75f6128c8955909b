r"""
The two maps without a gradient step: ridge regressions solved from moments that are accumulated in one pass.

With h a caption's output at [RET] `(d,)`, v its image's CLIP embedding, L2-normalised `(q,)`, and S_ab the covariance of
a and b over the pairs:

    ridge      B = S_vh (S_hh + rho tr(S_hh)/d I)^-1          v's best linear prediction from h
    whitening  P = (S_vv + eps tr(S_vv)/q I)^-p                p = 0: none; p = 1/2: whitened once; p = 1: fully
    W_t2m      W = a P B,   b = -W E[h]

L_tm (eq. 6) alone is the ridge with CLIP's text embedding as its target and p = 0. The image target with p > 0 stands
for L_vm (eq. 3-5): without the mean, and with the common directions of CLIP's embeddings turned down, a cosine with an
image tells it apart from the others, which is what InfoNCE asks for. The mean of v does not enter b, since it adds the
same to every image's score. The factor a gives e_t the mean square length one, that of eq. 6's target.

It ranks images among images and texts among texts. In a pool of both, two texts seen through one map lie closer together
than a text and an image, so that texts come first: search with `calibrate=True` or an `image_bias`, or train on from here.

    W_i2t      V = S_zf (S_ff + rho tr(S_ff)/c I)^-1,   b = E[z] - V E[f]

with f the image feature `(c,)` and z the mean of its caption's input embeddings `(d,)`; every visual token starts there.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_unimur import UniMuRModel
from train.collate import PairCollator, SkipCounter

logger = logging.get_logger("train")

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
FLOOR = 1e-4  # eps: of the mean eigenvalue, beside each eigenvalue that is raised to a negative power
HELD_OUT = 1000  # pairs at most, of which one in `ONE_IN` is held out for the choice
ONE_IN = 10

Batch = dict[str, torch.Tensor]


class Moments:
    """
    Count, sums and products of the rows of two matrices, in float64 whatever the rows' dtype.

    Args:
        widths: of x and y.
        device: of the sums.

    Sums commute, so the order and the size of the batches change the result by float64's rounding alone.
    """

    def __init__(self, widths: tuple[int, int], device: torch.device | str = "cpu"):
        x, y = widths
        self.count = 0
        self.sum_x, self.sum_y, self.xx, self.yx, self.yy = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((x,), (y,), (x, x), (y, x), (y, y))
        )

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """
        Takes in rows `x` `(n, d)` and `y` `(n, q)`.

        Raises:
            ValueError: the rows do not match, or hold NaN or infinity, which would spoil everything added before.
        """
        if x.shape != (len(y), len(self.sum_x)) or y.shape[1:] != self.sum_y.shape:
            raise ValueError(f"expected rows of widths {len(self.sum_x)} and {len(self.sum_y)}, got {tuple(x.shape)} and "
                             f"{tuple(y.shape)}")  # fmt: skip
        x, y = x.to(self.xx), y.to(self.xx)
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ValueError("a state or a target is NaN or infinite: look at the towers' weights and dtype")
        self.count += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.xx += x.T @ x
        self.yx += y.T @ x
        self.yy += y.T @ y

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments((len(self.sum_x), len(self.sum_y)), self.xx.device)
        both.count = self.count + other.count
        for name in ("sum_x", "sum_y", "xx", "yx", "yy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sum_x / self.count, self.sum_y / self.count

    def covariances(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """S_xx `(d, d)`, S_yx `(q, d)`, S_yy `(q, q)`. Raises `ValueError` where fewer than two rows were added."""
        if self.count < 2:
            raise ValueError(f"{self.count} pairs have no covariance: give at least two")
        x, y = self.means
        return (
            self.xx / self.count - torch.outer(x, x), self.yx / self.count - torch.outer(y, x),
            self.yy / self.count - torch.outer(y, y),
        )  # fmt: skip


def ridge_map(moments: Moments, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The ridge regression of y on x with an intercept: `B` `(q, d)` and `b` `(q,)`, float64, minimising
    `mean |y - B x - b|^2 + rho tr(S_xx)/d |B|^2`.

    Args:
        ridge: rho, in units of the mean variance of x.

    Raises:
        ValueError: x does not vary, or rho is too small for the covariance.
    """
    xx, yx, _ = moments.covariances()
    scale = xx.diagonal().mean()
    if not scale > 0:
        raise ValueError("the states do not vary from pair to pair: there is nothing to regress on")
    factor, failed = torch.linalg.cholesky_ex(xx + ridge * scale * torch.eye(len(xx)).to(xx))
    if failed:
        raise ValueError(f"the states' covariance is singular and a ridge of {ridge:g} does not mend it: raise it")
    weight = torch.cholesky_solve(yx.T, factor).T
    x, y = moments.means
    return weight, y - weight @ x


def inverse_power(covariance: torch.Tensor, power: float, floor: float = FLOOR) -> torch.Tensor:
    """`(S + floor tr(S)/q I)^-power` of a covariance `(q, q)`, singular or not."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0) + floor * values.clamp(min=0).mean()
    return vectors * values.pow(-power) @ vectors.T


def matching_map(moments: Moments, ridge: float, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """W_t2m's weight `(q, d)` and bias `(q,)`, float64, from the moments of states and image embeddings; see above."""
    weight, _ = ridge_map(moments, ridge)
    xx, _, yy = moments.covariances()
    weight = inverse_power(yy, power) @ weight
    weight = weight / ((weight @ xx) * weight).sum().sqrt()  # a: E|W (h - E[h])|^2 = 1
    return weight, -weight @ moments.means[0]


@dataclass
class ClosedForm:
    """What was found: the maps, float32, and how; `recall` is R@1 (0 to 1) over the held-out pairs by (ridge, power)."""

    matching: tuple[torch.Tensor, torch.Tensor]
    captioning: tuple[torch.Tensor, torch.Tensor] | None
    ridge: float
    power: float
    recall: dict[tuple[float, float], float]
    pairs: int

    def apply(self, model: UniMuRModel) -> None:
        """Starts the model's maps from them; W_i2t's only where they were asked for."""
        _set(model.W_t2m, *self.matching)
        if self.captioning is not None:
            tokens = model.config.n_visual_tokens
            weight, bias = self.captioning
            _set(model.W_i2t, weight.repeat(tokens, 1), bias.repeat(tokens))


@torch.no_grad()
def solve(batches: Iterable[Batch], ridges: Sequence[float] = RIDGES, powers: Sequence[float] = POWERS) -> ClosedForm:
    """
    Both maps in one pass over the data.

    Args:
        batches: of `ids` (a str for each pair), `ret_states` `(n, d)`, `image_embeds` `(n, q)` and, for W_i2t, `image_features`
            `(n, c)` and `caption_means` `(n, d)`, of any float dtype; row i of all is one pair.
        ridges, powers: rho and p to choose from, by R@1 of caption to image over pairs held out by a hash of their id
            (one in ten, at most a thousand). Every pair counts in the maps themselves.

    Raises:
        ValueError: there are too few pairs, or what [`Moments`] and [`ridge_map`] refuse.
    """
    sums: dict[str, tuple[Moments, Moments]] = {}
    states, targets = [], []
    for batch in batches:
        held = torch.tensor([zlib.crc32(f"held out {name}".encode()) % ONE_IN == 0 for name in batch["ids"]])
        room = HELD_OUT - sum(map(len, states))
        held &= held.cumsum(0) <= room
        target = F.normalize(batch["image_embeds"].double(), dim=-1)
        kinds = {"matching": (batch["ret_states"], target)}
        if "caption_means" in batch:
            kinds["captioning"] = (batch["image_features"], batch["caption_means"])
        for name, (x, y) in kinds.items():
            if name not in sums:
                sums[name] = tuple(Moments((x.shape[1], y.shape[1]), x.device) for _ in range(2))
            for moments, rows in zip(sums[name], (~held, held), strict=True):
                moments.add(x[rows], y[rows])
        states.append(batch["ret_states"][held].double())
        targets.append(target[held])
    if not sums or sums["matching"][0].count < 2:
        raise ValueError("the closed form needs at least two pairs besides those held out")
    states, targets = torch.cat(states), torch.cat(targets)
    fitted, rest = sums["matching"]
    recall = {}
    for ridge in ridges:
        for power in powers:
            weight, bias = matching_map(fitted, ridge, power)
            recall[ridge, power] = recall_at_1(states @ weight.T + bias, targets)
    # The first of the best, so that equals are the same in every run; without held-out pairs the middle of the grid.
    ridge, power = max(recall, key=recall.get) if len(states) else (ridges[len(ridges) // 2], powers[len(powers) // 2])
    whole = fitted + rest
    captioning = None
    if "captioning" in sums:
        captioning = tuple(t.float() for t in ridge_map(sums["captioning"][0] + sums["captioning"][1], ridge))
    return ClosedForm(
        tuple(t.float() for t in matching_map(whole, ridge, power)), captioning, ridge, power, recall, whole.count
    )


def recall_at_1(queries: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of queries `(n, q)` whose own target, row for row, has the highest cosine; ties count as misses."""
    if not len(queries):
        return 0.0
    scores = F.normalize(queries, dim=-1) @ F.normalize(targets, dim=-1).T
    own = scores.diagonal()[:, None]
    return ((scores >= own).sum(1) == 1).double().mean().item()


@torch.no_grad()
def batches(model: UniMuRModel, collated: Iterable[dict], *, captioning: bool = True) -> Iterator[Batch]:
    """
    What [`solve`] reads, from the batches of [`train.collate.PairCollator`]: cached features where they are there, and
    the towers' where not.

    Args:
        captioning: also what W_i2t starts from.
    """
    table = model.language_model.get_input_embeddings()
    for number, batch in enumerate(collated):
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        features, embeds = batch.get("image_features"), batch.get("image_embeds")
        if embeds is None:
            features, embeds = model.encode_images(batch["pixel_values"])
        states = batch.get("ret_states")
        if states is None:
            states = model.ret_states(batch["ret_input_ids"], batch["ret_attention_mask"])
        found = {"ids": [f"{number}-{i}" for i in range(len(states))]}  # the pairs' places, which no run changes
        found |= {"ret_states": states, "image_embeds": embeds[batch["target_indices"]]}
        if captioning:
            found["image_features"] = features[batch["image_indices"]]
            found["caption_means"] = _caption_means(batch, table, model)
        yield found


def _caption_means(batch: dict, table: nn.Module, model: UniMuRModel) -> torch.Tensor:
    """The mean input embedding of each caption's own tokens, `(n, d)` float32."""
    ids, eos = batch["labels"].clamp(min=0), model.processor.tokenizer.eos_token_id
    counted = (batch["labels"] >= 0) & (ids != (-1 if eos is None else eos))
    rows = table(ids).float() * counted[..., None]
    return rows.sum(1) / counted.sum(1, keepdim=True).clamp(min=1)


def start(
    model: UniMuRModel, rows: Dataset, collator: PairCollator, skips: SkipCounter, *, batch_size: int, workers: int = 0
) -> ClosedForm:
    """
    Puts both maps at their closed form, from one pass over the rows with a caption of each.

    Args:
        rows: caption pairs, cached or not, streamed or not. Every process reads all of them, which gives all the same
            maps without any exchange.
        skips: receives the counts of the pairs that could not be used.
    """
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator, num_workers=workers)

    def counted() -> Iterator[dict]:
        for batch in tqdm(loader, desc="closed form"):
            skips.update(batch["skipped"], batch["n_seen"])
            yield batch

    found = solve(batches(model, counted()))
    found.apply(model)
    logger.info(
        f"closed form of {found.pairs} pairs: ridge {found.ridge:g} and whitening power {found.power:g} give the best R@1 "
        f"over pairs held out, {100 * found.recall[found.ridge, found.power]:.1f} %"
    )
    return found


def _set(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
