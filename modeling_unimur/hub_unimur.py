"""What is saved beside a checkpoint's weights: pipeline, endpoint handler, sentence-transformers module, requirements, pool."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

from .pool_files import has_index
from .pool_unimur import CandidatePool

logger = logging.get_logger(__name__)

# Files that no import leads to, so that transformers does not copy them.
COMPANIONS = ("pipeline_unimur.py", "sentence_unimur.py", "handler.py")
CUSTOM_PIPELINES = {
    "multimodal-retrieval": {
        "impl": "pipeline_unimur.MultimodalRetrievalPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}
SENTENCE_TRANSFORMERS = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_unimur.UniMuREncoder"}],
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}
REQUIREMENTS = "requirements.txt"
POOL = "pool"
# Arguments of from_pretrained that say where a checkpoint is; its `source` is these and its name.
HUB_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
WEIGHTS = "model.safetensors"
FORMER_POOL = f"{POOL}/*"  # what a pool must not be uploaded beside: its index would be taken for the new one's


def refuse_local_towers(config: dict[str, Any]) -> None:
    """Refuses an adapter's config that names folders, which nobody else has, with a `ValueError`."""
    for name in ("text_model_name_or_path", "clip_model_name_or_path"):
        value = config.get(name)
        if value is not None and (Path(value).is_absolute() or Path(value).is_dir()):
            raise ValueError(
                f"{name} of this adapter is a folder of this machine, which nobody else has: name the tower on the Hub, "
                "or save a full checkpoint by save_pretrained(..., with_towers=True) and push that"
            )


def save_companions(
    folder: str | Path, source: Mapping[str, Any], *, lora: bool = False, draws: bool = False,
    pool: CandidatePool | None = None,
) -> None:  # fmt: skip
    """
    Writes what users of a checkpoint call beside its weights and code.

    Args:
        source: the arguments the model was loaded by, where the files that no import leads to are if this code is
            itself from there; empty for a model that was not loaded.
        lora: whether users need peft.
        draws: whether they need diffusers.
        pool: a pool to pack beside the model.
    """
    folder = Path(folder)
    for name in COMPANIONS:
        file = _companion(source, name)
        if file is None:
            logger.warning(f"{name} is neither with this code nor in the repository it came from: saved without it")
        elif file.resolve() != (folder / name).resolve():
            shutil.copyfile(file, folder / name)
    for name, content in SENTENCE_TRANSFORMERS.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if pool is not None:
        pool.save_to_disk(folder / POOL)
    _save_requirements(folder, source, {"peft": lora, "diffusers": draws})


def packed_pool(source: Mapping[str, Any]) -> CandidatePool:
    """
    The pool packed beside a checkpoint, in its folder or its Hub repository.

    Raises:
        ValueError: the model was not loaded from a checkpoint, or no pool is packed with it.
    """
    name = source.get("pretrained_model_name_or_path")
    if name is None:
        raise ValueError("this model was not loaded from a checkpoint, so no pool is packed with it: give a pool")
    folder = Path(name) / source.get("subfolder", "")
    if not Path(name).is_dir():
        hub = {k: v for k, v in source.items() if k in HUB_ARGUMENTS and k != "subfolder"}
        prefix = f"{source['subfolder']}/" if source.get("subfolder") else ""
        folder = Path(snapshot_download(name, allow_patterns=f"{prefix}{POOL}/*", **hub)) / prefix
    if not (folder / POOL).is_dir():
        raise ValueError(
            f"no pool is packed with {str(name)!r}: give a pool, or pack one by save_pretrained(..., pool=pool)"
        )
    return CandidatePool.load_from_disk(folder / POOL)


def beside_weights(source: Mapping[str, Any], name: str) -> Path | None:
    """A file of the checkpoint that `source` names; `None` where there is none."""
    if not source:
        return None
    arguments = dict(source)
    try:
        file = cached_file(arguments.pop("pretrained_model_name_or_path"), name, **arguments)
    except OSError:
        return None
    return None if file is None else Path(file)


def follow_umask(folder: str | Path) -> None:
    """Gives weights the mode of any new file; safetensors writes them for their owner alone."""
    folder = Path(folder)
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in (*folder.glob("*.safetensors"), *folder.glob("lora/*.safetensors")):
        file.chmod(mode)


def damaged_file(source: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> str | None:
    """The first file of a checkpoint that cannot be read as what it is; `None` where all can."""
    readers: dict[str, Callable[[Path], Any]] = {
        "config.json": lambda file: config_class.from_pretrained(str(file.parent)),
        "processor_config.json": _read_json,
        "tokenizer_config.json": _read_json,
        "tokenizer.json": _read_tokenizer,
        "clip_tokenizer/tokenizer_config.json": _read_json,
        "clip_tokenizer/tokenizer.json": _read_tokenizer,
        WEIGHTS: _read_weights,
        f"{WEIGHTS}.index.json": _read_json,
    }
    for name, read in readers.items():
        file = beside_weights(source, name)
        try:
            if file is not None:
                read(file)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # the tokenizers' Rust panics are no Exception
            return name
    return None


def _read_json(file: Path) -> None:
    if not isinstance(json.loads(file.read_text()), dict):
        raise ValueError(f"{file} is no object")


def _read_tokenizer(file: Path) -> None:
    Tokenizer.from_file(str(file)).encode("a")


def _read_weights(file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # no dict
            tensors.get_slice(name).get_shape()


def _save_requirements(folder: Path, source: Mapping[str, Any], extras: Mapping[str, bool]) -> None:
    """What an endpoint's container installs: the package's own requirements, the pool's, and those `extras` that are needed."""
    extras = {"faiss-cpu": has_index(folder / POOL), **extras}
    try:
        stated = importlib.metadata.requires("modeling-unimur") or []
    except importlib.metadata.PackageNotFoundError:
        file = _companion(source, REQUIREMENTS)
        if file is None:
            logger.warning(f"saved without {REQUIREMENTS}: the package's are unknown until it is installed by pip")
            return
        stated = file.read_text().splitlines()
    lines = [line for line in stated if "extra ==" not in line]
    for name, needed in extras.items():
        if needed and not any(line.startswith(name) for line in lines):
            lines.append(next((line.partition(";")[0].strip() for line in stated if line.startswith(name)), name))
    (folder / REQUIREMENTS).write_text("\n".join(lines) + "\n")


def _companion(source: Mapping[str, Any], name: str) -> Path | None:
    """A companion file, from beside this code or, where this code came from the Hub, from the repository."""
    here = Path(__file__).with_name(name)
    return here if here.is_file() else beside_weights(source, name)
