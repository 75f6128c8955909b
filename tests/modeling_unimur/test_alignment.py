"""The canonical alignment: images and CLIP's texts come through maps of their own, everywhere an embedding is made."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modeling_unimur import UniMuRConfig, UniMuRModel
from tests.conftest import picture

DIALOGUES = ["hello", ["look", picture(1)]]


@pytest.fixture
def canonical(fresh):
    return lambda **fields: fresh(**({"alignment": "canonical", "shared_width": 5} | fields))


def test_images_come_through_the_image_map(canonical):
    model = canonical()
    pixels = model.processor.pixels([picture(1), picture(2)])
    with torch.no_grad():
        pooled = model.clip.vision_model(pixels).pooler_output
        expected = F.normalize(pooled @ model.W_v2m.weight.T + model.W_v2m.bias, dim=-1)
    embeds = model.embed_images([picture(1), picture(2)])
    assert embeds.shape == (2, 5)
    torch.testing.assert_close(embeds, expected, atol=1e-6, rtol=0)

    model = canonical(matching_feature="projected")
    with torch.no_grad():
        unit = F.normalize(model.clip.visual_projection(model.clip.vision_model(pixels).pooler_output), dim=-1)
        expected = F.normalize(unit @ model.W_v2m.weight.T + model.W_v2m.bias, dim=-1)
    torch.testing.assert_close(model.embed_images([picture(1), picture(2)]), expected, atol=1e-6, rtol=0)


def test_texts_of_clip_come_through_theirs(canonical):
    model = canonical(text_candidates="clip_text")
    words = model.processor.clip_texts(["a dog"])
    embeds = model.encode_clip_texts(words["clip_input_ids"], words["clip_attention_mask"])
    with torch.no_grad():
        unit = F.normalize(embeds, dim=-1)
        expected = F.normalize(unit @ model.W_x2m.weight.T + model.W_x2m.bias, dim=-1)
    torch.testing.assert_close(model.embed_texts(["a dog"]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_saved_equals_loaded(canonical, tmp_path, full):
    model = canonical()
    model.save_pretrained(tmp_path / "saved", with_towers=full, golden=True)
    keys = {name.split(".")[0] for name in load_file(tmp_path / "saved" / "model.safetensors")}
    assert {"W_i2t", "W_t2m", "W_v2m", "W_x2m"} <= keys
    again = UniMuRModel.from_pretrained(tmp_path / "saved", self_check=True)
    assert again.fingerprint == model.fingerprint and again.fingerprint["dimension"] == 5
    torch.testing.assert_close(again.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES), atol=1e-6, rtol=0)
    torch.testing.assert_close(again.embed_images([picture(2)]), model.embed_images([picture(2)]), atol=1e-6, rtol=0)
    assert again.W_v2m.weight.dtype == torch.float32 and not again.W_v2m.weight.requires_grad


def test_a_pool_and_a_conversation_live_in_the_space(canonical, tmp_path):
    model = canonical()
    pool = model.build_pool(images=[picture(i) for i in range(3)], texts=["a dog", "a cat"], show_progress_bar=False)
    pool.save_to_disk(tmp_path / "pool")
    pool = type(pool).load_from_disk(tmp_path / "pool")
    assert model.retrieve(["a dog"], pool).text == "a dog" and pool.made_by["dimension"] == 5
    talk = model.conversation().say("hello").say("a dog")
    torch.testing.assert_close(talk.embed(), model.embed_dialogues([["hello", "a dog"]])[0], atol=1e-5, rtol=0)
    other = canonical()
    with torch.no_grad():
        other.W_v2m.weight.add_(1)
    with pytest.raises(ValueError, match="maps"):  # the image map is part of what a pool was made by
        other.retrieve(["a dog"], pool)


def test_the_losses_train_w_t2m_and_by_choice_the_image_map(canonical):
    for choice in (False, True):
        model = canonical(train_image_map=choice).train()
        batch = model.processor.pairs([picture(i) for i in range(4)], ["a dog", "a cat", "a cow", "a hen"])
        outputs = model(**batch)
        assert outputs.image_embeds.shape == outputs.text_embeds.shape == (4, 5)
        outputs.loss.backward()
        moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {"W_i2t", "W_t2m", "logit_scale"} | ({"W_v2m"} if choice else set())


def test_the_losses_are_those_of_the_maps_by_hand(canonical):
    model = canonical()
    batch = model.processor.pairs([picture(i) for i in range(3)], ["a dog", "a cat", "a cow"])
    with torch.no_grad():
        outputs = model(**batch)
        e, v = (F.normalize(x, dim=-1) for x in (outputs.ret_embeds, outputs.image_embeds))
        logits, own = e @ v.T / 0.07, torch.arange(3)
        expected = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        texts = model.encode_clip_texts(batch["targets"]["input_ids"], batch["targets"]["attention_mask"])
        targets = F.normalize(model.W_x2m(F.normalize(texts, dim=-1)), dim=-1)
    torch.testing.assert_close(outputs.loss_vm, expected)
    torch.testing.assert_close(outputs.loss_tm, (outputs.ret_embeds - targets).square().mean())
    torch.testing.assert_close(
        outputs.image_embeds, model.W_v2m(model.encode_images(batch["images"]["pixel_values"])[0])
    )


def test_another_width_gives_new_maps(canonical):
    model = canonical()
    model.set_shared_space(7, "projected")
    assert model.config.embedding_width == 7 and model.W_v2m.weight.shape == (7, model.config.clip_width)
    assert model.embed_images([picture(1)]).shape == (1, 7)
    assert model.W_t2m.weight.requires_grad and not model.W_x2m.weight.requires_grad
    with pytest.raises(ValueError, match="shared_width=0"):
        model.set_shared_space(0, "pooled")


def test_a_checkpoint_from_before_is_the_papers(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("alignment", "shared_width", "matching_feature", "train_image_map"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = UniMuRModel.from_pretrained(tmp_path)
    assert again.config.alignment == "paper" and again.fingerprint == model.fingerprint
    assert not hasattr(again, "W_v2m") and again.embed_images([picture(1)]).shape == (1, again.config.clip_width)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alignment": "mine"}, "alignment='mine' is not one of"),
        ({"alignment": "canonical"}, "the canonical space needs its width"),
        ({"shared_width": 5}, "the paper's has CLIP's"),
        ({"train_image_map": True}, "the paper's alignment has no image map"),
        (
            {"alignment": "canonical", "shared_width": 5, "image_feature": "projected"},
            "set matching_feature='projected'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(Exception, match=message):
        UniMuRConfig(**fields)
