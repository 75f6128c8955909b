"""The tasks' arithmetic on a hand-made world, and that they agree with what `retrieve` returns."""

import math

import pytest
import torch

from benchmarks.baselines.clip import ClipBaseline
from benchmarks.gallery import draw_gallery
from benchmarks.miniature import Split, chance, measure, table
from benchmarks.pairs import caption_to_image_recall
from benchmarks.retrieval import context_of, image_retrieval, image_to_itself, multimodal_response
from tests.conftest import picture
from train.miniature import encode, pictures
from train.miniature.dialogues import figure1, responses, visdial
from train.miniature.world import splits


def unit(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], 1)


class Angles:
    """A model whose embeddings are angles: of a context by its first word, of candidates by a table."""

    def __init__(self, contexts, candidates):
        self.contexts, self.candidates = contexts, candidates

    def embed_dialogues(self, dialogues, **_):
        return unit(*(self.contexts[d[0]["content"][0]["text"]] for d in dialogues))

    def embed_texts(self, texts, **_):
        return unit(*(self.candidates[t] for t in texts))

    embed_images = embed_texts


def dialogue(context, text, image=None):
    turn = {"speaker": "A", "elements": [{"type": "text", "text": context, "image_id": None}]}
    return {
        "dialogue_id": context, "turns": [turn, {"speaker": "B", "elements": []}], "target_turn": 1,
        "gold": {"text_ids": [text], "image_ids": [image] if image else []},
        "pool": {"text_ids": ["t0", "t1", "t2"], "image_ids": ["i0", "i1"]},
    }  # fmt: skip


def test_multimodal_response_by_hand():
    # Text candidates at 0, 40, 80 degrees, images at 10 and 50.
    texts, images = {"t0": "t0", "t1": "t1", "t2": "t2"}, {"i0": "i0", "i1": "i1"}
    model = Angles(
        {"a": 0, "b": 42, "c": 90, "d": 48},
        {"t0": 0, "t1": 40, "t2": 80, "i0": 10, "i1": 50},
    )
    dialogues = [
        dialogue("a", "t0", "i0"),  # text right; i0 (10) nearer than t1 (40): shown, right
        dialogue("b", "t0", "i0"),  # text t1, wrong; i1 (8 away) before t2 (38): shown, wrong
        dialogue("c", "t2", "i1"),  # text right; i1 (40 away) before t1 (50): shown, right
        dialogue("d", "t1"),  # text right; i1 (2 away) shown on a text-only turn
    ]
    found = multimodal_response(model, model, dialogues, texts, images)
    assert found["image retrieval rate"] == 100 and found["image retrieval rate on text-only turns"] == 100
    assert found["image R@1"] == pytest.approx(200 / 3) and found["text R@1"] == 75
    assert found["overall R@1"] == pytest.approx(100 * 5 / 7)
    cosines = [math.cos(math.radians(x)) for x in (10, 10, 30, 10)]
    assert found["CLIP-Sim"] == pytest.approx(sum(cosines) / 4, abs=1e-5)
    model.candidates |= {"i0": 200, "i1": 210}
    found = multimodal_response(model, model, dialogues, texts, images)
    assert found["image retrieval rate"] == 0 and found["image R@1"] == 0 and math.isnan(found["CLIP-Sim"])


def test_image_retrieval_by_hand():
    model = Angles({"a": 0, "b": 60}, {"i0": 10, "i1": 50})
    dialogues = [dialogue("a", "t0", "i0"), dialogue("b", "t0", "i0")]
    assert image_retrieval(model, dialogues, {"i0": "i0", "i1": "i1"}) == {"R@1": 50, "R@5": 100, "R@10": 100}


@pytest.fixture(scope="module")
def split():
    scenes = splits()["validation"]
    sets = responses(scenes, 40, 1), visdial(scenes, 12, 1), figure1(scenes, 1)
    return Split(*sets, {k: v for s in sets for k, v in pictures(s.images).items()})


def test_the_tasks_agree_with_retrieve(tiny, split):
    model, said = tiny(), split.responses
    found = multimodal_response(model, ClipBaseline(model), said.dialogues, said.texts, split.images)
    ids = said.dialogues[0]["pool"]
    pool = model.build_pool(
        [split.images[i] for i in ids["image_ids"]], [said.texts[i] for i in ids["text_ids"]],
        image_ids=ids["image_ids"], text_ids=ids["text_ids"], show_progress_bar=False,
    )  # fmt: skip
    replies = model.retrieve([context_of(d, split.images) for d in said.dialogues], pool, top_k=100)
    wants = [d["wants_image"] for d in said.dialogues]
    rate = sum(r.image is not None for r, w in zip(replies, wants, strict=True) if w) / sum(wants)
    right = sum(r.text == said.texts[d["gold"]["text_ids"][0]] for r, d in zip(replies, said.dialogues, strict=True))
    assert found["image retrieval rate"] == pytest.approx(100 * rate)
    assert found["text R@1"] == pytest.approx(100 * right / len(replies))


def test_the_whole_table(tiny, split):
    model = tiny()
    columns = {"UniMuR": measure(model, ClipBaseline(model), split), "chance": chance(split)}
    assert columns["UniMuR"].keys() - columns["chance"].keys() == {"CLIP-Sim"}
    assert all(0 <= v <= 100 for n, v in columns["UniMuR"].items() if n != "CLIP-Sim")
    text = table(columns)
    assert len(text.splitlines()) == 2 + len(columns["UniMuR"]) and "| image to itself R@1" in text
    assert chance(split)["dialogue to image R@5"] == pytest.approx(500 / 12)


def test_clip_alone(tiny):
    model = tiny()
    clip = ClipBaseline(model)
    assert (
        image_to_itself(clip, [picture(i) for i in range(5)])["R@1"] == 100
    )  # an identity for CLIP, said in the README
    words, image = clip.embed_texts(["a dog"]), clip.embed_images([picture(1)])
    both = clip.embed_dialogues([["a dog", picture(1)]])
    assert torch.allclose(both, torch.nn.functional.normalize(words + image, dim=-1), atol=1e-6)
    long = clip.embed_texts(["x" * 200 + " a dog"])
    assert clip.truncated == 1 and torch.isfinite(long).all()


def test_recall_on_pairs_counts_what_it_leaves_out(tiny):
    rows = [{"image": {"bytes": encode(picture(i)), "path": None}, "captions": [f"number {i}"]} for i in range(3)]
    rows += [{"image": {"bytes": b"", "path": None}, "captions": ["x"]}, {"image": rows[0]["image"], "captions": []}]
    found = caption_to_image_recall(tiny(), rows, 10)
    assert found["pool"] == 3 and found["left out"] == 2 and found["R@5"] == 100


def test_the_gallery_is_drawn(tiny, split, tmp_path):
    from PIL import Image

    from benchmarks.demo import replies

    rows = replies(tiny(), split)
    assert len(rows) >= 12
    asked = [d["turns"][0]["elements"][0]["text"] for d, _ in rows]
    assert "what do pandas look like?" in asked and "what do pandas eat?" in asked
    draw_gallery(rows[:3], split.responses.texts | split.facts.texts, split.images, tmp_path / "g.png")
    drawn = Image.open(tmp_path / "g.png")
    assert drawn.width > 800 and len(drawn.convert("L").getcolors()) > 20
