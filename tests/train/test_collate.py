"""Batches: broken pairs dropped and counted, captions drawn by a rule, documents laid out, features taken as given."""

import numpy as np
import pytest
import torch

from tests.conftest import picture
from tests.tiny import make_processor
from train.collate import PairCollator, SkipCounter, TooManyBadPairsError
from train.conversations import ImageId, make_conversation
from train.documents import InterleavedDocuments
from train.miniature import encode


def row(name, image=None, captions=("a",)):
    data = encode(picture(1)) if image is None else image
    return {"id": name, "image": {"bytes": data, "path": None}, "captions": list(captions)}


def test_broken_pairs_are_dropped_and_counted():
    collate = PairCollator(make_processor())
    rows = [
        row("0"), row("1", b""), row("2", captions=[" "]), row("3", b"<html>"), row("4", captions=[]),
        row("5", captions=["", "b"]), {"id": "6", "image": {"bytes": None, "path": "gone.png"}, "captions": ["a"]},
        {"id": "7", "image": None, "captions": ["a"]}, {**row("8"), "captions": None},
    ]  # fmt: skip
    batch = collate(rows)
    assert batch["skipped"] == {"empty": 1, "empty_caption": 3, "undecodable": 1, "missing": 2}
    assert type(batch["skipped"]) is dict and batch["n_seen"] == 9
    assert len(batch["images"]["pixel_values"]) == len(batch["contexts"]["input_ids"]) == 2
    assert batch["targets"]["image_indices"].tolist() == [0, 1]
    with pytest.raises(
        TooManyBadPairsError, match=r"all 2 pairs(.|\n)*empty: '1': (.|\n)*empty_caption: '2': no caption"
    ):
        PairCollator(make_processor())(rows[1:3])


def test_a_batch_without_a_usable_pair_repeats_the_last_good_one(caplog):
    collate = PairCollator(make_processor(), caption="first")
    good = collate([row("0", captions=["a"]), row("1", captions=["b"])])
    batch = collate([row("2", b""), row("3", captions=[" "])])
    assert "all 2 pairs of a batch are broken" in caplog.text and "is taken again" in caplog.text
    assert batch["skipped"] == {"empty": 1, "empty_caption": 1} and batch["n_seen"] == 2
    assert batch["contexts"]["input_ids"].tolist() == good["contexts"]["input_ids"][1:].tolist()
    assert torch.equal(batch["images"]["pixel_values"], good["images"]["pixel_values"][1:])
    assert batch["targets"]["image_indices"].tolist() == [0]


def test_the_first_few_of_each_reason_are_named(caplog):
    collate = PairCollator(make_processor())
    for i in range(6):
        collate([row("good"), row(f"bare{i}", captions=[""]), row(f"html{i}", b"<html>")])
    assert [f"bare{i}" in caplog.text for i in range(6)] == [f"html{i}" in caplog.text for i in range(6)]
    assert "'bare2' is left out (empty_caption)" in caplog.text and "bare3" not in caplog.text


def test_counts_come_back_from_loader_workers():
    from torch.utils.data import DataLoader

    rows = [row(str(i), b"" if i % 3 == 0 else None) for i in range(12)]
    skips = SkipCounter()
    for batch in DataLoader(rows, batch_size=3, num_workers=2, collate_fn=PairCollator(make_processor())):
        skips.update(batch["skipped"], batch["n_seen"])
    assert str(skips) == "4 of 12 pairs left out (33.3%): empty 4"


def test_an_unknown_way_to_pick_captions_is_refused():
    with pytest.raises(ValueError, match="'random' or 'first', got 'longest'"):
        PairCollator(make_processor(), caption="longest")


