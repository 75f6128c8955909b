"""
From FROMAGe's published checkpoint to one that [`FromageModel`] loads.

    python -m benchmarks.baselines.fromage_checkpoint FOLDER OUTPUT
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPConfig

from benchmarks.baselines.fromage import FromageModel
from modeling_unimur.identity_unimur import non_finite_tensors
from train.arguments import ModelArguments
from train.command import run_command
from train.json_files import BadDataError, read_json, require
from train.run import make_processor

ARGUMENTS, WEIGHTS = "model_args.json", "pretrained_ckpt.pth.tar"
# FROMAGe's names -> ours. All of them must be there, and nothing else.
NAMES = {
    "model.visual_embeddings.weight": "W_i2t.weight",
    "model.visual_embeddings.bias": "W_i2t.bias",
    "model.visual_fc.weight": "W_v2m.weight",
    "model.visual_fc.bias": "W_v2m.bias",
    "model.text_hidden_fcs.0.0.weight": "W_t2m.weight",
    "model.text_hidden_fcs.0.0.bias": "W_t2m.bias",
    "model.logit_scale": "logit_scale",
    "ret_input_embeddings.weight": "ret_embedding",
}
ROW = "ret_input_embeddings.weight"
TABLE = "model.input_embeddings.weight"  # prune_model_ckpt.py writes both; other scripts write only this
FLAT = ("logit_scale", "ret_embedding")  # stored as (), (1,), (d,) or (1, d); vectors here


def convert_checkpoint(
    folder: str | Path, output: str | Path, *, text_model: str | None = None, clip_model: str | None = None
) -> FromageModel:
    """
    Writes an adapter checkpoint of FROMAGe's trained tensors, as float32 safetensors, with its processor.

    The file is read by torch's weights-only loader, which runs no code; FROMAGe's image embeddings (`*.pkl`) are not
    needed and not opened. Training state next to `state_dict` (`epoch`, `optimizer`, ...) is not part of the model. [RET]'s
    row may be stored alone, or in the LLM's table of input embeddings, as FROMAGe's `prune_model_ckpt.py` leaves it.

    Args:
        folder: holds `model_args.json` and `pretrained_ckpt.pth.tar`.
        output: where the checkpoint goes.
        text_model, clip_model: the towers' folders or names, where they differ from those `model_args.json` names.

    Returns:
        The model as saved.

    Raises:
        BadDataError: a file is absent, cannot be read without running code, lacks a tensor, holds an unknown one, one of
            another shape than `model_args.json` and the towers ask for, or two rows of [RET] that differ; the message
            names it.
        OSError: a tower could not be loaded.
    """
    path = Path(folder) / ARGUMENTS
    given = read_json(path)
    n_visual_tokens = require(given, "n_visual_tokens", int, str(path))
    shared_dim = require(given, "shared_emb_dim", int, str(path))
    layers = require(given, "text_emb_layers", list, str(path))
    text_model = text_model or require(given, "opt_version", str, str(path))
    clip_model = clip_model or require(given, "visual_encoder", str, str(path))
    text, clip = AutoConfig.from_pretrained(text_model), CLIPConfig.from_pretrained(clip_model)
    if layers not in ([-1], [text.num_hidden_layers]):
        raise BadDataError(f"{path}: text_emb_layers={layers}: only the LLM's last output, [-1], is supported")
    if given.get("num_appended_retrieval_tokens", 1) != 1:
        raise BadDataError(f"{path}: {given['num_appended_retrieval_tokens']} retrieval tokens, expected one")

    weights = Path(folder) / WEIGHTS
    d = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    state = {str(name).removeprefix("module."): value for name, value in _read(weights).items()}
    if TABLE in state:
        row = _ret_row(state.pop(TABLE), given, weights, d)
        if ROW in state and not torch.equal(_checked(ROW, state[ROW], weights).flatten(), row):
            raise BadDataError(f"{weights}: {ROW} is not [RET]'s row of {TABLE}: which one was trained?")
        state[ROW] = row
    tensors = _renamed(state, weights)
    _check_shapes(tensors, weights, d, clip.vision_config.hidden_size, n_visual_tokens, shared_dim)
    towers = ModelArguments(text_model=text_model, clip_model=clip_model, n_visual_tokens=n_visual_tokens)
    model = FromageModel.from_pretrained_towers(
        text_model, clip_model, make_processor(towers), shared_dim=shared_dim
    ).eval()
    for name, tensor in tensors.items():
        model.get_parameter(name).data.copy_(tensor)
    bad = [name for name in non_finite_tensors(model) if name in tensors]
    if bad:
        raise BadDataError(f"{weights}: NaN or infinity in what becomes {', '.join(bad)}")
    model.save_pretrained(output)
    return model


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadDataError(f"{path}: no such file")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise BadDataError(
            f"{path}: cannot be read as tensors alone: it is damaged, or it would run code when loaded, which is "
            f"refused. Ask its author for a file that holds only a state_dict. The cause: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise BadDataError(f"{path}: not a whole torch file ({_first_line(error)}): fetch it again") from error
    return require(content, "state_dict", dict, str(path))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _ret_row(table: Any, given: dict[str, Any], path: Path, d: int) -> torch.Tensor:
    """[RET]'s row `(d,)` of the table `(rows, d)`, which may hold that row alone."""
    table = _checked(TABLE, table, path)
    if table.ndim != 2 or table.shape[1] != d or not len(table):
        raise BadDataError(f"{path}: {TABLE} has shape {tuple(table.shape)}, expected rows of the LLM's width {d}")
    if len(table) == 1:
        return table[0]
    index = require(given, "retrieval_token_idx", int, ARGUMENTS)
    if not 0 <= index < len(table):
        raise BadDataError(f"{path}: {TABLE} has {len(table)} rows, but {ARGUMENTS} says retrieval_token_idx={index}")
    return table[index]


