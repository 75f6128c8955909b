"""A GGUF file, quantised as llama.cpp reads it, made a folder that transformers reads."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.utils import is_gguf_available, logging

from train.cache import sha256

logger = logging.get_logger("train")

STAMP = "gguf.json"  # written last: which GGUF the folder was made of


def dequantise(gguf: str | Path, folder: str | Path) -> Path:
    """
    The LLM in a GGUF file as bfloat16 safetensors, with its tokenizer; made once, whole or not at all.

    What its quantisation lost stays lost. A folder that an earlier call made of the same file is used as it is.

    Args:
        gguf: the file.
        folder: made; its parents too.

    Returns:
        `folder`.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: there is no such file, it is no GGUF, truncated, or of a family that transformers does not read from
            GGUF, or the folder holds something else.
    """
    gguf, folder = Path(gguf), Path(folder)
    if not gguf.is_file():
        raise ValueError(f"{gguf} is not a file: give the path of a GGUF on this machine")
    if not is_gguf_available():
        raise ImportError(f"{gguf} is read by the package gguf: pip install 'modeling-unimur[gguf]'")
    stamp = {"gguf": gguf.name, "sha256": sha256(gguf)}
    if folder.exists():
        made = json.loads((folder / STAMP).read_text()) if (folder / STAMP).is_file() else None
        if made is None or made["sha256"] != stamp["sha256"]:
            holds = "something else" if made is None else f"the weights of another GGUF, {made['gguf']}"
            raise ValueError(f"{folder} holds {holds}: give another folder for {gguf.name}, or delete that one")
        return folder
    check(gguf)
    logger.warning(f"{gguf.name} is dequantised once, to bfloat16, in {folder}")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # Without dequantize=True the weights are the same, but would not be saved.
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / STAMP).write_text(json.dumps(stamp) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check(gguf: Path) -> None:
    """Raises `ValueError` where a file is no GGUF, is truncated, or is of a family that transformers does not read."""
    from gguf import GGUFReader

    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{gguf} is no GGUF: its first four bytes are not 'GGUF'")
    try:
        reader = GGUFReader(gguf)
        architecture = reader.get_field("general.architecture")
        if architecture is None:
            raise KeyError("general.architecture")
        family = architecture.contents()
    # The reader slices a memory map by what the header says, and fails in many ways where the map is too short.
    except Exception as error:
        raise ValueError(f"{gguf} is truncated or broken ({error}): fetch it again") from error
    known = sorted({name.replace("_", "") for name in GGUF_SUPPORTED_ARCHITECTURES})
    if family.replace("_", "").replace("-", "") not in known:
        raise ValueError(
            f"{gguf} holds a {family!r}, a family that transformers does not read from GGUF; it reads {', '.join(known)}"
        )
