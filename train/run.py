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
from dataclasses import dataclass, field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `train` is a folder of the repository, not a package

import torch
import yaml
from accelerate import PartialState
from torch.utils.data import ConcatDataset, Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuRProcessor
from train.closed_form import ClosedForm, Grid, start
from train.collate import PairCollator, SkipCounter
from train.data import load_pairs, streamed_length
from train.dequantise import dequantise
from train.documents import InterleavedDocuments
from train.features import cache_caption_states, cache_image_features
from train.trainer import UniMuRTrainer, UniMuRTrainingArguments

logger = logging.get_logger("train")
CONFIGS = Path(__file__).parent / "configs"
CHOSEN = "Of --init cca: the values of {} to choose from, by held-out replies; see train/canonical.py."
SHUFFLED = 2_000  # undecoded pairs of streamed shards that are mixed, besides the shards' order: some 100 MB of photos


@dataclass
class ModelArguments:
    """The towers and what the paper leaves open; see `UniMuRConfig` for the meaning of each field."""

    text_model: str | None = field(
        default=None, metadata={"help": "The frozen LLM: a folder, a Hub name, or a GGUF file on this machine."}
    )
    text_model_dir: str | None = field(
        default=None,
        metadata={"help": "Where a GGUF is kept as bfloat16 safetensors: output_dir/text_model by default."},
    )
    clip_model: str | None = field(default=None, metadata={"help": "The frozen CLIP: a folder or a Hub name."})
    text_model_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    clip_model_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the towers: auto, bfloat16, float16 or float32."})
    ret_init: str | None = field(
        default=None, metadata={"help": "Token that [RET] starts from; the mean row by default."}
    )
    ret_prompt: str = field(
        default=UniMuRConfig.ret_prompt,
        metadata={"help": "Words before every [RET], none by default; an LLM that was never taught [RET] needs them."},
    )
    alignment: str = field(
        default="canonical",
        metadata={"help": "Where [RET] and images meet: canonical, a space of canonical correlation; paper, CLIP's own.",
                  "choices": ["canonical", "paper"]},
    )  # fmt: skip
    init: str | None = field(
        default=None,
        metadata={"help": "Where the maps start. cca: canonical correlation, which the canonical alignment takes; of the "
                          "paper's, random by default, or closed-form, ridge regressions. Those two take one pass over the "
                          "pairs, and with --max_steps 0 they are all of the training.",
                  "choices": ["cca", "random", "closed-form"]},
    )  # fmt: skip
    cca_widths: list[int] = field(default_factory=lambda: list(Grid.widths), metadata={"help": CHOSEN.format("k")})
    cca_ridges: list[float] = field(default_factory=lambda: list(Grid.ridges), metadata={"help": CHOSEN.format("rho")})
    cca_powers: list[float] = field(default_factory=lambda: list(Grid.powers), metadata={"help": CHOSEN.format("w")})
    cca_text_weights: list[float] = field(
        default_factory=lambda: list(Grid.text_weights), metadata={"help": CHOSEN.format("lambda2, of CLIP's texts,")}
    )
    cca_document_shares: list[float] = field(
        default_factory=lambda: list(Grid.document_shares), metadata={"help": CHOSEN.format("the documents' share")}
    )
    train_image_map: bool = UniMuRConfig.train_image_map
    lora_rank: int = field(
        default=0,
        metadata={"help": "Beyond the paper: also train a LoRA of this rank on the LLM (needs peft); 0: none."},
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "The LLM's layers that a LoRA wraps."}
    )
    n_visual_tokens: int = UniMuRConfig.n_visual_tokens
    image_feature: str = UniMuRConfig.image_feature
    text_candidates: str = UniMuRConfig.text_candidates
    text_target: str = UniMuRConfig.text_target
    text_target_reduction: str = UniMuRConfig.text_target_reduction
    text_matching: str = UniMuRConfig.text_matching
    margin: float = UniMuRConfig.margin
    lambda1: float = UniMuRConfig.lambda1
    lambda2: float = UniMuRConfig.lambda2
    temperature: float = UniMuRConfig.temperature
    learn_temperature: bool = UniMuRConfig.learn_temperature
    train_ret_embedding: bool = UniMuRConfig.train_ret_embedding

    def __post_init__(self):
        self.init = self.init or ("cca" if self.alignment == "canonical" else "random")
        if (self.alignment == "canonical") != (self.init == "cca"):
            raise ValueError(
                f"--alignment {self.alignment} with --init {self.init}: the canonical alignment starts from cca, and the "
                "paper's from random or closed-form"
            )

    def config_fields(self) -> dict:
        """The fields of [`UniMuRConfig`] that are given here."""
        own = {f.name for f in fields(self)} & {f.name for f in fields(UniMuRConfig)}
        given = {name: getattr(self, name) for name in own - {"n_visual_tokens", "ret_prompt", "dtype"}}
        if self.alignment == "canonical":  # until the closed form has chosen them
            given |= {"shared_width": 1, "matching_feature": self.image_feature}
        return given

    def grid(self) -> Grid:
        """What the canonical alignment chooses from."""
        features = Grid.features if self.image_feature == "pooled" else ("projected",)
        chosen = {f.name: getattr(self, f"cca_{f.name}") for f in fields(Grid) if f.name != "features"}
        return Grid(features, **chosen)


