"""
Trains UniMuR's two linear maps.

    python train/run.py                                       the miniature (train/configs/miniature.yaml)
    python train/run.py my.yaml                               a configuration
    python train/run.py --config my.yaml --config train/configs/paper.yaml   the paper's form of it
    python train/run.py --config my.yaml --learning_rate 1e-3 a configuration, with changes
    accelerate launch train/run.py --config train/configs/opt-6.7b.yaml --train_data DIR
"""

import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `train` is a folder of the repository, not a package

if __name__ == "__main__":
    from train.command import require

    require("train", "accelerate", "matplotlib", "scipy", "yaml")

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuRProcessor
from modeling_unimur.configuration_unimur import DRAWING_FIELDS
from train.arguments import DataArguments, ModelArguments, parse
from train.cache import write_json
from train.checkpoints import newest_whole, restore, whole_folder
from train.closed_form import ClosedForm, start
from train.collate import PairCollator, SkipCounter, TooManyBadPairsError
from train.command import run_command
from train.curves import draw_curves
from train.data import streamed_length
from train.dequantise import dequantise
from train.documents import mixed
from train.drawing import DrawingTargets
from train.recall import caption_to_image_recall
from train.stream import MixedStream
from train.tars import find_tars
from train.trainer import UniMuRTrainer
from train.training_arguments import UniMuRTrainingArguments
from train.training_data import TrainingData, cache, load_data
from train.validation import Validation

logger = logging.get_logger("train")
UNASKED = (
    "[RET] is an untrained row that starts from the mean of all, and no words stand before it: a language model that was not "
    "taught [RET] is hardly asked for the gist. Try --ret_prompt $'\\nKeywords:' --ret_init ' the'"
)
SHUFFLED = 2_000  # undecoded pairs of streamed shards that are mixed, besides the shards' order: some 100 MB of photos


def towers(model_args: ModelArguments) -> tuple[str, str]:
    """The LLM and CLIP that are named. Raises `ValueError` where one is not."""
    text_model, clip_model = model_args.text_model, model_args.clip_model
    if text_model is None or clip_model is None:
        name = "text_model" if text_model is None else "clip_model"
        raise ValueError(f"--{name} is missing: a folder or a Hub name such as facebook/opt-6.7b")
    return text_model, clip_model


def make_processor(model_args: ModelArguments) -> UniMuRProcessor:
    """The processor of two towers: CLIP's preprocessing and both tokenizers."""
    return UniMuRProcessor.from_pretrained_towers(
        *towers(model_args),
        text_revision=model_args.text_model_revision,
        clip_revision=model_args.clip_model_revision,
        n_visual_tokens=model_args.n_visual_tokens,
        ret_prompt=model_args.ret_prompt,
    )