def _checked(name: str, value: Any, path: Path) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise BadDataError(f"{path}: {name} is {getattr(value, 'dtype', type(value).__name__)}, not floats")
    return value.detach().float()


def _renamed(state: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    missing, unknown = sorted(NAMES.keys() - state.keys()), sorted(state.keys() - NAMES.keys())
    if missing:
        raise BadDataError(
            f"{path}: the state_dict lacks {', '.join(missing)}; it holds {', '.join(sorted(state)[:12])}"
        )
    if unknown:
        raise BadDataError(
            f"{path}: the state_dict holds {len(unknown)} tensors that FROMAGe's pruned checkpoint does not have: "
            f"{', '.join(unknown[:8])}"
        )
    return {NAMES[name]: _checked(name, value, path) for name, value in state.items()}


def _check_shapes(
    tensors: dict[str, torch.Tensor], path: Path, d: int, c: int, n_visual_tokens: int, shared_dim: int
) -> None:
    """Refuses other shapes than the towers' widths d and c ask for, and reshapes to vectors what is stored otherwise."""
    theirs = {ours: name for name, ours in NAMES.items()}
    rows = tensors["W_i2t.bias"].numel()
    if rows != n_visual_tokens * d and rows % d == 0:
        raise BadDataError(
            f"{path}: model.visual_embeddings makes {rows // d} visual tokens of width {d}, but {ARGUMENTS} says "
            f"n_visual_tokens={n_visual_tokens}"
        )
    expected = {
        "W_i2t.weight": (n_visual_tokens * d, c), "W_i2t.bias": (n_visual_tokens * d,),
        "W_v2m.weight": (shared_dim, c), "W_v2m.bias": (shared_dim,),
        "W_t2m.weight": (shared_dim, d), "W_t2m.bias": (shared_dim,),
        "logit_scale": (1,), "ret_embedding": (d,),
    }  # fmt: skip
    for name, shape in expected.items():
        actual = tuple(tensors[name].shape)
        if name in FLAT and actual in ((), (1,), (1, *shape)):
            tensors[name] = tensors[name].reshape(-1)
        if tuple(tensors[name].shape) != shape:
            raise BadDataError(
                f"{path}: {theirs[name]} has shape {actual}, but {ARGUMENTS} and the towers (LLM width {d}, CLIP's "
                f"pooled output {c}) ask for {shape}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"holds {ARGUMENTS} and {WEIGHTS}")
    parser.add_argument("output", type=Path, help="where the checkpoint goes")
    parser.add_argument("--text_model", help="the LLM's folder or name, by default the one the checkpoint names")
    parser.add_argument("--clip_model", help="CLIP's folder or name, by default the one the checkpoint names")
    arguments = parser.parse_args()
    convert_checkpoint(
        arguments.folder, arguments.output, text_model=arguments.text_model, clip_model=arguments.clip_model
    )
    print(f"checkpoint: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
