"""Both checkpoint kinds: saved = loaded, here and in a process without the package; broken ones are named errors."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from modeling_unimur import UniMuRConfig, UniMuRModel
from tests.conftest import KINDS, picture
from tests.processes import run_script
from tests.tiny import make_towers

DIALOGUES = ["hello", ["look", picture(1)]]
REMOTE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_unimur", "train"):
            raise ImportError("the package must not be needed: " + name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
path, out = sys.argv[1:]
model = AutoModel.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
pool = model.build_pool(texts=["a dog", "a panda"], show_progress_bar=False)
assert model.retrieve("a panda", pool).text == "a panda"
assert AutoProcessor.from_pretrained(path, trust_remote_code=True).n_visual_tokens == 2
assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "unimur"
torch.save(model.embed_dialogues(["hello", "a panda"]), out)
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full", [False, True])
def test_saved_equals_loaded(tiny, tmp_path, kind, full):
    model = tiny(kind)
    model.save_pretrained(tmp_path, with_towers=full)
    keys = set(load_file(tmp_path / "model.safetensors"))
    trained = {"W_i2t.weight", "W_i2t.bias", "W_t2m.weight", "W_t2m.bias", "ret_embedding", "logit_scale"}
    assert keys == trained if not full else keys > trained
    again = UniMuRModel.from_pretrained(tmp_path)
    assert again.config.is_adapter is not full and model.config.is_adapter
    assert torch.equal(again.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES))
    assert torch.equal(again.embed_images([picture(2)]), model.embed_images([picture(2)]))
    assert again.fingerprint == model.fingerprint
    trainable = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trainable == trained - {"ret_embedding"}  # from_pretrained thaws what __init__ froze


def test_a_full_checkpoint_saved_again_is_still_full(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "a", with_towers=True)
    UniMuRModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = UniMuRModel.from_pretrained(tmp_path / "b")
    assert torch.equal(again.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES))


def test_only_the_main_process_writes_what_lies_beside_the_weights(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "by place", False)
    model.save_pretrained(tmp_path / "by name", is_main_process=False)
    assert not list(tmp_path.rglob("processor_config.json"))


@pytest.mark.parametrize("full", [False, True])
def test_loads_in_a_process_without_the_package(tiny, tmp_path, full):
    model = tiny()
    model.save_pretrained(tmp_path / "c", with_towers=full)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = run_script(REMOTE, tmp_path / "c", tmp_path / "out.pt", cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.allclose(theirs, model.embed_dialogues(["hello", "a panda"]), atol=1e-6)


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["ret_embedding", "W_t2m.weight", "logit_scale"])
def test_a_missing_tensor_is_named(tiny, tmp_path, name, full):
    tiny().save_pretrained(tmp_path, with_towers=full)
    _edit(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"lacks tensors: {name}"):
        UniMuRModel.from_pretrained(tmp_path)


def test_a_missing_tower_tensor_is_named(tiny, tmp_path):
    tiny().save_pretrained(tmp_path, with_towers=True)
    _edit(tmp_path, lambda tensors: tensors.pop("clip.visual_projection.weight"))
    with pytest.raises(ValueError, match=r"clip\.visual_projection\.weight"):
        UniMuRModel.from_pretrained(tmp_path)


def test_an_unknown_tensor_is_named(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    _edit(tmp_path, lambda tensors: tensors.update(W_extra=torch.zeros(2)))
    with pytest.raises(ValueError, match="unknown tensors: W_extra"):
        UniMuRModel.from_pretrained(tmp_path)


def test_a_misshapen_tensor_is_an_error(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    _edit(tmp_path, lambda tensors: tensors.update({"W_t2m.weight": torch.zeros(24, 5)}))
    with pytest.raises(ValueError, match=r"another shape .*: W_t2m\.weight is \(24, 5\), expected \(24, 32\)"):
        UniMuRModel.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"holds no model\.safetensors.*never from a pickled file"):
        UniMuRModel.from_pretrained(tmp_path)


def test_a_misspelt_field_of_a_saved_config_is_named(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_visual_token"] = config.pop("n_visual_tokens")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="no field 'n_visual_token'; did you mean 'n_visual_tokens'"):
        UniMuRModel.from_pretrained(tmp_path)


def test_a_checkpoint_without_its_processor_says_so(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(OSError, match=r"holds no processor_config\.json"):
        UniMuRModel.from_pretrained(tmp_path).embed_dialogues(["hello"])
    with pytest.raises(OSError, match=r"holds no processor_config\.json"):
        AutoProcessor.from_pretrained(tmp_path)  # transformers would hand out a bare tokenizer


def test_a_checkpoint_without_clips_tokenizer_says_so(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    for file in (tmp_path / "clip_tokenizer").iterdir():
        file.unlink()
    (tmp_path / "clip_tokenizer").rmdir()
    with pytest.raises(ValueError, match="lacks its 'clip_tokenizer/' folder"):
        UniMuRModel.from_pretrained(tmp_path).embed_texts(["hello"])


def test_the_self_check_finds_drift(tiny, tmp_path):
    tiny().save_pretrained(tmp_path, with_towers=True, golden=True)
    model = UniMuRModel.from_pretrained(tmp_path, self_check=True)
    assert max(model.self_check().values()) < 1e-5
    _edit(tmp_path, lambda tensors: tensors["W_t2m.bias"].mul_(1.5))
    with pytest.raises(ValueError, match="golden dialogue differs by"):
        UniMuRModel.from_pretrained(tmp_path, self_check=True)
    (tmp_path / "golden.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no golden\.safetensors"):
        UniMuRModel.from_pretrained(tmp_path, self_check=True)


def test_a_full_checkpoint_remembers_where_its_towers_came_from(fresh, tmp_path):
    model = fresh()
    model.config.text_model_name_or_path = "facebook/opt-6.7b"
    model.save_pretrained(tmp_path, with_towers=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_model_source"] == "facebook/opt-6.7b" and config["text_model_name_or_path"] is None
    assert config["clip_model_source"] is None  # a folder's name says nothing to others
    assert model.config.text_model_name_or_path == "facebook/opt-6.7b" and model.config.text_model_source is None


def test_an_old_transformers_is_told_the_version_needed(tiny, tmp_path):
    """On releases that lack what the code imports, the first line must speak before the imports fail."""
    tiny().save_pretrained(tmp_path)
    script = """
