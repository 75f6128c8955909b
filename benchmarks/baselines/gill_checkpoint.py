"""
From GILL's published checkpoint to one that [`FromageModel`] loads, which retrieves and, with a diffusion model, draws.

    python -m benchmarks.baselines.gill_checkpoint FOLDER OUTPUT

Unrun on the published file, whose weights did not reach the machine that this was written on: the layout is its repository's.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPConfig

from benchmarks.baselines.fromage import FromageModel
from benchmarks.baselines.fromage_checkpoint import ARGUMENTS, WEIGHTS, _checked, _read
from modeling_unimur.identity_unimur import non_finite_tensors
from train.arguments import ModelArguments
from train.json_files import BadDataError, read_json, require
from train.run import make_processor

TABLE = "model.input_embeddings.weight"  # GILL's prune_model_ckpt.py leaves the [IMG] rows alone in it
MAPPER = "model.gen_text_hidden_fcs.0."
HEADS = 4  # of the mapper, fixed in GILL's code and stored nowhere
# GILL's names -> ours, beside the mapper, whose tensors have one name in both.
NAMES = {
    "model.visual_embeddings.weight": "W_i2t.weight",
    "model.visual_embeddings.bias": "W_i2t.bias",
    "model.visual_fc.weight": "W_v2m.weight",
    "model.visual_fc.bias": "W_v2m.bias",
    "model.ret_text_hidden_fcs.0.model.weight": "W_t2m.weight",
    "model.ret_text_hidden_fcs.0.model.bias": "W_t2m.bias",
    "model.logit_scale": "logit_scale",
}
# Of model_args.json: what has to be so. Retrieval then reads the first [IMG] token, which is [RET] here.
EXPECTED = {"text_fc_mode": "gill_mapper", "ret_text_fc_mode": "linear", "share_ret_gen": True}
DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def convert_checkpoint(
    folder: str | Path, output: str | Path, *, text_model: str | None = None, clip_model: str | None = None,
    diffusion_model: str = DIFFUSION,
) -> FromageModel:  # fmt: skip
    """
    Writes an adapter checkpoint of GILL's trained tensors, as float32 safetensors, its processor beside it.

    The file is read by torch's weights-only loader, which runs no code; GILL's image embeddings (`*.npy`, `*.pkl`) and its
    decision model are not opened: `draw_below` is that rule here, and is to be learned.

    Args:
        folder: holds `model_args.json` and `pretrained_ckpt.pth.tar`.
        output: where the checkpoint goes.
        text_model, clip_model: the towers' folders or names, where they differ from those `model_args.json` names.
        diffusion_model: GILL's Stable Diffusion 1.5, by its name today.

    Returns:
        The model as saved.

    Raises:
        BadDataError: a file is absent, cannot be read without running code, lacks a tensor, holds an unknown one or one of
            another shape than `model_args.json` and the towers ask for, or is not GILL's kind; the message names it.
        OSError: a tower could not be loaded.
    """
    path, weights = Path(folder) / ARGUMENTS, Path(folder) / WEIGHTS
    given = read_json(path)
    for name, value in EXPECTED.items():
        if given.get(name) != value:
            raise BadDataError(f"{path}: {name}={given.get(name)!r}, only {value!r} is supported")
    numbers = {
        name: require(given, name, int, str(path))
        for name in ("n_visual_tokens", "ret_emb_dim", "gen_emb_dim", "num_gen_tokens", "num_clip_tokens")
    }
    text_model = text_model or require(given, "opt_version", str, str(path))
    clip_model = clip_model or require(given, "visual_encoder", str, str(path))
    layers = require(given, "text_emb_layers", list, str(path))
    if layers not in ([-1], [AutoConfig.from_pretrained(text_model).num_hidden_layers]):
        raise BadDataError(f"{path}: text_emb_layers={layers}: only the LLM's last output, [-1], is supported")
    CLIPConfig.from_pretrained(clip_model)  # a tower that is no CLIP is refused before the file is read

    tensors = _renamed(_read(weights), numbers["num_gen_tokens"], weights)
    towers = ModelArguments(text_model=text_model, clip_model=clip_model, n_visual_tokens=numbers["n_visual_tokens"])
    model = FromageModel.from_pretrained_towers(
        text_model, clip_model, make_processor(towers), shared_dim=numbers["ret_emb_dim"],
        n_drawing_tokens=numbers["num_gen_tokens"], drawing_length=numbers["num_clip_tokens"],
        drawing_width=numbers["gen_emb_dim"], drawing_model_name_or_path=diffusion_model, mapper_heads=HEADS,
        mapper_width=len(tensors["drawing.fc.weight"]), mapper_layers=_layers(tensors),
    ).eval()  # fmt: skip
    _fill(model, tensors, weights)
    model.save_pretrained(output)
    return model


def _renamed(state: dict[str, Any], tokens: int, path: Path) -> dict[str, torch.Tensor]:
    """GILL's tensors by our names, the [IMG] rows `(tokens, d)` parted into [RET] and the rest."""
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    missing = sorted({*NAMES, TABLE, MAPPER + "fc.weight", MAPPER + "query_embs"} - state.keys())
    unknown = sorted(n for n in state if n not in NAMES and n != TABLE and not n.startswith(MAPPER))
    for problem, names in (
        ("lacks", missing),
        ("holds tensors that GILL's pruned checkpoint does not have:", unknown),
    ):
        if names:
            raise BadDataError(f"{path}: the state_dict {problem} {', '.join(names[:8])}")
    rows = _checked(TABLE, state.pop(TABLE), path)
    if rows.ndim != 2 or len(rows) != tokens:
        raise BadDataError(
            f"{path}: {TABLE} has shape {tuple(rows.shape)}, expected the {tokens} rows of the [IMG] tokens"
        )
    tensors = {
        NAMES.get(name) or "drawing." + name.removeprefix(MAPPER): _checked(name, value, path)
        for name, value in state.items()
    }
    return tensors | {
        "ret_embedding": rows[0],
        "drawing.tokens": rows[1:],
        "logit_scale": tensors["logit_scale"].reshape(-1),
    }


