"""
The Trainer: eq. 7 jointly or in alternating steps, each loss logged beside the sum, bad pairs counted, checkpoints that
appear whole and a resumed run that is the interrupted one.
"""

import shutil
import sys
import time
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from modeling_unimur.towers_unimur import load_lora_weights
from train.bank import NegativesBank
from train.checkpoints import ASIDE, STATE, newest_whole, put_in_place, rotate_checkpoints, what_is_broken
from train.collate import SkipCounter, no_captions
from train.drawing import DrawingTargets
from train.numerics import IN_A_ROW, STOP, NonFiniteError, culprits, describe, is_finite
from train.progress import Progress
from train.sampler import GroupedSampler, set_epoch
from train.training_arguments import UniMuRTrainingArguments
from train.validation import Validation

logger = logging.get_logger(__name__)

BANK = "negatives_bank.safetensors"
# The parts of a batch that a schedule leaves out.
LEFT_OUT = {
    "captioning": ("contexts", "targets"), "matching": ("captions",), "drawing": ("captions", "targets", "images"),
}  # fmt: skip


class UniMuRTrainer(Trainer):
    """
    transformers' Trainer over batches of [`train.collate.PairCollator`].

    Args:
        groups: each row's kind, where batches are to be of one kind (see [`train.sampler.GroupedSampler`]).
        validation: what `--eval_steps` measures.
        order: of streamed data, what their order depends on beside the loader's settings, such as shards and seed, by name;
            a run is only resumed in the same order.

    Attributes:
        skips (`SkipCounter`): the pairs left out so far, also before a resumption; checked against `max_bad_share` at
            every log and at the end.
        drawing_targets ([`train.drawing.DrawingTargets`]): what gives the mapper's targets, where the model learns to draw.
        skipped_steps (`int`): steps left out since a loss or a gradient was not finite.
    """

    args: UniMuRTrainingArguments
    model: Any  # a UniMuRModel, wrapped where it is sharded
    matching_tensors: tuple[str, ...] = ("W_t2m", "W_v2m", "logit_scale", "logit_bias")  # of matching_learning_rate

    def __init__(
        self, *, groups: list[int] | None = None, validation: Validation | None = None,
        order: Mapping[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(eval_dataset=validation, **kwargs)
        self.groups, self.validation = groups, validation
        self.skips = SkipCounter()
        self.drawing_targets: DrawingTargets | None = None
        if self.args.negatives_bank and self.model.config.train_image_map:
            raise ValueError(
                "--negatives_bank keeps past embeddings of images, which --train_image_map changes: give one"
            )
        self.bank = NegativesBank(self.args.negatives_bank) if self.args.negatives_bank else None
        self.progress = Progress(order=self._full_order(order))
        self.skipped_steps = self._skipped_in_a_row = 0
        self._aside: Path | None = None
        self._to_bank: torch.Tensor | None = None
        self._parts: dict[str, tuple[Any, int]] = {}
        self._images, self._since = 0, time.perf_counter()
        # A collator, or the object whose method it is, draws captions by the epoch.
        self.add_callback(_Passes(self, getattr(self.data_collator, "__self__", self.data_collator)))
        if self.args.early_stopping_patience is not None:
            self.add_callback(
                EarlyStoppingCallback(self.args.early_stopping_patience, self.args.early_stopping_threshold)
            )
        if self.args.state_noise:
            self.model.W_t2m.register_forward_pre_hook(self._add_noise)
            if self.model.config.n_drawing_tokens:
                self.model.drawing.fc.register_forward_pre_hook(self._add_noise)

    @property
    def streamed(self) -> bool:
        """Whether the training data have no length."""
        return not hasattr(self.train_dataset, "__len__")

    def _full_order(self, order: Mapping[str, Any] | None) -> dict[str, Any]:
        if not self.streamed:
            return {}
        args = self.args
        return dict(order or {}) | {
            "batch size": args.per_device_train_batch_size, "processes": args.world_size,
            "gradient accumulation": args.gradient_accumulation_steps, "workers": args.dataloader_num_workers,
        }  # fmt: skip

    def _add_noise(self, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        (states,) = inputs
        if not module.training or len(states) < 2:
            return None
        deviation = (states - states.mean(0)).square().mean().sqrt().detach()
        return states + self.args.state_noise * deviation * torch.randn_like(states)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        for rate, names in (
            (self.args.matching_learning_rate, self.matching_tensors), (self.args.drawing_learning_rate, ("drawing",)),
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
        words = inputs.pop("words", None)
        part, inputs = self._scheduled(inputs)
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

    def _scheduled(self, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """
        Which part of eq. 7 this step trains, and the batch without the others. A batch without captions in any process, such
        as one of replies that are pictures, is for the matching losses on every step.
        """
        captioned, part = self._anywhere("captions" in inputs), self.args.schedule
        if part == "alternating":
            part = "captioning" if captioned and self.state.global_step % 2 == 0 else "matching"
        left_out = LEFT_OUT.get(part, ())
        if captioned and "captions" not in inputs:  # eq. 1-2 is a mean over all processes, which wait for each other
            inputs = inputs | {"captions": no_captions(self.args.device)}
        return part, {name: value for name, value in inputs.items() if name not in left_out}

    def _anywhere(self, here: bool) -> bool:
        """Whether something holds in any process; every process takes part where their batches may differ in it."""
        if self.groups is None or self.accelerator.num_processes == 1:
            return here
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.args.device), "sum"))

    def floating_point_ops(self, inputs):
        """6 for each parameter and token of the contexts, as transformers counts them; none where they are cached."""
        tokens = inputs.get("contexts", {}).get("input_ids")
        return 0 if tokens is None else 6 * tokens.numel() * self.model.num_parameters(exclude_embeddings=True)

    def fill_bank(self) -> None:
        """Adds the last step's images to the bank of negatives; every process takes part."""
        if self.bank is not None and self._to_bank is not None:
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

    def training_step(self, model, inputs, num_items_in_batch=None):
        names = inputs.pop("names", [])
        inputs.pop("replies", None)
        before = dict(self._parts)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.scaler is not None:  # of float16: it leaves such steps out by itself
            return loss
        bad = (~is_finite(loss, self.model)).float()
        if self.accelerator.num_processes > 1:  # a step that one process leaves out, all leave out
            bad = self.accelerator.reduce(bad, "max")
        if not bad:
            self._skipped_in_a_row = 0
            return loss
        new = {name: total - before.get(name, (0.0, 0))[0] for name, (total, _) in self._parts.items()}
        self._leave_out(describe(self.state.global_step + 1, culprits(new, self.model), names))
        self._parts = before
        return torch.zeros_like(loss)

    def _leave_out(self, what: str) -> None:
        """Takes back the step's gradients, or stops, as `non_finite` says."""
        if self.args.non_finite == STOP:
            raise NonFiniteError(
                f"{what}. Look at this batch and at the towers' dtype, lower --learning_rate, or leave such steps out with "
                "--non_finite skip"
            )
        self.skipped_steps, self._skipped_in_a_row = self.skipped_steps + 1, self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= IN_A_ROW:
            raise NonFiniteError(
                f"{what}, as on the {IN_A_ROW - 1} batches before: it comes of the weights, not of a batch"
            )
        logger.warning(f"{what}: this step is left out")
        self.model.zero_grad(set_to_none=True)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """
        Measures `validation`, logs it and returns it, each name after `eval_`; see [`train.validation.Validation`].

        Raises:
            ValueError: there is no validation, or another data set is given.
        """
        validation = eval_dataset if isinstance(eval_dataset, Validation) else self.validation
        if validation is None or (eval_dataset is not None and eval_dataset is not validation):
            raise ValueError("evaluate measures the trainer's validation: make it with validation=Validation(...)")
        measured = validation.measure(self.accelerator.unwrap_model(self.model), self._prepare_inputs)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        super().log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial=None):
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model, trial):
        """Writes a checkpoint aside, with the bank and the progress, and then gives it its name; every process takes part."""
        folder = Path(self._get_output_dir(trial))
        target = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        filled = folder / ASIDE / target.name
        writes = self.args.should_save
        if writes:
            shutil.rmtree(filled, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = filled.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        if self.state.best_model_checkpoint == str(filled):
            self.state.best_model_checkpoint = str(target)
        if self.bank is not None:
            self.fill_bank()
        total = self.total_skips()
        self.accelerator.wait_for_everyone()
        if writes:
            self.state.save_to_json(str(filled / STATE))
            self.progress.save(filled, total)
            if self.bank is not None:
                save_file(self.bank.state_dict(), filled / BANK)
            put_in_place(filled, target)
        self._rotate()
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _rotate(self) -> None:
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(self.args.output_dir, limit, self.state.global_step, best)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._aside is None:  # what is pushed in the background must not move
            super()._push_from_checkpoint(checkpoint_folder)

    def total_skips(self) -> SkipCounter:
        """The counts of all processes, in each; every process takes part."""
        total = SkipCounter()
        for part in gather_object([(self.skips.counts, self.skips.seen, self.skips.examples)]):
            total.update(*part)
        return total

    def _init_training_state(self, *args, **kwargs):
        epochs, batches = super()._init_training_state(*args, **kwargs)
        if self.state.global_step >= self.state.max_steps:
            # Killed after its last step: transformers would take one more before it looks at the limit.
            return sys.maxsize, 0
        if self.streamed and self.progress.resumed:
            steps = self.state.global_step - self.progress.first_step
            return self.progress.passes - 1, steps * self.args.gradient_accumulation_steps
        return epochs, batches

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

    def _issue_warnings_after_load(self, load_result):
        # The towers are not in an adapter's checkpoint; what is trained must be.
        lost = [name for name in load_result.missing_keys if name.split(".")[0] in self.model.own_tensors]
        if lost or load_result.unexpected_keys:
            raise ValueError(f"the checkpoint has other tensors: without {lost}, with {load_result.unexpected_keys}")

    def _load_best_model(self):
        super()._load_best_model()
        if self.model.config.text_adapter:
            load_lora_weights(self.model.language_model, self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """
        transformers' `train`.

        Raises:
            ValueError: the checkpoint is not whole or of another run's streamed data, or no step was taken.
            NonFiniteError: see `non_finite`.
            TooManyBadPairsError: more than `max_bad_share` of the pairs are broken.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        if resume_from_checkpoint:
            self._resume(Path(resume_from_checkpoint))
            kwargs["resume_from_checkpoint"] = str(resume_from_checkpoint)
        self._check_one_batch()
        self._since = time.perf_counter()
        result = super().train(**kwargs)
        if resume_from_checkpoint:
            self._rotate()  # a run that was killed after its last save had not come to it
        self.skips = self.total_skips()
        if not self.state.global_step:
            raise ValueError(
                f"training took no step: {self.skips.seen} pairs were seen, and a step takes "
                f"{self._step_rows()}. Look at the data, or lower --per_device_train_batch_size"
            )
        self.skips.check(self.args.max_bad_share)
        if self.skips.seen and self.accelerator.is_main_process:
            logger.info(str(self.skips))
        return result

    def _resume(self, checkpoint: Path) -> None:
        if problem := what_is_broken(checkpoint):
            raise ValueError(
                f"{checkpoint} cannot be resumed from: {problem}. Give another, or 'last' for the newest whole"
            )
        skips = self.skips if self.accelerator.is_main_process else SkipCounter()
        if not self.progress.resume(checkpoint, skips):
            logger.warning(f"{checkpoint} holds no counts of the pairs left out before it: they start from here")

    def _step_rows(self) -> str:
        args = self.args
        rows = args.train_batch_size * args.world_size
        steps = args.gradient_accumulation_steps
        return f"a batch of {rows}" + (f" times {steps}" if steps > 1 else "")

    def _check_one_batch(self) -> None:
        """Refuses data with a length that do not fill one batch, where what is less is dropped."""
        batch = self.args.train_batch_size * self.args.world_size
        rows = self.train_dataset
        if not isinstance(rows, Sized) or not self.args.dataloader_drop_last or len(rows) >= batch:
            return
        raise ValueError(
            f"{len(rows)} pairs fill no batch of {batch}, and --dataloader_drop_last leaves out what is less: "
            "lower --per_device_train_batch_size, or give --dataloader_drop_last false"
        )


class _Passes(TrainerCallback):
    """Counts passes over the data, and tells the sampler and the collator, which draws a caption per image by them."""

    def __init__(self, trainer: UniMuRTrainer, collator: Any):
        self.trainer, self.collator = trainer, collator

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        number = self.trainer.progress.begin_pass(state.global_step)
        epoch = number if self.trainer.streamed else int(state.epoch or 0)
        if hasattr(self.collator, "epoch"):
            self.collator.epoch = epoch
        set_epoch(train_dataloader, epoch)
