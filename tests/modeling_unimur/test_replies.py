"""Replies and candidates: values that decode no picture unless it is looked at, and show and save themselves."""

import copy
import io
import json
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from PIL import Image

import modeling_unimur.replies_unimur as replies
from modeling_unimur import Candidate, CandidatePool
from modeling_unimur.display_unimur import LARGE, SMALL, figure, gallery, shortened, thumbnail
from modeling_unimur.images_unimur import BadImageError
from tests.conftest import picture

MADE_BY = {"towers": "t", "maps": "m", "text_candidates": "ret", "preprocessing": "p", "dimension": 2}
QUERY = torch.tensor([[1.0, 0.0]])


def pool_of(images, text="far"):
    """Images the farther from the query the later they stand, and a text farther than any."""
    angles = torch.deg2rad(torch.arange(len(images) + 1, dtype=torch.float32))
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    pool = CandidatePool.empty(MADE_BY).append("image", images, embeddings[:-1])
    return pool.append("text", [text], embeddings[-1:], ["far"])


@pytest.fixture
def decoded(monkeypatch):
    """What has been decoded."""
    done = []
    real = replies.decode_image
    monkeypatch.setattr(replies, "decode_image", lambda source: done.append(source) or real(source))
    return done


@pytest.fixture
def broken(tmp_path):
    """A pool of three images given as files, of which one is gone by now and one is no image."""
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    pool = pool_of([tmp_path / f"{i}.png" for i in range(3)])
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"broken")
    return pool


def test_a_picture_is_decoded_once_and_when_it_is_looked_at(decoded):
    one, other = pool_of([picture(i) for i in range(5)]).search(QUERY.repeat(2, 1))
    assert not decoded
    assert one.candidates[0].item is one.image and one.image is other.image
    assert len(decoded) == 1  # both replies show the same
    assert one.candidates[3].item.tobytes() == picture(3).tobytes()
    assert one.candidates[3].item is other.candidates[3].item
    assert len(decoded) == 2


def test_to_print_compare_or_hash_decodes_nothing(decoded, broken):
    one, other = broken.search(QUERY.repeat(2, 1))
    assert one == other and hash(one) == hash(other) and len({one, other, *one.candidates}) == 5
    assert one != replace(one, best_image=None) and one.candidates[0] != one.candidates[1]
    for value in (one, *one.candidates):
        assert "\n" not in repr(value) == str(value)
    assert repr(one) == "Retrieval('far', image '0.png', 4 candidates)"
    assert repr(one.candidates[1]) == "Candidate(2: image '1.png', score 1.000)"
    assert repr(Candidate("b", "text", "h\n" * 90, 0.5, 1)).count("h") == 30
    assert not decoded


def test_a_picture_that_cannot_be_read_is_named_when_it_is_looked_at(broken, tmp_path):
    (reply,) = broken.search(QUERY)
    assert reply.image.tobytes() == picture(0).tobytes()
    with pytest.raises(BadImageError, match=r"candidate '1.png': .*does not exist") as caught:
        _ = reply.candidates[1].item
    assert caught.value.reason == "missing"
    with pytest.raises(BadImageError, match=r"candidate '2.png': .*not an image"):
        _ = reply.candidates[2].item
    (tmp_path / "0.png").unlink()
    (reply,) = broken.search(QUERY)  # one broken picture spoils no other reply
    with pytest.raises(BadImageError, match=r"candidate '0\.png'"):
        _ = reply.image


def test_a_candidate_is_a_plain_frozen_value():
    def made():
        file = io.BytesIO()
        picture(1).save(file, "PNG")
        return Candidate("a", "image", replies.Undecoded("a", {"bytes": file.getvalue(), "path": None}), 0.5, 1)

    looked_at = made()
    assert looked_at.item.tobytes() == picture(1).tobytes()
    assert looked_at == made() == pickle.loads(pickle.dumps(looked_at)) == copy.deepcopy(made())
    assert replace(made(), rank=2).item.tobytes() == picture(1).tobytes()
    with pytest.raises(FrozenInstanceError):
        made().score = 1.0
    with pytest.raises(TypeError, match="stored"):
        Candidate("a", "image", score=0.5, rank=1)