def test_the_counter_stops_above_its_share():
    skips = SkipCounter()
    skips.update({"missing": 3}, 60)
    skips.update({"missing": 1, "empty": 1}, 40)
    assert str(skips) == "5 of 100 pairs left out (5.0%): missing 4, empty 1"
    skips.check(0.05)
    with pytest.raises(TooManyBadPairsError, match=r"missing 4, empty 1: more than the 4\.0% allowed"):
        skips.check(0.04)
    skips.update({"missing": 5}, 5, {"missing": [f"row {i}" for i in range(5)]})
    skips.update({"missing": 1}, 1, {"missing": ["row 5"], "empty": ["row 6"]})
    assert skips.examples == {"missing": ["row 0", "row 1", "row 2"], "empty": ["row 6"]}
    with pytest.raises(TooManyBadPairsError, match=r"missing: row 0\n(.|\n)*empty: row 6"):
        skips.check(0.0)


def test_captions_are_drawn_per_epoch_and_reproducibly():
    processor, captions = make_processor(), [f"{c}{c}" for c in "abcdefgh"]
    rows = [row(str(i), captions=captions) for i in range(20)]

    def drawn(epoch, seed=0, kind="random"):
        collate = PairCollator(processor, caption=kind, seed=seed)
        collate.epoch = epoch
        return collate(rows)["targets"]["input_ids"][:, 1].tolist()

    assert drawn(0) == drawn(0) != drawn(1) and drawn(0) != drawn(0, seed=1)
    assert len(set(drawn(0))) > 4
    assert len(set(drawn(0, kind="first"))) == 1


def test_a_pair_is_read_as_a_conversation():
    processor, captions = make_processor(), ["a b", "c d"]
    rows = [row(str(i), captions=captions) for i in range(300)]

    def contexts(rows, epoch=0, **settings):
        collate = PairCollator(processor, caption="first")
        collate.pair_contexts, collate.epoch = "conversations", epoch
        for name, value in settings.items():
            setattr(collate, name, value)
        batch = collate(rows)
        part, images = batch["contexts"], iter(batch["contexts"]["image_indices"].tolist())
        assert batch["targets"]["image_indices"].tolist() == list(range(len(rows)))
        kinds = []
        for number, (ids, mask) in enumerate(zip(part["input_ids"], part["attention_mask"], strict=True)):
            ids = ids[mask.bool()].tolist()
            if processor.image_token_id in ids:
                assert next(images) == number  # its own image
            kinds.append(tuple(ids))
        assert next(images, None) is None
        return kinds

    def of(dialogue):
        return tuple(processor.contexts([dialogue])["input_ids"][0].tolist())

    alone, shown, both = of(["a b"]), of([picture(1), "a b"]), of(["c d", "a b"])
    kinds = contexts(rows)
    assert set(kinds) == {alone, shown, both} and all(80 < kinds.count(kind) < 120 for kind in set(kinds))
    assert kinds == contexts(rows) != contexts(rows, epoch=1)
    single = contexts([row(str(i), captions=["a b"]) for i in range(100)])
    assert set(single) == {alone, shown} and 35 < single.count(shown) < 65
    assert set(contexts(rows, pair_contexts="caption")) == {alone}


def test_the_target_that_a_context_shows_teaches_the_visual_tokens_nothing(fresh):
    rows = [row(str(i), encode(picture(i)), captions=["a b", "c d"]) for i in range(12)]
    model = fresh("opt")
    collate = PairCollator(model.processor)
    gradients = {}
    for collate.pair_contexts in ("caption", "conversations"):
        batch = collate(rows)
        inputs = {name: batch[name] for name in ("contexts", "targets", "images")}
        for kept in (True, False):
            model.zero_grad()
            if not kept:
                inputs["contexts"].pop("fixed_images", None)
            model(**inputs).loss.backward()
            seen = model.W_i2t.weight.grad
            gradients[collate.pair_contexts, kept] = None if seen is None else seen.abs().sum().item()
            assert model.W_t2m.weight.grad.abs().sum() > 0
    assert gradients["caption", True] in (None, 0.0) and gradients["conversations", True] in (None, 0.0)
    assert gradients["conversations", False] > 0


def documents(images):
    see, target = ["see", ImageId("context")], ["here", ImageId("target")]
    return InterleavedDocuments.of(
        [make_conversation("d", [see, ["more!"], target], [2]), make_conversation("e", [["more!"], ["here"]], [1])],
        images,
    )


