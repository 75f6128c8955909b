"""Two linear maps learned from cached states: the paper's own form, its variants, and FROMAGe's heads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from modeling_unimur.losses_unimur import text_matching_loss, visual_matching_loss
from train.canonical import STATE, TEXT, CanonicalMaps, Correlations, Setting
from train.closed_form import POOLED
from train.moments import Moments

WARM_UP = 30


@dataclass
class Pairs:
    """Captions, row for row: `states` `(n, d)` at [RET], CLIP's `features` `(n, c)`, `images` and `texts` `(n, q)`."""

    states: torch.Tensor
    features: torch.Tensor
    images: torch.Tensor
    texts: torch.Tensor

    def draw(self, n: int, seed: int) -> "Pairs":
        """`n` of them, drawn without replacement."""
        rows = torch.randperm(len(self.states), generator=torch.Generator().manual_seed(seed))[:n]
        return Pairs(*(getattr(self, name)[rows] for name in ("states", "features", "images", "texts")))


@dataclass
class Space:
    """Embeds states `(n, d)` and images, given as CLIP's feature and embedding; both to `(n, q)`, not normalised."""

    states: Callable[[torch.Tensor], torch.Tensor]
    images: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """
    What is learned.

    Args:
        lambda1, lambda2: of L_vm and L_tm, eq. 7.
        text_matching: L_tm's form (Table 5).
        width: of a new space, into which the image's feature is mapped too, as FROMAGe does; `None`: CLIP's.
    """

    lambda1: float = 1.0
    lambda2: float = 10.0
    text_matching: str = "mse"
    width: int | None = None


OBJECTIVES = {
    "DAT": Objective(),
    "DAT, no noise": Objective(),
    "VM": Objective(lambda2=0.0),
    "TM": Objective(lambda1=0.0),
    "DAT, InfoNCE": Objective(text_matching="infonce"),
    "DAT, max-margin": Objective(text_matching="max_margin"),
    "FROMAGe's heads": Objective(lambda2=0.0, width=256),
}


@dataclass(frozen=True)
class Fit:
    """How it is learned: Adam's `rate`, `noise` on the states in units of their mean deviation, `steps`, `batch`."""

    rate: float
    noise: float
    steps: int = 320
    batch: int = 1024


def learn(pairs: Pairs, objective: Objective, fit: Fit, seed: int) -> Space:
    """
    Learns the maps by Adam with a learned temperature, warm-up and a cosine schedule.

    Args:
        seed: of the maps' start, the batches and the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, deviation = pairs.states.mean(0), pairs.states.std(0).mean()
    width = objective.width or pairs.images.shape[1]
    text = _linear(pairs.states.shape[1], width, generator)
    image = _linear(pairs.features.shape[1], width, generator) if objective.width else None
    scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    parameters = [*text.parameters(), *(image.parameters() if image else ()), scale]
    optimizer = torch.optim.Adam(parameters, lr=fit.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(fit.steps))
    # Standardised by one scale, which a linear map could undo: Adam's steps then suit the states of any LLM.
    states = (pairs.states - mean) / deviation
    order = torch.empty(0, dtype=torch.long)
    for _ in range(fit.steps):
        while len(order) < min(fit.batch, len(states)):
            order = torch.cat([order, torch.randperm(len(states), generator=generator)])
        rows, order = order[: fit.batch], order[fit.batch :]
        x = states[rows]
        embeds = text(x + fit.noise * torch.randn(x.shape, generator=generator))
        target = image(pairs.features[rows]) if image else pairs.images[rows]
        factor = scale.exp().clamp(max=100)
        loss = torch.zeros(())
        if objective.lambda1:
            loss = loss + objective.lambda1 * visual_matching_loss(embeds, target, factor)  # eq. 3-5
        if objective.lambda2:
            loss = loss + objective.lambda2 * text_matching_loss(  # eq. 6
                embeds, pairs.texts[rows], kind=objective.text_matching, logit_scale=factor
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def of_states(rows: torch.Tensor) -> torch.Tensor:
        return text((rows - mean) / deviation)

    @torch.no_grad()
    def of_images(features: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return image(features) if image else embeds

    return Space(of_states, of_images)


def _cosine(steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / WARM_UP)
        return rising * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())

    return factor


def _linear(width: int, out: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(width, out)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
    return linear


def canonical(pairs: Pairs, setting: Setting) -> Space:
    """The space of canonical correlation; see [`train.canonical`]."""
    return _space(correlations(pairs).maps(setting))


def canonical_spaces(pairs: Pairs, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Space]]:
    """The same for many settings of one feature and text weight; the directions of a ridge are computed once."""
    correlated, known = correlations(pairs), {}
    for setting in settings:
        if setting.ridge not in known:
            known[setting.ridge] = correlated.directions(setting.feature, setting.ridge, setting.text_weight)
        yield setting, _space(correlated.cut(known[setting.ridge], setting))


def correlations(pairs: Pairs) -> Correlations:
    """Of states, CLIP's pooled features and its text embeddings."""
    rows = {STATE: pairs.states, POOLED: pairs.features, TEXT: F.normalize(pairs.texts, dim=-1)}
    moments = Moments({name: value.shape[1] for name, value in rows.items()})
    moments.add(rows)
    return Correlations(moments)


def _space(maps: CanonicalMaps) -> Space:
    of_images = maps.of(POOLED)
    return Space(maps.of(STATE), lambda features, embeds: of_images(features))
