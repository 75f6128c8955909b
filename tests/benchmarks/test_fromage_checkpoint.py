"""FROMAGe's published layout: converted, it embeds as its tensors say; what is wrong with a file is named."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.baselines.fromage import FromageModel
from benchmarks.baselines.fromage_checkpoint import NAMES, TABLE, convert_checkpoint, main
from tests.conftest import picture
from tests.tiny import make_towers
from train.json_files import BadDataError


def published(folder, **changes):
    """A checkpoint in the layout of FROMAGe's release over tiny towers; `changes` replace tensors, `None` drops one."""
    text, clip = make_towers(folder / "towers")
    folder.mkdir(exist_ok=True)
    torch.manual_seed(5)
    state = {
        "model.logit_scale": torch.tensor(3.5),
        "model.visual_embeddings.weight": torch.randn(64, 32), "model.visual_embeddings.bias": torch.randn(64),
        "model.visual_fc.weight": torch.randn(16, 32), "model.visual_fc.bias": torch.randn(16),
        "model.text_hidden_fcs.0.0.weight": torch.randn(16, 32), "model.text_hidden_fcs.0.0.bias": torch.randn(16),
        "ret_input_embeddings.weight": torch.randn(1, 32),
    } | changes  # fmt: skip
    state = {name: value for name, value in state.items() if value is not None}
    arguments = {
        "opt_version": str(text), "visual_encoder": str(clip), "n_visual_tokens": 2, "shared_emb_dim": 16,
        "text_emb_layers": [-1], "retrieval_token_idx": 50266, "num_appended_retrieval_tokens": 1,
    }  # fmt: skip
    (folder / "model_args.json").write_text(json.dumps(arguments))
    torch.save({"state_dict": state}, folder / "pretrained_ckpt.pth.tar")
    return state


def edit(folder, **fields):
    path = folder / "model_args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["row", "vector in bfloat16", "module.", "pruned", "table", "row as table"])
