"""The Trainer: eq. 7 jointly or in alternating steps, each loss logged beside the sum, bad pairs counted."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from modeling_unimur.towers_unimur import load_lora_weights
from train.bank import NegativesBank
from train.collate import SkipCounter
from train.drawing import DrawingTargets
from train.sampler import GroupedSampler

logger = logging.get_logger(__name__)

BANK = "negatives_bank.safetensors"
# The parts of a batch that a schedule leaves out.
LEFT_OUT = {
    "captioning": ("contexts", "targets"), "matching": ("captions",), "drawing": ("captions", "targets", "images"),
}  # fmt: skip
MATCHING_TENSORS = ("W_t2m", "W_v2m", "logit_scale", "logit_bias")


@dataclass
class UniMuRTrainingArguments(TrainingArguments):
    """transformers' arguments with the paper's defaults (Section 4.1): Adam at 2e-4, 100 warm-up steps, 5 epochs."""

    output_dir: str = field(default="runs/unimur", metadata={"help": "Where checkpoints and results go."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of Adam."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Zero makes AdamW the paper's Adam."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the rows' own columns."})
    # HfArgumentParser reads the type's parts in this order.
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers to report to."})  # noqa: RUF036
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    schedule: str = field(
        default="joint",
        metadata={"help": "joint: eq. 7 as one sum. alternating: L_cap and the matching losses in turn, step by step. "
                          "captioning, matching: only the one part. drawing: the mapper's loss alone, over captions.",
                  "choices": ["joint", "alternating", "captioning", "matching", "drawing"]},
    )  # fmt: skip
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses from the log, at the price of waiting for every step."}
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Several sequences share a row of the LLM's input instead of padding. Flash attention leaves "
                          "padding out by itself and does not take this."},
    )  # fmt: skip
    negatives_bank: int = field(
        default=0,
        metadata={
            "help": "Beyond the paper: past images that eq. 4 also contrasts each caption with; 0: in-batch alone."
        },
    )
    matching_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of what eq. 3-6 alone train (W_t2m, the temperature, W_v2m where it is "
                          "trained), which a closed form has put near its place; learning_rate by default."},
    )  # fmt: skip
    drawing_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the [IMG] tokens and the mapper; learning_rate by default."},
    )
    state_noise: float = field(
        default=0.0,
        metadata={"help": "Beyond the paper: Gaussian noise on the states that W_t2m and the mapper read in training, in units "
                          "of their mean deviation within the batch. It keeps the map from fitting captions alone."},
    )  # fmt: skip
    max_bad_share: float = field(
        default=0.05, metadata={"help": "Stop when more than this share of the pairs seen is broken."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # Of streamed data one process would otherwise collate for all, and cut batches whose parts have unlike lengths.
            self.accelerator_config.dispatch_batches = False
        if self.schedule != "joint" and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # a step leaves out one of the maps


class UniMuRTrainer(Trainer):
    """
    transformers' Trainer over batches of [`train.collate.PairCollator`].

    `groups` gives each row's kind, where batches are to be of one kind (see [`train.sampler.GroupedSampler`]).
    `drawing_targets` (a [`train.drawing.DrawingTargets`]) gives the mapper's targets, where the model learns to draw.
    `skips` counts the pairs left out so far; it is checked against `max_bad_share` at every log and at the end.
    """

    def __init__(self, *args, groups: list[int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.groups = groups
        self.skips = SkipCounter()
        self.drawing_targets: DrawingTargets | None = None
        if self.args.negatives_bank and self.model.config.train_image_map:
            raise ValueError(
                "--negatives_bank keeps past embeddings of images, which --train_image_map changes: give one"
            )
        self.bank = NegativesBank(self.args.negatives_bank) if self.args.negatives_bank else None
        self._to_bank: torch.Tensor | None = None
        self._parts: dict[str, torch.Tensor] = {}
        self._images, self._since = 0, time.perf_counter()
        # A collator, or the object whose method it is, draws captions by the epoch.
        collator = getattr(self.data_collator, "__self__", self.data_collator)
        if hasattr(collator, "epoch"):
            self.add_callback(_EpochToCollator(collator))
        if self.bank is not None:
            self.add_callback(_BankToCheckpoint(self))
        if self.args.state_noise:
            self.model.W_t2m.register_forward_pre_hook(self._add_noise)
            if self.model.config.n_drawing_tokens:
                self.model.drawing.fc.register_forward_pre_hook(self._add_noise)

    def _add_noise(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        (states,) = inputs
        if not module.training or len(states) < 2:
            return None
        deviation = (states - states.mean(0)).square().mean().sqrt().detach()
        return states + self.args.state_noise * deviation * torch.randn_like(states)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        for rate, names in (
            (self.args.matching_learning_rate, MATCHING_TENSORS), (self.args.drawing_learning_rate, ("drawing",)),
        ):  # fmt: skip
            if rate is None:
                continue
            own = {id(p) for n, p in self.model.named_parameters() if n.split(".")[0] in names}
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
                if chosen:
                    optimizer.add_param_group(group | {"params": chosen, "lr": rate})
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        if self.groups is None:
            return super()._get_train_sampler(train_dataset)
        sampler = GroupedSampler(self.groups, self.args.train_batch_size * self.args.world_size, self.args.seed)
        if sampler.left_out:
            logger.warning(f"{sampler.left_out} rows an epoch fill no batch of their kind and wait for the next epoch")
        return sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        skipped, seen = inputs.pop("skipped"), inputs.pop("n_seen")
        self.skips.update(skipped, seen)
        self._images += seen - sum(skipped.values())
        part = self.args.schedule
        if part == "alternating":
            part = "captioning" if self.state.global_step % 2 == 0 else "matching"
        words = inputs.pop("words", None)
        inputs = {name: value for name, value in inputs.items() if name not in LEFT_OUT.get(part, ())}
        if words is not None and self.drawing_targets is not None and part != "captioning":
            inputs["drawing_targets"] = self.drawing_targets(words, self.args.device)
        banked = self.bank is not None and "targets" in inputs
        if banked:
            self.fill_bank()  # only now: the last step's backward pass still read the bank
            inputs["negatives"] = self.bank.embeds
        outputs = model(**inputs)
        if banked:
            self._to_bank = outputs.image_embeds[inputs["targets"]["image_indices"]]
        for name, loss in outputs.items():
            if name.startswith("loss_"):
                # Kept on the device: reading it here would make the host wait for every step.
                total, count = self._parts.get(name, (0.0, 0))
                self._parts[name] = (total + loss.detach(), count + 1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def floating_point_ops(self, inputs):
        """6 for each parameter and token of the contexts, as transformers counts them; none where they are cached."""
        tokens = inputs.get("contexts", {}).get("input_ids")
        return 0 if tokens is None else 6 * tokens.numel() * self.model.num_parameters(exclude_embeddings=True)

    def fill_bank(self) -> None:
        """Adds the last step's images to the bank of negatives; every process takes part."""
        if self._to_bank is not None:
            self.bank.add(self._to_bank)
            self._to_bank = None

    def log(self, logs, start_time=None):
        if self._parts:
            for name, (total, count) in self._parts.items():
                logs[name] = self.accelerator.reduce(total / count, "mean").item()
            elapsed = time.perf_counter() - self._since
            logs["images_per_second"] = round(self._images * self.accelerator.num_processes / elapsed, 1)
            self._parts, self._images, self._since = {}, 0, time.perf_counter()
            self.skips.check(self.args.max_bad_share)
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        if self.model.config.text_adapter:
            load_lora_weights(self.model.language_model, resume_from_checkpoint)
        if self.bank is not None:
            file = Path(resume_from_checkpoint) / BANK
            if file.is_file():
                self.bank.load_state_dict(load_file(file, device=str(self.args.device)))
            else:
                logger.warning(f"{resume_from_checkpoint} holds no {BANK}: the bank of negatives starts empty")

    def train(self, *args, **kwargs):
        self._since = time.perf_counter()
        result = super().train(*args, **kwargs)
        for other in gather_object([(self.skips.counts, self.skips.seen)])[1:]:
            if self.accelerator.is_main_process:
                self.skips.update(*other)
        self.skips.check(self.args.max_bad_share)
        if self.skips.seen and self.accelerator.is_main_process:
            logger.info(str(self.skips))
        return result


class _EpochToCollator(TrainerCallback):
    """Tells the collator the epoch, from which it draws a caption per image."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


class _BankToCheckpoint(TrainerCallback):
    """Keeps the bank of negatives with each checkpoint, so that a resumed run is the run that was interrupted."""

    def __init__(self, trainer: UniMuRTrainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.fill_bank()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file(self.trainer.bank.state_dict(), folder / BANK)