def add_lora(model: UniMuRModel, rank: int, targets: list[str]) -> None:
    """A trainable LoRA on the LLM, scaled by one. Raises `ImportError` without peft."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("--lora_rank needs peft: pip install 'modeling-unimur[lora]'") from error
    model.add_lora(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM"))


def make_model(model_args: ModelArguments, args: UniMuRTrainingArguments) -> UniMuRModel:
    """
    The untrained model over the two towers that are named (a GGUF is dequantised first), or the saved one to go on from.
    """
    if model_args.model is not None:
        return UniMuRModel.from_pretrained(model_args.model)
    text_model, _ = towers(model_args)
    if text_model.lower().endswith(".gguf"):
        folder = Path(model_args.text_model_dir or Path(args.output_dir) / "text_model")
        with args.main_process_first(desc="the GGUF"):
            model_args.text_model = str(dequantise(text_model, folder))
    model = UniMuRModel.from_pretrained_towers(
        *towers(model_args), make_processor(model_args),
        ret_init=model_args.ret_init, dtype=model_args.dtype, **model_args.config_fields(),
    )  # fmt: skip
    if model_args.ret_init is None and not model_args.ret_prompt and not model_args.train_ret_embedding:
        logger.warning(UNASKED)
    if model_args.lora_rank:
        add_lora(model, model_args.lora_rank, model_args.lora_targets)
    return model


def learn_to_draw(model: UniMuRModel, model_args: ModelArguments, args: UniMuRTrainingArguments) -> DrawingTargets:
    """The targets of the mapper, which a model that cannot draw yet is given. Raises what [`DrawingTargets`] does."""
    targets = DrawingTargets(model_args.drawing_model_name_or_path, model_args.drawing_model_revision)
    if not model.config.n_drawing_tokens:
        names = DRAWING_FIELDS & {f.name for f in fields(model_args)}
        model.add_drawing(
            drawing_length=targets.length, drawing_width=targets.width, **{n: getattr(model_args, n) for n in names}
        )
    if args.schedule != "drawing":
        args.ddp_find_unused_parameters = True  # a batch of documents leaves the mapper out
    return targets


def solve(
    data: TrainingData, model: UniMuRModel, collator: PairCollator, model_args: ModelArguments,
    args: UniMuRTrainingArguments,
) -> ClosedForm:  # fmt: skip
    """Puts the maps at their closed form."""
    counts = SkipCounter()
    closed = start(
        model.to(args.device), data.rows, collator, counts, batch_size=args.train_batch_size,
        workers=args.dataloader_num_workers, grid=model_args.grid(), visual_start=model_args.visual_start,
        documents=data.documents if model_args.alignment == "canonical" else None,
    )  # fmt: skip
    total = SkipCounter()
    for part in gather_object([(counts.counts, counts.seen, counts.examples)]):
        total.update(*part)
    total.check(args.max_bad_share)
    if not args.max_steps and not data.skips.seen:  # else training counts the same pairs, or their caching did
        data.skips.update(total.counts, total.seen, total.examples)
    return closed


def make_collator(data: TrainingData, model: UniMuRModel, data_args: DataArguments, seed: int) -> PairCollator:
    """
    The collator, which has seen a usable pair: a batch whose pairs are all broken needs one, also if it is the first.

    Raises:
        ValueError: no pair is usable.
    """
    collator = PairCollator(model.processor, caption=data_args.caption, seed=seed)
    collator.pair_contexts = data_args.pair_contexts
    problem: Exception | None = None
    for row in data.rows:
        try:
            collator([row])
        except TooManyBadPairsError as error:
            problem = problem or error
        else:
            collator.named = True  # so that a step that goes wrong names its pairs
            return collator
    raise ValueError(
        f"{data_args.source or data_args.dialogues} holds no usable pair"
        + (f": {problem}" if problem else "; it is empty")
    )


def replies_to_predict(model: UniMuRModel, data_args: DataArguments, args: UniMuRTrainingArguments) -> str:
    """
    Which replies are targets of eq. 1-2, as [`PairCollator`] names them: none where L_cap is not trained, and after words alone
    only where a LoRA is, since nothing else learns from them.
    """
    if data_args.dialogues is None or not data_args.dialogue_captioning or args.schedule in ("matching", "drawing"):
        return "none"
    return "all" if model.config.text_adapter else "after images"


def make_validation(
    data: TrainingData, model: UniMuRModel, collator: PairCollator, data_args: DataArguments,
    args: UniMuRTrainingArguments,
) -> Validation | None:  # fmt: skip
    """
    What training is judged by; `None` where nothing is held out. Held-out data without `--eval_strategy` are measured every
    `--logging_steps`.

    Raises:
        ValueError: validation is wanted and nothing is held out, or the model is sharded.
    """
    if data.held_pairs is None and data.held_documents is None:
        if args.eval_strategy != "no":
            raise ValueError(
                f"--eval_strategy {IntervalStrategy(args.eval_strategy).value}: there is nothing to validate on. Give "
                "--eval_data, or hold out a share of the training data with --eval_share 0.02"
            )
        return None
    if args.fsdp:
        raise ValueError(
            "validation while training needs a model that is not sharded: leave --eval_data and --fsdp apart"
        )
    return Validation(
        model.to(args.device), collator, data.held_pairs, data.held_documents, pool=data_args.eval_pool,
        batch_size=args.train_batch_size * args.world_size, workers=args.dataloader_num_workers, about=data.held_about,
    )  # fmt: skip


def make_trainer(
    data: TrainingData, model: UniMuRModel, collator: PairCollator, args: UniMuRTrainingArguments,
    validation: Validation | None = None, source: str | list[str] | None = None, share: float | None = None,
) -> UniMuRTrainer:  # fmt: skip
    """The trainer over pairs and documents; `source` is that of streamed pairs, `share` the documents'."""
    rows, groups, order = data.rows, None, None
    if data.streamed:
        names = [path.name for path in find_tars(source or "")]
        order = {"shards": names, "seed": args.seed, "shuffled pairs": SHUFFLED}
    if data.documents is not None:
        args.ddp_find_unused_parameters = True  # a batch of documents without images leaves W_i2t out
        if order is not None and share is not None:
            rows = MixedStream(rows, data.documents, share, args.train_batch_size * args.world_size, args.seed)
            order |= {"dialogues": len(data.documents), "dialogue share": share}
        else:
            rows, groups = mixed(rows, data.documents, share)
    collator.pack = args.packing and "flash" not in (model.language_model.config._attn_implementation or "")
    trainer = UniMuRTrainer(
        model=model, args=args, train_dataset=rows, groups=groups, data_collator=collator, validation=validation,
        order=order,
    )  # fmt: skip
    trainer.skips = data.skips
    return trainer


