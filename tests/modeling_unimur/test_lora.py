"""LoRA by choice: a standard PEFT adapter beside the maps, in both kinds of checkpoint; off by default."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_unimur import UniMuRModel
from tests.conftest import picture

peft = pytest.importorskip("peft", reason="peft is optional: pip install 'modeling-unimur[lora]'")
DIALOGUES = ["hello", ["look", picture(1)]]


@pytest.fixture
def model(fresh):
    model = fresh()
    plain = model.embed_dialogues(DIALOGUES), model.fingerprint
    model.add_lora(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(plain[0], model.embed_dialogues(DIALOGUES))  # B starts at zero
    assert model.fingerprint["towers"] == plain[1]["towers"] and model.fingerprint != plain[1]
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert not torch.allclose(plain[0], model.embed_dialogues(DIALOGUES), atol=1e-3)
    return model


def test_only_the_maps_and_the_lora_are_trained(model):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"W_i2t", "W_t2m", "logit_scale", "language_model"}
    assert all(".lora_" in name for name in trained if name.startswith("language_model"))
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize("full", [False, True])
def test_saved_equals_loaded(model, tmp_path, full):
    model.save_pretrained(tmp_path, with_towers=full)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not any("lora" in n or "base_layer" in n for n in names)
    again = UniMuRModel.from_pretrained(tmp_path)
    assert torch.equal(again.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES))
    assert again.fingerprint == model.fingerprint
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_peft_loads_it_beside_ours(model, tmp_path):
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model.config.text_model_name_or_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    ids = torch.tensor([[2, 10, 11, 12]])
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model.language_model(ids).logits, atol=1e-6)


def test_without_peft_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    import modeling_unimur.towers_unimur as towers

    monkeypatch.setattr(towers, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install peft"):
        UniMuRModel.from_pretrained(tmp_path)
