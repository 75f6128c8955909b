"""The pool and retrieval of Section 3.4: order, modalities, exclusion, persistence, refusal."""

import re

import pytest
import torch
from PIL import Image

from modeling_unimur import CandidatePool
from tests.conftest import picture

MADE_BY = {"towers": "t", "maps": "m", "text_candidates": "ret", "preprocessing": "p", "dimension": 2}


def unit(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], 1)


def pool_of(texts=(), images=()):
    """A pool whose candidates stand at given angles from the query at 0 degrees."""
    pool = CandidatePool.empty(MADE_BY)
    if images:
        pool = pool.append("image", [picture(i) for i in range(len(images))], unit(*images))
    if texts:
        pool = pool.append("text", [f"text at {angle}" for angle in texts], unit(*texts))
    return pool


QUERY = unit(0)


def test_scores_are_cosines_in_one_order():
    (reply,) = pool_of(texts=(10, 60), images=(30, 80)).search(QUERY)
    assert [c.modality for c in reply.candidates] == ["text", "image", "text", "image"]
    assert [c.rank for c in reply.candidates] == [1, 2, 3, 4]
    assert [c.score for c in reply.candidates] == pytest.approx(
        torch.cos(torch.deg2rad(torch.tensor([10.0, 30, 60, 80]))).tolist()
    )
    assert isinstance(reply.candidates[1].item, Image.Image) and reply.candidates[0].item == "text at 10"


@pytest.mark.parametrize(
    ("texts", "images", "with_image"),
    [
        ((10, 60), (30,), True),  # text, image: both
        ((30, 60), (10,), True),  # image, text: both
        ((10, 20), (30,), False),  # top-2 are texts: the utterance alone
        ((50, 60), (10, 20), True),  # top-2 are images: the best text is the utterance all the same
        ((10,), (89,), True),  # nothing else remains
    ],
)
def test_the_reply_of_section_3_4(texts, images, with_image):
    (reply,) = pool_of(texts, images).search(QUERY, top_k=1)
    assert reply.text == f"text at {min(texts)}"
    assert (reply.image is not None) is with_image
    assert len(reply.candidates) == 1


def test_modality_and_exclude():
    pool = pool_of(texts=(10, 60), images=(30, 80))
    (images,) = pool.search(QUERY, modality="image")
    assert {c.modality for c in images.candidates} == {"image"} and images.text is None and images.image is not None
    (texts,) = pool.search(QUERY, modality="text", top_k=1)
    assert texts.text == "text at 10" and texts.image is None
    (rest,) = pool.search(QUERY, exclude=["text-2", "image-0"])
    assert [c.id for c in rest.candidates] == ["text-3", "image-1"]
    with pytest.raises(ValueError, match="no candidate remains"):
        pool.search(QUERY, modality="image", exclude=["image-0", "image-1"])


def test_top_k_is_exact_over_both_kinds():
    torch.manual_seed(0)
    angles = (torch.rand(60) * 180).tolist()
    pool = pool_of(texts=tuple(angles[:40]), images=tuple(angles[40:]))
    (reply,) = pool.search(QUERY, top_k=15)
    expected = sorted(range(60), key=lambda i: angles[i])[:15]
    ids = [f"image-{i - 40}" if i >= 40 else f"text-{20 + i}" for i in expected]
    assert [c.id for c in reply.candidates] == ids


