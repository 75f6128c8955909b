"""What `train/run.py` can be given: the towers and the model, the data, and the training; from yaml files and flags."""

import inspect
import json
import re
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import IntervalStrategy

from modeling_unimur import UniMuRConfig
from modeling_unimur.configuration_unimur import CHOICES, DRAWING_FIELDS
from train.closed_form import Grid
from train.command import DTYPES, Parser, unknown
from train.training_arguments import UniMuRTrainingArguments

CONFIGS = Path(__file__).parent / "configs"
CHOSEN = "Of --init cca: the values of {} to choose from, by held-out replies; see train/canonical.py."
# Fields of UniMuRConfig that follow from the towers and the closed form, or that are given otherwise here.
DERIVED = {
    "text_config", "clip_config", "text_model_name_or_path", "text_model_revision", "clip_model_name_or_path",
    "clip_model_revision", "text_model_source", "clip_model_source", "text_adapter", "ret_token_id", "image_token_id",
    "alignment", "shared_width", "matching_feature", "drawing_length", "drawing_width", "draw_below",
}  # fmt: skip
OF_PROCESSOR = {"n_visual_tokens", "ret_prompt"}  # the processor has them, and the model takes them from it


def _config_arguments() -> Any:
    """A dataclass of `UniMuRConfig`'s own fields with its defaults, its choices and its docstring's words as help."""
    # An entry's words are the indented lines below it: one entry may describe several fields, "a, b (`int`): words".
    entries = re.findall(
        r"^    (\w[^\n]*?): (.*(?:\n        .*)*)", inspect.cleandoc(UniMuRConfig.__doc__ or ""), re.M
    )
    given = []
    for f in fields(UniMuRConfig):
        if f.name not in UniMuRConfig.__annotations__ or f.name in DERIVED:
            continue
        words = next((text for names, text in entries if f.name in re.split(r"[ ,(]+", names)), "")
        about: dict[str, Any] = {"help": " ".join(words.split()).replace("%", "%%")}
        if f.name in CHOICES:
            about["choices"] = list(CHOICES[f.name])
        default = {"default_factory": f.default_factory} if f.default is MISSING else {"default": f.default}
        given.append((f.name, f.type, field(**default, metadata=about)))
    return make_dataclass("ConfigArguments", given)


ConfigArguments: Any = _config_arguments()


