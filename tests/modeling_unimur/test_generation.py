"""Pictures drawn by a diffusion model: its conditioning, the arguments, what a checkpoint holds of it."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers.dynamic_module_utils import get_imports

from modeling_unimur import UniMuRModel
from modeling_unimur.generation_unimur import drawing_loss
from modeling_unimur.pipeline_unimur import MultimodalRetrievalPipeline
from tests.conftest import picture
from tests.tiny import make_pipeline

SMALL = {"mapper_width": 16, "mapper_layers": 1, "mapper_heads": 2, "drawing_steps": 2, "drawing_guidance": 2.0}
TALK = ["a panda in a red hat", "show me"]


@pytest.fixture
def drawer(fresh):
    """A tiny model that can draw, its weights random, over a tiny Stable Diffusion."""
    model = fresh()
    model.add_drawing(make_pipeline(), n_drawing_tokens=4, **SMALL)
    model.drawing.tokens.data.normal_(std=0.2)
    return model


def test_a_model_without_generation_is_what_it_was(fresh, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # an import of it fails
    model = fresh()
    model.save_pretrained(tmp_path / "saved")
    config = (tmp_path / "saved" / "config.json").read_text()
    assert not any(word in config for word in ("draw", "mapper", "lambda3"))
    assert not any("drawing" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="cannot draw"):
        model.generate("hello")


def test_remote_code_does_not_ask_for_diffusers():
    import modeling_unimur.generation_unimur as module

    assert "diffusers" not in get_imports(module.__file__)


def test_generation_keeps_embeddings_fingerprint_and_pools(fresh):
    model = fresh()
    pool, before = model.build_pool(texts=["one", "two"], show_progress_bar=False), model.embed_dialogues(["hello"])
    model.add_drawing(make_pipeline(), n_drawing_tokens=4, **SMALL)
    assert torch.equal(model.embed_dialogues(["hello"]), before)
    model.retrieve("hello", pool)  # refused where the fingerprint has changed


def test_checkpoint_round_trip(drawer, tmp_path):
    drawer.pipeline.save_pretrained(tmp_path / "diffusion")
    drawer.config.drawing_model_name_or_path = str(tmp_path / "diffusion")
    drawer.config.draw_below = 0.25
    drawer.save_pretrained(tmp_path / "saved")
    again = UniMuRModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in drawer.drawing.state_dict(prefix="drawing.").items())
    assert again.config.draw_below == 0.25 and all(p.requires_grad for p in again.drawing.parameters())
    assert not any((tmp_path / "saved").rglob("*unet*"))
    assert again.generate(TALK).tobytes() == drawer.generate(TALK).tobytes()


def test_states_are_those_of_an_unbatched_pass(drawer):
    """Wherever the padding is, and [RET]'s own state is what it is without tokens behind it."""
    inputs = drawer.processor.contexts([["hi"], TALK, [picture(1), "this"]])
    features = drawer.encode_images(inputs["pixel_values"])[0]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        states = drawer.drawing_states(ids, mask, features)
        torch.testing.assert_close(states[:, 0], drawer.ret_states(ids, mask, features), atol=1e-5, rtol=1e-5)
        alone = drawer.drawing_states(ids[:1, : mask[0].sum()], mask[:1, : mask[0].sum()])
        order = mask.argsort(dim=1, stable=True)  # padding on the left
        left = drawer.drawing_states(ids.gather(1, order), mask.gather(1, order), features)
    torch.testing.assert_close(states[:1], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states, left, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states[:, 1], states[:, 2], atol=1e-2)  # the tokens differ


