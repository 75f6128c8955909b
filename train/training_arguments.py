"""The arguments of training: transformers' own with the paper's defaults, and ours."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from train.numerics import SKIP, STOP

NOT_NEGATIVE = (
    "learning_rate", "matching_learning_rate", "warmup_steps", "weight_decay", "num_train_epochs", "negatives_bank",
    "state_noise", "max_bad_share",
)  # fmt: skip
AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps")


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
    non_finite: str = field(
        default=STOP,
        metadata={"help": "Where a loss or a gradient is NaN or infinite: stop the run, or skip that step.",
                  "choices": [STOP, SKIP]},
    )  # fmt: skip
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "With --load_best_model_at_end: stop after so many validations in a row without a better "
                          "--metric_for_best_model; never by default."},
    )  # fmt: skip
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much a validation must be better to count for that."}
    )

    _argument_group_name = "the training: these, and transformers' own"

    def __post_init__(self):
        for name in NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if "tensorboard" in (self.report_to or "") and not is_tensorboard_available():
            raise ImportError("--report_to tensorboard needs it: pip install 'modeling-unimur[tensorboard]'")
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                "--early_stopping_patience compares with the best model so far: give --load_best_model_at_end true too"
            )
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # Of streamed data one process would otherwise collate for all, and cut batches whose parts have different lengths.
            self.accelerator_config.dispatch_batches = False
        if self.schedule != "joint" and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # a step leaves out one of the maps
