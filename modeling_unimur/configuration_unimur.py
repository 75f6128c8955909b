"""Configuration of UniMuR: two frozen towers, two linear maps, and what the paper leaves open."""

import dataclasses
import difflib
import functools
import math
from typing import Any, cast

import transformers

OLDEST = "5.20"
# The first file that is loaded: on an older release the imports below would fail without saying why.
if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
    raise ImportError(
        f"UniMuR needs transformers {OLDEST} or newer, and {transformers.__version__} is installed: "
        f"pip install 'transformers>={OLDEST}'"
    )

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .towers_unimur import embedding_width, pooled_width, text_width

CHOICES = {
    "alignment": ("paper", "canonical"),
    "matching_feature": ("pooled", "projected"),
    "image_feature": ("pooled", "projected"),
    "text_candidates": ("ret", "last_output", "input_embeddings", "clip_text"),
    "text_target": ("normalized", "raw"),
    "text_target_reduction": ("mean", "sum"),
    "text_matching": ("mse", "infonce", "max_margin"),
    "visual_matching": ("infonce", "sigmoid"),
}


# Of a model that can draw; another's config does not hold them.
DRAWING_FIELDS = frozenset((
    "n_drawing_tokens", "drawing_model_name_or_path", "drawing_model_revision", "drawing_length", "drawing_width",
    "mapper_width", "mapper_layers", "mapper_heads", "lambda3", "drawing_steps", "drawing_guidance", "draw_below",
))  # fmt: skip
NUMBERS = ("lambda1", "lambda2", "lambda3", "margin", "temperature", "logit_bias", "drawing_guidance")
TOKENS = ("ret_token_id", "image_token_id")


