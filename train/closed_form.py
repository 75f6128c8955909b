"""
Both maps without a gradient step: moments summed in one pass over the data, from which the solution is chosen.

`--init cca` solves the canonical alignment ([`train.canonical`]), `--init closed-form` the paper's ([`train.ridge`]). What
a solution leaves open is chosen by the replies it retrieves for pairs, and documents where there are any, that were held out
([`train.held_out`]), of few by cross-validation; every pair counts in the maps themselves. Pairs that are read as
conversations take a pass more, without the LLM, which solves the W_i2t that these are read through.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_unimur import UniMuRModel
from train.canonical import STATE, TEXT, Correlations, Setting
from train.collate import PairCollator, SkipCounter
from train.held_out import HeldOut, Replies, Rows, document_replies, few_or_part, pair_replies
from train.moments import Moments, Spectrum
from train.ridge import matching_map, ridge_map
from train.sums import TOO_FEW, Sums
from train.visual_words import visual_words

logger = logging.get_logger("train")

POOLED, PROJECTED, WORDS = "pooled", "projected", "words"  # an image's two features; a caption's mean input embedding
PAIR_VIEWS, DOCUMENT_VIEWS = (STATE, POOLED, PROJECTED, TEXT, WORDS), (STATE, POOLED, PROJECTED)
RIDGES, POWERS = (1e-4, 1e-3, 1e-2, 1e-1), (0.0, 0.25, 0.5, 0.75, 1.0)  # of the paper's alignment
WORDS_RIDGE = 1e-2  # of W_i2t
SAMPLED = 20_000  # images whose captions the visual tokens' words are found on, of all processes

Map = tuple[torch.Tensor, torch.Tensor]  # weight and bias


@dataclass(frozen=True)
class Grid:
    """What the canonical alignment chooses from; one value is no choice. See [`train.canonical.Setting`]."""

    features: Sequence[str] = (POOLED, PROJECTED)
    widths: Sequence[int] = (32, 64, 128, 256, 512)
    ridges: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    powers: Sequence[float] = (1.0, 1.5, 2.0, 3.0)
    text_weights: Sequence[float] = (0.0,)
    document_shares: Sequence[float] = (0.25, 0.5, 0.75)


@dataclass
class ClosedForm:
    """
    A solution: the maps, float32, and how they were chosen.

    Attributes:
        maps: name of a map -> weight and bias.
        setting: what was chosen, by name.
        recall: of each setting tried, over what was held out (0 to 1).
        score: that of the chosen one; `None` where nothing was held out.
        pairs: contexts of pairs that count in it: their captions, and conversations of these.
    """

    maps: dict[str, Map]
    setting: dict[str, Any]
    recall: dict[Any, float]
    score: float | None
    pairs: int = 0
    documents: int = 0

    def apply(self, model: UniMuRModel) -> None:
        """Starts the model's maps from it; in the canonical alignment they take its width."""
        if model.config.alignment == "canonical":
            model.set_shared_space(len(self.maps["W_t2m"][0]), self.setting["feature"])
        for name, solution in self.maps.items():
            put(getattr(model, name), solution)

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                           for name, value in self.setting.items())  # fmt: skip
        recall = (
            "nothing was held out to choose by" if self.score is None else f"held-out R@1 {100 * self.score:.1f} %"
        )
        return f"closed form of {self.pairs} contexts of pairs and {self.documents} documents: {chosen}; {recall}"


@torch.no_grad()
def put(linear: torch.nn.Linear, solution: Map) -> None:
    """Sets a map; of W_i2t one place may be that of all visual tokens."""
    weight, bias = solution
    tokens = linear.out_features // len(bias)
    linear.weight.copy_(weight.repeat(tokens, 1))
    linear.bias.copy_(bias.repeat(tokens))


def solve_canonical(pairs: Sums, documents: Sums | None = None, grid: Grid | None = None) -> ClosedForm:
    """
    The canonical alignment from what was summed.

    Args:
        pairs: of the views `"state"`, `"pooled"`, `"projected"`, `"text"` and, for W_i2t, `"words"`.
        documents: of the first three.

    Raises:
        ValueError: there are too few pairs, or the states or the images do not vary.
    """
    grid = grid or Grid()
    if documents is not None and documents.empty:
        logger.warning("no document has a reply with an image: they do not count in the closed form")
        documents = None
    splits = list(_splits(pairs, documents))
    counts = [int(fitted.pairs.count) for fitted, _ in splits]
    shares = (0.0,) if documents is None else grid.document_shares
    recall: dict[Setting, list[float]] = {}
    for fitted, replies in splits:
        for feature, ridge, text_weight, share in product(grid.features, grid.ridges, grid.text_weights, shares):
            directions = fitted.directions(feature, ridge, text_weight, share)
            limit = min(len(directions[1]), min(counts) - 1)
            for width, power in product(_widths(grid.widths, limit), grid.powers):
                setting = Setting(feature, width, ridge, power, text_weight, share)
                cut = fitted.cut(directions, setting)
                tried = [r.recall(cut.of(STATE), cut.of(feature), feature) for r in replies]
                recall.setdefault(setting, []).extend(tried)
    setting, means, score = _best(recall)
    whole = Correlations(pairs.whole(), None if documents is None else documents.whole())
    maps = whole.maps(setting).maps
    solved = {"W_t2m": maps[STATE], "W_v2m": maps[setting.feature], "W_x2m": maps[TEXT]}
    return _finished(solved, whole.pairs, asdict(setting), means, score, whole.documents)