import sys, transformers
transformers.__version__ = "4.57.0"
sys.path.insert(0, sys.argv[1])
import importlib.util
spec = importlib.util.spec_from_file_location("configuration_unimur", sys.argv[1] + "/configuration_unimur.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
    done = run_script(script, tmp_path, cwd=tmp_path, environment=dict(os.environ))
    assert done.returncode != 0
    stated = re.search(r'"transformers>=(.*?),', (Path(__file__).parents[2] / "pyproject.toml").read_text())[1]
    assert f"UniMuR needs transformers {stated} or newer" in done.stderr
    assert re.search(r"UniMuR needs transformers 5\.\d+ or newer, and 4\.57\.0 is installed: pip install", done.stderr)


def test_towers_of_another_width_are_refused(tiny, tmp_path):
    tiny("opt").save_pretrained(tmp_path / "a")
    narrow, _ = make_towers(tmp_path / "narrow", "opt-350m")
    with pytest.raises(ValueError, match=r"text_width 32.* have 16: these are not the towers it was trained with"):
        UniMuRModel.from_pretrained(tmp_path / "a", text_model_name_or_path=str(narrow))


def test_an_absent_tower_says_which_and_what_to_do(tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "a")
    with pytest.raises(OSError, match=r"text_model 'nowhere/opt'.*Pass text_model_name_or_path"):
        UniMuRModel.from_pretrained(tmp_path / "a", text_model_name_or_path="nowhere/opt")


def test_towers_can_be_pointed_elsewhere(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    text, clip = config["text_model_name_or_path"], config["clip_model_name_or_path"]
    config |= {"text_model_name_or_path": "gone/opt", "clip_model_name_or_path": "gone/clip"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    moved = UniMuRModel.from_pretrained(tmp_path / "a", text_model_name_or_path=text, clip_model_name_or_path=clip)
    assert torch.equal(moved.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 0.1}, "did you mean 'temperature'"),
        ({"text_matching": "cosine"}, "text_matching='cosine'"),
        ({"text_candidates": "avg"}, "text_candidates='avg'"),
        ({"temperature": 0.0}, "must be positive"),
        ({"lambda2": -1.0}, "lambda2=-1.0"),
        ({"n_visual_tokens": 0}, "n_visual_tokens=0"),
        ({"text_model_name_or_path": "a"}, "names both towers"),
    ],
)
def test_bad_config_fields_are_refused(fields, message):
    with pytest.raises(Exception, match=message):  # strict dataclasses wrap a ValueError
        UniMuRConfig(**fields)


def test_config_round_trips(tmp_path):
    config = UniMuRConfig(text_config={"model_type": "qwen2", "hidden_size": 48}, n_visual_tokens=4, lambda2=5.0)
    config.save_pretrained(tmp_path)
    again = UniMuRConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.text_config.model_type, again.text_width, again.n_visual_tokens) == ("qwen2", 48, 4)
    assert again.get_text_config() is again.text_config


def test_ret_starts_from_the_named_token(fresh, tmp_path):
    model = fresh()
    table = model.language_model.get_input_embeddings().weight
    assert torch.allclose(model.ret_embedding, table.mean(0), atol=1e-6)
    config = model.config
    towers = config.text_model_name_or_path, config.clip_model_name_or_path
    hashed = UniMuRModel.from_pretrained_towers(*towers, model.processor, ret_init="#")
    assert torch.equal(hashed.ret_embedding, table[model.processor.tokenizer.convert_tokens_to_ids("#")])
    with pytest.raises(ValueError, match="2 tokens"):
        UniMuRModel.from_pretrained_towers(*towers, model.processor, ret_init="##")


def test_a_model_without_a_checkpoint_asks_for_its_processor(fresh):
    model = fresh()
    model._processor = None
    with pytest.raises(ValueError, match=r"set model\.processor"):
        model.embed_dialogues(["hi"])
