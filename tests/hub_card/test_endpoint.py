"""The endpoint, driven through a real server by a real client: replies, bounds, errors as JSON, nothing fetched."""

import base64
import http.client
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from hub_card.endpoint import Limits
from hub_card.serve import load_handler
from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.hub_card.serving import served
from tests.tiny import make_pipeline


def base64_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    tiny().save_pretrained(folder, with_towers=True)
    model = UniMuRModel.from_pretrained(folder)
    pool = model.build_pool(
        images=[picture(1), picture(2)], texts=["you are welcome.", "bye"], show_progress_bar=False
    )
    model.save_pretrained(folder, pool=pool)
    return UniMuRModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def ask(model):
    with served(load_handler_of(model)) as port:

        def ask(body, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", "/", body, {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            assert answer.headers["Content-Type"] == "application/json"
            return answer.status, json.loads(content)

        yield ask


def load_handler_of(model):
    return load_handler(Path(model._source["pretrained_model_name_or_path"]))


def message(*parts):
    return {"role": "user", "content": list(parts)}


def image_part(image):
    return {"type": "image", "image": base64_of(image)}


def test_it_answers_as_retrieve_does(ask, model):
    photo = picture(7)
    turns = ["hello", message({"type": "text", "text": "look"}, image_part(photo))]
    status, answer = ask({"inputs": turns})
    assert status == 200
    reply = model.retrieve(
        ["hello", message({"type": "text", "text": "look"}, {"type": "image", "image": photo})], model.packed_pool
    )
    assert answer["text"] == reply.text
    assert (answer["image"] is None) is (reply.image is None)
    assert [c["id"] for c in answer["candidates"]] == [c.id for c in reply.candidates]
    assert [c["score"] for c in answer["candidates"]] == pytest.approx([c.score for c in reply.candidates], abs=1e-5)
    image = next(c for c in answer["candidates"] if c["modality"] == "image")
    original = next(c for c in reply.candidates if c.id == image["id"]).item
    with Image.open(io.BytesIO(base64.b64decode(image["image"]))) as sent:
        assert sent.tobytes() == original.tobytes()


def test_parameters_narrow_the_search(ask):
    status, answer = ask({"inputs": "hello", "parameters": {"modality": "image", "top_k": 1, "exclude": ["image-0"]}})
    assert status == 200
    assert [c["id"] for c in answer["candidates"]] == ["image-1"] and answer["text"] is None
    assert answer["image"] == answer["candidates"][0]["image"]


def test_a_large_picture_is_sent_small_and_encoded_once(model, monkeypatch):
    handler = load_handler_of(model)
    large = model.build_pool(
        images=[Image.effect_noise((900, 1800), 50).convert("RGB"), picture(2)], texts=["far"], show_progress_bar=False
    )
    handler.pool, module = large, sys.modules["handler"]
    saved, encoded = [], module.encoded
    monkeypatch.setattr(module, "encoded", lambda image: saved.append(image) or encoded(image))
    answer = handler({"inputs": "hello", "parameters": {"image_bias": 3}})
    sent = {c["id"]: base64.b64decode(c["image"]) for c in answer["candidates"] if c["modality"] == "image"}
    shapes = {
        id_: (image.format, image.size) for id_, image in ((i, Image.open(io.BytesIO(b))) for i, b in sent.items())
    }
    assert shapes == {"image-0": ("JPEG", (256, 512)), "image-1": ("PNG", (40, 30))}
    first = next(c for c in answer["candidates"] if c["modality"] == "image")
    assert answer["image"] == first["image"] and len(saved) == 2
    reply = model.retrieve("hello", large, image_bias=3)
    assert next(c.id for c in reply.candidates if c.modality == "image") == first["id"]
    # A text alone is listed, and the picture beside it is shown all the same.
    alone = handler({"inputs": "hello", "parameters": {"top_k": 1, "image_bias": -3, "exclude": []}})
    assert [c["modality"] for c in alone["candidates"]] == ["text"] and alone["image"] == first["image"]


@pytest.mark.parametrize(
    ("request_", "message_"),
    [
        ({}, "inputs"),
        ([1], "inputs"),
        ({"inputs": []}, "1 to 64 turns"),
        ({"inputs": ["hi"] * 65}, "1 to 64 turns, got 65"),
        ({"inputs": ""}, "empty text"),
        ({"inputs": 3}, "turn 0"),
        ({"inputs": "a" * 20_001}, "20001 characters"),
        (
            {"inputs": [message(*[{"type": "text", "text": "a" * 200}] * 101)]},
            "20200 characters; a dialogue has at most",
        ),
        ({"inputs": ["a" * 11_000] * 2}, "up to turn 1 are 22000 characters"),
        ({"inputs": [message(*[{"type": "image", "image": "aGk="}] * 17)]}, "more than 16 images"),
        ({"inputs": [message({"type": "image", "image": "http://127.0.0.1/x.png"})]}, "not a URL or a path"),
        ({"inputs": [message({"type": "image", "image": "/etc/hostname"})]}, "turn 0"),
        ({"inputs": [message({"type": "image", "path": "/etc/hostname"})]}, "a part is"),
        ({"inputs": [message({"type": "image_url", "image_url": {"url": "http://127.0.0.1"}})]}, "a part is"),
        ({"inputs": [message({"type": "image", "image": base64.b64encode(b"no image").decode()})]}, "not an image"),
        ({"inputs": "hi", "parameters": {"top_n": 3}}, "unknown parameter 'top_n'"),
        ({"inputs": "hi", "parameters": {"top_k": 0}}, "between 1 and 100"),
        ({"inputs": "hi", "parameters": {"top_k": True}}, "cannot be bool"),
        ({"inputs": "hi", "parameters": {"modality": "video"}}, "modality='video'"),
        ({"inputs": "hi", "parameters": {"exclude": [1]}}, "list of ids"),
        ({"inputs": "hi", "parameters": {"image_bias": 10**400}}, "between -1000 and 1000"),
        ({"inputs": "hi", "parameters": {"image_bias": float("nan")}}, "between -1000 and 1000"),
        ({"inputs": "hi", "parameters": {"generate": "always"}}, "this model cannot draw"),
        ({"inputs": "hi", "parameters": {"generate": "maybe"}}, "generate='maybe'"),
        ({"inputs": "hi", "parameters": {"generate": True}}, "cannot be bool"),
        ({"inputs": "hi", "parameters": {"generate": "always", "steps": 51}}, "steps must be between 1 and 50"),
        (
            {"inputs": "hi", "parameters": {"generate": "always", "guidance": float("nan")}},
            "guidance must be between 1 and 20",
        ),
        (
            {"inputs": "hi", "parameters": {"generate": "always", "seed": 2**32}},
            "seed must be between 0 and 4294967295",
        ),
        ({"inputs": "hi", "parameters": {"steps": 3}}, "generate is 'never'"),
        ({"inputs": "hi", "parameters": {"generate": "always", "size": [8, 8]}}, "unknown parameter 'size'"),
    ],
)
def test_a_bad_request_is_answered_by_what_is_wrong(ask, request_, message_):
    status, answer = ask(request_)
    assert status == 400 and set(answer) == {"error"}
    assert message_ in answer["error"]


def test_base64_may_be_broken_into_lines(ask):
    whole = base64_of(picture(3))
    broken = "\r\n".join(whole[at : at + 76] for at in range(0, len(whole), 76)) + "\n"
    answers = [ask({"inputs": [message({"type": "image", "image": sent})]}) for sent in (whole, broken)]
    assert answers[0] == answers[1] and answers[1][0] == 200


def test_too_many_pixels_are_refused_before_they_are_decoded(ask):
    status, answer = ask({"inputs": [message(image_part(Image.new("1", (5000, 5000))))]})
    assert status == 400 and "16000000 pixels" in answer["error"]


def test_a_body_that_is_no_json_or_too_long(ask):
    status, answer = ask(b"{")
    assert status == 400 and "error" in answer
    status, answer = ask(b"[" * 100_000)
    assert status == 400 and "nested too deeply" in answer["error"]
    too_long = str(Limits().body_bytes + 1)
    status, answer = ask(b"", **{"Content-Length": too_long})
    assert status == 413 and str(Limits().body_bytes) in answer["error"]


def test_a_batch_answers_each_request_as_alone_and_a_bad_one_spoils_no_other(model):
    handler = load_handler_of(model)
    broken = {"type": "image", "image": base64.b64encode(b"no image").decode()}
    requests = [
        {"inputs": "hello"},
        {"inputs": [message(broken)]},
        {"inputs": ["look", message(image_part(picture(7)))], "parameters": {"exclude": ["image-0"], "top_k": 2}},
        {"inputs": 3},
        {"inputs": "hi", "parameters": {"modality": "video"}},
        {"inputs": "a much longer turn than the others " * 3, "parameters": {"exclude": ["image-0"], "top_k": 2}},
    ]
    answers = handler.batch(requests)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, Exception):
            with pytest.raises(type(answer)) as alone:
                handler(request)
            assert isinstance(answer, ValueError) and str(alone.value) == str(answer)
        else:
            alone = handler(request)
            assert [c.pop("score") for c in answer["candidates"]] == pytest.approx(
                [c.pop("score") for c in alone["candidates"]], abs=1e-5
            )
            assert answer == alone
    assert [isinstance(answer, Exception) for answer in answers] == [False, True, False, True, True, False]
    assert handler.batch([]) == []