def where_to_resume(args: UniMuRTrainingArguments) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` names; `last` is the newest whole one, or none where there is none.
    Raises `ValueError` where another is no folder.
    """
    if args.process_index == 0:
        restore(args.output_dir)
    PartialState().wait_for_everyone()
    named = args.resume_from_checkpoint
    if named != "last":
        if named is not None and not Path(named).is_dir():
            raise ValueError(
                f"--resume_from_checkpoint {named} is no folder: give a checkpoint-<step> of an earlier run, or last"
            )
        return named
    newest = newest_whole(args.output_dir)
    logger.warning(
        f"{args.output_dir} holds no whole checkpoint: training starts from the beginning"
        if newest is None
        else f"training resumes from {newest}"
    )
    return None if newest is None else str(newest)


def train(
    data: TrainingData, model: UniMuRModel, model_args: ModelArguments, data_args: DataArguments,
    args: UniMuRTrainingArguments, targets: DrawingTargets | None = None,
) -> tuple[UniMuRTrainer, dict[str, Any]]:  # fmt: skip
    """
    Trains the model, from a checkpoint where one is named; `targets` are the mapper's, of a model that learns to draw.
    Returns the trainer, and what it reports.
    """
    collator = make_collator(data, model, data_args, args.seed)
    if data.streamed:
        data.rows = data.pairs.shuffle(seed=args.seed, buffer_size=SHUFFLED)
    resume, closed = where_to_resume(args), None
    if resume is not None and model_args.alignment == "canonical":
        former = UniMuRConfig.from_pretrained(resume)
        if former.shared_width is None:
            raise ValueError(f"{resume} is of the paper's alignment: resume it with --alignment paper")
        model.set_shared_space(former.shared_width, former.matching_feature)
    elif model_args.init != "random" and model_args.model is None:
        closed = solve(data, model, collator, model_args, args)
    collator.worded, collator.images = targets is not None, args.schedule != "drawing"
    collator.predicted = replies_to_predict(model, data_args, args)
    validation = None
    if args.schedule == "drawing":
        args.eval_strategy = IntervalStrategy.NO
        logger.warning("--schedule drawing is not validated on the way: retrieval, which is validated, stays as it is")
    else:
        validation = make_validation(data, model, collator, data_args, args)
    trainer = make_trainer(
        data, model, collator, args, validation, data_args.source, data_args.dialogue_share
    )  # fmt: skip
    trainer.drawing_targets = targets
    # transformers takes no steps for no limit; here they are what they say.
    loss = trainer.train(resume_from_checkpoint=resume).training_loss if args.max_steps else None
    summary = {"steps": trainer.state.global_step, "loss": loss, "processes": trainer.accelerator.num_processes}
    if validation is not None:
        summary["validation"] = {"on": validation.about} | trainer.evaluate()
    summary |= {
        "pairs_seen": trainer.skips.seen, "skipped": dict(trainer.skips.counts), "steps_skipped": trainer.skipped_steps,
        "log": trainer.state.log_history,
    }  # fmt: skip
    if closed is not None:
        summary["closed_form"] = closed.setting | {"held_out_recall": closed.score}
    return trainer, summary


def save(trainer: UniMuRTrainer, folder: Path, with_towers: bool) -> None:
    """Writes the checkpoint that users load, whole or not at all."""
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        with whole_folder(folder) as filled:
            model.save_pretrained(filled, with_towers=with_towers, golden=True)
    trainer.accelerator.wait_for_everyone()


def measure(checkpoint: Path, data: TrainingData, limit: int, device: torch.device) -> dict[str, Any]:
    """Caption-to-image recall of the saved checkpoint, which is what users load; with what it was measured on, as text."""
    model = UniMuRModel.from_pretrained(checkpoint).to(device)
    held = data.held_pairs is not None
    pairs: Iterable[dict[str, Any]] = data.held_pairs if held else data.pairs
    return {"on": data.held_about if held else "training pairs"} | caption_to_image_recall(model, pairs, limit)


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
        args.max_steps = _steps(streamed_length(data_args.source or []), data_args, args)
    model = make_model(model_args, args)
    targets = learn_to_draw(model, model_args, args) if model_args.n_drawing_tokens else None
    if data_args.cache_features and args.schedule != "drawing":
        cache(data, model, data_args, args)
    trainer, summary = train(data, model, model_args, data_args, args, targets)
    checkpoint = Path(args.output_dir) / "checkpoint"
    save(trainer, checkpoint, data_args.save_towers)
    summary["checkpoint"] = str(checkpoint)
    if trainer.is_world_process_zero():
        print(trainer.skips)
        write_json(Path(args.output_dir) / "train_results.json", summary)
        if trainer.state.log_history:
            draw_curves(trainer.state.log_history, Path(args.output_dir) / "curves.png", data.held_about)
        if data_args.evaluate_pairs:
            summary["caption_to_image"] = measure(checkpoint, data, data_args.evaluate_pairs, args.device)
            write_json(Path(args.output_dir) / "train_results.json", summary)
        report(summary)
    return summary


def report(summary: dict[str, Any]) -> None:
    """Prints what was measured, with what it was measured on, and where the checkpoint is."""
    for about, key in (("at the end of training", "validation"), ("caption to image", "caption_to_image")):
        measured = dict(summary.get(key, {}))
        if not measured:
            continue
        print(f"{about}, on {measured.pop('on')}:")
        for name, value in measured.items():
            unit = " %" if "R@" in name or "rate" in name else ""
            print(f"  {name.removeprefix('eval_')}: {f'{value:.1f}' if unit else f'{value:.4g}'}{unit}")
    print(f"checkpoint: {summary['checkpoint']}")


def _steps(pairs: int | None, data_args: DataArguments, args: UniMuRTrainingArguments) -> int:
    if pairs is None:
        raise ValueError("these shards have no _stats.json that counts their pairs: give --max_steps")
    rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    kept = (1 - data_args.eval_share) / (1 - (data_args.dialogue_share or 0))
    return max(1, int(pairs * kept * args.num_train_epochs // rows))


if __name__ == "__main__":
    run_command(main)
    # The backend's threads must end before the interpreter does, or a process may abort after its work is done.
    PartialState().destroy_process_group()
