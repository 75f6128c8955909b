"""The canonical maps as a checkpoint that a user loads, and a picture of its replies."""

from pathlib import Path

import torch

from benchmarks.gallery import draw_gallery
from modeling_unimur import CandidatePool, UniMuRModel
from train.canonical import STATE, TEXT, Setting
from train.closed_form import POOLED

from .bench import DIALOGUE, RESPONSE, Bench
from .spaces import Pairs, correlations


def canonical_model(bench: Bench, pairs: Pairs, setting: Setting) -> UniMuRModel:
    """A UniMuR over the bench's towers with the canonical maps and the bench's W_i2t."""
    old = bench.model
    model = UniMuRModel.from_pretrained_towers(
        old.config.text_model_name_or_path, old.config.clip_model_name_or_path, old.processor,
        alignment="canonical", shared_width=setting.width,
    ).eval()  # fmt: skip
    model.attach_towers(old.language_model, old.clip)
    maps = correlations(pairs).maps(setting).maps
    with torch.no_grad():
        model.ret_embedding.copy_(old.ret_embedding)
        for name, value in old.W_i2t.named_parameters():
            getattr(model.W_i2t, name).copy_(value)
        for name, view in (("W_t2m", STATE), ("W_v2m", POOLED), ("W_x2m", TEXT)):
            weight, bias = maps[view]
            getattr(model, name).weight.copy_(weight)
            getattr(model, name).bias.copy_(bias)
    return model


@torch.no_grad()
def draw(bench: Bench, model: UniMuRModel, split: str, path: Path) -> None:
    """Writes the gallery: replies to some dialogues of both kinds, from their whole pools, by the cached states."""
    states, known = bench.evaluation_states(split), bench.evaluation(split)
    rows = []
    for kind in (RESPONSE, DIALOGUE):
        data, (texts, images) = known["data"][kind], known["candidates"][kind]
        pool = CandidatePool.empty(model.fingerprint)
        pictures = model.finished(model.unify_images(*known["images"][kind]))
        pool = pool.append("image", [data.images[i] for i in images], pictures, list(images))
        if texts:
            words = model.finished(model.W_t2m(states["texts"]))
            pool = pool.append("text", [data.texts[i] for i in texts], words, list(texts))
        wanting = [i for i, d in enumerate(data.dialogues) if d["wants_image"]]
        chosen = wanting[:2]
        if kind == RESPONSE:
            informed = [i for i in wanting if data.dialogues[i]["image_informs"]]
            others = [i for i in wanting if not data.dialogues[i]["image_informs"]]
            chosen = [*informed[:4], *others[:4], *(i for i, d in enumerate(data.dialogues) if not d["wants_image"])][
                :12
            ]
        replies = pool.search(model.finished(model.W_t2m(states[kind][chosen])))
        rows += zip([data.dialogues[i] for i in chosen], replies, strict=True)
    tables = [known["data"][kind] for kind in (RESPONSE, DIALOGUE)]
    draw_gallery(rows, tables[0].texts, tables[0].images | tables[1].images, path)