def test_a_picture_is_the_same_alone_and_in_a_list(drawer):
    one, two = drawer.generate([TALK, ["a longer talk about a dog on the beach"]], batch_size=2)
    assert one.size == (16, 16) and one.mode == "RGB"
    assert one.tobytes() == drawer.generate(TALK).tobytes() != two.tobytes()
    assert drawer.generate(TALK, seed=1).tobytes() != one.tobytes()
    assert drawer.generate(TALK, size=(24, 32)).size == (32, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0"), ({"steps": 2.5}, "steps=2.5"), ({"guidance": 0.5}, "guidance=0.5"),
        ({"guidance": float("nan")}, "guidance=nan"), ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 100_000}, "batch_size=100000"), ({"size": (15, 16)}, "size="), ({"size": 16}, "size=16"),
        ({"seed": "x"}, "seed='x'"),
    ],
)  # fmt: skip
def test_arguments_are_refused_by_name(drawer, arguments, message):
    with pytest.raises(ValueError, match=message):
        drawer.generate(TALK, **arguments)


def test_another_conditioning_is_refused_with_both_numbers(drawer):
    with pytest.raises(ValueError, match="width 16, and the mapper gives 32"):
        drawer.pipeline = make_pipeline(width=16)
    with pytest.raises(ValueError, match="positions 9, and the mapper gives 12"):
        drawer.pipeline = make_pipeline(length=9)
    with pytest.raises(ValueError, match="Stable Diffusion"):
        drawer.pipeline = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"4, 12, 32.*4, 9, 32"):
        drawing_loss(torch.zeros(4, 12, 32), torch.zeros(4, 9, 32))


def test_without_diffusers_a_sentence_says_what_to_install(drawer, monkeypatch):
    drawer._pipeline, drawer.config.drawing_model_name_or_path = None, "somewhere"
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'modeling-unimur\[generate\]'"):
        drawer.generate(TALK)


def test_a_diffusion_model_that_is_not_there(drawer, tmp_path):
    drawer._pipeline, drawer.config.drawing_model_name_or_path = None, str(tmp_path / "absent")
    with pytest.raises(OSError, match=r"absent.*could not be loaded"):
        drawer.generate(TALK)
    drawer.config.drawing_model_name_or_path = None
    with pytest.raises(ValueError, match="names no diffusion model"):
        drawer.generate(TALK)


def test_nan_is_named_and_memory_leaves_the_model_usable(drawer, monkeypatch):
    before, weight = drawer.generate(TALK), drawer.pipeline.unet.conv_out.bias.data
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="drawn latents hold NaN"):
        drawer.generate(TALK)
    weight.copy_(kept)

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(drawer.pipeline.unet, "forward", exhausted)
        with pytest.raises(ValueError, match="lower batch_size"):
            drawer.generate(TALK)
    assert drawer.generate(TALK).tobytes() == before.tobytes()
    drawer.drawing.model.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="mapper's output holds NaN"):
        drawer.generate(TALK)


def test_retrieve_draws_never_always_or_where_the_pool_has_no_good_one(drawer):
    pool = drawer.build_pool(images=[picture(1), picture(2)], texts=["hello"], show_progress_bar=False)
    plain = drawer.retrieve(TALK, pool, image_bias=10.0)
    assert plain.image_source == "retrieved"
    always = drawer.retrieve(TALK, pool, image_bias=10.0, generate="always")
    assert always.image_source == "drawn" and always.image.tobytes() == drawer.generate(TALK).tobytes()
    assert always.candidates == plain.candidates
    assert "drawn, not from the pool" in always._repr_html_() and "not from the pool" not in plain._repr_html_()
    score = drawer.retrieve(TALK, pool, modality="image").candidates[0].score
    for threshold, source in ((score + 0.01, "drawn"), (score - 0.01, "retrieved")):
        drawer.config.draw_below = threshold
        replies = drawer.retrieve([TALK], pool, image_bias=10.0, generate="auto", seed=3)
        assert [r.image_source for r in replies] == [source]
    # A reply that shows no image gets none from "auto".
    assert drawer.retrieve(TALK, pool, modality="text", generate="auto").image_source is None