def solve_paper(pairs: Sums, ridges: Sequence[float] = RIDGES, powers: Sequence[float] = POWERS) -> ClosedForm:
    """The paper's alignment from what was summed; the views and errors of `solve_canonical`."""
    recall: dict[tuple[float, float], list[float]] = {}
    for fitted, replies in _splits(pairs):
        moments = fitted.pairs
        states, images = (Spectrum(moments.covariance(v, v), f"the {v} of a pair") for v in (STATE, PROJECTED))
        for ridge, power in product(ridges, powers):
            solution = matching_map(moments, ridge, power, STATE, PROJECTED, (states, images))
            weight, bias = (t.float().cpu() for t in solution)  # where the replies are held
            # Of images alone: this form returns no image out of a pool of both.
            tried = [r.image_recall(lambda h, w=weight, b=bias: h @ w.T + b) for r in replies]
            recall.setdefault((ridge, power), []).extend(tried)
    (ridge, power), means, score = _best(recall)
    whole = pairs.whole()
    solved = {"W_t2m": matching_map(whole, ridge, power, STATE, PROJECTED)}
    return _finished(solved, whole, {"ridge": ridge, "power": power}, means, score)


def _splits(pairs: Sums, documents: Sums | None = None) -> Iterator[tuple[Correlations, list[Replies]]]:
    """What a setting is fitted to, and the replies that judge it; where one kind has one split, it is in all."""
    of_pairs, of_documents = pairs.folds(), [] if documents is None else documents.folds()
    for fold in range(max(len(of_pairs), len(of_documents))):
        moments, held = of_pairs[fold % len(of_pairs)]
        if moments.count < 2:
            raise ValueError(TOO_FEW)
        interleaved, replies = None, [pair_replies(held)]
        if of_documents:
            interleaved, held = of_documents[fold % len(of_documents)]
            replies.append(document_replies(held))
        yield Correlations(moments, interleaved), [r for r in replies if r is not None]


def _widths(wanted: Sequence[int], limit: int) -> list[int]:
    """Those there are directions for; where one is too large, all the directions there are."""
    widths = [width for width in wanted if width <= limit]
    if len(widths) == len(wanted):
        return widths
    if not widths:
        logger.warning_once(f"there are {limit} canonical directions, fewer than {min(wanted)}: all of them are kept")
    return sorted({*widths, limit})