@dataclass
class ModelArguments(ConfigArguments):
    """The towers and where training starts, beside what the paper leaves open: the fields of `UniMuRConfig`."""

    _argument_group_name = "the model"

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
    dtype: str = field(default="auto", metadata={"help": "dtype of the towers.", "choices": list(DTYPES)})
    ret_init: str | None = field(
        default=None, metadata={"help": "Token that [RET] starts from; the mean row by default."}
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
    visual_start: str = field(
        default="words",
        metadata={"help": "Where a closed form puts W_i2t. words: each of several visual tokens holds a word of the caption "
                          "that the image predicts (train/visual_words.py); mean: all hold the mean of its words, as one "
                          "token does.",
                  "choices": ["words", "mean"]},
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
    lora_rank: int = field(
        default=0,
        metadata={"help": "Beyond the paper: also train a LoRA of this rank on the LLM (needs peft); 0: none."},
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "The LLM's layers that a LoRA wraps."}
    )

    model: str | None = field(
        default=None,
        metadata={"help": "A saved UniMuR to go on from, as it is, in the place of a new one over two towers."},
    )

    def __post_init__(self):
        if self.n_drawing_tokens and self.drawing_model_name_or_path is None:
            raise ValueError(
                "--n_drawing_tokens needs --drawing_model_name_or_path: the diffusion model that is to draw"
            )
        self.init = self.init or ("cca" if self.alignment == "canonical" else "random")
        if (self.alignment == "canonical") != (self.init == "cca"):
            raise ValueError(
                f"--alignment {self.alignment} with --init {self.init}: the canonical alignment starts from cca, and the "
                "paper's from random or closed-form"
            )

    def config_fields(self) -> dict:
        """The fields of [`UniMuRConfig`] that are given here, but for those of drawing, which are added to a model."""
        names = {f.name for f in fields(ConfigArguments)} - OF_PROCESSOR - DRAWING_FIELDS
        given = {"alignment": self.alignment} | {name: getattr(self, name) for name in names}
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
    """What to train on, and what to hold out."""

    _argument_group_name = "the data"

    train_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "'miniature', or an image folder with metadata, tar shards (one, several, or a pattern), or a CC3M tsv "
                    "(see train/data.py)."
        },
    )  # fmt: skip
    dialogues: str | None = field(
        default=None,
        metadata={
            "help": "Conversations to train on, beside --train_data or alone (beyond the paper): chat messages (jsonl, json, "
            "parquet, a saved dataset or one on the Hub), MMDialog's, VisDial's or VIST's training file, or archives of texts "
            "and pictures in order (see train/dialogue_files.py). Alone, their images with words beside them are the pairs."
        },
    )
    dialogue_share: float | None = field(
        default=None,
        metadata={
            "help": "Their share of an epoch's rows; the kind with too few is repeated. By default as many as there are."
        },
    )
    dialogue_captioning: bool = field(
        default=True,
        metadata={
            "help": "Of --dialogues: a reply's text is also a target of eq. 1-2, after its context, where that shows an image "
            "(with --lora_rank everywhere). The miniature's --interleaved documents are none: so its figures were measured."
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Images of a tsv or of dialogues; those of dialogues are beside them by default."},
    )
    miniature: str = field(
        default="runs/miniature", metadata={"help": "Where the miniature's towers are made and kept."}
    )
    caption: str = field(
        default="random", metadata={"help": "An image's caption in an epoch.", "choices": ["random", "first"]}
    )
    pair_contexts: str = field(
        default="caption",
        metadata={"help": "What [RET] of a pair stands behind. caption: its caption, as in the paper; conversations: of the "
                          "steps a third shows the image before the caption and a third another caption, and in the closed "
                          "form every caption counts alone and once more so (beyond the paper).",
                  "choices": ["caption", "conversations"]},
    )  # fmt: skip
    interleaved: bool = field(
        default=False,
        metadata={"help": "Of the miniature: add its interleaved documents to the pairs (beyond the paper)."},
    )
    cache_features: bool = field(
        default=False,
        metadata={"help": "Run what is frozen once, before training: CLIP on every image and caption and, with [RET] "
                          "frozen and no LoRA, the LLM on every caption. Kept on disk for later runs. The training's "
                          "--dataloader_num_workers decode; by default every idle core."},
    )  # fmt: skip
    cache_captions: bool = field(
        default=True,
        metadata={
            "help": "Of --cache_features the captions' part, which --pair_contexts conversations has no use for; "
            "without it only the images'."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where they are kept: output_dir/features by default, and for the miniature, whose data are "
                          "drawn again in each run, a temporary folder."},
    )  # fmt: skip
    save_towers: bool = field(
        default=False, metadata={"help": "Also save the towers: a full, self-contained checkpoint."}
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={"help": "Pairs to validate on while training, of any layout of --train_data; the miniature takes its "
                          "validation split. Measured every --eval_steps."},
    )  # fmt: skip
    eval_dialogues: str | None = field(
        default=None, metadata={"help": "Conversations to validate on while training, as --dialogues takes them."}
    )
    eval_share: float = field(
        default=0.0,
        metadata={"help": "In their place: the share of the training data that is held out to validate on, by the hash of "
                          "their ids."},
    )  # fmt: skip
    eval_pool: int = field(
        default=1000, metadata={"help": "Held-out pairs, and conversations, that validation takes, from the first."}
    )
    evaluate_pairs: int = field(
        default=1000,
        metadata={"help": "At the end, caption-to-image recall of the checkpoint over so many pairs, held-out ones where "
                          "there are any and else training pairs; 0: none."},
    )  # fmt: skip

    def __post_init__(self):
        if self.evaluate_pairs < 0:
            raise ValueError(f"--evaluate_pairs {self.evaluate_pairs} must not be negative; 0 measures nothing")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"--eval_share {self.eval_share}: expected a share from 0, none, to below 1")
        if self.eval_share and self.eval_data:
            raise ValueError("--eval_share holds out training data in the place of --eval_data: give one of them")
        if self.eval_pool < 2:
            raise ValueError(f"--eval_pool {self.eval_pool}: recall needs a pool of at least 2")

    @property
    def source(self) -> str | list[str] | None:
        """What `--train_data` names: one path, or several where a list is given."""
        return self.train_data[0] if self.train_data and len(self.train_data) == 1 else self.train_data


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's plain words: `no`, `off` and `yes` are words, and only `true` and `false` are truth values."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, UniMuRTrainingArguments]:
    """
    Arguments from yaml files (`--config FILE`, `--config=FILE`, or a first argument that ends in .yaml), flags, or both: a
    later file wins over an earlier one, and flags win over all; `null` means the default. Without any, the
    miniature's yaml.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no mapping of settings, a setting or flag is unknown, or a value is not of its kind.
    """
    argv = list(argv) or ["--config", str(CONFIGS / "miniature.yaml")]
    if argv[0].endswith((".yaml", ".yml")) and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    kinds: Any = (ModelArguments, DataArguments, UniMuRTrainingArguments)  # transformers' annotation fits no dataclass
    parser = Parser(kinds, description=__doc__)
    files, flags = _split_configs(argv)
    given: dict[str, Any] = {}
    known = parser.known()
    for file in files:
        given |= _settings(file, known)
    values: list[str] = []
    for name, value in given.items():
        values += _as_flags(name, value)
    model_args, data_args, args, rest = parser.parse_args_into_dataclasses(
        args=values + flags, return_remaining_strings=True
    )
    if rest:
        raise unknown(rest[0], known)
    if (data_args.eval_data or data_args.eval_share) and args.eval_strategy == "no":
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, args.logging_steps
    return model_args, data_args, args


def _split_configs(argv: list[str]) -> tuple[list[Path], list[str]]:
    """The files that `--config` names, and the other arguments."""
    files, flags = [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != "--config":
            flags.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if not value or value.startswith("--"):
            raise ValueError("--config needs the path of a yaml file")
        files.append(Path(value))
    return files, flags


def _settings(file: Path, known: set[str]) -> dict[str, Any]:
    try:
        settings = yaml.load(file.read_text(encoding="utf-8"), Loader=_Yaml) or {}  # a subclass of SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is no yaml: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {file}: expected settings as 'name: value' lines, got a {type(settings).__name__}")
    for name in settings:
        if name not in known:
            raise unknown(str(name), known, f"the setting {name!r} of {file}")
    return settings


def _as_flags(name: str, value: Any) -> list[str]:
    """A yaml setting as flags; none for a null."""
    if value is None:
        return []
    if isinstance(value, list):
        if any(element is None or isinstance(element, list | dict) for element in value):
            raise ValueError(f"the setting {name!r} is {value!r}: expected a list of plain values")
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
