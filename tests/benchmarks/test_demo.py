"""The demo's table, its gallery and recall on pairs; and that the tasks agree with what `retrieve` returns."""

import json

import pytest
import torch

from benchmarks.baselines.clip import ClipBaseline
from benchmarks.demo import report
from benchmarks.gallery import draw_gallery
from benchmarks.load import UniMuR
from benchmarks.miniature import Split, image_to_itself, measure, table
from benchmarks.protocols import protocols
from benchmarks.schema import Dialogues
from benchmarks.spread import RESULTS
from benchmarks.tasks import image, response
from benchmarks.tasks.contexts import context_of
from tests.conftest import picture
from train.miniature import encode, pictures
from train.miniature.dialogues import figure1, responses, visdial
from train.miniature.world import splits
from train.recall import caption_to_image_recall


@pytest.fixture(scope="module")
def split():
    scenes = splits()["validation"]
    sets = responses(scenes, 40, 1), visdial(scenes, 12, 1), figure1(scenes, 1)
    return Split(*sets, {k: v for s in sets for k, v in pictures(s.images).items()})


def test_the_tasks_agree_with_retrieve(tiny, split):
    model, source = tiny(), split.responses
    data = Dialogues(source.dialogues, source.texts, split.images)
    measures = response.run(UniMuR(model), data, protocols("mmdialog", True)[0], ClipBaseline(model))
    ids = source.dialogues[0]["pool"]
    pool = model.build_pool(
        [split.images[i] for i in ids["image_ids"]], [source.texts[i] for i in ids["text_ids"]],
        image_ids=ids["image_ids"], text_ids=ids["text_ids"], show_progress_bar=False,
    )  # fmt: skip
    replies = model.retrieve([context_of(d, split.images) for d in source.dialogues], pool, top_k=100)
    wants = [d["wants_image"] for d in source.dialogues]
    rate = sum(r.image is not None for r, w in zip(replies, wants, strict=True) if w) / sum(wants)
    hits = sum(
        r.text == source.texts[d["gold"]["text_ids"][0]] for r, d in zip(replies, source.dialogues, strict=True)
    )
    assert measures["image retrieval rate"].value == pytest.approx(rate)
    assert measures["text R@1"].value == pytest.approx(hits / len(replies))


def test_the_whole_table(tiny, split):
    model = tiny()
    clip = ClipBaseline(model)
    columns = {"UniMuR": measure(UniMuR(model), clip, split), "CLIP": measure(clip, clip, split)}
    assert columns["UniMuR"].keys() == columns["CLIP"].keys()
    assert all(0 <= v <= 100 for n, v in columns["UniMuR"].items() if n != "CLIP-Sim")
    assert columns["CLIP"]["image to itself R@1"] == 100  # an identity for CLIP, as the README explains
    text = table(columns)
    assert len(text.splitlines()) == 2 + len(columns["UniMuR"]) and "| image to itself R@1" in text


def test_an_image_by_itself_is_the_whole_context(split):
    data = image_to_itself(Dialogues(split.visdial.dialogues, {}, split.images))
    golds = {d["gold"]["image_ids"][0] for d in data.dialogues}
    assert len(data) == 12 and golds == set(data.dialogues[0]["pool"]["image_ids"])
    (turn,) = context_of(data.dialogues[3], split.images)
    assert turn["content"] == [{"type": "image", "image": split.images[data.dialogues[3]["dialogue_id"]]}]


def test_clip_alone(tiny):
    clip = ClipBaseline(tiny())
    words, image_ = clip.embed_texts(["a dog"]), clip.embed_images([picture(1)])
    both = clip.embed_dialogues([["a dog", picture(1)]])
    assert torch.allclose(both, torch.nn.functional.normalize(words + image_, dim=-1), atol=1e-6)
    assert clip.notes == []
    long = clip.embed_texts(["x" * 200 + " a dog"])
    assert clip.truncated == 1 and torch.isfinite(long).all() and "1 texts exceeded" in clip.notes[0]
    clip.begin()
    assert clip.notes == []


def test_a_constant_model_gains_nothing_from_ties(tiny, split):
    class Constant(UniMuR):
        def embed_dialogues(self, dialogues, **_):
            return torch.ones(len(dialogues), 4) / 2

        embed_images = embed_texts = embed_dialogues

    data = Dialogues(split.visdial.dialogues, {}, split.images)
    measures = image.run(Constant(tiny()), data, protocols("visdial", True)[0])
    assert {k: m.value for k, m in measures.items()} == pytest.approx({"R@1": 1 / 12, "R@5": 5 / 12, "R@10": 10 / 12})


def test_recall_on_pairs_counts_what_it_leaves_out(tiny):
    rows = [{"image": {"bytes": encode(picture(i)), "path": None}, "captions": [f"number {i}"]} for i in range(3)]
    rows += [{"image": {"bytes": b"", "path": None}, "captions": ["x"]}, {"image": rows[0]["image"], "captions": []}]
    recall = caption_to_image_recall(tiny(), rows, 10)
    assert recall["pool"] == 3 and recall["left out"] == 2 and recall["R@5"] == 100
    blank = [rows[0] | {"captions": [" ", "number 0"]}, rows[1] | {"captions": [""]}, rows[2]]
    recall = caption_to_image_recall(tiny(), blank, 10)
    assert recall["pool"] == 2 and recall["left out"] == 1


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


def test_the_demo_reports_its_figures_among_the_published_ones(tmp_path, capsys):
    columns = json.loads((RESULTS / "demo-0.json").read_text())["columns"]
    results = {"seed": 0, "split": "test", "results": columns, "seconds": {"total": 3.0}, "peak_memory_gib": 1.5,
               "checkpoint": "c"}  # fmt: skip
    report(tmp_path, results)
    printed = capsys.readouterr().out
    assert "test split, seed 0" in printed and "figures of UniMuR lie within those of" in printed
    assert "total 3" in printed and "peak memory: 1.50 GiB" in printed
    assert json.loads((tmp_path / "results.json").read_text()) == results
    report(tmp_path, results | {"split": "validation"})
    assert "lie within" not in capsys.readouterr().out  # the published ones are of the test split