def test_image_bias_and_calibration_move_images_only_as_said():
    pool = pool_of(texts=(10, 20, 30), images=(50, 60, 85))
    assert pool.search(QUERY)[0].image is None
    assert pool.search(QUERY, image_bias=0.5)[0].image is not None
    (plain,), (calibrated,) = pool.search(QUERY), pool.search(QUERY, calibrate=True)
    cosines = torch.cos(torch.deg2rad(torch.tensor([50.0, 60, 85])))
    expected = (cosines - cosines.mean()) / cosines.std(correction=0)
    scores = {c.id: c.score for c in calibrated.candidates}
    assert [scores[f"image-{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-4)
    order = [[c.id for c in r.candidates if c.modality == "image"] for r in (plain, calibrated)]
    assert order[0] == order[1]


def test_saved_loaded_and_appended(tmp_path):
    image = tmp_path / "a.png"
    picture(5).save(image)
    pool = CandidatePool.empty(MADE_BY).append("image", [image], unit(5), ["mine"]).append("text", ["t"], unit(40))
    pool.save_to_disk(tmp_path / "pool")
    image.unlink()  # the saved pool holds its images
    again = CandidatePool.load_from_disk(tmp_path / "pool")
    assert len(again) == 2 and again.made_by == MADE_BY
    (reply,) = again.search(QUERY)
    assert reply.candidates[0].id == "mine" and reply.image.tobytes() == picture(5).tobytes()
    longer = again.append("text", ["nearer"], unit(1))
    assert longer.search(QUERY)[0].text == "nearer" and len(again) == 2
    with pytest.raises(FileNotFoundError, match="not a pool"):
        CandidatePool.load_from_disk(tmp_path)


def test_bad_pools_are_refused():
    with pytest.raises(ValueError, match="empty"):
        CandidatePool.empty(MADE_BY).search(QUERY)
    with pytest.raises(ValueError, match="duplicate id 'x'"):
        pool_of(texts=(1,)).append("text", ["a", "b"], unit(1, 2), ["x", "x"])
    with pytest.raises(ValueError, match="do not match"):
        pool_of(texts=(1,)).append("text", ["a", "b"], unit(1))
    with pytest.raises(ValueError, match="modality='video'"):
        pool_of(texts=(1,)).search(QUERY, modality="video")
    with pytest.raises(ValueError, match="top_k=0"):
        pool_of(texts=(1,)).search(QUERY, top_k=0)
    with pytest.raises(ValueError, match="exclude='text-0' is one string"):
        pool_of(texts=(1,)).search(QUERY, exclude="text-0")
    for bias in (float("nan"), float("-inf"), 1e39, 10**400):
        with pytest.raises(ValueError, match=f"image_bias={re.escape(str(bias))} must be finite"):
            pool_of(texts=(1,)).search(QUERY, image_bias=bias)


def test_the_model_builds_extends_and_retrieves(tiny, tmp_path):
    model = tiny()
    picture(3).save(tmp_path / "c.png")
    images = [picture(1), picture(2), tmp_path / "c.png"]
    texts = ["a dog on the beach", "a panda eats", "thanks!"]
    pool = model.build_pool(images, texts, show_progress_bar=False)
    assert len(pool) == 6 and "3 images, 3 texts" in repr(pool)
    dialogue = ["look", picture(1), "what is it?"]
    reply = model.retrieve(dialogue, pool, top_k=6)
    query = model.embed_dialogues([dialogue])
    candidates = torch.cat([model.embed_images(images), model.embed_texts(texts)])
    assert [c.score for c in reply.candidates] == pytest.approx(
        (query @ candidates.T)[0].sort(descending=True).values.tolist(), abs=1e-5
    )
    many = model.retrieve([dialogue, ["hi"]], pool)
    assert len(many) == 2 and [c.id for c in many[0].candidates] == [c.id for c in reply.candidates]
    assert model.retrieve("a panda eats", pool).text == "a panda eats"  # e of a text is its own nearest text
    longer = model.extend_pool(pool, texts=["new"], show_progress_bar=False)
    assert len(longer) == 7
    with pytest.raises(ValueError, match="no candidates"):
        model.build_pool()


def test_a_pool_of_another_model_is_refused_with_what_differs(tiny, fresh):
    pool = tiny("opt").build_pool(texts=["a"], show_progress_bar=False)
    other = fresh("opt", seed=1)
    with pytest.raises(ValueError, match=r"these differ: towers .*maps"):
        other.retrieve("a", pool)
    model = fresh("opt")
    pool = model.build_pool(texts=["a"], show_progress_bar=False)
    model.W_t2m.bias.data[0] += 1e-4
    with pytest.raises(ValueError, match=r"differ: maps"):
        model.extend_pool(pool, texts=["b"])


def test_bad_candidates_are_named(tiny, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"image 1: .*bad\.jpg"):
        tiny().build_pool([picture(1), tmp_path / "bad.jpg"], show_progress_bar=False)
    with pytest.raises(ValueError, match="text 0 is empty"):
        tiny().build_pool(texts=[""], show_progress_bar=False)
    with pytest.raises(ValueError, match=r"images is one image .*give a list of images, or a folder"):
        tiny().build_pool(tmp_path / "bad.jpg", show_progress_bar=False)
    with pytest.raises(ValueError, match=r"texts is one text .*give a list of texts"):
        tiny().build_pool(texts="ab", show_progress_bar=False)
    with pytest.raises(ValueError, match="is a URL"):
        tiny().build_pool(["https://example.org/a.png"], show_progress_bar=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_ids": ["a"]}, "1 image ids and 2 images do not match"),
        ({"text_ids": ["a", "b"]}, "2 text ids and 1 texts do not match"),
        ({"image_ids": ["a", "a"]}, "duplicate id 'a'"),
        ({"image_ids": ["a", "b"], "text_ids": ["b"]}, "duplicate id 'b'"),
        ({"text_ids": ["own"]}, "duplicate id 'own'"),
        ({"text_ids": ["image-1"]}, "duplicate id 'image-1'"),  # the number of the first image
        ({"images": None, "image_ids": ["a"]}, "1 image ids and 0 images do not match"),
        ({"texts": None, "text_ids": ["a"]}, "1 text ids and 0 texts do not match"),
    ],
)
def test_bad_ids_are_refused_before_anything_is_embedded(tiny, monkeypatch, arguments, message):
    model = tiny()
    pool = model.build_pool(texts=["a"], text_ids=["own"], show_progress_bar=False)
    monkeypatch.setattr(model, "prepare", lambda *_: pytest.fail("embedded"))
    given = {"images": [picture(1), picture(2)], "texts": ["b"]} | arguments
    with pytest.raises(ValueError, match=message):
        model.extend_pool(pool, **given)


def test_a_datasets_column_is_a_list_of_images(tiny):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [picture(i) for i in range(3)]}).cast_column("image", datasets.Image())
    pool = tiny().build_pool(rows["image"], image_ids=["a", "b", "c"], show_progress_bar=False)
    assert torch.allclose(
        torch.tensor(pool.dataset["embedding"][:]), tiny().embed_images([picture(i) for i in range(3)]), atol=1e-6
    )