def _best(recall: dict[Any, list[float]]) -> tuple[Any, dict[Any, float], float | None]:
    """
    The first of the best, so that equals are the same in every run, the mean of each, and the best mean; with nothing held
    out the middle of the grid.
    """
    if not any(recall.values()):
        return list(recall)[len(recall) // 2], dict.fromkeys(recall, 0.0), None
    means = {setting: sum(values) / len(values) for setting, values in recall.items()}
    best = max(means, key=means.__getitem__)
    return best, means, means[best]


def _finished(
    solved: dict[str, Map], pairs: Moments, setting: dict[str, Any], recall: dict[Any, float], score: float | None,
    documents: Moments | None = None,
) -> ClosedForm:  # fmt: skip
    if WORDS in pairs.widths:
        solved["W_i2t"] = ridge_map(pairs, WORDS_RIDGE, POOLED, WORDS)
    maps = {name: (weight.float(), bias.float()) for name, (weight, bias) in solved.items()}
    return ClosedForm(maps, setting, recall, score, int(pairs.count), 0 if documents is None else int(documents.count))


# One pass over the data


@torch.no_grad()
def pair_rows(model: UniMuRModel, batch: dict[str, Any], views: Sequence[str] = PAIR_VIEWS) -> Rows:
    """The views of a collated batch of pairs, a row an item: cached where they are, and the towers' where not."""
    images, contexts, targets = batch["images"], batch["contexts"], batch["targets"]
    features, embeds = images.get("features"), images.get("embeds")
    if embeds is None:
        features, embeds = model.encode_images(images["pixel_values"])
    at = targets["image_indices"]
    rows = {POOLED: features[at], PROJECTED: F.normalize(embeds[at].float(), dim=-1)}
    if STATE in views:
        rows[STATE] = _states(model, contexts, features)
    if TEXT in views:
        texts = targets.get("text_embeds")
        if texts is None:
            texts = model.encode_clip_texts(targets["input_ids"], targets["attention_mask"])
        rows[TEXT] = F.normalize(texts.float(), dim=-1)
    if WORDS in views:
        rows[WORDS] = _caption_means(batch, model)
    return rows


def _states(model: UniMuRModel, contexts: dict[str, Any], features: torch.Tensor | None) -> torch.Tensor:
    """h([RET]) of a batch's contexts, which show some of the images of `features`; cached where they are."""
    if "states" in contexts:
        return contexts["states"]
    shown = None if features is None else features[contexts["image_indices"]]
    return model.ret_states(contexts["input_ids"], contexts["attention_mask"], shown, contexts.get("packing"))


def _caption_means(batch: dict[str, Any], model: UniMuRModel) -> torch.Tensor:
    """The mean input embedding of each caption's own tokens, `(n, d)` float32."""
    labels = batch["captions"]["labels"]
    ids, eos = labels.clamp(min=0), model.processor.tokenizer.eos_token_id
    counted = (labels >= 0) & (ids != (-1 if eos is None else eos))
    rows = model.language_model.get_input_embeddings()(ids).float() * counted[..., None]
    return rows.sum(1) / counted.sum(1, keepdim=True).clamp(min=1)


def sum_pairs(
    model: UniMuRModel, rows: Dataset, collator: PairCollator, skips: SkipCounter, *, batch_size: int, workers: int = 0,
    every_caption: bool = True, captions: HeldOut | None = None, views: Sequence[str] = PAIR_VIEWS,
) -> Sums:  # fmt: skip
    """
    The moments of caption pairs, read as the collator's `pair_contexts` says. Each process reads its part; the sums are those
    of all.

    Args:
        rows: cached or not, streamed or not.
        skips: receives the counts of the pairs that could not be used, of this process.
        every_caption: each of an image's captions is a row; else the one that the collator draws.
        captions: receives a caption of each image, for `visual_words`.
        views: what is summed; without the states the LLM does not run.
    """
    sums = Sums(views, few_or_part(rows), model.device)
    for batch in _collated(model, rows, collator, skips, "closed form: pairs", batch_size, workers, every_caption):
        names = [batch["names"][i] for i in batch["targets"]["image_indices"].tolist()]
        values = pair_rows(model, batch, views)
        sums.add(values, names)
        if captions is not None:
            _sample(captions, model, batch, values[POOLED], names)
    if captions is not None:
        captions.gather()
        captions.surplus()
    return sums.finish()


def _sample(
    captions: HeldOut, model: UniMuRModel, batch: dict[str, Any], features: torch.Tensor, names: list[str]
) -> None:
    """Each image's first caption, as its tokens, with the image's feature; as many as `captions` takes."""
    labels, eos = batch["captions"]["labels"].cpu(), model.processor.tokenizer.eos_token_id
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    for name, row in first.items():
        ids = [token for token in labels[row].tolist() if token >= 0 and token != eos]
        if ids:
            captions.add(captions.hash(name), {POOLED: features[row].float().cpu(), WORDS: torch.tensor(ids)})
    captions.surplus(slack=captions.size)


def visual_map(model: UniMuRModel, pairs: Sums, captions: HeldOut | None) -> Map:
    """
    W_i2t whose visual tokens each hold a word of the captions that were sampled (see [`train.visual_words`]), or without these
    the mean of the words.
    """
    if captions is None:
        weight, bias = ridge_map(pairs.whole(), WORDS_RIDGE, POOLED, WORDS)
        return weight.float(), bias.float()
    rows = captions.rows()
    features = torch.stack([row[POOLED] for row in rows])
    table = model.language_model.get_input_embeddings().weight.detach().cpu()
    return visual_words(features, [row[WORDS].tolist() for row in rows], table, model.config.n_visual_tokens)


def sum_documents(
    model: UniMuRModel, documents: Dataset, collator: PairCollator, skips: SkipCounter, *, batch_size: int,
    workers: int = 0,
) -> Sums:  # fmt: skip
    """
    The moments of interleaved documents whose reply has an image: the context's state, through W_i2t as it is, and the
    image. What is held out may have a text alone.
    """
    sums = Sums(DOCUMENT_VIEWS, few_or_part(documents), model.device)
    for batch in _collated(model, documents, collator, skips, "closed form: documents", batch_size, workers, False):
        _add_documents(sums, model, batch)
    return sums.finish()


@torch.no_grad()
def _add_documents(sums: Sums, model: UniMuRModel, batch: dict[str, Any]) -> None:
    images, contexts = batch.get("images", {}), batch["contexts"]
    features, embeds = images.get("features"), images.get("embeds")
    if embeds is None and "pixel_values" in images:
        features, embeds = model.encode_images(images["pixel_values"])
    states = _states(model, contexts, features)
    rows_and_images = (batch["targets"][name].tolist() for name in ("image_rows", "image_indices"))
    targets = dict(zip(*rows_and_images, strict=True))
    fitted = []
    for row, (name, reply) in enumerate(zip(batch["names"], batch["replies"], strict=True)):
        number = sums.held.number(name)
        if number is None:
            fitted += [row] if row in targets else []
            continue
        views = {STATE: states[row].cpu()}
        if row in targets:
            image = targets[row]
            views |= {POOLED: features[image].cpu(), PROJECTED: F.normalize(embeds[image].float(), dim=-1).cpu()}
        if reply is not None:
            words = model.processor.texts([reply]).to(model.device)
            views["reply"] = model.ret_states(words["input_ids"], words["attention_mask"])[0].cpu()
        sums.held.add(number, views)
    sums.fit_surplus(slack=sums.held.size)
    if fitted:
        images = [targets[row] for row in fitted]
        unit = F.normalize(embeds[images].float(), dim=-1)
        sums.fit({STATE: states[fitted], POOLED: features[images], PROJECTED: unit})


def _collated(
    model: UniMuRModel, rows: Dataset, collator: PairCollator, skips: SkipCounter, about: str, batch_size: int,
    workers: int, every_caption: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    collator = copy(collator)
    collator.named, collator.every_caption = True, every_caption
    loader = DataLoader(_own_part(rows), batch_size=batch_size, collate_fn=collator, num_workers=workers)
    for batch in tqdm(loader, desc=about):
        skips.update(batch["skipped"], batch["n_seen"])
        yield send_to_device(batch, model.device)


def _own_part(rows: Dataset) -> Dataset:
    """This process's share of the rows."""
    state = PartialState()
    if state.num_processes == 1:
        return rows
    if not hasattr(rows, "__len__"):
        return split_dataset_by_node(rows, rank=state.process_index, world_size=state.num_processes)
    return Subset(rows, range(state.process_index, len(rows), state.num_processes))


def start(
    model: UniMuRModel, rows: Dataset, collator: PairCollator, skips: SkipCounter, *, batch_size: int, workers: int = 0,
    documents: Dataset | None = None, grid: Grid | None = None, every_caption: bool = True, visual_start: str = "words",
) -> ClosedForm:  # fmt: skip
    """
    Puts the model's maps at their closed form.

    Args:
        rows: caption pairs, cached or not, streamed or not.
        skips: receives the counts of the pairs that could not be used.
        documents: interleaved documents, for the canonical alignment; their contexts' images are read through the
            W_i2t of the pairs' closed form.
        grid: what the canonical alignment chooses from.
        visual_start: `"words"`: each of several visual tokens holds a word of the caption; `"mean"`: all hold its mean word.
    """
    arguments: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
    words = visual_start == "words" and model.config.n_visual_tokens > 1
    captions = HeldOut(SAMPLED, every=True) if words else None
    of_images: dict[str, Map] = {}
    if collator.pair_contexts == "conversations":  # the LLM reads what they show through W_i2t, which is solved first
        alone = copy(collator)
        alone.pair_contexts = "caption"
        visual = sum_pairs(model, rows, alone, SkipCounter(), captions=captions, views=(POOLED, WORDS), **arguments)
        of_images["W_i2t"] = visual_map(model, visual, captions)
        put(model.W_i2t, of_images["W_i2t"])
        pairs = sum_pairs(model, rows, collator, skips, every_caption=every_caption, **arguments)
    else:
        pairs = sum_pairs(model, rows, collator, skips, every_caption=every_caption, captions=captions, **arguments)
        if captions is not None:  # else the means, which are solved with the other maps
            of_images["W_i2t"] = visual_map(model, pairs, captions)
    solved = solve_paper(pairs) if model.config.alignment == "paper" else solve_canonical(pairs, None, grid)
    if documents is not None and model.config.alignment == "canonical":
        solved.maps |= of_images
        solved.apply(model)
        solved = solve_canonical(pairs, sum_documents(model, documents, collator, skips, **arguments), grid)
    solved.maps |= of_images
    solved.apply(model)
    logger.info(str(solved))
    return solved
