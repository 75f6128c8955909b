"""
The two frozen towers, and the only file that knows which there are: a causal language model and an image-text model.

It loads them, says their widths and lengths, encodes images and texts, makes their processors. Another family of
image-text models is a line of `FAMILIES` and, where it encodes otherwise, a branch of `encode_images` and `encode_texts`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import is_peft_available, logging

from .packing_unimur import block_mask
from .packing_unimur import positions as positions_of

logger = logging.get_logger(__name__)

# What a checkpoint holds beside its towers; W_v2m and W_x2m in the canonical alignment alone, logit_bias with eq. 4 as
# SigLIP's sigmoid loss.
OWN_TENSORS = ("W_i2t", "W_t2m", "W_v2m", "W_x2m", "ret_embedding", "logit_scale", "logit_bias", "drawing")
LORA = ".lora_"  # in the name of every tensor of a LoRA
LORA_FOLDER = "lora"


@dataclass(frozen=True)
class Family:
    """
    How image-text models of one type of transformers are used.

    Args:
        image_processor, tokenizer: transformers' classes that read theirs, by name: importing them all warns of what they need.
        projected: an embedding is a projection of the pooled output; else it is the pooled output.
        full_length: texts are padded to all positions and read without a mask, as they were in pre-training.
    """

    image_processor: str = "CLIPImageProcessor"
    tokenizer: str = "AutoTokenizer"
    projected: bool = True
    full_length: bool = False


# By `model_type`. MetaCLIP's checkpoints are of type clip, SigLIP 2's of a fixed resolution of type siglip.
FAMILIES = {
    "clip": Family(tokenizer="CLIPTokenizer"),
    "metaclip_2": Family(),
    "siglip": Family("SiglipImageProcessor", projected=False, full_length=True),
}
SUPPORTED = "CLIP, MetaCLIP, MetaCLIP 2, SigLIP, and SigLIP 2 of a fixed resolution (such as google/siglip2-so400m-patch14-384)"


def family(config: PreTrainedConfig) -> Family:
    """The family of an image-text model's config. Raises `ValueError` where it is none of those supported."""
    kind = config.model_type
    if kind not in FAMILIES:
        naflex = "; siglip2 is the variant of any resolution (NaFlex)" if kind == "siglip2" else ""
        raise ValueError(f"clip_model is of type {kind!r}, which is not supported{naflex}. Supported are {SUPPORTED}")
    if not getattr(config.vision_config, "vision_use_head", True):
        raise ValueError(
            f"clip_model is a {kind} without its pooling head (vision_use_head=False), which makes its embeddings"
        )
    return FAMILIES[kind]


# Widths and lengths


def text_width(config: PreTrainedConfig) -> int:
    """d: width of the LLM's input embeddings and of its last output (they differ from OPT-350m's hidden size)."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def pooled_width(config: PreTrainedConfig) -> int:
    """c: width of the image-text model's pooled output for an image."""
    return config.vision_config.hidden_size


def embedding_width(config: PreTrainedConfig) -> int:
    """Width of the image-text model's own embeddings of images and texts."""
    return config.projection_dim if family(config).projected else config.vision_config.hidden_size


