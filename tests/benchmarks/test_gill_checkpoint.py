"""GILL's published layout: converted, it retrieves and draws as its tensors say; what is wrong with a file is named."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines.fromage import FromageModel
from benchmarks.baselines.gill_checkpoint import MAPPER, main
from tests.tiny import make_pipeline, make_towers
from train.json_files import BadDataError


class Mapper(nn.Module):
    """GILL's, at a tiny width: written out as the page describes it, to compare with."""

    def __init__(self):
        super().__init__()
        self.fc, self.model = nn.Linear(32, 16), nn.Linear(16, 32)
        self.tfm = nn.Transformer(16, 4, 2, 2, 64, 0.0, batch_first=True, norm_first=True)
        self.query_embs = nn.Parameter(torch.randn(1, 12, 16))


def published(folder, **changes):
    text, clip = make_towers(folder / "towers")
    torch.manual_seed(5)
    mapper = Mapper()
    state = {
        "model.logit_scale": torch.tensor(3.5), "model.input_embeddings.weight": torch.randn(3, 32),
        "model.visual_embeddings.weight": torch.randn(64, 32), "model.visual_embeddings.bias": torch.randn(64),
        "model.visual_fc.weight": torch.randn(16, 32), "model.visual_fc.bias": torch.randn(16),
        "model.ret_text_hidden_fcs.0.model.weight": torch.randn(16, 32),
        "model.ret_text_hidden_fcs.0.model.bias": torch.randn(16),
        **{MAPPER + name: value for name, value in mapper.state_dict().items()},
    } | changes  # fmt: skip
    arguments = {
        "opt_version": str(text), "visual_encoder": str(clip), "n_visual_tokens": 2, "ret_emb_dim": 16, "gen_emb_dim": 32,
        "text_emb_layers": [-1], "text_fc_mode": "gill_mapper", "ret_text_fc_mode": "linear", "num_gen_tokens": 3,
        "num_ret_tokens": 3, "num_clip_tokens": 12, "share_ret_gen": True,
    }  # fmt: skip
    (folder / "model_args.json").write_text(json.dumps(arguments))
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, folder / "pretrained_ckpt.pth.tar")
    return state, mapper


def convert(folder):
    main([str(folder), str(folder / "out"), "--diffusion_model", str(folder / "diffusion")])
    return FromageModel.from_pretrained(folder / "out")


@torch.no_grad()
def test_a_converted_checkpoint_retrieves_and_draws_as_its_tensors_say(tmp_path):
    state, mapper = published(tmp_path)
    make_pipeline().save_pretrained(tmp_path / "diffusion")
    model = convert(tmp_path)
    ids = model.processor.turn_ids([["show me a cat"]])
    table, rows = model.language_model.get_input_embeddings().weight, state["model.input_embeddings.weight"]
    inputs = torch.cat([table[torch.tensor(ids)], rows])[None]
    hidden = model.language_model.base_model(inputs_embeds=inputs).last_hidden_state[:, -3:]
    head = {part: state[f"model.ret_text_hidden_fcs.0.model.{part}"] for part in ("weight", "bias")}
    own = F.normalize(F.linear(hidden[:, 0], head["weight"], head["bias"]), dim=-1)
    torch.testing.assert_close(model.embed_dialogues(["show me a cat"]), own, atol=1e-5, rtol=1e-5)
    drawn = mapper.model(mapper.tfm(mapper.fc(hidden + rows), mapper.query_embs))
    torch.testing.assert_close(
        model.prompt_embeds(model.processor.contexts(["show me a cat"])), drawn, atol=1e-4, rtol=1e-4
    )
    assert model.generate("show me a cat", steps=1).size == (16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.visual_fc.weight": None}, "lacks model.visual_fc.weight"),
        ({"model.lm.weight": torch.zeros(2)}, "does not have: model.lm.weight"),
        ({"model.input_embeddings.weight": torch.zeros(9, 32)}, "3 rows of the .IMG. tokens"),
        ({MAPPER + "model.bias": torch.zeros(31)}, r"drawing.model.bias has shape \(31,\)"),
        (
            {MAPPER + "model.bias": torch.full((32,), float("nan"))},
            "NaN or infinity in what becomes drawing.model.bias",
        ),
        ({MAPPER + "tfm.encoder.norm.bias": None}, "differ from GILL's: drawing.tfm.encoder.norm.bias"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, changes, message):
    published(tmp_path, **changes)
    with pytest.raises(BadDataError, match=message):
        convert(tmp_path)
