"""Recall over pairs and replies, by the numbers of small cases; and data sets with a row for each caption."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from modeling_unimur.losses_unimur import visual_matching_loss
from tests.conftest import picture
from tests.tiny import make_model
from train.data import load_pairs
from train.grouping import hold_out, one_row_an_image
from train.miniature import encode
from train.recall import caption_to_image_recall, hits_at, reply_recall


def test_ties_count_by_their_share():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 3.0]])
    hits = hits_at(scores, [1, 0, 0], (1, 2, 3))
    assert torch.allclose(hits, torch.tensor([[0, 1, 1], [1 / 3, 2 / 3, 1], [0, 0.5, 1]]))


def flickr(folder, captions_each=5, images=4):
    """A row for each caption, as Flickr8k has them."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(images):
        picture(i).save(folder / f"{i}.png")
        rows += [{"file_name": f"{i}.png", "caption": f"{'abcdefgh'[i] * 6} {c}"} for c in range(captions_each)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_pairs(folder)


class Perfect:
    """A model that knows which image a caption is of."""

    class processor:
        decode = staticmethod(lambda image: Path(image["path"]).stem)

    @staticmethod
    def embed_dialogues(captions, **_):
        return torch.eye(8)[["abcdefgh".index(caption[0]) for caption in captions]]

    @staticmethod
    def embed_images(images, **_):
        return torch.eye(8)[[int(image) for image in images]]


def test_a_perfect_model_has_full_recall_with_a_row_for_each_caption(tmp_path):
    rows = flickr(tmp_path / "f")
    assert len(rows) == 20
    recalls = caption_to_image_recall(Perfect(), rows, 20)
    assert recalls["R@1"] == 100 and recalls["pool"] == 4
    grouped = one_row_an_image(rows)
    assert len(grouped) == 4 and grouped[2]["captions"] == [f"cccccc {c}" for c in range(5)]
    assert grouped[2]["image"]["path"].endswith("2.png") and grouped.column_names == rows.column_names
    assert one_row_an_image(grouped) is grouped


def test_rows_of_one_image_are_no_negatives():
    torch.manual_seed(0)
    image, other = torch.randn(2, 6)
    texts, scale = torch.randn(4, 6), torch.tensor(5.0)
    assert visual_matching_loss(texts, image.expand(4, 6), scale).item() == pytest.approx(0, abs=1e-6)  # was 2 ln 4
    mixed = torch.stack([image, image, other])
    cosines = 5 * torch.nn.functional.normalize(texts[:3], dim=-1) @ torch.nn.functional.normalize(mixed, dim=-1).T
    expected = 0.0
    for i, rivals in enumerate(([2], [2], [0, 1])):
        for view in (cosines[i], cosines[:, i]):
            expected += (torch.logsumexp(view[[i, *rivals]], 0) - view[i]).item() / 3
    assert visual_matching_loss(texts[:3], mixed, scale).item() == pytest.approx(expected, rel=1e-5)
    negatives = torch.nn.functional.normalize(torch.stack([image, other]), dim=-1)
    assert math.isfinite(visual_matching_loss(texts[:3], mixed, scale, negatives).item())


def test_no_pair_at_all_has_no_recall(tmp_path):
    recalls = caption_to_image_recall(make_model(tmp_path), [{"image": None, "captions": ["x"]}], 5)
    assert math.isnan(recalls["R@1"]) and (recalls["pool"], recalls["left out"]) == (0, 1)


def test_replies_by_section_3_4():
    # Contexts 0 and 1 want an image, 2 and 3 words alone; an image is shown where it beats the second text.
    texts = torch.eye(6)[:4]
    images = torch.eye(6)[4:]
    queries = torch.tensor([
        [0.9, 0.1, 0, 0, 0.5, 0], [0, 0.9, 0.3, 0, 0, 0.2], [0, 0, 0.9, 0.1, 0.5, 0], [0.9, 0, 0, 0.4, 0, 0.1],
    ])  # fmt: skip
    recalls = reply_recall(queries, texts, images, [0, 1, 2, 3], [0, 1, None, None])
    assert recalls["image_rate"] == 50 and recalls["image_rate_text_only"] == 50
    assert recalls["reply_R@1"] == pytest.approx(100 * (3 + 1) / 6)  # one text is second, one image is not shown
    assert recalls["reply_image_R@1"] == 100 and recalls["reply_R@5"] == pytest.approx(100 * 5 / 6)
    words = reply_recall(queries, texts, torch.zeros(0, 6), [0, 1, 2, 3], [None] * 4)
    assert words["image_rate_text_only"] == 0 and "image_rate" not in words


def test_a_share_is_held_out_by_the_ids_alone():
    from datasets import Dataset, IterableDataset

    rows = Dataset.from_dict({"id": [str(i) for i in range(400)]})
    kept, held = hold_out(rows, 0.1)
    assert 20 < len(held) < 60 and sorted([*kept["id"], *held["id"]], key=int) == rows["id"][:]
    assert set(hold_out(rows.shuffle(seed=1), 0.1)[1]["id"]) == set(held["id"])
    streamed = hold_out(IterableDataset.from_generator(lambda: ({"id": str(i)} for i in range(400))), 0.1)
    assert [row["id"] for row in streamed[1]] == held["id"][:] and len(list(streamed[0])) == len(kept)


def test_a_run_ends_well_without_evaluate(tmp_path, monkeypatch):
    from tests.tiny import make_towers
    from train.run import main

    text, clip = make_towers(tmp_path / "towers")
    flickr(tmp_path / "f", captions_each=2, images=3)
    for name in ("evaluate", "benchmarks"):
        monkeypatch.setitem(sys.modules, name, None)
    summary = main([
        f"--train_data={tmp_path / 'f'}", f"--text_model={text}", f"--clip_model={clip}", f"--output_dir={tmp_path / 'o'}",
        "--max_steps=1", "--per_device_train_batch_size=3", "--use_cpu=true", "--alignment=paper", "--save_strategy=no",
        "--disable_tqdm=true",
    ])  # fmt: skip
    assert summary["caption_to_image"]["pool"] == 3 and summary["caption_to_image"]["on"] == "training pairs"


def test_bytes_of_one_image_are_one_image():
    same = encode(picture(0))
    rows = [{"image": {"bytes": same, "path": None}, "captions": [c]} for c in ("a", "a again")]

    class Model(Perfect):
        class processor:
            decode = staticmethod(lambda image: 0)

    assert caption_to_image_recall(Model(), rows, 5)["pool"] == 1
