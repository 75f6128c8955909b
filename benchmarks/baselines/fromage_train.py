"""FROMAGe trained as UniMuR is: by the same trainer, on the miniature's pairs, over the same towers."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, set_seed

from benchmarks.baselines.fromage import FromageModel
from benchmarks.baselines.fromage_heads import caption_states, conversation_states, start_canonical, train_heads
from modeling_unimur import UniMuRProcessor
from modeling_unimur.processing_unimur import IGNORE
from train.arguments import ModelArguments
from train.collate import PairCollator, SkipCounter
from train.features import cache_image_features
from train.miniature import Miniature
from train.run import make_processor
from train.trainer import UniMuRTrainer
from train.training_arguments import UniMuRTrainingArguments
from train.visual_words import start_visual_tokens


class FromageCollator(PairCollator):
    """
    Batches of caption pairs for [`FromageModel.forward`], laid out as FROMAGe's `models.py` does.

    The retrieval pass reads `BOS caption [RET]`; the captioning pass reads the same without [RET] after the image:
    `image BOS caption`, BOS and caption labelled, without an end of text. With probability `concatenate` a batch's
    captioning rows are joined in pairs: `image BOS caption image BOS caption`, both texts labelled. An odd last
    row, and a pair longer than the LLM's positions, stay separate.

    Args:
        processor, caption, seed: as [`PairCollator`]'s.
        concatenate: FROMAGe's own is 0.5, drawn for the batch as a whole.

    Raises:
        ValueError: `concatenate` is not a probability.
    """

    def __init__(self, processor: UniMuRProcessor, caption: str = "random", seed: int = 0, concatenate: float = 0.5):
        super().__init__(processor, caption, seed)
        if not 0 <= concatenate <= 1:
            raise ValueError(f"concatenate={concatenate} is not a probability")
        self.concatenate = concatenate

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        # The targets are W_v2m of the features; CLIP's texts, and what was cached of an untrained map, are not needed.
        for name in ("text_rows", "input_ids", "attention_mask", "text_embeds"):
            batch["targets"].pop(name, None)
        # A hash rather than a generator, as for the captions: the draw is the same in every worker.
        draw = zlib.crc32(f"{self.seed}-{self.epoch}-{'-'.join(str(row['id']) for row in rows)}".encode()) / 2**32
        rows = caption_rows(batch, self.processor)
        if draw < self.concatenate:
            rows = joined(rows, self.processor.max_length)
        images = batch["captions"]["image_indices"]
        return batch | {"captions": captioning(rows, self.processor) | {"image_indices": images}}


def caption_rows(batch: dict[str, Any], processor: UniMuRProcessor) -> list[list[int]]:
    """`image BOS caption` of each row `BOS caption [RET]` of the retrieval pass, within the LLM's positions."""
    image = [processor.image_token_id] * processor.n_visual_tokens
    room = processor.max_length - len(image)
    contexts = batch["contexts"]
    sizes = contexts["attention_mask"].sum(1).tolist()
    return [
        image + ids[: min(size - 1, room)].tolist()
        for ids, size in zip(contexts["input_ids"], sizes, strict=True)
    ]  # fmt: skip


def joined(rows: list[list[int]], limit: int) -> list[list[int]]:
    """Rows joined in pairs of at most `limit` ids in all; the images keep their order."""
    pairs = []
    for first, second in zip(rows[::2], [*rows[1::2], []], strict=False):
        pairs += [first + second] if len(first) + len(second) <= limit else [first, second]
    return pairs


def captioning(rows: list[list[int]], processor: UniMuRProcessor) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` `(n, length)` of captioning rows: every token but the images' is labelled."""
    ids = [torch.tensor(row) for row in rows]
    labels = [row.masked_fill(row == processor.image_token_id, IGNORE) for row in ids]
    padding = processor.tokenizer.pad_token_id or 0
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }


class RescaleRet(TrainerCallback):
    """After each optimiser step [RET]'s input embedding gets the mean norm of the frozen rows."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        getattr(model, "module", model).rescale_ret()


class FromageTrainer(UniMuRTrainer):
    """UniMuR's, where [RET] too has the rate of what retrieves."""

    matching_tensors = (*UniMuRTrainer.matching_tensors, "ret_embedding")


def train_fromage(
    output_dir: str | Path, miniature: Miniature, seed: int, *, learning_rate: float,
    visual_learning_rate: float | None = None, max_steps: int = 320, per_device_train_batch_size: int = 64,
    gradient_accumulation_steps: int = 2, warmup_steps: int = 30, lr_scheduler_type: str = "cosine",
    ret_init: str | None = "#", n_visual_tokens: int = 6, shared_dim: int = 256, concatenate: float = 0.5,
    logging_steps: int = 20, heads: Mapping[str, Any] | None = None, start: Mapping[str, Any] | None = None,
    pair_contexts: str = "caption",
) -> str:  # fmt: skip
    """
    Trains FROMAGe on the miniature's caption pairs.

    The defaults are those of UniMuR's pairs-only variant (train/configs/miniature.yaml), so that two rows differ by the
    method and the rates alone. W_i2t starts as UniMuR's, at a closed form.

    Args:
        learning_rate: of the two heads, [RET] and the temperature.
        visual_learning_rate: of W_i2t; the same by default.
        heads: arguments of [`train_heads`], which then trains W_t2m, W_v2m and the temperature further; by default it
            does not run.
        start: arguments of [`start_canonical`], from which the two heads then start; by default they keep their values.
        pair_contexts: what the heads' start and training read: `"caption"`, or UniMuR's `"conversations"`.
        output_dir: gets `checkpoint/`, an adapter over the miniature's towers, and `trainer_state.json` with the losses.
        seed: of the maps' start and of the order of the pairs.

    Returns:
        The checkpoint's path.
    """
    set_seed(seed)
    towers = ModelArguments(
        text_model=miniature.text_model, clip_model=miniature.clip_model, n_visual_tokens=n_visual_tokens
    )
    model = FromageModel.from_pretrained_towers(
        miniature.text_model, miniature.clip_model, make_processor(towers), ret_init=ret_init, shared_dim=shared_dim
    )
    skips = SkipCounter()
    rows = cache_image_features(miniature.pairs, model, skips)
    features = torch.from_numpy(rows["image_features"][range(len(rows))])
    start_visual_tokens(model, [texts[0] for texts in rows["captions"]], features)
    args = UniMuRTrainingArguments(
        output_dir=str(output_dir), seed=seed, max_steps=max_steps, matching_learning_rate=learning_rate,
        learning_rate=learning_rate if visual_learning_rate is None else visual_learning_rate,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, warmup_steps=warmup_steps,
        lr_scheduler_type=lr_scheduler_type, logging_steps=logging_steps, save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = FromageTrainer(
        model=model, args=args, train_dataset=rows, callbacks=[RescaleRet()],
        data_collator=FromageCollator(model.processor, seed=seed, concatenate=concatenate),
    )  # fmt: skip
    trainer.skips = skips
    trainer.train()
    trainer.save_state()
    if heads:
        if pair_contexts == "caption":
            data = caption_states(model, rows["captions"], features)
        else:
            data = conversation_states(model, rows, seed)
        if start:
            start_canonical(model, data, **start)
        train_heads(model, data, seed=seed, **heads)
    checkpoint = str(Path(output_dir) / "checkpoint")
    model.save_pretrained(checkpoint)
    return checkpoint
