"""A golden vector: embeddings of fixed inputs, saved with a checkpoint, by which a loaded model is found to drift."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

GOLDEN = "golden.safetensors"
TEXT = "a golden text, the same in every version."
# The largest difference of a coordinate: float32 differs by summation order only, half precision by its own rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def golden_image() -> Image.Image:
    """A picture that no decoder and no font can change: a 64 x 48 ramp of each channel."""
    rows, columns = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([rows * 5, columns * 4, (rows + columns) * 2], -1).astype(np.uint8))


def golden_embeddings(model: Any) -> dict[str, torch.Tensor]:
    """The `(q,)` float32 embeddings of a dialogue with an image, an image and a text."""
    return {
        "dialogue": model.embed_dialogues([["look!", golden_image(), TEXT]])[0],
        "image": model.embed_images([golden_image()])[0],
        "text": model.embed_texts([TEXT])[0],
    }


def save_golden(model: Any, folder: str | Path) -> None:
    """Writes `golden.safetensors` into a checkpoint's folder."""
    save_file(golden_embeddings(model), str(Path(folder) / GOLDEN))


def compare_golden(model: Any, file: str | Path) -> dict[str, float]:
    """
    The largest difference of a coordinate from the golden vectors in `file`, for each input.

    Raises:
        ValueError: one is beyond what the towers' dtype explains; the message names it.
    """
    golden, found = load_file(str(file)), golden_embeddings(model)
    allowed = TOLERANCE[model.language_model.dtype]
    differences = {}
    for name, vector in golden.items():
        if name not in found or found[name].shape != vector.shape:
            raise ValueError(f"the golden vector {name!r} of {str(file)!r} has no counterpart in this model")
        differences[name] = float((found[name] - vector).abs().max())
        if not differences[name] <= allowed:
            raise ValueError(
                f"self-check failed: the embedding of the golden {name} differs by {differences[name]:.2g} from the one "
                f"saved with the checkpoint, more than {allowed:.0e} in {model.language_model.dtype}. The weights, a "
                "tower, the preprocessing or a library has changed"
            )
    return differences