@dataclass
class DataArguments:
    """What to train on."""

    train_data: str | None = field(
        default=None,
        metadata={
            "help": "'miniature', or an image folder with metadata, tar shards, or a CC3M tsv (see train/data.py)."
        },
    )
    image_folder: str | None = field(default=None, metadata={"help": "Images of a tsv."})
    miniature: str = field(
        default="runs/miniature", metadata={"help": "Where the miniature's towers are made and kept."}
    )
    caption: str = field(
        default="random", metadata={"help": "An image's caption in an epoch.", "choices": ["random", "first"]}
    )
    interleaved: bool = field(
        default=False,
        metadata={"help": "Add interleaved documents to the pairs (beyond the paper; the miniature has them)."},
    )
    cache_features: bool = field(
        default=False,
        metadata={"help": "Run what is frozen once, before training: CLIP on every image and caption and, with [RET] "
                          "frozen and no LoRA, the LLM on every caption. Kept on disk for later runs. The training's "
                          "--dataloader_num_workers decode; by default every core that is spare."},
    )  # fmt: skip
    cache_captions: bool = field(
        default=True, metadata={"help": "Of --cache_features the captions' part; without it only the images'."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where they are kept: output_dir/features by default, and for the miniature, whose data are "
                          "drawn anew in each run, a temporary folder."},
    )  # fmt: skip
    save_towers: bool = field(
        default=False, metadata={"help": "Also save the towers: a full, self-contained checkpoint."}
    )
    evaluate_pairs: int = field(
        default=1000, metadata={"help": "At the end, caption-to-image recall over so many training pairs; 0: none."}
    )


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, UniMuRTrainingArguments]:
    """
    Arguments from yaml files, flags, or both: a later file wins over an earlier one, and flags win over all; `null` stands
    for the default. Without any, the miniature's yaml.
    """
    argv = list(argv) or ["--config", str(CONFIGS / "miniature.yaml")]
    if argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "--config")
    given, values = {}, []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs the path of a yaml file")
        given |= yaml.safe_load(Path(argv[at + 1]).read_text()) or {}
        del argv[at : at + 2]
    for name, value in given.items():
        if isinstance(value, list):
            values += [f"--{name}", *map(str, value)]
        elif value is not None:
            values.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    parser = HfArgumentParser((ModelArguments, DataArguments, UniMuRTrainingArguments))
    return parser.parse_args_into_dataclasses(args=values + argv)


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
    if data_args.train_data is None:
        raise ValueError("--train_data is missing: a folder or file of image-caption pairs, or 'miniature'")
    if data_args.train_data != "miniature":
        if data_args.interleaved:
            raise ValueError("--interleaved needs documents, which only the miniature has so far")
        pairs = load_pairs(data_args.train_data, image_folder=data_args.image_folder)
        return TrainingData(pairs, pairs)
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
        data.documents.use_images(data.rows)


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
    counts.check(args.max_bad_share)
    if not args.max_steps and not data.skips.seen:  # else training counts the same pairs, or their caching did
        data.skips.update(counts.counts, counts.seen, counts.examples)
    return closed


def make_trainer(
    data: TrainingData, model: UniMuRModel, collator: PairCollator, args: UniMuRTrainingArguments
) -> UniMuRTrainer:
    """The trainer over pairs and documents."""
    rows, groups = data.rows, None
    if data.documents is not None:
        groups = [0] * len(rows) + [1 + data.documents.shows_image(i) for i in range(len(data.documents))]
        rows = ConcatDataset([rows, data.documents])
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
    trainer = make_trainer(data, model, collator, args)
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
