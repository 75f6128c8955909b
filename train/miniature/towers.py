"""The miniature's two towers: a CLIP and an OPT of under a million parameters each, pre-trained on train scenes.

Each is saved as a folder shaped like a Hub repository, so that everything downstream loads it as it loads a real
tower. What replaces web-scale pre-training is written down in `documents`: its figures depend on it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm.auto import tqdm, trange
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GPT2Tokenizer,
    OPTConfig,
    OPTForCausalLM,
)

from train.miniature.dialogues import DialogueSet, responses, visdial
from train.miniature.world import FAVOURITES, SIZE, Scene, alt_text, captions, draw, facts, plural

# ----------------------------------------------------------------------------------------------------- tokenizers


def clip_tokenizer(corpus: Sequence[str], max_length: int = 40, vocab_size: int = 1200) -> CLIPTokenizer:
    """A CLIP tokenizer (lower case, "</w>" ends a word) whose pairs are merged as often as in `corpus`."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    # CLIP's own splitting rule, so that what is merged here is what the tokenizer will look up.
    learner.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=bytes_,
        end_of_word_suffix="</w>",
        # Every byte may also end a word. Left to the trainer, these would be numbered in the order of a hash, and ties
        # between merges with them.
        special_tokens=[start, end, *(f"{byte}</w>" for byte in bytes_)],
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    vocab, merges = bpe_parts(learner)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def opt_tokenizer(corpus: Sequence[str], max_length: int = 160, vocab_size: int = 1200) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer laid out as OPT's: `<s>` 0, `<pad>` 1, `</s>` 2 (which begins every text)."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    vocab, merges = bpe_parts(learner)
    return GPT2Tokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        add_bos_token=True,
        model_max_length=max_length,
    )


def bpe_parts(tokenizer: Tokenizer) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges of a trained BPE tokenizer; the merges as pairs, which transformers takes and does not annotate."""
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def check_reload(saved: Any, folder: Path, sample: str) -> None:
    """Refuse a tokenizer that reads `sample` differently once it is loaded again, or reads nothing."""
    before = saved(sample)["input_ids"]
    after = type(saved).from_pretrained(folder)(sample)["input_ids"]
    if before != after or len(before) < 4:
        raise RuntimeError(f"tokenizer in {folder} changed on reload: {before} became {after}")


# ----------------------------------------------------------------------------------------------------------- CLIP
def pretrain_clip(
    folder: str | Path,
    scenes: Sequence[Scene],
    *,
    seed: int = 0,
    steps: int = 520,
    batch_size: int = 128,
    lr: float = 1e-3,
    width: int = 96,
    layers: int = 2,
    patch: int = 16,
    dim: int = 64,
    progress: bool = True,
) -> Path:
    """Train a CLIP from scratch on pictures of `scenes` and their captions, and save it with its processors.

    Args:
        folder: where to save; made if absent.
        scenes: training scenes only.
        seed: of weights, pictures, captions and order. The same seed gives the same weights on the same machine.
        steps, batch_size, lr: optimiser steps, pairs a step, peak learning rate.
        width, layers, patch, dim: hidden size and depth of both encoders, pixels a patch, size q of the embedding.
        progress: show a bar.

    Returns:
        The folder.
    """
    folder = Path(folder)
    rng = random.Random(f"clip-{seed}")
    texts = [captions(scene, rng, 6, 1) for scene in scenes]
    corpus = [text for options in texts for text in options] + [line for fact in facts() for line in fact]
    tokenizer = clip_tokenizer(corpus)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(_clip_config(tokenizer, width, layers, patch, dim))
        pixels = draw_all(scenes, rng, progress)
        _train_clip(model, pixels, processor, texts, tokenizer, steps, batch_size, lr, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    check_reload(tokenizer, folder, corpus[0])
    return folder


def _clip_config(tokenizer: CLIPTokenizer, width: int, layers: int, patch: int, dim: int) -> CLIPConfig:
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "projection_dim": dim,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(
        text_config=shared | text,
        vision_config=shared | {"image_size": SIZE, "patch_size": patch},
        projection_dim=dim,
    )


def draw_all(scenes: Sequence[Scene], rng: random.Random, progress: bool) -> torch.Tensor:
    """Pictures of scenes `(n, 3, 64, 64)` uint8: a quarter of the memory of their pixel values."""
    pixels = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for i, scene in enumerate(tqdm(scenes, desc="drawing", disable=not progress)):
        pixels[i] = np.asarray(draw(scene, rng))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def pixel_values_of(pixels: torch.Tensor, processor: CLIPImageProcessor) -> torch.Tensor:
    """`(n, 3, 64, 64)` float32, as the image processor gives them for these pictures."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (pixels.float() * processor.rescale_factor - mean) / std