def test_a_reply_says_of_which_candidates_it_is():
    (reply,) = pool_of([picture(0)]).search(QUERY, top_k=1)
    assert (reply.best_text.id, reply.best_text.rank, reply.best_image.id) == ("far", 2, "image-0")
    (words,) = pool_of([picture(0)]).search(QUERY, modality="text")
    assert words.image is None and words.best_image is None and words.text == "far"


def test_html_is_bounded_and_escaped(broken):
    big = pool_of([picture(1, (2000, 1000))], text="<script>alert(1)</script>")
    (reply,) = big.search(QUERY)
    page = reply._repr_html_()
    assert "<script>" not in page and page.count("&lt;script&gt;") == 2 and page.count("<img ") == 2
    assert len(page) < 40_000
    for side in (LARGE, SMALL):
        small = Image.open(io.BytesIO(data_of(thumbnail(picture(1, (2000, 1000)), side))))
        assert small.size == (side, side // 2) and small.format == "JPEG"
    assert data_of(thumbnail(picture(1), SMALL))[1:4] == b"PNG"  # it is as small as that already
    assert "onerror" not in figure("a", '"><img onerror=1>').replace("&quot;&gt;&lt;img onerror", "")
    assert "&lt;b&gt;" in gallery("<b>", []) and shortened("a\nb") == "'a\\nb'"
    (half,) = broken.search(QUERY)
    assert half._repr_html_().count("<img ") == 2 and "does not exist" in half._repr_html_()
    assert "<em>" in half.candidates[1]._repr_html_()


def data_of(url):
    import base64

    return base64.b64decode(url.partition(",")[2])


def test_a_notebook_lists_a_bounded_number():
    (reply,) = pool_of([picture(i) for i in range(14)]).search(QUERY, top_k=15)
    assert reply._repr_html_().count("<img ") == 1 + replies.LISTED and "of which 10 are listed" in reply._repr_html_()


def test_a_saved_reply_is_json_and_pictures(tmp_path):
    (reply,) = pool_of([picture(i) for i in range(3)]).search(QUERY, top_k=2)
    path = reply.save(tmp_path / "a" / "b")
    content = json.loads(path.read_text())
    assert path.name == "reply.json" and content["text"] == "far" and content["image"] == "candidate-1.png"
    assert [(c["id"], c["rank"], c["image"]) for c in content["candidates"]] == [
        ("image-0", 1, "candidate-1.png"), ("image-1", 2, "candidate-2.png")]  # fmt: skip
    for rank in (1, 2):
        assert Image.open(path.parent / f"candidate-{rank}.png").tobytes() == picture(rank - 1).tobytes()


def test_the_picture_of_a_reply_is_saved_where_it_is_not_listed(tmp_path):
    texts = CandidatePool.empty(MADE_BY).append("text", ["near"], QUERY)
    pool = texts.append("image", [picture(0)], torch.tensor([[0.0, 1.0]]))
    (reply,) = pool.search(QUERY, top_k=1)
    content = json.loads(reply.save(tmp_path).read_text())
    assert content["image"] == "candidate-2.png" and len(content["candidates"]) == 1
    assert (tmp_path / "candidate-2.png").is_file()


def test_nothing_is_saved_of_a_reply_with_a_broken_picture(broken, tmp_path):
    with pytest.raises(BadImageError, match=r"1\.png"):
        broken.search(QUERY)[0].save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_show_opens_the_viewer_outside_of_a_notebook(monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(Image.Image, "show", lambda image, title=None: opened.append(title))
    pool_of([picture(0)]).search(QUERY)[0].show()
    assert opened == ["image-0"] and capsys.readouterr().out == "far\n"


def test_show_displays_in_a_notebook(monkeypatch):
    import sys
    from types import SimpleNamespace

    displayed = []
    notebook = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel=1), display=SimpleNamespace(display=displayed.append)
    )
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    (reply,) = pool_of([picture(0)]).search(QUERY)
    reply.show()
    assert displayed == [reply]
