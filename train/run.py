"""
Trains UniMuR's two linear maps.

    python train/run.py                                       the miniature (train/configs/miniature.yaml)
    python train/run.py my.yaml                               a configuration
    python train/run.py --config my.yaml --config train/configs/paper.yaml   the paper's form of it
    python train/run.py --config my.yaml --learning_rate 1e-3 a configuration, with changes
    accelerate launch train/run.py --config train/configs/opt-6.7b.yaml --train_data DIR
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `train` is a folder of the repository, not a package

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTokenizer,
    PreTrainedConfig,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuRProcessor
from train.arguments import DataArguments, ModelArguments, parse
from train.closed_form import ClosedForm, start
from train.collate import PairCollator, SkipCounter
from train.data import streamed_length
from train.dequantise import dequantise
from train.dialogue_files import load_rows
from train.documents import InterleavedDocuments, mixed
from train.features import cache_caption_states, cache_image_features
from train.trainer import UniMuRTrainer, UniMuRTrainingArguments

logger = logging.get_logger("train")
SHUFFLED = 2_000  # undecoded pairs of streamed shards that are mixed, besides the shards' order: some 100 MB of photos


def make_processor(model_args: ModelArguments) -> UniMuRProcessor:
    """The processor of two towers: CLIP's preprocessing and both tokenizers."""
    config = AutoConfig.from_pretrained(model_args.text_model, revision=model_args.text_model_revision)
    clip = {
        "pretrained_model_name_or_path": model_args.clip_model,
        "revision": model_args.clip_model_revision or "main",
    }
    return UniMuRProcessor(
        CLIPImageProcessor.from_pretrained(**clip),
        AutoTokenizer.from_pretrained(model_args.text_model, revision=model_args.text_model_revision),
        CLIPTokenizer.from_pretrained(**clip),
        n_visual_tokens=model_args.n_visual_tokens,
        max_length=positions(config),
        ret_prompt=model_args.ret_prompt,
    )


def positions(config: PreTrainedConfig) -> int:
    """Positions of an LLM. Its config says, not its tokenizer. Raises `ValueError` where it does not."""
    found = getattr(config, "max_position_embeddings", None)
    if not found:
        raise ValueError(
            f"the config of this {config.model_type} names no max_position_embeddings, which bounds a dialogue: add to its "
            "config.json how many positions it was trained with"
        )
    return found


