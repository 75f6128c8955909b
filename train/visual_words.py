r"""
W_i2t of several visual tokens in closed form: each token holds a word of the caption that the image predicts.

A regression on the mean of a caption's words puts all visual tokens at one place, near the mean of all words, which a
language model that nobody taught cannot read. Here token j has words of its own. With f an image's feature `(c,)` and z_j
the input embedding `(d,)` of the caption's word that token j holds, two steps alternate:

    regression    B_j = S_zf (S_ff + rho tr(S_ff)/c I)^-1        z_j's best linear prediction from f (Hoerl & Kennard 1970)
    assignment    the words of each caption are shared out, one a token, so that the sum over j of
                  log(m / m_z) cos(B_j f, z_j) is greatest (Kuhn 1955)

where both sides of the cosine are less the mean word, and m_z of the m captions hold the word: one that stands in all of them
counts for nothing (inverse document frequency, Sparck Jones 1972). It starts from the rarest words of each caption in their
order. A token so comes to hold one kind of word: animals, colours, places. There is no gradient, and the captions are the
only labels.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from tqdm.auto import tqdm

from train.moments import Spectrum

RIDGE = 1e-3  # rho, in units of the mean variance of the features
ROUNDS = 20
SHARED = 2  # words a token that are shared out: the rarest of the caption
ROWS = 1024  # captions whose words are compared at once


def visual_words(
    features: torch.Tensor, captions: Sequence[Sequence[int]], table: torch.Tensor, n: int, ridge: float = RIDGE,
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    W_i2t's weight `(n d, c)` and bias `(n d,)`, float32.

    Args:
        features: of the images, `(m, c)`.
        captions: the token ids of each image's caption; one with fewer tokens than are shared out gives them repeatedly.
        table: the LLM's input embeddings `(vocabulary, d)`.
        n: visual tokens an image.
        ridge: rho.
        rounds: of both steps; fewer where nothing moves any more.

    Raises:
        ValueError: there is no caption, one is empty, or the features do not vary.
    """
    if not captions or not all(captions):
        raise ValueError("every image needs a caption of at least one token")
    words = rarest(captions, SHARED * n)
    centred = features.double() - features.double().mean(0)
    inverse = Spectrum(centred.T @ centred / len(centred), "the image's feature").inverse(1.0, ridge)
    holding = _holding(captions)
    mean_word = table[sorted(holding)].float().mean(0)
    rarity = torch.tensor([[math.log(len(captions) / holding[word]) for word in row] for row in words.tolist()])
    held = rarest(captions, n)
    for _ in tqdm(range(rounds), "words of the visual tokens"):
        weight, bias = _regression(features, centred, inverse, table, held)
        shared = _assignment(features, weight, bias, table, words, rarity, mean_word)
        if torch.equal(shared, held):
            break
        held = shared
    weight, bias = _regression(features, centred, inverse, table, held)
    return weight.flatten(0, 1).float(), bias.flatten().float()


@torch.no_grad()
def start_visual_tokens(model: Any, captions: Sequence[str], features: torch.Tensor) -> None:
    """
    Gives a model over a frozen LLM, UniMuR or FROMAGe, the W_i2t of `visual_words`. Raises what that does.

    Args:
        captions: one of each image.
        features: CLIP's pooled outputs `(m, c)` of the images.
    """
    ids = model.processor.tokenizer(list(captions), add_special_tokens=False)["input_ids"]
    table = model.language_model.get_input_embeddings().weight.detach()
    weight, bias = visual_words(features, ids, table, model.config.n_visual_tokens)
    model.W_i2t.weight.copy_(weight)
    model.W_i2t.bias.copy_(bias)


def rarest(captions: Sequence[Sequence[int]], k: int) -> torch.Tensor:
    """The k tokens `(m, k)` of each caption that the fewest captions hold, in the caption's order."""
    holding, rows = _holding(captions), []
    for caption in captions:
        caption = list(caption) * -(-k // len(caption))
        places = sorted(range(len(caption)), key=lambda place: holding[caption[place]])[:k]
        rows.append([caption[place] for place in sorted(places)])
    return torch.tensor(rows)


def _holding(captions: Sequence[Sequence[int]]) -> Counter[int]:
    """In how many captions each token is."""
    return Counter(token for caption in captions for token in set(caption))


def _regression(
    features: torch.Tensor, centred: torch.Tensor, inverse: torch.Tensor, table: torch.Tensor, held: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(n, d, c)` and bias `(n, d)`, float64, of the words `(m, n)` that the tokens hold."""
    maps = []
    for token in held.T:
        word = table[token].double()
        weight = (word.T @ centred / len(centred)) @ inverse
        maps.append((weight, word.mean(0) - weight @ features.double().mean(0)))
    weights, biases = zip(*maps, strict=True)
    return torch.stack(weights), torch.stack(biases)


def _assignment(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, table: torch.Tensor, words: torch.Tensor,
    rarity: torch.Tensor, mean_word: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The words `(m, n)` that the tokens hold now, out of `words` `(m, k)`, which count by their `rarity`."""
    held = []
    for start in range(0, len(words), ROWS):
        rows = features[start : start + ROWS].float()
        predicted = torch.einsum("mc,ndc->mnd", rows, weight.float()) + bias.float() - mean_word
        given = table[words[start : start + ROWS]].float() - mean_word
        cosines = F.normalize(predicted, dim=-1) @ F.normalize(given, dim=-1).transpose(1, 2)
        gains = (cosines * rarity[start : start + ROWS, None]).numpy()
        chosen = np.stack([linear_sum_assignment(row, maximize=True)[1] for row in gains])
        held.append(words[start : start + ROWS].gather(1, torch.from_numpy(chosen)))
    return torch.cat(held)
