"""The two frozen towers of a UniMuR: how an adapter checkpoint finds them, and what identifies a model."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPModel, PreTrainedModel
from transformers.utils import is_peft_available

# What a checkpoint holds beside its towers; W_v2m and W_x2m in the canonical alignment alone,
# `drawing` where the model can draw.
OWN_TENSORS = ("W_i2t", "W_t2m", "W_v2m", "W_x2m", "ret_embedding", "logit_scale", "drawing")
LORA = ".lora_"  # in the name of every tensor of a LoRA
LORA_FOLDER = "lora"
# Of the arguments a user gives for the adapter, those that hold for its towers too. Never revision or subfolder: each
# tower has its own.
SHARED_ARGUMENTS = ("dtype", "device_map", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def load_towers(config, **kwargs) -> tuple[PreTrainedModel, CLIPModel]:
    """
    Loads the towers that an adapter's config names, at the revisions it names.

    Args:
        config ([`UniMuRConfig`]): of an adapter checkpoint.
        kwargs: those of `SHARED_ARGUMENTS`.

    Raises:
        OSError: a tower is not there; the message says which, and how to point elsewhere.
    """
    if config._attn_implementation is not None:
        kwargs["attn_implementation"] = config._attn_implementation
    towers = []
    for cls, part in ((AutoModelForCausalLM, "text_model"), (CLIPModel, "clip_model")):
        name = getattr(config, f"{part}_name_or_path")
        revision = getattr(config, f"{part}_revision") or "main"
        try:
            towers.append(cls.from_pretrained(name, revision=revision, **kwargs))
        except OSError as error:
            raise OSError(
                f"this adapter checkpoint needs its base {part} {name!r} at revision {revision!r}, which could not be "
                f"loaded. Pass {part}_name_or_path=... (and {part}_revision=...) to from_pretrained if it lies "
                f"elsewhere. The cause: {error}"
            ) from error
    return tuple(towers)


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


def load_lora_weights(language_model: PreTrainedModel, folder: str) -> None:
    """Puts the weights in `lora/` of a checkpoint's folder into the LoRA that the LLM has already."""
    weights = load_file(Path(folder) / LORA_FOLDER / "adapter_model.safetensors")
    own = {name: parameter for name, parameter in language_model.named_parameters() if LORA in name}
    # A saved adapter's names lead with PEFT's prefix and leave out the adapter's own name.
    found = {n.removeprefix("base_model.model.").replace(".weight", ".default.weight"): w for n, w in weights.items()}
    if set(found) != set(own):
        raise ValueError(f"the LoRA in {folder!r} has other layers: {', '.join(sorted(set(found) ^ set(own))[:5])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def plain_name(name: str) -> str:
    """A tower's own name of a tensor that a LoRA has wrapped."""
    return name.replace(".base_layer.", ".")


def check_widths(model) -> None:
    """Refuses towers whose widths are not those of the maps, which would otherwise fail late or not at all."""
    config = model.config
    table = model.language_model.get_input_embeddings().weight
    # The config holds the towers' own configs by now.
    expected = {f"{name}.weight": (after, before) for name, (before, after) in model.map_widths(config).items()}
    expected["ret_embedding"] = (table.shape[1],)
    for name, shape in expected.items():
        found = tuple(model.get_parameter(name).shape)
        if found != shape:
            raise ValueError(
                f"{name} of the checkpoint has shape {found}, but the towers "
                f"{config.text_model_name_or_path!r} and {config.clip_model_name_or_path!r} need {shape}: "
                "these are not the towers it was trained with"
            )


def non_finite_tensors(module: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity."""
    return [name for name, tensor in module.named_parameters() if not bool(torch.isfinite(tensor).all())]


def digest(parameters, *, head: int | None = None) -> str:
    """
    16 hexadecimal digits over named parameters.

    Args:
        parameters: `(name, tensor)` pairs.
        head: take only so many leading values of each, rounded to bfloat16, so that a large tower costs little and is
            the same tower when it is loaded in bfloat16 (not in float16, which rounds otherwise).
    """
    state = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        values = tensor.detach().flatten()[:head]
        values = values.to("cpu", torch.float32) if head is None else values.to("cpu", torch.bfloat16).float()
        state.update(f"{name}{tuple(tensor.shape)}".encode())
        state.update(values.numpy().tobytes())
    return state.hexdigest()[:16]