def _train_clip(
    model: CLIPModel,
    pixels: torch.Tensor,
    processor: CLIPImageProcessor,
    texts: list[list[str]],
    tokenizer: CLIPTokenizer,
    steps: int,
    batch_size: int,
    lr: float,
    progress: bool,
) -> None:
    """Symmetric InfoNCE over batches; one caption of each picture is drawn at every visit."""
    n, options = len(texts), len(texts[0])
    flat = tokenizer([t for row in texts for t in row], padding=True, truncation=True, return_tensors="pt")
    ids, mask = (flat[k].view(n, options, -1) for k in ("input_ids", "attention_mask"))
    optimizer, schedule = adamw(model, lr, steps)
    labels = torch.arange(batch_size)
    order = batches_of(n, batch_size, steps)
    bar = trange(steps, desc="CLIP", disable=not progress)
    for step in bar:
        rows, which = order[step], torch.randint(options, (batch_size,))
        length = int(mask[rows, which].sum(1).max())
        out = model(
            input_ids=ids[rows, which, :length],
            attention_mask=mask[rows, which, :length],
            pixel_values=pixel_values_of(pixels[rows], processor),
        )
        loss = (F.cross_entropy(out.logits_per_image, labels) + F.cross_entropy(out.logits_per_text, labels)) / 2
        take_step(loss, model, optimizer, schedule)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


# ------------------------------------------------------------------------------------------------------------ OPT
# (text before the tail, tail): the tail is what the [RET] state must predict.
Document = tuple[str, str]