def _layers(tensors: dict[str, torch.Tensor]) -> int:
    numbers = [int(m[1]) for name in tensors if (m := re.match(r"drawing\.tfm\.encoder\.layers\.(\d+)\.", name))]
    return max(numbers, default=0) + 1


def _fill(model: FromageModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Puts the tensors into the model; all of its own, and of their shapes."""
    own = {n: p for n, p in model.named_parameters() if n.split(".")[0] in model.own_tensors}
    if tensors.keys() != own.keys():
        raise BadDataError(f"{path}: these differ from GILL's: {', '.join(sorted(tensors.keys() ^ own.keys())[:8])}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise BadDataError(
                f"{path}: what becomes {name} has shape {tuple(tensors[name].shape)}, but {ARGUMENTS} and the towers ask for "
                f"{tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])
    bad = [name for name in non_finite_tensors(model) if name in own]
    if bad:
        raise BadDataError(f"{path}: NaN or infinity in what becomes {', '.join(bad)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"holds {ARGUMENTS} and {WEIGHTS}")
    parser.add_argument("output", type=Path, help="where the checkpoint goes")
    parser.add_argument("--text_model", help="the LLM's folder or name, by default the one the checkpoint names")
    parser.add_argument("--clip_model", help="CLIP's folder or name, by default the one the checkpoint names")
    parser.add_argument("--diffusion_model", default=DIFFUSION, help="the diffusion model's folder or name")
    arguments = vars(parser.parse_args(argv))
    convert_checkpoint(
        arguments.pop("folder"), arguments["output"], **{k: v for k, v in arguments.items() if k != "output"}
    )
    print(f"checkpoint: {arguments['output']}")


if __name__ == "__main__":
    main()