def test_the_pictures_that_are_decoded_together_are_bounded(model, monkeypatch):
    handler, counts = load_handler_of(model), []
    embed = handler.model.embed_dialogues
    monkeypatch.setattr(handler.model, "embed_dialogues", lambda d: counts.append(len(d)) or embed(d))
    monkeypatch.setattr(sys.modules["handler"], "MAX_PIXELS", 2 * 40 * 30)
    one = {"inputs": [message(image_part(picture(1)))]}
    answers = handler.batch([one] * 5)
    assert counts == [2, 2, 1] and len({answer["text"] for answer in answers}) == 1
    with pytest.raises(ValueError, match="the images up to turn 2 have 3600 pixels"):
        handler({"inputs": one["inputs"] * 4})


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_model_goes_to_the_gpu_where_there_is_one(model, monkeypatch, there, device):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *where: moved.append(*where) or self)
    load_handler_of(model)
    assert moved == [device]


def test_a_repository_without_a_pool_says_so(tiny, tmp_path):
    tiny().save_pretrained(tmp_path, with_towers=True)
    with pytest.raises(ValueError, match="no pool is packed"):
        load_handler(tmp_path)


@pytest.fixture
def drawing(tiny, tmp_path):
    """A checkpoint that can draw, with a pool and the folder of its diffusion model."""
    make_pipeline().save_pretrained(tmp_path / "diffusion")
    tiny().save_pretrained(tmp_path / "drawing", with_towers=True)
    model = UniMuRModel.from_pretrained(tmp_path / "drawing")
    small = {"mapper_width": 16, "mapper_layers": 1, "mapper_heads": 2, "drawing_steps": 2, "drawing_guidance": 2.0}
    model.add_drawing(make_pipeline(), n_drawing_tokens=3, **small)
    model.config.drawing_model_name_or_path = str(tmp_path / "diffusion")
    pool = model.build_pool(images=[picture(1), picture(2)], texts=["hello"], show_progress_bar=False)
    model.save_pretrained(tmp_path / "drawing", pool=pool)
    return UniMuRModel.from_pretrained(tmp_path / "drawing")


