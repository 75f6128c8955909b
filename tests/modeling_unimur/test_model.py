"""Equivalences: batched = single, left = right padding, towers = the models run directly, frozen stays frozen."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CLIPModel

from tests.conftest import KINDS, picture

DIALOGUES = [
    "hi",
    ["look at this one", picture(1), "what is the animal doing?", "it is eating.", picture(2)],
    [{"role": "user", "content": [{"type": "image", "image": picture(3)}, {"type": "text", "text": "show me more!"}]}],
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_never_changes_an_embedding(tiny, kind):
    model = tiny(kind)
    together = model.embed_dialogues(DIALOGUES)
    assert together.shape == (3, 24) and together.dtype == torch.float32
    assert torch.allclose(together.norm(dim=-1), torch.ones(3))
    alone = torch.cat([model.embed_dialogues([d]) for d in DIALOGUES])
    backwards = model.embed_dialogues(DIALOGUES[::-1], batch_size=2).flip(0)
    assert torch.allclose(together, alone, atol=2e-6) and torch.allclose(together, backwards, atol=2e-6)
    assert (together @ together.T - torch.eye(3)).abs().max() > 0.01  # not one constant vector


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_equals_right_padding(tiny, kind):
    model = tiny(kind)
    right = model.processor.contexts(DIALOGUES)
    ids, mask = right["input_ids"], right["attention_mask"]
    shift = (mask == 0).sum(1).tolist()
    assert max(shift) > 0
    left_ids, left_mask = (torch.stack([r.roll(s) for r, s in zip(x, shift, strict=True)]) for x in (ids, mask))
    with torch.no_grad():
        features = model.encode_images(right["pixel_values"])[0]
        expected = model.encode_contexts(ids, mask, features)
        assert torch.allclose(model.encode_contexts(left_ids, left_mask, features), expected, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_llm_is_its_base(tiny, kind):
    model = tiny(kind)
    base = AutoModelForCausalLM.from_pretrained(model.config.text_model_name_or_path).eval()
    inputs = model.processor.texts(["a panda in the forest"], end_with_ret=False)
    with torch.no_grad():
        hidden = model.last_outputs(model.input_embeddings(inputs["input_ids"]), inputs["attention_mask"])
        ours = model.language_model.get_output_embeddings()(hidden)
        theirs = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert len(base.get_input_embeddings().weight) == len(model.language_model.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", KINDS)
def test_caption_loss_is_the_llms_own_loss_behind_a_visual_prefix(tiny, kind):
    model = tiny(kind)
    batch = model.processor.pairs([picture(1), picture(2)], ["a dog", "a panda in a hat"])
    with torch.no_grad():
        features = model.encode_images(batch["images"]["pixel_values"])[0]
        captions = batch["captions"]
        embeds = model.input_embeddings(captions["input_ids"], features)
        logits = model.language_model(
            inputs_embeds=embeds, attention_mask=captions["attention_mask"],
            position_ids=(captions["attention_mask"].cumsum(-1) - 1).clamp(min=0),
        ).logits  # fmt: skip
        expected = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), captions["labels"][:, 1:].flatten(), ignore_index=-100
        )
        assert torch.allclose(model(**batch).loss_cap, expected, atol=1e-5)


def test_clip_is_its_base(tiny):
    model = tiny()
    base = CLIPModel.from_pretrained(model.config.clip_model_name_or_path).eval()
    pixels = model.processor.pixels([picture(1), picture(2)])
    texts = model.processor.clip_texts(["a dog", "a panda in a hat"])
    with torch.no_grad():
        images = base.get_image_features(pixel_values=pixels).pooler_output
        words = base.get_text_features(
            input_ids=texts["clip_input_ids"], attention_mask=texts["clip_attention_mask"]
        ).pooler_output
        assert torch.allclose(model.encode_images(pixels)[1], images, atol=1e-6)
        assert torch.allclose(model.encode_clip_texts(**{k[5:]: v for k, v in texts.items()}), words, atol=1e-6)
    assert torch.allclose(model.embed_images([picture(1), picture(2)]), F.normalize(images, dim=-1), atol=1e-6)


def test_special_tokens_never_reach_the_table(tiny):
    model = tiny()
    table = model.language_model.get_input_embeddings().weight
    assert model.config.ret_token_id >= len(table)  # would be out of range
    inputs = model.processor.contexts([["a", picture(1)]])
    with torch.no_grad():
        embeds = model.input_embeddings(inputs["input_ids"], model.encode_images(inputs["pixel_values"])[0])
    assert torch.equal(embeds[0, -1], model.ret_embedding)
    at_image = inputs["input_ids"][0] == model.config.image_token_id
    visual = model.W_i2t(model.encode_images(inputs["pixel_values"])[0]).view(2, -1)
    assert at_image.sum() == 2 and torch.equal(embeds[0][at_image], visual)


def test_an_image_in_the_context_matters_and_so_does_its_place(tiny):
    model = tiny()
    a, b, c = model.embed_dialogues([["see", picture(1)], ["see", picture(2)], [picture(1), "see"]])
    assert (a - b).abs().max() > 1e-3 and (a - c).abs().max() > 1e-3


def test_eager_equals_sdpa(tiny):
    model = tiny()
    expected = model.embed_dialogues(DIALOGUES)
    before = model.language_model.config._attn_implementation
    try:
        model.language_model.set_attn_implementation("eager")
        assert torch.allclose(model.embed_dialogues(DIALOGUES), expected, atol=2e-6)
    finally:
        model.language_model.set_attn_implementation(before)


def test_only_the_maps_and_the_temperature_are_trained(tiny, fresh):
    def trained(model):
        return {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}

    assert trained(tiny()) == {"W_i2t", "W_t2m", "logit_scale"}
    assert trained(fresh(train_ret_embedding=True, learn_temperature=False)) == {"W_i2t", "W_t2m", "ret_embedding"}


def test_towers_stay_in_eval(tiny):
    model = tiny().train()
    assert model.training and not model.language_model.training and not model.clip.training
    model.eval()


@pytest.mark.parametrize("space", ["ret", "last_output", "input_embeddings", "clip_text"])
def test_text_candidate_spaces(tiny, space):
    model = tiny()
    texts = ["a dog", "a panda eats bamboo in the forest"]
    before = model.config.text_candidates
    model.config.text_candidates = space
    try:
        embeds = model.embed_texts(texts)
        assert torch.allclose(embeds, torch.cat([model.embed_texts([t]) for t in texts]), atol=2e-6)
        inputs = model.processor.texts(texts[:1], end_with_ret=False)
        with torch.no_grad():
            rows = model.input_embeddings(inputs["input_ids"])
            expected = {
                "ret": lambda: model.embed_dialogues(texts[:1]),
                "input_embeddings": lambda: model.W_t2m(rows.mean(1)),
                "last_output": lambda: model.W_t2m(model.last_outputs(rows, inputs["attention_mask"]).mean(1)),
                "clip_text": lambda: model.encode_clip_texts(
                    **{k[5:]: v for k, v in model.processor.clip_texts(texts[:1]).items()}
                ),
            }[space]()
        assert torch.allclose(embeds[:1], F.normalize(expected, dim=-1), atol=2e-6)
    finally:
        model.config.text_candidates = before


def test_switches_of_table_4(fresh):
    model = fresh()
    batch = model.processor.pairs([picture(i) for i in range(3)], ["a", "b", "c"])
    full = model(**batch)
    assert full.loss.item() == pytest.approx((full.loss_cap + full.loss_vm + 10 * full.loss_tm).item(), rel=1e-6)
    model.config.lambda2 = 0.0
    vm_only = model(**batch)
    assert vm_only.loss_tm is None and vm_only.loss.item() == pytest.approx((full.loss_cap + full.loss_vm).item())
    model.config.lambda1, model.config.lambda2 = 0.0, 10.0
    assert model(**batch).loss_vm is None


def test_cached_features_give_the_same_losses(tiny):
    model = tiny()
    batch = model.processor.pairs([picture(i) for i in range(3)], ["a", "b", "c"])
    features, embeds = model.encode_images(batch["images"]["pixel_values"])
    cached = batch | {"images": {"features": features, "embeds": embeds}}
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, model(**cached).loss)


def test_forward_without_inputs_says_what_it_needs(tiny):
    with pytest.raises(ValueError, match="give captions, contexts"):
        tiny()()
    with pytest.raises(ValueError, match="contexts need their targets"):
        tiny()(contexts=tiny().processor.pairs(None, ["a"])["contexts"])


def test_a_config_without_token_ids_is_named(fresh):
    model = fresh()
    model.config.ret_token_id = None
    with pytest.raises(ValueError, match="no ret_token_id"):
        model.embed_dialogues("hi")


def test_nan_weights_are_named(fresh):
    model = fresh()
    model.W_t2m.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*W_t2m\.weight"):
        model.embed_dialogues(["hi"])


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_bfloat16_towers_keep_float32_maps(fresh, tmp_path, spelling):
    from modeling_unimur import UniMuRModel

    model = fresh()
    model.save_pretrained(tmp_path / "a")
    half = UniMuRModel.from_pretrained(tmp_path / "a", **{spelling: torch.bfloat16})
    assert half.language_model.dtype == half.clip.dtype == torch.bfloat16
    assert half.W_i2t.weight.dtype == half.W_t2m.weight.dtype == half.ret_embedding.dtype == torch.float32
    a, b = model.embed_dialogues(DIALOGUES), half.embed_dialogues(DIALOGUES)
    assert b.dtype == torch.float32 and F.cosine_similarity(a, b).min() > 0.98