def positions(config: PreTrainedConfig) -> int | None:
    """Positions of the LLM, in tokens; `None` where its config names no bound."""
    text = config.get_text_config(decoder=True)
    return next(
        (n for n in (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")) if n), None
    )


def clip_text_length(config: PreTrainedConfig) -> int | None:
    """The length that every text is padded to for the image-text model; `None` where any up to its positions will do."""
    return config.text_config.max_position_embeddings if family(config).full_length else None


# Encoding


class ImageTextModel(Protocol):
    """What is read of an image-text model; the projections only where its [`Family`] has them."""

    vision_model: Callable[..., Any]
    text_model: Callable[..., Any]
    visual_projection: Callable[[torch.Tensor], torch.Tensor]
    text_projection: Callable[[torch.Tensor], torch.Tensor]

    @property
    def config(self) -> PreTrainedConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...


@torch.no_grad()
def encode_images(clip: ImageTextModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One pass of the visual tower: `(i, 3, h, w)` -> its pooled output `(i, c)` and the image embedding `(i, clip_width)`,
    float32, neither normalised.
    """
    pooled = clip.vision_model(pixel_values.to(clip.dtype)).pooler_output
    if not family(clip.config).projected:
        return pooled.float(), pooled.float()
    return pooled.float(), clip.visual_projection(pooled).float()


@torch.no_grad()
def encode_texts(clip: ImageTextModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The text embedding `(n, clip_width)`, float32, not normalised."""
    if family(clip.config).full_length:  # its text tower pools at the last position, padding or not
        return clip.text_model(input_ids=input_ids).pooler_output.float()
    pooled = clip.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
    return clip.text_projection(pooled).float()


def trunk_outputs(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """
    The LLM without its vocabulary head: `(n, length, d)` -> its last outputs `(n, length, d)`. `attention_mask` is
    `(n, length)` of ones and zeros or `(n, 1, length, length)`, added to the attention's logits.
    """
    trunk = language_model.base_model
    # Without positions of its own (ALiBi, state-space models) a trunk has no argument for them.
    known = {"position_ids": position_ids} if "position_ids" in signature(trunk.forward).parameters else {}
    return trunk(
        inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False, **known
    ).last_hidden_state  # fmt: skip


@torch.no_grad()
def check_causal(language_model: PreTrainedModel) -> None:
    """
    Refuses a language model that cannot be UniMuR's, tried out on four positions.

    Raises:
        ValueError: it does not run from input embeddings without its head, or a position sees those after it.
    """
    kind = language_model.config.model_type
    device = input_device(language_model)
    try:
        table_rows = language_model.get_input_embeddings()(torch.arange(1, 5, device=device)[None])
        rows = (table_rows + table_rows.roll(1, dims=1)) / 2  # no token's, as an image's are not
        mask = torch.ones(1, 4, dtype=torch.long, device=device)
        four = trunk_outputs(language_model, rows, mask, mask.cumsum(-1) - 1)
        three = trunk_outputs(language_model, rows[:, :3], mask[:, :3], mask[:, :3].cumsum(-1) - 1)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"a language model of type {kind!r} does not run from input embeddings as a decoder alone, which UniMuR "
            f"needs: take another causal language model. The cause: {error}"
        ) from error
    tolerance = 1e-2 if four.dtype in (torch.float32, torch.float64) else 0.1
    if not (four[:, :3] - three).abs().max() <= tolerance * three.abs().max():
        raise ValueError(
            f"a language model of type {kind!r} lets a position see those after it: it is an encoder, or its config says "
            "is_decoder=False. UniMuR needs a causal language model"
        )


def takes_conversations(language_model: PreTrainedModel) -> bool:
    """
    Whether the LLM can continue from cached keys and values that are cut back: layers of a state space or a convolution
    keep a state instead, and a trunk without position ids cannot know where it continues.
    """
    stateful = any(getattr(part, "_is_stateful", False) for part in (language_model, language_model.base_model))
    takes = signature(language_model.base_model.forward).parameters
    if stateful or not {"position_ids", "past_key_values"} <= takes.keys():
        return False
    layers = DynamicCache(config=language_model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def input_device(language_model: PreTrainedModel) -> torch.device:
    """Where the LLM reads its input, also when accelerate has offloaded its parameters."""
    embed = language_model.get_input_embeddings()
    device = getattr(getattr(embed, "_hf_hook", None), "execution_device", None)
    return next(embed.parameters()).device if device is None else torch.device(device)


@torch.no_grad()
def packs_exactly(language_model: PreTrainedModel) -> bool:
    """
    Whether two sequences that share a row come out as on their own, tried out on five positions: a block mask and
    positions of their own do not keep them apart under ALiBi or in a state-space layer.
    """
    embed = language_model.get_input_embeddings()
    rows = embed(torch.arange(1, 6, device=input_device(language_model)))
    segments = torch.tensor([[1, 1, 1, 2, 2]], device=rows.device)
    try:
        packed = trunk_outputs(language_model, rows[None], block_mask(segments, rows.dtype), positions_of(segments))[
            0, 3:
        ]
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes no mask of four dimensions
        return False
    mask = torch.ones(1, 2, dtype=torch.long, device=rows.device)
    alone = trunk_outputs(language_model, rows[None, 3:], mask, mask.cumsum(-1) - 1)[0]
    tolerance = 1e-3 if rows.dtype in (torch.float32, torch.float64) else 0.05
    return bool((packed - alone).abs().max() <= tolerance * alone.abs().max())


def attention_window(config: PreTrainedConfig) -> int | None:
    """Positions that some layer of the LLM looks back at most; `None` where all look at everything."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "use_sliding_window", True) is False:
        return None
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


# Loading

EVERYWHERE, TOWERS, CHECKPOINT = "towers and checkpoint", "towers", "checkpoint"
# Which part an argument of from_pretrained concerns where the towers are elsewhere than the trained tensors. What is not listed
# is the checkpoint's own, as are fields of the config. A full checkpoint is one model, to which all of them apply; but
# the trained tensors are never quantised and stay float32 there too.
LOADING_ARGUMENTS = {
    "dtype": EVERYWHERE,
    "token": EVERYWHERE,
    "cache_dir": EVERYWHERE,
    "local_files_only": EVERYWHERE,
    "force_download": EVERYWHERE,
    "proxies": EVERYWHERE,
    "attn_implementation": TOWERS,  # a dict: "text_config" and "clip_config" name the tower, "" both
    "device_map": TOWERS,  # a dict: names that begin with "language_model" and "clip"; the rest follows the LLM's input
    "max_memory": TOWERS,  # to each of the two by itself
    "offload_folder": TOWERS,
    "offload_buffers": TOWERS,
    "quantization_config": TOWERS,
    "revision": CHECKPOINT,  # each tower has its own, in the config
    "subfolder": CHECKPOINT,
    "variant": CHECKPOINT,  # names a file of this one repository
}
PARTS = {"text_model": ("language_model", "text_config"), "clip_model": ("clip", "clip_config")}
# Buffers that older releases of transformers saved, and that are computed now.
FORMER_BUFFERS = re.compile(r"(position_ids|rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


def split_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of from_pretrained for the trained tensors of an adapter, and those for its towers."""
    goes = {name: LOADING_ARGUMENTS.get(name, CHECKPOINT) for name in given}
    own = {name: value for name, value in given.items() if goes[name] != TOWERS}
    return own, {name: value for name, value in given.items() if goes[name] != CHECKPOINT}


def load_towers(config, **arguments: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """
    Loads the towers that an adapter's config names, at the revisions it names.

    Args:
        config ([`UniMuRConfig`]): of an adapter checkpoint.
        arguments: those of `LOADING_ARGUMENTS` that concern towers.

    Raises:
        OSError: a tower is not there, or damaged; the message says which, and how to point elsewhere.
        ValueError: a tower is of no supported family, or a tensor is missing, unknown or of another shape.
    """
    language_model, clip = (_load_tower(config, part, arguments) for part in PARTS)
    return language_model, clip


def read_config(name: str, **hub: Any) -> PreTrainedConfig:
    """The config of a folder or a name on the Hub. Raises `OSError` that names it, and what it was taken for."""
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except OSError as error:
        refuse_no_folder(name, error)
        raise


def refuse_no_folder(name: str, error: OSError) -> None:
    """Of a name that is no folder transformers' own error speaks of the Hub alone: raises an `OSError` of both."""
    if not Path(name).is_dir():
        raise OSError(f"{name!r} is no folder here, and could not be loaded from the Hub either: {error}") from error


def check_language_model(config: PreTrainedConfig, name: str) -> None:
    """Refuses with a `ValueError` a config that is no causal language model's."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"text_model {name!r} is of type {config.model_type!r}, which is no causal language model: give one such as "
            "facebook/opt-1.3b"
        )


def _load_tower(config, part: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    name, revision = getattr(config, f"{part}_name_or_path"), getattr(config, f"{part}_revision") or "main"
    hub = {
        k: arguments[k]
        for k in ("token", "cache_dir", "local_files_only", "force_download", "proxies")
        if k in arguments
    }
    try:
        tower_config = read_config(name, revision=revision, **hub)
        if part == "clip_model":
            family(tower_config)
        else:
            check_language_model(tower_config, name)
        loader = AutoModelForCausalLM if part == "text_model" else AutoModel
        loaded = loader.from_pretrained(
            name, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True,
            **arguments_of_part(part, arguments),
        )  # fmt: skip
    except OSError as error:
        raise OSError(
            f"this adapter checkpoint needs its base {part} {name!r} at revision {revision!r}, which could not be "
            f"loaded. Pass {part}_name_or_path=... (and {part}_revision=...) to from_pretrained if it is "
            f"elsewhere. The cause: {error}"
        ) from error
    tower, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    check_loaded(info, f"the base {part} {name!r}")
    return tower


def arguments_of_part(part: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The loading arguments of one tower, with what dicts say of both of them resolved."""
    module, key = PARTS[part]
    resolved = dict(arguments)
    attention = arguments.get("attn_implementation")
    if isinstance(attention, dict):
        resolved["attn_implementation"] = attention.get(key, attention.get(""))
    if resolved.get("attn_implementation", "") is None:
        del resolved["attn_implementation"]
    method = getattr(arguments.get("quantization_config"), "quant_method", None)
    if part == "clip_model" and method == "torchao":
        logger.warning(
            f"torchao quantises the language model; {PARTS[part][0]}, which transformers cannot convert by it alone, "
            "stays whole"
        )
        del resolved["quantization_config"]
    device_map = arguments.get("device_map")
    if isinstance(device_map, dict):
        mine = {
            n.removeprefix(module).removeprefix("."): d for n, d in device_map.items() if n.split(".")[0] == module
        }
        if not mine and "" in device_map:
            mine = {"": device_map[""]}
        if not mine:
            raise ValueError(
                f"device_map={device_map!r} names no device for {module!r}; names begin with 'language_model' and 'clip', "
                "or are ''"
            )
        resolved["device_map"] = mine
    return resolved


def check_loaded(info: Mapping[str, Any], what: str) -> None:
    """
    Refuses weights that are not exactly the model's.

    Args:
        info: transformers' loading info.
        what: names the checkpoint in the message.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """
    unexpected = [name for name in info["unexpected_keys"] if not FORMER_BUFFERS.search(name)]
    for names, meaning in ((info["missing_keys"], "lacks"), (unexpected, "holds the unknown")):
        if names:
            raise ValueError(f"{what} {meaning} tensors: {_listed(names)}")
    if info["mismatched_keys"]:
        shapes = "; ".join(f"{k} is {tuple(a)}, expected {tuple(b)}" for k, a, b in sorted(info["mismatched_keys"]))
        raise ValueError(f"{what} holds tensors of another shape than its config says: {shapes}")


def _listed(names: Iterable[Any], most: int = 8) -> str:
    listed = sorted(map(str, names))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def check_same_widths(made_for: PreTrainedConfig, config: PreTrainedConfig, names: tuple[str, str]) -> None:
    """
    Refuses towers of other widths than the maps were made for, which would otherwise fail late or not at all.

    Args:
        made_for, config ([`UniMuRConfig`]): with the towers' configs as they were and as they are.
        names: the towers', for the message.
    """
    for width in ("text_width", "image_feature_width", "clip_width"):
        was, now = getattr(made_for, width), getattr(config, width)
        if was != now:
            raise ValueError(
                f"the maps of the checkpoint were made for towers of {width} {was}, and {names[0]!r} and {names[1]!r} have "
                f"{now}: these are not the towers it was trained with"
            )


def load_processors(
    text_model: str, clip_model: str, text_revision: str | None = None, clip_revision: str | None = None
) -> dict[str, Any]:
    """
    What a [`UniMuRProcessor`] takes of two towers (folders or Hub names): `image_processor`, `tokenizer`,
    `clip_tokenizer`, `clip_text_length` and, where the LLM's config names its positions, `max_length`.

    Raises:
        ValueError: `clip_model` is of no supported family, or `text_model` no causal language model.
        OSError: a tower is not there.
    """
    text, clip = {"revision": text_revision or "main"}, {"revision": clip_revision or "main"}
    text_config, clip_config = read_config(text_model, **text), read_config(clip_model, **clip)
    check_language_model(text_config, text_model)
    kind, limit = family(clip_config), positions(text_config)
    return {
        "image_processor": getattr(transformers, kind.image_processor).from_pretrained(clip_model, **clip),
        "tokenizer": AutoTokenizer.from_pretrained(text_model, **text),
        "clip_tokenizer": getattr(transformers, kind.tokenizer).from_pretrained(clip_model, **clip),
        "clip_text_length": clip_text_length(clip_config),
    } | ({} if limit is None else {"max_length": limit})


# LoRA


def load_lora(language_model: PreTrainedModel, name: str, **hub) -> None:
    """
    Loads the PEFT adapter in `lora/` of a checkpoint into its LLM.

    Args:
        name: the checkpoint's folder or Hub name.
        hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only` that it was loaded by.

    Raises:
        ImportError: peft is not installed.
    """
    if not is_peft_available():
        raise ImportError(f"the checkpoint {name!r} has a LoRA, which needs peft: pip install peft")
    subfolder = "/".join(filter(None, (hub.pop("subfolder", None), LORA_FOLDER)))
    if Path(name).is_dir():
        language_model.load_adapter(str(Path(name) / subfolder))
    else:
        language_model.load_adapter(name, adapter_kwargs={"subfolder": subfolder, **hub})


def load_lora_weights(language_model: nn.Module, folder: str | Path) -> None:
    """Puts the weights in `lora/` of a checkpoint's folder into the LoRA that the LLM has already."""
    saved = load_file(Path(folder) / LORA_FOLDER / "adapter_model.safetensors")
    own = {name: parameter for name, parameter in language_model.named_parameters() if LORA in name}
    # A saved adapter's names lead with PEFT's prefix and leave out the adapter's own name.
    weights = {n.removeprefix("base_model.model.").replace(".weight", ".default.weight"): w for n, w in saved.items()}
    if set(weights) != set(own):
        raise ValueError(f"the LoRA in {str(folder)!r} has other layers: {_listed(set(weights) ^ set(own))}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def plain_name(name: str) -> str:
    """A tower's own name of a tensor, without what a LoRA or `torch.compile` adds."""
    return name.replace(".base_layer.", ".").replace("_orig_mod.", "")