def add_lora(model: UniMuRModel, rank: int, targets: list[str]) -> None:
    """A trainable LoRA on the LLM, scaled by one. Raises `ImportError` without peft."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("--lora_rank needs peft: pip install 'modeling-unimur[lora]'") from error
    model.add_lora(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM"))


@dataclass
class TrainingData:
    """
    What was named to train on.

    Attributes:
        pairs: as they were read; streamed ones have no length.
        rows: what the collator gets of them: themselves, or with features in their images' place.
        documents: interleaved documents, or `None`.
        skips: what was left out while features were cached.
    """

    pairs: Dataset
    rows: Dataset
    documents: InterleavedDocuments | None = None
    skips: SkipCounter = field(default_factory=SkipCounter)

    @property
    def streamed(self) -> bool:
        return not hasattr(self.pairs, "__len__")


def load_data(model_args: ModelArguments, data_args: DataArguments, args: UniMuRTrainingArguments) -> TrainingData:
    """
    Reads what `--train_data` names. The miniature also gives its towers, where none are named.

    Raises:
        ValueError: nothing or no known layout is named, or documents are asked for where there are none.
    """
    if data_args.train_data != "miniature":
        if data_args.interleaved:
            raise ValueError("--interleaved is of the miniature: give your own documents with --dialogues")
        pairs, documents = load_rows(data_args.train_data, data_args.dialogues, data_args.image_folder)
        return TrainingData(pairs, pairs, documents)
    if data_args.dialogues is not None:
        raise ValueError("--dialogues beside --train_data miniature: give one of them")
    from train.miniature import prepare

    if model_args.text_model is None:
        torch.set_num_threads(1)  # models this small lose more by a second thread than they gain
    with args.main_process_first(desc="the miniature"):
        miniature = prepare(data_args.miniature, args.seed)
    model_args.text_model = model_args.text_model or miniature.text_model
    model_args.clip_model = model_args.clip_model or miniature.clip_model
    return TrainingData(miniature.pairs, miniature.pairs, miniature.documents if data_args.interleaved else None)


def make_model(model_args: ModelArguments, args: UniMuRTrainingArguments) -> UniMuRModel:
    """The untrained model over the two towers that are named; a GGUF is dequantised first."""
    for name in ("text_model", "clip_model"):
        if getattr(model_args, name) is None:
            raise ValueError(f"--{name} is missing: a folder or a Hub name such as facebook/opt-6.7b")
    if model_args.text_model.lower().endswith(".gguf"):
        folder = Path(model_args.text_model_dir or Path(args.output_dir) / "text_model")
        with args.main_process_first(desc="the GGUF"):
            model_args.text_model = str(dequantise(model_args.text_model, folder))
    model = UniMuRModel.from_pretrained_towers(
        model_args.text_model, model_args.clip_model, make_processor(model_args),
        ret_init=model_args.ret_init, dtype=model_args.dtype, **model_args.config_fields(),
    )  # fmt: skip
    if model_args.lora_rank:
        add_lora(model, model_args.lora_rank, model_args.lora_targets)
    return model


def cache(data: TrainingData, model: UniMuRModel, data_args: DataArguments, args: UniMuRTrainingArguments) -> None:
    """Puts what is frozen in the place of the images, and by choice of the captions."""
    if data.streamed:
        raise ValueError("--cache_features needs data with a length; shards are streamed")
    folder = data_args.cache_dir
    if folder is None and data_args.train_data != "miniature":
        folder = Path(args.output_dir) / "features"
    places = [folder and Path(folder) / part for part in ("images", "captions")]
    model.to(args.device)
    counts = SkipCounter()
    workers = args.dataloader_num_workers or spare_cores(args.device, args.world_size)
    data.rows = cache_image_features(data.pairs, model, counts, folder=places[0], workers=workers)
    counts.check(args.max_bad_share)
    if args.process_index == 0:  # every process has the counts of all, and the trainer adds up the processes'
        data.skips.update(counts.counts, counts.seen, counts.examples)
    if data_args.cache_captions:
        data.rows = cache_caption_states(data.rows, model, places[1])
    if data.documents is not None:
        rows = data.rows
        if data.documents.images is not data.pairs:
            folder = places[0] and places[0].with_name("dialogue_images")
            rows = cache_image_features(data.documents.images, model, SkipCounter(), folder=folder, workers=workers)
        data.documents.use_images(rows)


def solve(
    data: TrainingData, model: UniMuRModel, collator: PairCollator, model_args: ModelArguments,
    args: UniMuRTrainingArguments,
) -> ClosedForm:  # fmt: skip
    """Puts the maps at their closed form."""
    counts = SkipCounter()
    closed = start(
        model.to(args.device), data.rows, collator, counts, batch_size=args.train_batch_size,
        workers=args.dataloader_num_workers, grid=model_args.grid(),
        documents=data.documents if model_args.alignment == "canonical" else None,
    )  # fmt: skip
    total = SkipCounter()
    for part in gather_object([(counts.counts, counts.seen, counts.examples)]):
        total.update(*part)
    total.check(args.max_bad_share)
    if not args.max_steps and not data.skips.seen:  # else training counts the same pairs, or their caching did
        data.skips.update(total.counts, total.seen, total.examples)
    return closed


def make_trainer(
    data: TrainingData, model: UniMuRModel, collator: PairCollator, args: UniMuRTrainingArguments,
    share: float | None = None,
) -> UniMuRTrainer:  # fmt: skip
    """The trainer over pairs and documents."""
    rows, groups = data.rows, None
    if data.documents is not None:
        rows, groups = mixed(rows, data.documents, share)
        args.ddp_find_unused_parameters = True  # a batch of documents without images leaves W_i2t out
    collator.pack = args.packing and "flash" not in (model.language_model.config._attn_implementation or "")
    trainer = UniMuRTrainer(model=model, args=args, train_dataset=rows, groups=groups, data_collator=collator)
    trainer.skips = data.skips
    return trainer


def measure(checkpoint: str, data: TrainingData, data_args: DataArguments, device: torch.device) -> dict:
    """Caption-to-image recall over training pairs, of the saved checkpoint, which is what users load."""
    from benchmarks.pairs import caption_to_image_recall

    model = UniMuRModel.from_pretrained(checkpoint).to(device)
    return caption_to_image_recall(model, data.pairs, data_args.evaluate_pairs)


def main(argv: list[str] | None = None) -> dict:
    """
    Trains, saves the checkpoint and measures it.

    Returns:
        The summary that is also written to `output_dir/train_results.json`.
    """
    model_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    data = load_data(model_args, data_args, args)
    if data.streamed and args.max_steps < 0:
        args.max_steps = _steps(streamed_length(data_args.train_data), args)
    model = make_model(model_args, args)
    if data_args.cache_features:
        cache(data, model, data_args, args)
    if data.streamed:
        data.rows = data.pairs.shuffle(seed=args.seed, buffer_size=SHUFFLED)
    collator = PairCollator(model.processor, caption=data_args.caption, seed=args.seed)
    resume = args.resume_from_checkpoint
    resume = get_last_checkpoint(args.output_dir) if resume == "last" else resume
    closed = None
    if resume is not None and model_args.alignment == "canonical":
        former = UniMuRConfig.from_pretrained(resume)
        model.set_shared_space(former.shared_width, former.matching_feature)
    elif model_args.init != "random":
        closed = solve(data, model, collator, model_args, args)
    trainer = make_trainer(data, model, collator, args, data_args.dialogue_share)
    # transformers takes no steps for no limit; here they are what they say.
    loss = trainer.train(resume_from_checkpoint=resume).training_loss if args.max_steps else None
    checkpoint = str(Path(args.output_dir) / "checkpoint")
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
            checkpoint, with_towers=data_args.save_towers, golden=True
        )
    trainer.accelerator.wait_for_everyone()
    summary = {
        "checkpoint": checkpoint, "steps": trainer.state.global_step, "loss": loss,
        "processes": trainer.accelerator.num_processes, "pairs_seen": trainer.skips.seen,
        "skipped": dict(trainer.skips.counts), "log": trainer.state.log_history,
    }  # fmt: skip
    if closed is not None:
        summary["closed_form"] = closed.setting | {"held_out_recall": closed.score}
    if trainer.is_world_process_zero():
        print(trainer.skips)
        results = Path(args.output_dir) / "train_results.json"
        results.write_text(json.dumps(summary, indent=2) + "\n")
        if data_args.evaluate_pairs:
            summary["caption_to_image"] = measure(checkpoint, data, data_args, args.device)
            results.write_text(json.dumps(summary, indent=2) + "\n")
        for name, value in summary.get("caption_to_image", {}).items():
            print(f"caption to image, {name}: {value:.1f} %" if isinstance(value, float) else f"{name}: {value}")
        print(f"checkpoint: {checkpoint}")
    return summary


def spare_cores(device: torch.device, processes: int) -> int:
    """Workers that decode for one of `processes`: on an accelerator the cores are theirs, on a CPU the towers need them."""
    return 0 if device.type == "cpu" else max(1, (os.cpu_count() or 1) // processes - 1)


def _steps(pairs: int | None, args: UniMuRTrainingArguments) -> int:
    if pairs is None:
        raise ValueError("these shards have no _stats.json that counts their pairs: give --max_steps")
    return max(
        1,
        int(
            pairs
            * args.num_train_epochs
            // (args.train_batch_size * args.world_size * args.gradient_accumulation_steps)
        ),
    )


if __name__ == "__main__":
    main()
    # The backend's threads must end before the interpreter does, or a process may abort after its work is done.
    PartialState().destroy_process_group()