def test_a_drawn_picture_travels_as_the_pools_do(drawing):
    handler = load_handler_of(drawing)
    parameters = {"generate": "always", "seed": 3, "steps": 1, "guidance": 3, "image_bias": 3}
    requests = [{"inputs": text, "parameters": parameters} for text in ("hello", "a panda, please")]
    answers = handler.batch([*requests, {"inputs": "hello", "parameters": {"image_bias": 3}}])
    assert [answer["image_source"] for answer in answers] == ["drawn", "drawn", "retrieved"]
    for text, answer in zip(("hello", "a panda, please"), answers[:2], strict=True):
        sent = base64.b64decode(answer["image"])
        with Image.open(io.BytesIO(sent)) as image:
            assert image.format == "PNG"
            assert image.tobytes() == drawing.generate([text], seed=3, steps=1, guidance=3).tobytes()
        assert answer["image"] not in [c.get("image") for c in answer["candidates"]]
    assert answers[0]["candidates"] == answers[2]["candidates"]
    assert "diffusers" in (Path(drawing._source["pretrained_model_name_or_path"]) / "requirements.txt").read_text()


def test_without_its_diffusion_model_it_retrieves_and_says_that_it_cannot_draw(drawing, tmp_path, caplog):
    (tmp_path / "diffusion").rename(tmp_path / "gone")
    handler = load_handler_of(drawing)
    assert "this endpoint cannot draw" in caplog.text and "could not be loaded" in caplog.text
    assert handler({"inputs": "hello"})["text"] == "hello"
    (tmp_path / "gone").rename(tmp_path / "diffusion")  # nothing is loaded for a request
    with pytest.raises(ValueError, match="this endpoint cannot draw") as caught:
        handler({"inputs": "hello", "parameters": {"generate": "always"}})
    assert str(tmp_path) not in str(caught.value)
