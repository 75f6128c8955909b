"""What identifies a model: digests of its weights, the fingerprint of its embeddings, golden vectors, NaN."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .configuration_unimur import UniMuRConfig
from .processing_unimur import UniMuRProcessor
from .towers_unimur import LORA, plain_name

GOLDEN = "golden.safetensors"
TEXT = "a golden text, the same in every version."
# The largest difference of a coordinate: float32 differs by summation order only, half precision by its own rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
HEAD = 64  # leading values of each of a tower's tensors that its digest reads


class Identified(Protocol):
    """What the functions below read of a model."""

    config: UniMuRConfig
    language_model: PreTrainedModel | None
    own_tensors: tuple[str, ...]
    digests: dict[str, tuple[Any, str]]  # by part: the state of the weights, and their digest in that state

    @property
    def processor(self) -> UniMuRProcessor: ...

    def embed_dialogues(self, dialogues: list[Any]) -> torch.Tensor: ...

    def embed_images(self, images: list[Any]) -> torch.Tensor: ...

    def embed_texts(self, texts: list[str]) -> torch.Tensor: ...


# Digests


def named_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Parameters of a module sorted by name, each once. Names are the weights' own, without what a LoRA or `torch.compile`
    adds; an offloaded one is in memory only until the next one.
    """
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    named = {plain_name(name): (name, tensor) for name, tensor in module.named_parameters()}
    for plain in sorted(named):
        name, tensor = named[plain]
        if not tensor.is_meta:
            yield plain, tensor.detach()
        elif name not in tied:  # offloading makes two tensors of what was one
            owner, _, attribute = name.rpartition(".")
            with _loaded(module.get_submodule(owner)):
                yield plain, getattr(module.get_submodule(owner), attribute).detach()


def _loaded(module: nn.Module):
    """A context in which a module's own parameters are in memory, where accelerate has offloaded them."""
    try:  # a plain import would make accelerate a requirement of the checkpoint's code
        from accelerate.utils import align_module_device
    except ImportError:
        return nullcontext()
    return align_module_device(module, torch.device("cpu"))


def digest(weights: Iterable[tuple[str, torch.Tensor]], *, head: int | None = None) -> str:
    """
    16 hexadecimal digits over named tensors, in the order given (that of `named_weights`).

    Args:
        weights: `(name, tensor)` pairs.
        head: take only so many leading values of each, rounded to bfloat16, so that a large tower costs little and is
            the same tower when it is loaded in bfloat16 (not in float16, which rounds otherwise).
    """
    state = hashlib.sha256()
    for name, tensor in weights:
        values = tensor.detach().flatten()[:head]
        values = values.to("cpu", torch.float32) if head is None else values.to("cpu", torch.bfloat16).float()
        state.update(f"{name}{tuple(tensor.shape)}".encode())
        state.update(values.numpy().tobytes())
    return state.hexdigest()[:16]


def is_own(model: Identified, name: str) -> bool:
    """Whether a tensor is the model's own (a LoRA's too) rather than a tower's."""
    return name.split(".")[0] in model.own_tensors or LORA in name


def towers_digest(model: Identified) -> str:
    """Digest of both towers' weights, taken once: they are frozen."""
    if "towers" not in model.digests:
        weights = ((n, t) for n, t in named_weights(_module(model)) if not is_own(model, n))
        model.digests["towers"] = (None, digest(weights, head=HEAD))
    return model.digests["towers"][1]


def maps_digest(model: Identified) -> str:
    """Digest of what is trained and of what is beside it, taken again where a value has changed."""
    # Without what draws, which no embedding depends on: a model that learns to draw keeps its pools.
    own = [(n, p) for n, p in named_weights(_module(model)) if is_own(model, n) and not n.startswith("drawing.")]
    # Hashing megabytes would cost a query as much as its search; the probe sees what is written past autograd.
    probes = [p.flatten()[:: max(1, p.numel() // 64)].float().sum() for _, p in own]
    state = [(n, p.data_ptr(), p._version) for n, p in own], torch.stack([p.cpu() for p in probes]).tolist()
    if "maps" not in model.digests or model.digests["maps"][0] != state:
        model.digests["maps"] = state, digest(own)
    return model.digests["maps"][1]


def fingerprint(model: Identified) -> dict[str, Any]:
    """What makes two models' embeddings comparable: weights, candidate space, preprocessing, dimension q."""
    return {
        "towers": towers_digest(model),
        "maps": maps_digest(model),
        "text_candidates": model.config.text_candidates,
        "preprocessing": model.processor.fingerprint,
        "dimension": model.config.embedding_width,
    }


def non_finite_tensors(module: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity."""
    return [name for name, tensor in named_weights(module) if not bool(torch.isfinite(tensor).all())]


def _module(model: Identified) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


# Golden vectors: embeddings of fixed inputs, saved with a checkpoint, which show that a loaded model has drifted


def golden_image() -> Image.Image:
    """A picture that no decoder and no font can change: a 64 x 48 ramp of each channel."""
    rows, columns = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([rows * 5, columns * 4, (rows + columns) * 2], -1).astype(np.uint8))


def golden_embeddings(model: Identified) -> dict[str, torch.Tensor]:
    """The `(q,)` float32 embeddings of a dialogue with an image, an image and a text."""
    return {
        "dialogue": model.embed_dialogues([["look!", golden_image(), TEXT]])[0],
        "image": model.embed_images([golden_image()])[0],
        "text": model.embed_texts([TEXT])[0],
    }


def save_golden(model: Identified, folder: str | Path) -> None:
    """Writes `golden.safetensors` into a checkpoint's folder."""
    save_file(golden_embeddings(model), str(Path(folder) / GOLDEN))


def compare_golden(model: Identified, file: str | Path) -> dict[str, float]:
    """
    The largest difference of a coordinate from the golden vectors in `file`, for each input.

    Raises:
        OSError: the file is damaged.
        ValueError: one is beyond what the towers' dtype explains; the message names it.
    """
    try:
        golden = load_file(str(file))
    except SafetensorError as error:
        raise OSError(f"{str(file)!r} is damaged: restore it from the checkpoint. The cause: {error}") from error
    now = golden_embeddings(model)
    assert model.language_model is not None
    dtype = model.language_model.dtype
    if set(golden) != set(now) or any(golden[name].shape != now[name].shape for name in now):
        raise ValueError(
            f"{str(file)!r} holds { ({n: tuple(v.shape) for n, v in golden.items()}) }, and this model's golden vectors are "
            f"{ ({n: tuple(v.shape) for n, v in now.items()}) }: it is another model's, or damaged"
        )
    differences = {name: float((now[name] - vector).abs().max()) for name, vector in golden.items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE[dtype]:
            raise ValueError(
                f"self-check failed: the embedding of the golden {name} differs by {difference:.2g} from the one "
                f"saved with the checkpoint, more than {TOLERANCE[dtype]:.0e} in {dtype}. The weights, a "
                "tower, the preprocessing or a library has changed"
            )
    return differences