def test_a_converted_checkpoint_embeds_as_its_tensors_say(tmp_path, layout):
    state = published(tmp_path)
    if layout == "vector in bfloat16":
        state = {name: value.bfloat16() for name, value in state.items()}
        state["ret_input_embeddings.weight"] = state["ret_input_embeddings.weight"][0]
    row, table = state["ret_input_embeddings.weight"].reshape(1, 32), torch.randn(9, 32)
    if layout in ("pruned", "table", "row as table"):
        edit(tmp_path, retrieval_token_idx=7)
        table[7] = row
        state["model.input_embeddings.weight"] = row if layout == "row as table" else table
        if layout != "pruned":
            del state["ret_input_embeddings.weight"]
    prefix = "module." if layout == "module." else ""
    stored = {(prefix if name.startswith("model.") else "") + name: value for name, value in state.items()}
    torch.save({"state_dict": stored}, tmp_path / "pretrained_ckpt.pth.tar")
    convert_checkpoint(tmp_path, tmp_path / "ours")
    model = FromageModel.from_pretrained(tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(NAMES.values())

    state = {name: value.float() for name, value in state.items()}
    a, b = (model.processor.pixels([picture(i)]) for i in (1, 2))
    pooled = {i: model.clip.vision_model(p).pooler_output for i, p in ((1, a), (2, b))}
    image = pooled[2] @ state["model.visual_fc.weight"].T + state["model.visual_fc.bias"]
    assert torch.allclose(model.embed_images([picture(2)]), F.normalize(image, dim=-1), atol=1e-5)
    visual = pooled[1] @ state["model.visual_embeddings.weight"].T + state["model.visual_embeddings.bias"]
    table = model.language_model.get_input_embeddings().weight
    ids = model.processor.tokenizer.convert_tokens_to_ids(["Ċ", "h", "i"])
    inputs = torch.cat([visual.reshape(2, 32), table[[2, *ids]], row.float()])[None]  # BOS behind the image
    h = model.language_model.base_model(inputs_embeds=inputs).last_hidden_state[:, -1]
    context = h @ state["model.text_hidden_fcs.0.0.weight"].T + state["model.text_hidden_fcs.0.0.bias"]
    assert torch.allclose(model.embed_dialogues([[picture(1), "hi"]]), F.normalize(context, dim=-1), atol=1e-5)
    assert model.logit_scale.tolist() == [3.5]


def test_towers_elsewhere_and_the_command(tmp_path, monkeypatch, capsys):
    published(tmp_path)
    towers = {
        name: json.loads((tmp_path / "model_args.json").read_text())[name]
        for name in ("opt_version", "visual_encoder")
    }
    edit(tmp_path, opt_version="facebook/absent", visual_encoder="openai/absent")
    monkeypatch.setattr("sys.argv", [
        "x", str(tmp_path), str(tmp_path / "ours"),
        f"--text_model={towers['opt_version']}", f"--clip_model={towers['visual_encoder']}",
    ])  # fmt: skip
    main()
    assert str(tmp_path / "ours") in capsys.readouterr().out
    assert FromageModel.from_pretrained(tmp_path / "ours").config.text_model_name_or_path == towers["opt_version"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.visual_fc.bias": None}, "lacks model.visual_fc.bias"),
        ({"model.lm.weight": torch.zeros(2)}, "does not have: model.lm.weight"),
        ({"model.visual_fc.weight": torch.zeros(16, 31)}, r"visual_fc.weight has shape \(16, 31\).*\(16, 32\)"),
        ({"ret_input_embeddings.weight": torch.zeros(2, 32)}, r"ret_input_embeddings.weight has shape \(2, 32\)"),
        ({"model.logit_scale": torch.zeros(2)}, r"logit_scale has shape \(2,\)"),
        ({"model.logit_scale": torch.tensor(float("nan"))}, "NaN or infinity in what becomes logit_scale"),
        ({"model.logit_scale": 3.5}, "model.logit_scale is float, not floats"),
        ({"model.visual_fc.bias": torch.zeros(16, dtype=torch.long)}, "visual_fc.bias is torch.int64, not floats"),
        ({TABLE: torch.zeros(9, 31)}, r"input_embeddings.weight has shape \(9, 31\).*width 32"),
        ({TABLE: torch.zeros(0, 32)}, r"input_embeddings.weight has shape \(0, 32\)"),
        ({TABLE: torch.zeros(32)}, r"input_embeddings.weight has shape \(32,\)"),
        ({TABLE: torch.zeros(9, 32, dtype=torch.long)}, "input_embeddings.weight is torch.int64, not floats"),
        ({TABLE: torch.zeros(9, 32)}, "has 9 rows, but model_args.json says retrieval_token_idx=50266"),
        ({TABLE: torch.zeros(1, 32)}, r"ret_input_embeddings.weight is not \[RET\]'s row"),
        ({"ret_input_embeddings.weight": None}, "lacks ret_input_embeddings.weight"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, changes, message):
    published(tmp_path, **changes)
    with pytest.raises(BadDataError, match=message):
        convert_checkpoint(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_visual_tokens": 4}, "makes 2 visual tokens of width 32, but model_args.json says n_visual_tokens=4"),
        ({"shared_emb_dim": 8}, r"visual_fc.weight has shape \(16, 32\).*\(8, 32\)"),
        ({"shared_emb_dim": None}, "'shared_emb_dim' is NoneType"),
        ({"text_emb_layers": [-1, 1]}, r"text_emb_layers=\[-1, 1\]"),
        ({"num_appended_retrieval_tokens": 2}, "2 retrieval tokens"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, fields, message):
    published(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(BadDataError, match=message):
        convert_checkpoint(tmp_path, tmp_path / "ours")


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def test_a_file_that_holds_code_is_refused_unrun(tmp_path, capsys):
    published(tmp_path)
    path = tmp_path / "pretrained_ckpt.pth.tar"
    torch.save({"state_dict": {"model.logit_scale": Code()}}, path)
    with pytest.raises(BadDataError, match="would run code"):
        convert_checkpoint(tmp_path, tmp_path / "ours")
    assert "never run" not in capsys.readouterr().out


def test_absent_and_broken_files_are_named(tmp_path):
    published(tmp_path)
    path = tmp_path / "pretrained_ckpt.pth.tar"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not torch at all"):
        path.write_bytes(content)
        with pytest.raises(BadDataError, match=r"pretrained_ckpt.pth.tar: (not a whole|cannot be read)"):
            convert_checkpoint(tmp_path, tmp_path / "ours")
    torch.save({"weights": {}}, path)
    with pytest.raises(BadDataError, match="'state_dict'"):
        convert_checkpoint(tmp_path, tmp_path / "ours")
    path.unlink()
    with pytest.raises(BadDataError, match=r"pretrained_ckpt\.pth\.tar: no such file"):
        convert_checkpoint(tmp_path, tmp_path / "ours")
    (tmp_path / "model_args.json").unlink()
    with pytest.raises(BadDataError, match=r"model_args\.json: no such file"):
        convert_checkpoint(tmp_path, tmp_path / "ours")
