"""What `train/run.py` trains on: pairs and documents, what is held out of them, and what is cached of them."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling_unimur import UniMuRModel
from train.arguments import DataArguments, ModelArguments
from train.collate import SkipCounter
from train.data import load_pairs
from train.dialogue_files import load_dialogues, load_rows
from train.documents import InterleavedDocuments, checked_share
from train.features import cache_caption_states, cache_image_features
from train.grouping import hold_out, is_held_out, one_row_an_image
from train.training_arguments import UniMuRTrainingArguments


@dataclass
class TrainingData:
    """
    What was named to train on, and what is held out of it.

    Attributes:
        pairs: as they were read; streamed ones have no length.
        rows: what the collator gets of them: themselves, or with features in their images' place.
        documents: interleaved documents, or `None`.
        held_pairs, held_documents: what validation is made on; `None` where nothing is held out.
        held_about: what these are, as text.
        skips: what was left out while features were cached.
    """

    pairs: Any
    rows: Any
    documents: InterleavedDocuments | None = None
    held_pairs: Any = None
    held_documents: InterleavedDocuments | None = None
    held_about: str = ""
    skips: SkipCounter = field(default_factory=SkipCounter)

    @property
    def streamed(self) -> bool:
        return not hasattr(self.pairs, "__len__")

    def hold_out(self, share: float) -> None:
        """Takes a share of the pairs and documents away from training, by the hash of their ids."""
        self.pairs, self.held_pairs = hold_out(self.pairs, share)
        self.rows = self.pairs
        if self.documents is not None:
            parts: tuple[list[int], list[int]] = [], []
            for number, name in enumerate(self.documents.conversations["id"]):
                parts[is_held_out(name, share)].append(number)
            self.documents, self.held_documents = (self.documents.select(part) for part in parts)
        self.held_about = f"a held-out share of the training data ({share:.1%})"


def load_data(model_args: ModelArguments, data_args: DataArguments, args: UniMuRTrainingArguments) -> TrainingData:
    """
    Reads what `--train_data` names, and what to validate on. The miniature also gives its towers, where none are named,
    and its validation split.

    Raises:
        ValueError: nothing or no known layout is named, or documents are wanted where there are none or by `--schedule
            captioning`.
    """
    if args.schedule == "captioning" and (data_args.dialogues is not None or data_args.interleaved):
        raise ValueError(
            "--schedule captioning trains eq. 1-2 alone, in which most documents take no part: leave --dialogues and "
            "--interleaved out, or give --schedule joint or alternating"
        )
    if data_args.dialogue_share is not None:
        checked_share(data_args.dialogue_share)
        if data_args.dialogues is None and not data_args.interleaved:
            raise ValueError("--dialogue_share is of --dialogues, and there are none: give them, or leave it out")
    if data_args.source == "miniature":
        if data_args.dialogues is not None:
            raise ValueError("--dialogues beside --train_data miniature: give one of them")
        data = _miniature(model_args, data_args, args)
    elif data_args.interleaved:
        raise ValueError("--interleaved is of the miniature: give your own documents with --dialogues")
    else:
        pairs, documents = load_rows(data_args.source, data_args.dialogues, data_args.image_folder)
        pairs = _grouped(pairs)
        data = TrainingData(pairs, pairs, documents)
        if data.streamed and documents is not None and data_args.dialogue_share is None:
            raise ValueError(
                "--dialogues beside streamed archives, which have no length: give their share of the rows, such as "
                "--dialogue_share 0.3"
            )
    _hold_out(data, data_args)
    return data


def _hold_out(data: TrainingData, data_args: DataArguments) -> None:
    """What `--eval_data`, `--eval_dialogues` or `--eval_share` name to validate on."""
    named = []
    if data_args.eval_data:
        path = data_args.eval_data[0] if len(data_args.eval_data) == 1 else data_args.eval_data
        data.held_pairs = _grouped(load_pairs(path, image_folder=data_args.image_folder))
        named.append(f"pairs of {path}")
    if data_args.eval_dialogues:
        data.held_documents = load_dialogues(data_args.eval_dialogues, data_args.image_folder)
        named.append(f"conversations of {data_args.eval_dialogues}")
    if named:
        data.held_about = " and ".join(named)
    elif data_args.eval_share:
        data.hold_out(data_args.eval_share)


def _grouped(pairs: Any) -> Any:
    return one_row_an_image(pairs) if hasattr(pairs, "__len__") else pairs


def _miniature(model_args: ModelArguments, data_args: DataArguments, args: UniMuRTrainingArguments) -> TrainingData:
    from train.miniature import prepare, validation_data

    if model_args.text_model is None and model_args.clip_model is None:
        torch.set_num_threads(1)  # models this small lose more by a second thread than they gain
    with args.main_process_first(desc="the miniature"):
        miniature = prepare(data_args.miniature, args.seed)
    model_args.text_model = model_args.text_model or miniature.text_model
    model_args.clip_model = model_args.clip_model or miniature.clip_model
    data = TrainingData(miniature.pairs, miniature.pairs, miniature.documents if data_args.interleaved else None)
    if args.eval_strategy != "no" and not (data_args.eval_data or data_args.eval_dialogues or data_args.eval_share):
        data.held_pairs, documents = validation_data(args.seed, data_args.eval_pool)
        data.held_documents = documents if data_args.interleaved else None
        data.held_about = "the miniature's validation split"
    return data


def cache(data: TrainingData, model: UniMuRModel, data_args: DataArguments, args: UniMuRTrainingArguments) -> None:
    """Puts what is frozen in the place of the images, and by choice of the captions."""
    if data.streamed:
        raise ValueError("--cache_features needs data with a length; shards are streamed: leave it out for them")
    folder = None if data_args.cache_dir is None else Path(data_args.cache_dir)
    if folder is None and data_args.source != "miniature":
        folder = Path(args.output_dir) / "features"
    images, captions, dialogue_images = (
        None if folder is None else folder / part for part in ("images", "captions", "dialogue_images")
    )
    model.to(args.device)
    counts = SkipCounter()
    workers = args.dataloader_num_workers or spare_cores(args.device, args.world_size)
    data.rows = cache_image_features(data.pairs, model, counts, folder=images, workers=workers)
    counts.check(args.max_bad_share)
    if args.process_index == 0:  # every process has the counts of all, and the trainer adds up the processes'
        data.skips.update(counts.counts, counts.seen, counts.examples)
    read_once = (
        data_args.pair_contexts == "caption" and not model.config.n_drawing_tokens
    )  # [IMG] tokens are behind [RET]
    if data_args.cache_captions and read_once:
        data.rows = cache_caption_states(data.rows, model, captions)
    if data.documents is not None:
        rows = data.rows
        if data.documents.images is not data.pairs:
            rows = cache_image_features(
                data.documents.images, model, SkipCounter(), folder=dialogue_images, workers=workers
            )
        data.documents.use_images(rows)


def spare_cores(device: torch.device, processes: int) -> int:
    """Workers that decode for one of `processes`: on an accelerator the cores are theirs, on a CPU the towers need them."""
    return 0 if device.type == "cpu" else max(1, (os.cpu_count() or 1) // processes - 1)