def as_people_write(cls):
    """
    A strict dataclass that takes an int where a field is a float (yaml's 0 and 10), and whose refusals, of a type or a
    value, are `ValueError`s as those of any other class.
    """
    construct, assign = cls.__init__, cls.__setattr__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        try:
            construct(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def __setattr__(self, name, value):
        try:
            assign(self, name, float(value) if name in NUMBERS and type(value) is int else value)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    cls.__init__, cls.__setattr__ = __init__, __setattr__
    return cls


@as_people_write
@strict
class UniMuRConfig(PreTrainedConfig):
    r"""
    Configuration of a [`UniMuRModel`].

    A checkpoint is an *adapter* when both `text_model_name_or_path` and `clip_model_name_or_path` are set: it holds the
    trained tensors only and the towers are loaded from those names. It is *full* when both are `None`: the towers are
    in the checkpoint itself.

    What the paper leaves open has the default that did best on the miniature, where one did (the repository's
    `benchmarks/results`), by overall R@1. Over five seeds: `[RET]` as the space of candidate texts, by 20 points; eq. 6's
    target normalised or raw is alike (raw shows fewer images and finds a dialogue's image better), normalised and summed
    over q it is 2 points worse; a learned temperature and one fixed at 0.07 are alike, 0.01 is worse; `lambda2` is the paper's,
    although 1 did no worse.
    Over two seeds: [RET] frozen, by 4 points; CLIP's pooled and projected outputs are alike; 6 visual tokens beat 1,
    FROMAGe's, so the miniature's configuration takes 6.

    Args:
        text_config (`dict` or [`PreTrainedConfig`]): any causal language model of transformers (d = its width).
        clip_config (`dict` or [`PreTrainedConfig`]): any image-text model of [`towers_unimur.FAMILIES`]: CLIP (q = its
            `projection_dim`), MetaCLIP, SigLIP (q = its width); "CLIP" below means whichever it is.
        text_model_name_or_path, text_model_revision: where the frozen LLM of an adapter checkpoint comes from.
        clip_model_name_or_path, clip_model_revision: the same for CLIP.
        text_model_source, clip_model_source: where the towers within a full checkpoint came from, for the record.
        text_adapter (`bool`, defaults to `False`): the LLM carries a LoRA, in `lora/` of the checkpoint.
        ret_token_id, image_token_id (`int`): tokenizer ids of `[RET]` and `<image>`. They never index the LLM's
            embedding table, so they may lie beyond it.
        alignment (`"paper"` | `"canonical"`): the space in which [RET] and images meet. `"paper"` is Section 3.2's: CLIP's
            own embeddings, as they are. `"canonical"`: the space of canonical correlation, into which `W_v2m` maps images
            and `W_x2m` CLIP's texts; both are solved for in closed form (the repository's `train/canonical.py`).
        shared_width (`int`, *optional*): k, the width of the canonical space; the paper's has CLIP's.
        matching_feature (`"pooled"` | `"projected"`): what `W_v2m` reads of an image: CLIP's output before its
            projection, or after it.
        train_image_map (`bool`, defaults to `False`): train `W_v2m` too, as FROMAGe does; else it is frozen.
        ret_prompt (`str`, defaults to `""`): words before every `[RET]`, such as `"\nKeywords:"`, which ask an LLM that
            was never taught [RET] for the gist of what came before. The processor adds them and must have the same.
        n_visual_tokens (`int`, defaults to 1): visual tokens an image becomes (FROMAGe 1, GILL 4; the paper is silent).
        image_feature (`"pooled"` | `"projected"`): what `W_i2t` reads: CLIP's pooled output, or the q-dimensional
            embedding that the paper's shared symbol c suggests.
        text_candidates (`"ret"` | `"last_output"` | `"input_embeddings"` | `"clip_text"`): the space of a pool's texts
            (Section 3.4): e of `text [RET]`; `W_t2m` of the mean last output; `W_t2m` of the mean input embedding, the
            paper's wording; CLIP's text embedding.
        text_target, text_target_reduction: target of eq. 6: CLIP's text embedding L2-normalised or raw; the squared
            distance averaged or summed over the q dimensions.
        text_matching (`"mse"` | `"infonce"` | `"max_margin"`): L_tm of eq. 6, or Table 5's alternatives.
        margin (`float`, defaults to 0.2): margin of `"max_margin"`.
        visual_matching (`"infonce"` | `"sigmoid"`): L_vm of eq. 3-5, or in its place SigLIP's sigmoid loss of every
            pair, beyond the paper; it has a trained `logit_bias` beside the temperature.
        logit_bias (`float`, defaults to -10): where that bias starts (SigLIP's own; its temperature starts at 0.1).
        lambda1, lambda2 (`float`, default to 1 and 10): weights of L_vm and L_tm in eq. 7. Zero switches a loss off
            (Table 4: VM only, TM only).
        temperature (`float`, defaults to 0.07): tau of eq. 4-5, or its start when `learn_temperature` is true.
        learn_temperature (`bool`, defaults to `True`): as FROMAGe does; the paper does not say.
        train_ret_embedding (`bool`, defaults to `False`): train [RET]'s input embedding beside the two maps.
        n_drawing_tokens (`int`, defaults to 0): [IMG] tokens behind a context that a diffusion model draws from (GILL 8), [RET]
            the first of them; 0: the model cannot draw, and holds nothing for it (Appendix A.2).
        drawing_model_name_or_path, drawing_model_revision: the frozen diffusion model, a folder or a Hub name of diffusers; it
            is never in the checkpoint.
        drawing_length, drawing_width (`int`, default to 77 and 768): positions and width of its text conditioning.
        mapper_width, mapper_layers, mapper_heads (`int`, default to 512, 4 and 4): of GILL's mapper, layers in its encoder and
            in its decoder each.
        lambda3 (`float`, defaults to 1): weight of the mapper's loss beside eq. 7.
        drawing_steps (`int`), drawing_guidance (`float`): what a picture is drawn with by default.
        draw_below (`float`, *optional*): `retrieve(..., generate="auto")` draws a picture where the cosine of the pool's best
            image is below; learned on held-out dialogues.

    Raises:
        ValueError: a choice outside those listed, a weight that is negative or not finite, token ids that are negative or
            equal, or a name that is a misspelt field.
    """

    model_type = "unimur"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "clip_config": SubConfigSpec(config_class=AutoConfig, model_type="clip"),
    }

    text_config: dict | PreTrainedConfig | None = None
    clip_config: dict | PreTrainedConfig | None = None
    text_model_name_or_path: str | None = None
    text_model_revision: str | None = None
    clip_model_name_or_path: str | None = None
    clip_model_revision: str | None = None
    text_model_source: str | None = None
    clip_model_source: str | None = None
    text_adapter: bool = False
    ret_token_id: int | None = None
    image_token_id: int | None = None
    alignment: str = "paper"
    shared_width: int | None = None
    matching_feature: str = "pooled"
    train_image_map: bool = False
    ret_prompt: str = ""
    n_visual_tokens: int = 1
    image_feature: str = "pooled"
    text_candidates: str = "ret"
    text_target: str = "normalized"
    text_target_reduction: str = "mean"
    text_matching: str = "mse"
    margin: float = 0.2
    visual_matching: str = "infonce"
    logit_bias: float = -10.0
    lambda1: float = 1.0
    lambda2: float = 10.0
    temperature: float = 0.07
    learn_temperature: bool = True
    train_ret_embedding: bool = False
    n_drawing_tokens: int = 0
    drawing_model_name_or_path: str | None = None
    drawing_model_revision: str | None = None
    drawing_length: int = 77
    drawing_width: int = 768
    mapper_width: int = 512
    mapper_layers: int = 4
    mapper_heads: int = 4
    lambda3: float = 1.0
    drawing_steps: int = 50
    drawing_guidance: float = 7.5
    draw_below: float | None = None

    def __post_init__(self, **kwargs):
        own = [field.name for field in dataclasses.fields(self)]
        for name in kwargs:
            close = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
            if close and not hasattr(PreTrainedConfig, name):
                raise ValueError(f"UniMuRConfig has no field {name!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields, without those for drawing where the model cannot draw."""
        fields = super().to_dict()
        return fields if self.n_drawing_tokens else {k: v for k, v in fields.items() if k not in DRAWING_FIELDS}

    def validate_unimur(self):
        """Refuses values that would fail late or change the model silently."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        width = self.shared_width
        if (self.alignment == "canonical") != (width is not None) or (width is not None and width < 1):
            raise ValueError(
                f"alignment={self.alignment!r} with shared_width={self.shared_width!r}: the canonical space needs its width, "
                "at least 1, and the paper's has CLIP's"
            )
        if self.alignment == "paper" and self.train_image_map:
            raise ValueError("train_image_map=True: the paper's alignment has no image map; set alignment='canonical'")
        if self.alignment == "canonical" and self.matching_feature == "pooled" != self.image_feature:
            raise ValueError(
                "matching_feature='pooled' needs image_feature='pooled', since one feature of an image is kept beside its "
                "embedding: set matching_feature='projected'"
            )
        if self.n_visual_tokens < 1:
            raise ValueError(f"n_visual_tokens={self.n_visual_tokens}: an image needs at least one visual token")
        for name in NUMBERS:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")
        ids = [i for i in (getattr(self, name) for name in TOKENS) if i is not None]
        if any(i < 0 for i in ids) or len(set(ids)) < len(ids):
            stated = ", ".join(f"{name}={getattr(self, name)}" for name in TOKENS)
            raise ValueError(f"{stated}: token ids must be different and not negative")
        self._validate_drawing()
        for name in ("lambda1", "lambda2", "lambda3", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if (self.text_model_name_or_path is None) != (self.clip_model_name_or_path is None):
            raise ValueError(
                "an adapter checkpoint names both towers and a full one neither, but "
                f"text_model_name_or_path={self.text_model_name_or_path!r} and "
                f"clip_model_name_or_path={self.clip_model_name_or_path!r}"
            )

    def _validate_drawing(self) -> None:
        if self.n_drawing_tokens < 0 or self.n_drawing_tokens == 1:
            raise ValueError(
                f"n_drawing_tokens={self.n_drawing_tokens}: [RET] and at least one [IMG] token behind it, or 0 for a model "
                "that cannot draw"
            )
        for name in (
            "drawing_length",
            "drawing_width",
            "mapper_width",
            "mapper_layers",
            "mapper_heads",
            "drawing_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mapper_width % self.mapper_heads:
            raise ValueError(f"mapper_width={self.mapper_width} is no multiple of mapper_heads={self.mapper_heads}")
        if not 1 <= self.drawing_guidance < float("inf"):
            raise ValueError(f"drawing_guidance={self.drawing_guidance} must be a number from 1 on; 1 is none")

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint holds the trained tensors only."""
        return self.text_model_name_or_path is not None

    @property
    def towers(self) -> tuple[PreTrainedConfig, PreTrainedConfig]:
        """The configs of the LLM and of CLIP, which dicts have become when they were given."""
        return cast(PreTrainedConfig, self.text_config), cast(PreTrainedConfig, self.clip_config)

    @property
    def text_width(self) -> int:
        """d: width of the LLM's input embeddings and of its last output."""
        return text_width(self.towers[0])

    @property
    def image_feature_width(self) -> int:
        """c: width of what `W_i2t` reads."""
        return pooled_width(self.towers[1]) if self.image_feature == "pooled" else self.clip_width

    @property
    def clip_width(self) -> int:
        """Width of CLIP's own embeddings of images and texts."""
        return embedding_width(self.towers[1])

    @property
    def embedding_width(self) -> int:
        """q: width of the unified embedding: CLIP's in the paper's alignment, `shared_width` in the canonical one."""
        return self.clip_width if self.shared_width is None else self.shared_width

    @property
    def matching_feature_width(self) -> int:
        """Width of what `W_v2m` reads of an image."""
        return self.image_feature_width if self.matching_feature == "pooled" else self.clip_width


# transformers looks a checkpoint's config up even to load its tokenizer; unregistered, it would ask to run remote code.
AutoConfig.register(UniMuRConfig.model_type, UniMuRConfig, exist_ok=True)
# What save_pretrained writes then loads elsewhere with trust_remote_code, without this package.
UniMuRConfig.register_for_auto_class()
