"""A GGUF becomes a folder once, whole or not at all; any other file is refused with its reason."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.gguf_file import write_gguf
from train import dequantise as module
from train.dequantise import dequantise


@pytest.fixture
def gguf(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_the_folder_is_the_llama_to_four_bits(tmp_path):
    original = write_gguf(tmp_path / "tiny.gguf")
    folder = dequantise(tmp_path / "tiny.gguf", tmp_path / "made" / "llm")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 128
    for name, tensor in original.state_dict().items():
        error = (model.state_dict()[name].float() - tensor).abs().max()
        assert error <= (0.05 if tensor.ndim == 2 else 0.01), (name, error)  # a step of Q4_1 is about 0.06
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        a, b = original(ids).logits, model.float()(ids).logits
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() > 0.9
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("b a")["input_ids"] == tokenizer.convert_tokens_to_ids(["b", "Ġa"])  # the merge, and no BOS
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 2)


def test_a_second_run_takes_what_is_there(gguf, tmp_path, monkeypatch):
    folder = dequantise(gguf, tmp_path / "llm")
    monkeypatch.setattr(module, "check", lambda _: pytest.fail("made again"))
    assert dequantise(gguf, tmp_path / "llm") == folder


def test_what_breaks_off_leaves_nothing(gguf, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.json, "dumps", fail)  # the stamp comes last: the weights are written by then
        with pytest.raises(KeyboardInterrupt):
            dequantise(gguf, tmp_path / "llm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.gguf"]
    assert json.loads((dequantise(gguf, tmp_path / "llm") / "gguf.json").read_text())["gguf"] == "tiny.gguf"


def test_a_folder_of_something_else_is_left_alone(gguf, tmp_path):
    dequantise(gguf, tmp_path / "llm")
    write_gguf(tmp_path / "other.gguf", seed=1)
    with pytest.raises(
        ValueError, match=r"the weights of another GGUF, tiny\.gguf: give another folder for other\.gguf"
    ):
        dequantise(tmp_path / "other.gguf", tmp_path / "llm")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds something else"):
        dequantise(gguf, tmp_path / "mine")


@pytest.mark.parametrize("share", [0.99, 0.5, 0.05, 0.001])
def test_a_truncated_file_is_named(gguf, tmp_path, share):
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[: max(6, int(share * len(whole)))])
    with pytest.raises(ValueError, match=r"tiny\.gguf is truncated or broken"):
        dequantise(gguf, tmp_path / "llm")
    assert not (tmp_path / "llm").exists()


def test_what_is_no_gguf_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.gguf is not a file"):
        dequantise(tmp_path / "absent.gguf", tmp_path / "llm")
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.gguf is no GGUF"):
        dequantise(tmp_path / "page.gguf", tmp_path / "llm")


def test_an_unknown_family_is_named(tmp_path):
    write_gguf(tmp_path / "odd.gguf", family="rwkv7")
    with pytest.raises(
        ValueError, match=r"'rwkv7', a family that transformers does not read from GGUF; it reads .*llama"
    ):
        dequantise(tmp_path / "odd.gguf", tmp_path / "llm")


def test_without_the_package_it_is_asked_for(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'modeling-unimur\[gguf\]'"):
        dequantise(gguf, tmp_path / "llm")
