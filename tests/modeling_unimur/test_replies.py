"""Candidates whose pictures are decoded when they are looked at, and are otherwise as any other value."""

import io
import pickle
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch

import modeling_unimur.replies_unimur as replies
from modeling_unimur import Candidate, CandidatePool
from modeling_unimur.images_unimur import BadImageError
from tests.conftest import picture

MADE_BY = {"towers": "t", "maps": "m", "text_candidates": "ret", "preprocessing": "p", "dimension": 2}


def pool_of(images):
    """Images the farther from the query the later they stand, and a text farther than any."""
    angles = torch.deg2rad(torch.arange(len(images) + 1, dtype=torch.float32))
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    pool = CandidatePool.empty(MADE_BY).append("image", images, embeddings[:-1])
    return pool.append("text", ["far"], embeddings[-1:], ["far"])


QUERY = torch.tensor([[1.0, 0.0]])


@pytest.fixture
def decoded(monkeypatch):
    """What has been decoded."""
    done = []
    real = replies.decode_image
    monkeypatch.setattr(replies, "decode_image", lambda source: done.append(source) or real(source))
    return done


def test_only_the_replys_picture_is_decoded_by_a_search(decoded):
    one, other = pool_of([picture(i) for i in range(5)]).search(QUERY.repeat(2, 1))
    assert len(decoded) == 1  # both replies show the same
    assert one.candidates[0].item is one.image and one.image is other.image
    assert (
        one.candidates[3].item.tobytes() == picture(3).tobytes() and one.candidates[3].item is other.candidates[3].item
    )
    assert len(decoded) == 2


def test_a_picture_that_cannot_be_read_is_named_when_it_is_looked_at(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    pool = pool_of([tmp_path / f"{i}.png" for i in range(3)])
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"broken")
    (reply,) = pool.search(QUERY)
    assert reply.image.tobytes() == picture(0).tobytes()
    with pytest.raises(BadImageError, match=r"candidate '1.png': .*does not exist") as caught:
        _ = reply.candidates[1].item
    assert caught.value.reason == "missing"
    with pytest.raises(BadImageError, match=r"candidate '2.png': .*not an image"):
        _ = reply.candidates[2].item
    (tmp_path / "0.png").unlink()
    with pytest.raises(BadImageError, match=r"candidate '0\.png'"):  # the reply's own is shown in any case
        pool.search(QUERY)


def test_a_candidate_is_a_plain_frozen_value():
    def made():
        file = io.BytesIO()
        picture(1).save(file, "PNG")
        return Candidate("a", "image", replies.Undecoded("a", file.getvalue()), 0.5, 1)

    plain = Candidate("a", "image", picture(1), 0.5, 1)
    assert asdict(made())["item"].tobytes() == picture(1).tobytes()
    assert made() == made() and made() == pickle.loads(pickle.dumps(made()))
    assert replace(made(), rank=2).item.tobytes() == plain.item.tobytes()
    assert "item=<PIL.Image.Image image mode=RGB size=40x30" in repr(made())
    assert (
        repr(Candidate("b", "text", "hi", 0.5, 1))
        == "Candidate(id='b', modality='text', item='hi', score=0.5, rank=1)"
    )
    with pytest.raises(FrozenInstanceError):
        made().item = "other"
    with pytest.raises(TypeError, match="item"):
        Candidate("a", "image", score=0.5, rank=1)