def test_documents_and_pairs_in_one_batch():
    import datasets

    images = datasets.Dataset.from_list(
        [row(name, encode(picture(i))) for i, name in enumerate(("target", "context", "other"))]
    )
    made = documents(images)
    processor = make_processor(n_visual_tokens=1)
    batch = PairCollator(processor)([row("p"), made[0], made[1]])
    assert len(batch["images"]["pixel_values"]) == 3  # the pair's, the document's context and target
    assert torch.allclose(
        batch["images"]["pixel_values"][1], processor.pixels([picture(1)])[0]
    )  # sorted: context before target
    assert batch["captions"]["image_indices"].tolist() == [0]
    assert batch["contexts"]["image_indices"].tolist() == [1]
    rows = {name: batch["targets"][name].tolist() for name in ("image_rows", "image_indices", "text_rows")}
    assert rows == {"image_rows": [0, 1], "image_indices": [0, 2], "text_rows": [0, 1, 2]}
    dialogue = [{"content": ["see", {"type": "image", "image": picture(1)}]}, "more!"]
    context = processor.contexts([dialogue])["input_ids"][0]
    assert batch["contexts"]["input_ids"][1, : len(context)].tolist() == context.tolist()
    assert len(batch["captions"]["labels"]) == 1  # only the pair has a caption


@pytest.mark.parametrize(("predicted", "rows"), [("none", 1), ("after images", 2), ("all", 3)])
def test_replies_are_captions_by_choice(predicted, rows):
    import datasets

    images = datasets.Dataset.from_list([row(name) for name in ("target", "context")])
    made, processor = documents(images), make_processor(n_visual_tokens=1)
    collate = PairCollator(processor)
    collate.predicted, collate.worded = predicted, True
    batch = collate([row("p"), made[0], made[1]])
    ids = [[i for i in ids if i >= 0][:-1] for ids in batch["captions"]["labels"].tolist()]
    t = processor.tokenizer.convert_tokens_to_ids
    assert ids == ([[t("a")], [t(c) for c in "here"], [t(c) for c in "here"]])[:rows]
    assert batch["captions"]["image_indices"].tolist() == [0, 1][:rows]
    assert batch["words"] == ["a"]  # what the mapper draws is a pair's


def test_a_document_whose_image_was_left_out_is_counted():
    import datasets

    made = documents(datasets.Dataset.from_list([row("target")]))
    batch = PairCollator(make_processor())([made[0], made[1]])
    assert batch["skipped"] == {"missing": 1} and batch["n_seen"] == 2 and len(batch["contexts"]["input_ids"]) == 1


def test_what_a_reader_says_is_wrong_is_counted():
    batch = PairCollator(make_processor())([row("p"), {"id": "x", "problem": "not_json: no object"}])
    assert batch["skipped"] == {"not_json": 1} and batch["n_seen"] == 2


def test_cached_features_replace_images(fresh):
    import datasets

    from train.features import cache_image_features

    model, skips = fresh(), SkipCounter()
    images = datasets.Dataset.from_list([row("0", encode(picture(0))), row("1", b""), row("2", encode(picture(2)))])
    cached = cache_image_features(images, model, skips)
    assert [r["id"] for r in cached] == ["0", "2"] and dict(skips.counts) == {"empty": 1} and skips.seen == 3
    features, embeds = model.encode_images(model.processor.pixels([picture(0), picture(2)]))
    assert np.allclose(cached["image_features"][:], features, atol=1e-6)
    collate = PairCollator(model.processor)
    batch, plain = collate(list(cached)), collate([images[0], images[2]])
    assert "pixel_values" not in batch["images"] and torch.allclose(batch["images"]["embeds"], embeds, atol=1e-6)
    kept = ("skipped", "n_seen")
    with torch.no_grad():
        losses = [model(**{k: v for k, v in b.items() if k not in kept}).loss for b in (batch, plain)]
    assert torch.allclose(*losses, atol=1e-6)
