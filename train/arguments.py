"""What `train/run.py` can be given: the towers and the model, the data, and the training; from yaml files and flags."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from modeling_unimur import UniMuRConfig
from train.closed_form import Grid
from train.trainer import UniMuRTrainingArguments

CONFIGS = Path(__file__).parent / "configs"
CHOSEN = "Of --init cca: the values of {} to choose from, by held-out replies; see train/canonical.py."


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
            "help": "Their share of an epoch's rows; the kind with too few comes again. What they are by default."
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Images of a tsv or of dialogues; those of dialogues lie beside them by default."},
    )
    miniature: str = field(
        default="runs/miniature", metadata={"help": "Where the miniature's towers are made and kept."}
    )
    caption: str = field(
        default="random", metadata={"help": "An image's caption in an epoch.", "choices": ["random", "first"]}
    )
    interleaved: bool = field(
        default=False,
        metadata={"help": "Of the miniature: add its interleaved documents to the pairs (beyond the paper)."},
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
                          "drawn again in each run, a temporary folder."},
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
