"""The image-text tower may be a CLIP, a MetaCLIP 2 or a SigLIP; towers load whole or not at all; the rest is refused."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AltCLIPConfig, AutoModel, Siglip2Config, SiglipConfig

from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuRProcessor
from modeling_unimur.losses_unimur import sigmoid_matching_loss
from modeling_unimur.towers_unimur import attention_window, family
from tests.conftest import picture
from tests.tiny import make_processor, make_towers

DIALOGUES = ["hi", ["look", picture(1), "what is it?"]]
TEXTS = ["a Dog", "a panda in a hat"]


@pytest.fixture(scope="module", params=["siglip", "metaclip_2"])
def towers(request, tmp_path_factory):
    return make_towers(tmp_path_factory.mktemp(request.param), clip_kind=request.param)


def made(towers, **fields):
    processor = UniMuRProcessor.from_pretrained_towers(*towers, n_visual_tokens=2)
    return UniMuRModel.from_pretrained_towers(*map(str, towers), processor, **fields).eval()


def test_its_embeddings_are_the_towers_own(towers):
    model, base = made(towers, text_candidates="clip_text"), AutoModel.from_pretrained(towers[1]).eval()
    words = model.processor.clip_tokenizer
    padding = (
        {"padding": "max_length", "max_length": 16, "truncation": True}
        if base.config.model_type == "siglip"
        else {"padding": True}
    )
    with torch.no_grad():
        images = base.get_image_features(pixel_values=model.processor.pixels([picture(1), picture(2)])).pooler_output
        texts = words(TEXTS, return_tensors="pt", **padding)
        if base.config.model_type == "siglip":
            texts = {"input_ids": texts["input_ids"]}  # trained without a mask
        texts = base.get_text_features(**texts).pooler_output
    assert torch.allclose(model.embed_images([picture(1), picture(2)]), F.normalize(images, dim=-1), atol=1e-6)
    assert torch.allclose(model.embed_texts(TEXTS), F.normalize(texts, dim=-1), atol=1e-6)
    assert torch.allclose(model.embed_texts(TEXTS[:1]), model.embed_texts(TEXTS)[:1], atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_saved_equals_loaded(towers, tmp_path, full):
    model = made(towers)
    model.save_pretrained(tmp_path, with_towers=full)
    again = UniMuRModel.from_pretrained(tmp_path)
    assert again.fingerprint == model.fingerprint and type(again.clip) is type(model.clip)
    assert torch.equal(again.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES))
    assert torch.equal(again.embed_texts(TEXTS), model.embed_texts(TEXTS))


@pytest.mark.parametrize("fields", [{}, {"alignment": "canonical", "shared_width": 5}, {"visual_matching": "sigmoid"}])
def test_it_trains(towers, fields):
    model = made(towers, **fields).train()
    outputs = model(**model.processor.pairs([picture(i) for i in range(3)], ["a dog", "a cat", "a cow"]))
    outputs.loss.backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"W_i2t", "W_t2m", "logit_scale"} | ({"logit_bias"} if "visual_matching" in fields else set())


def test_siglip_without_its_text_length_is_refused(tmp_path):
    text, clip = make_towers(tmp_path, clip_kind="siglip")
    processor = UniMuRProcessor.from_pretrained_towers(text, clip)
    assert processor.clip_text_length == 16 and processor.clip_texts(["a"])["clip_input_ids"].shape == (1, 16)
    short = UniMuRProcessor(processor.image_processor, processor.tokenizer, processor.clip_tokenizer, max_length=128)
    with pytest.raises(ValueError, match="needs 16: make the processor with clip_text_length=16"):
        UniMuRModel.from_pretrained_towers(str(text), str(clip), short)
    assert short.fingerprint != processor.fingerprint  # a pool's texts would be others
    with pytest.raises(ValueError, match="it is another model's tokenizer"):
        UniMuRModel.from_pretrained_towers(str(text), str(clip), make_processor(clip_text_length=16))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AltCLIPConfig(), "type 'altclip'.*Supported are CLIP, MetaCLIP"),
        (Siglip2Config(), r"type 'siglip2'.*any resolution \(NaFlex\).*Supported are"),
        (SiglipConfig(vision_config={"vision_use_head": False}), "without its pooling head"),
    ],
)
def test_what_is_neither_is_refused_in_words(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        family(config)
    text, clip = make_towers(tmp_path)
    config.save_pretrained(clip)
    with pytest.raises(ValueError, match=message):
        UniMuRModel.from_pretrained_towers(str(text), str(clip), make_processor())


@pytest.mark.parametrize(
    ("part", "tensor"),
    [("text", "model.decoder.layers.1.fc1.weight"), ("clip", "vision_model.encoder.layers.0.mlp.fc1.weight")],
)
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_a_tower_is_whole_or_refused(tmp_path, part, tensor, change):
    folder = make_towers(tmp_path)[part == "clip"]
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors[tensor]
    elif change == "extra":
        tensors["more.weight"] = torch.zeros(2)
    else:
        tensors[tensor] = tensors[tensor][:3].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = {"missing": f"lacks tensors: .*{re.escape(tensor)}", "extra": "holds the unknown tensors: more.weight",
               "misshapen": f"another shape.*{re.escape(tensor)}"}  # fmt: skip
    kind = "clip_model" if part == "clip" else "text_model"
    if change != "misshapen":
        message[change] = f"base {kind} .*{message[change]}"
    with pytest.raises(ValueError, match=message[change]):
        UniMuRModel.from_pretrained_towers(str(tmp_path / "text"), str(tmp_path / "clip"), make_processor())


def test_buffers_of_older_releases_are_no_extra_tensors(tmp_path):
    _, clip = make_towers(tmp_path)
    tensors = load_file(clip / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, clip / "model.safetensors", metadata={"format": "pt"})
    UniMuRModel.from_pretrained_towers(str(tmp_path / "text"), str(clip), make_processor())


def test_the_sigmoid_loss_is_siglips():
    torch.manual_seed(0)
    e, v, further = torch.randn(3, 4), torch.randn(3, 4), F.normalize(torch.randn(2, 4), dim=-1)
    cosines = F.normalize(e, dim=-1) @ F.normalize(v, dim=-1).T
    pairs = [(cosines[i, j] * 5 - 2) * (1 if i == j else -1) for i in range(3) for j in range(3)]
    expected = -sum(F.logsigmoid(pair) for pair in pairs) / 3
    assert torch.allclose(sigmoid_matching_loss(e, v, 5.0, -2.0), expected)
    more = -F.logsigmoid(-(F.normalize(e, dim=-1) @ further.T * 5 - 2)).sum() / 3
    assert torch.allclose(sigmoid_matching_loss(e, v, 5.0, -2.0, further), expected + more)
    own = F.normalize(v[:1], dim=-1)  # a past copy of a caption's own image is no negative of it
    others = -F.logsigmoid(-(F.normalize(e[1:], dim=-1) @ own.T * 5 - 2)).sum() / 3
    assert torch.allclose(sigmoid_matching_loss(e, v, 5.0, -2.0, own), expected + others)
    assert sigmoid_matching_loss(e[:0], v[:0], 5.0, -2.0).item() == 0


def test_the_bias_is_the_models_own_and_starts_where_the_config_says(fresh, tmp_path):
    model = fresh(visual_matching="sigmoid", logit_bias=-3)
    assert model.logit_bias.item() == -3.0 and model.logit_bias.requires_grad
    model.save_pretrained(tmp_path / "saved")
    assert "logit_bias" in load_file(tmp_path / "saved" / "model.safetensors")
    assert UniMuRModel.from_pretrained(tmp_path / "saved").fingerprint == model.fingerprint
    assert "logit_bias" not in dict(fresh().named_parameters())


def test_a_window_is_the_shortest_of_its_layers():
    kinds = [({"model_type": "mistral", "sliding_window": 16}, 16), ({"model_type": "opt"}, None),
             ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, None)]  # fmt: skip
    for text, window in kinds:
        assert attention_window(UniMuRConfig(text_config=text).text_config) == window


def test_the_config_of_siglip_2_is_read_by_the_trainer():
    from train.arguments import CONFIGS, parse

    model_args = parse(["--config", str(CONFIGS / "siglip2.yaml"), "--train_data", "x"])[0]
    assert model_args.clip_model == "google/siglip2-so400m-patch14-384"
    assert json.dumps(vars(model_args), default=str)
