"""Causal language models beyond those of `KINDS`: what works, what falls back, what is refused. All: tests.stress.families."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.stress import families
from tests.tiny import init_weights, make_processor

# Scaled embeddings, soft caps and a window; ALiBi; a window; a state-space model; convolutions; one beside a vision tower.
FAMILIES = {
    "gemma2": (True, True), "bloom": (False, False), "mistral": (True, True), "mamba": (False, False),
    "lfm2_moe": (False, False), "gemma3": (True, True),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "expected"), FAMILIES.items())
def test_a_family_works(kind, expected):
    result = families.check(kind)
    assert result["works"] and result["packs"] == expected[0]
    if expected[1]:
        assert result["converses"] is True
    else:
        assert "a conversation continues from cached keys and values" in result["converses"]


def test_sequences_beyond_the_window_are_padded_and_it_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(families.MORE, "mistral", {"sliding_window": 8})
    model = families.make("mistral", tmp_path)
    items = [{"caption": None, "context": [["a long text of letters"]], "image": 0, "text": "b"} for _ in range(2)]
    padded, packed = (model.processor.documents(items, [picture(0)], pack=pack) for pack in (False, True))
    with torch.no_grad():
        assert torch.equal(model(**packed).ret_embeds, model(**padded).ret_embeds)
    assert "exceed the LLM's window of 8: they are padded, not packed" in caplog.text


def test_what_needs_the_tokens_of_its_inputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="type 'gemma4_text' does not run from input embeddings"):
        families.make("gemma4_text", tmp_path)


def test_the_page_has_every_type_once_and_every_reason():
    rows = {
        "opt": {"works": True, "packs": True, "converses": True},
        "xglm": {"works": True, "packs": False, "converses": True},
        "mamba": {"works": True, "packs": False, "converses": "refused"},
        "ctrl": {"works": False, "why": "ValueError: a | b"},
    }
    lines = families.page(rows).splitlines()
    assert "Each of the 4 types" in lines[2] and "; 3 work:" in lines[2]
    for start, kinds in (("**Everything", "opt"), ("**Training pads", "xglm, mamba"), ("**No `conv", "mamba")):
        (line,) = [line for line in lines if line.startswith(start)]
        assert line.endswith(f"** {kinds}.") and f"({len(kinds.split())})" in line
    assert lines[-1] == r"| ctrl | ValueError: a \| b |"


def test_what_looks_ahead_is_refused(tmp_path, monkeypatch):
    families.make("opt", tmp_path)
    monkeypatch.setitem(families.MORE, "bert", {"is_decoder": False})
    init_weights(AutoModelForCausalLM.from_config(families.tiny_config("bert"))).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"type 'bert' lets a position see those after it.*is_decoder"):
        UniMuRModel.from_pretrained_towers(
            str(tmp_path / "text"), str(tmp_path / "clip"), make_processor(max_length=96)
        )