def documents(scenes: Sequence[Scene], n: int, rng: random.Random) -> list[Document]:
    """`n` texts for pre-training the language model, each followed by a tail of hashtags.

    A language model of this size carries no summary of a text in its last state unless its training text asks for
    one; web text does so with hashtags, keywords and alt texts, and so do these documents. Where a dialogue shows an
    image, its alt text's words take the image's place, in any order, and a dialogue that asks for a picture is
    tagged "photo", one that asks for words "chat".
    """
    made: list[Document] = []
    while len(made) < n:
        spoken = responses(scenes, len(scenes), rng.randrange(1 << 30), image_share=0.5, informed_share=0.5)
        questions = visdial(scenes, len(scenes), rng.randrange(1 << 30))
        for group, share in ((spoken, 1.0), (questions, 0.5)):
            for dialogue in group.dialogues:
                if rng.random() < share:
                    made.append(_dialogue_document(dialogue, group, rng))
        for scene in scenes:
            kind = rng.random()
            if kind < 0.5:
                made.append((captions(scene, rng, 1)[0], alt_text(scene, rng)))
            elif kind < 0.8:
                made.append((_words(scene, rng), alt_text(scene, rng)))
            else:
                made.append((_words(scene, rng) + " " + captions(scene, rng, 1)[0], ""))
        made += [(text, alt_text(spoken.scenes[text_id], rng)) for text_id, text in spoken.texts.items()]
        for _ in range(len(scenes) // 200):  # common knowledge comes often: one document in twenty-five
            made += _fact_documents(rng)
    rng.shuffle(made)
    return made[:n]


def _fact_documents(rng: random.Random) -> list[Document]:
    """For each animal: what it eats, as question and answer, and a question for what it looks like."""
    made = []
    for (animal, food), (question, answer) in zip(FAVOURITES.items(), facts(), strict=True):
        made.append((question, _tail([animal, "eating", food, "chat"], rng)))
        made.append((answer, _tail([animal, "eating", food], rng)))
        made.append((f"what do {plural(animal)} look like?", _tail([animal, "photo"], rng)))
    return made


def _tail(tags: list[str], rng: random.Random) -> str:
    rng.shuffle(tags)
    return " ".join(f"# {tag}" for tag in tags)


def _words(scene: Scene, rng: random.Random) -> str:
    """What takes an image's place: the scene's words, in any order, each after a space."""
    return " " + alt_text(scene, rng, "")


def _dialogue_document(dialogue: dict[str, Any], group: DialogueSet, rng: random.Random) -> Document:
    """A dialogue up to its reply, images as their words, and the tags of the scene it is about."""
    lines = [
        "".join(
            e["text"] if e["type"] == "text" else _words(group.images[e["image_id"]], rng) for e in turn["elements"]
        )
        for turn in dialogue["turns"][: dialogue["target_turn"]]
    ]
    scene = group.scenes[dialogue["dialogue_id"]]
    return "\n".join(lines), _tail([*scene.tags, "photo" if dialogue["wants_image"] else "chat"], rng)


def pretrain_opt(
    folder: str | Path,
    scenes: Sequence[Scene],
    *,
    seed: int = 0,
    steps: int = 1100,
    batch_size: int = 32,
    lr: float = 4e-3,
    width: int = 128,
    layers: int = 2,
    heads: int = 8,
    body_weight: float = 0.02,
    progress: bool = True,
) -> Path:
    """Train an OPT from scratch on `documents` of `scenes`, and save it with its tokenizer.

    Args:
        folder: where to save; made if absent.
        scenes: training scenes only.
        seed: of weights and documents. The same seed gives the same weights on the same machine.
        steps, batch_size, lr: optimiser steps, documents a step, peak learning rate.
        width, layers, heads: hidden size, depth, attention heads.
        body_weight: weight of the loss on tokens before a document's tail, against 1 on the tail.
        progress: show a bar.

    Returns:
        The folder.
    """
    folder = Path(folder)
    rng = random.Random(f"opt-{seed}")
    docs = documents(scenes, steps * batch_size, rng)
    tokenizer = opt_tokenizer([line for doc in docs[:8000] for line in doc])
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        dropout=0.0,
        init_std=0.12 * (128 / width) ** 0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
        optimizer, schedule = adamw(model, lr, steps)
        bar = tqdm(_document_batches(docs, tokenizer, batch_size, body_weight), "OPT", steps, disable=not progress)
        for step, (ids, mask, weights) in enumerate(bar):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
            take_step(loss, model, optimizer, schedule)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_reload(tokenizer, folder, docs[0][0])
    return folder


def _document_batches(
    docs: list[Document], tokenizer: GPT2Tokenizer, batch_size: int, body_weight: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of (ids, mask, loss weights), each `(batch, length)`, of documents of similar length, right-padded.

    Body and tail are tokenised apart: the byte-level rule would else join a full stop to the "#" after it.
    """
    bodies = tokenizer([body for body, _ in docs])["input_ids"]
    tails = tokenizer([tail for _, tail in docs])["input_ids"]
    rows = []
    for body, tail in zip(bodies, tails, strict=True):
        tail = [*tail[1:], tokenizer.eos_token_id]  # without the BOS of its own
        # The first "#" is not predicted: [RET] is put there, whatever the text.
        weights = [body_weight] * (len(body) + 1) + [1.0] * (len(tail) - 1)
        rows.append((body + tail, weights))
    # Sorted by length within a few batches only: sorted over all, a batch would hold one kind of document.
    batches = []
    for start in range(0, len(rows), 4 * batch_size):
        near = sorted(rows[start : start + 4 * batch_size], key=lambda row: len(row[0]))
        chunks = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        batches += [chunks[i] for i in torch.randperm(len(chunks)).tolist()]
    for chosen in batches:
        length = max(len(ids) for ids, _ in chosen)
        pad = tokenizer.pad_token_id
        padded = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in chosen])
        yield padded, (padded != pad).long(), torch.tensor([w + [0.0] * (length - len(w)) for _, w in chosen])


# --------------------------------------------------------------------------------------------------------- shared
def batches_of(n: int, batch_size: int, steps: int) -> torch.Tensor:
    """Indices `(steps, batch_size)`: shuffled epochs, one after another."""
    if batch_size > n:
        raise ValueError(f"a batch of {batch_size} needs as many scenes, there are {n}")
    per_epoch = n // batch_size
    epochs = [torch.randperm(n)[: per_epoch * batch_size].view(per_epoch, -1) for _ in range(-(-steps // per_epoch))]
    return torch.cat(epochs)[:steps]


def adamw(
    model: torch.nn.Module, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a short warm-up and a cosine down to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.08)
    return optimizer, schedule


def take_step(loss: torch.Tensor, model: torch.nn.Module, optimizer: Any, schedule: Any) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