def test_what_retrieve_cannot_draw_is_refused(drawer, fresh):
    pool = drawer.build_pool(texts=["hello"], show_progress_bar=False)
    for arguments, message in (
        ({"generate": "maybe"}, "generate='maybe'"),
        ({"generate": "auto"}, "draw_below"),
        ({"generate": "always", "stepz": 3}, "no argument stepz"),
        ({"steps": 3}, "generate is 'never'"),
    ):
        with pytest.raises(ValueError, match=message):
            drawer.retrieve(TALK, pool, **arguments)


def test_loss_reaches_tokens_and_mapper_alone(drawer):
    inputs = drawer.processor.contexts(["one caption", "another, longer caption"])
    target = torch.randn(2, 12, 32)
    output = drawer(contexts=dict(inputs), drawing_targets=target)
    output.loss.backward()
    assert output.loss_vm is None and torch.equal(output.loss, drawer.config.lambda3 * output.loss_draw)
    moved = {name for name, p in drawer.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert "drawing.tokens" in moved and all(name.startswith("drawing.") for name in moved)


def test_config_refuses_what_cannot_draw(fresh):
    for fields, message in (
        ({"n_drawing_tokens": 1}, "n_drawing_tokens=1"),
        ({"mapper_width": 10, "mapper_heads": 4}, "multiple of mapper_heads"),
        ({"drawing_guidance": 0.0}, "drawing_guidance=0.0"),
    ):
        model = fresh()
        with pytest.raises(ValueError, match=message):
            model.add_drawing(None, **{"n_drawing_tokens": 4, **fields})
        assert model.config.n_drawing_tokens == 0
    assert json.loads(fresh().config.to_json_string()).get("n_drawing_tokens") in (None, 0)


def test_the_pipeline_draws_as_retrieve_does(drawer):
    pool = drawer.build_pool(images=[picture(1), picture(2)], texts=["hello"], show_progress_bar=False)
    pipe = MultimodalRetrievalPipeline(drawer, drawer.processor)
    talks = [TALK, ["look", picture(3)], ["and another"]]
    plain, drawn = (pipe(talks, pool=pool, image_bias=10.0, batch_size=2, **given)
                    for given in ({}, {"generate": "always", "seed": 3, "steps": 1}))  # fmt: skip
    assert [answer["image_source"] for answer in plain] == ["retrieved"] * 3
    assert [answer["image_source"] for answer in drawn] == ["drawn"] * 3
    expected = drawer.generate(talks, seed=3, steps=1)
    assert [answer["image"].tobytes() for answer in drawn] == [image.tobytes() for image in expected]
    assert [answer["candidates"] for answer in drawn] == [answer["candidates"] for answer in plain]
    score = drawer.retrieve(TALK, pool, modality="image").candidates[0].score
    for threshold, source in ((score + 0.01, "drawn"), (score - 0.01, "retrieved")):
        drawer.config.draw_below = threshold
        assert pipe(TALK, pool=pool, image_bias=10.0, generate="auto")["image_source"] == source
    shut_out = (
        drawer.retrieve(TALK, pool, modality="image").candidates[0].id
    )  # the rule goes by what is left of the pool
    drawer.config.draw_below = score - 1e-4
    assert pipe(TALK, pool=pool, image_bias=10.0, generate="auto", exclude=[shut_out])["image_source"] == "drawn"


def test_what_the_pipeline_cannot_draw_is_refused(drawer, tiny):
    pipe = MultimodalRetrievalPipeline(drawer, drawer.processor)
    for arguments, message in (
        ({"generate": "maybe"}, "generate='maybe'"), ({"steps": 3}, "generate is 'never'"),
        ({"generate": "always", "steps": 0}, "steps=0"), ({"draw": "always"}, "a search takes .* generate, seed, steps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pipe("hi", pool={"texts": ["a"]}, **arguments)
    unable = MultimodalRetrievalPipeline(tiny(), tiny().processor)
    with pytest.raises(ValueError, match="this model cannot draw"):
        unable("hi", pool={"texts": ["a"]}, generate="always")
    assert unable("hi", pool={"texts": ["a"]})["image_source"] is None
