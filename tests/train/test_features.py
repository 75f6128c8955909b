"""The cache of frozen features: equal to what it replaces, resumable, verified, and refused when it is another's."""

import errno
import json
import os
import pickle
import threading

import numpy as np
import pytest
import torch

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.tiny import make_model
from train import cache, features
from train.cache import CachedTable, CorruptCacheError, StaleCacheError, build_cache
from train.collate import PairCollator, SkipCounter
from train.data import read_image_folder
from train.features import MatchingStates, cache_caption_states, cache_image_features
from train.trainer import UniMuRTrainer
from train.training_arguments import UniMuRTrainingArguments

WORDS = ["a red fox", "two dogs run far away", "sea", "my old hat is here", "one panda", "sky", "tiny cup", "cars"]
N = 12


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "PART_ROWS", 4)


@pytest.fixture
def photos(tmp_path):
    """Twelve pairs in files; the fifth's file is no picture and the eighth has captions to strip and to leave out."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(N):
        picture(i).save(folder / f"{i}.png")
        captions = [WORDS[i % 8], f"number {i} of them"] if i != 7 else ["  cars ", "", "   ", "blue cars"]
        rows.append(json.dumps({"file_name": f"{i}.png", "captions": captions}))
    (folder / "4.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def both(photos, model, cache, skips=None, **more):
    rows = cache_image_features(
        read_image_folder(photos), model, skips or SkipCounter(), folder=cache / "images", batch_size=2, **more
    )
    return cache_caption_states(rows, model, cache / "captions", batch_size=4)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forbid(*_):
    raise AssertionError("a part was made again")


def losses(model, batch):
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k not in ("skipped", "n_seen")})
    return torch.stack([out.loss_cap, out.loss_vm, out.loss_tm])


@pytest.mark.parametrize("fields", [{}, {"image_feature": "projected"}, {"train_ret_embedding": True}])
def test_losses_from_the_cache_are_those_of_the_plain_batch(fresh, photos, tmp_path, fields):
    model, plain = fresh(**fields), read_image_folder(photos)
    cached = both(photos, model, tmp_path / "cache")
    assert len(cached) == N - 1 and ("ret_states" in cached.captions) == (not model.config.train_ret_embedding)
    for epoch in range(3):
        for picked in ([0, 3, 7, 11], [9, 1, 6]):
            collate = PairCollator(model.processor, seed=3)
            collate.epoch = epoch
            a = collate([plain[i] for i in picked])
            b = collate([cached[i - (i > 4)] for i in picked])
            assert "pixel_values" not in b["images"] and "input_ids" not in b["targets"]
            assert ("input_ids" in b["contexts"]) == model.config.train_ret_embedding
            torch.testing.assert_close(losses(model, b), losses(model, a), rtol=1e-5, atol=1e-6)


def test_training_from_the_cache_gives_the_maps_of_training_without(fresh, photos, tmp_path):
    rows = [row for i, row in enumerate(read_image_folder(photos)) if i != 4]
    weights = []
    for name in ("plain", "cached", "packed"):
        model = make_model(tmp_path / "t")
        data = rows if name == "plain" else both(photos, model, tmp_path / "cache")
        args = UniMuRTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, warmup_steps=0,
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        collator = PairCollator(model.processor, pack=name == "packed")
        UniMuRTrainer(model=model, args=args, train_dataset=data, data_collator=collator).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-3, atol=1e-4)


def test_a_second_run_reads_what_the_first_wrote(fresh, photos, tmp_path, monkeypatch):
    model, skips = fresh(), SkipCounter()
    first = both(photos, model, tmp_path / "cache", skips, workers=2)
    assert first.rates["decode"] > 0 and first.rates["encode"] > 0
    assert skips.seen == N and dict(skips.counts) == {"undecodable": 1} and "'4.png'" in skips.details()
    manifest = json.loads((tmp_path / "cache" / "images" / "manifest.json").read_text())
    assert manifest["shards"]["00001.arrow"]["skipped"] == {"undecodable": 1}
    monkeypatch.setattr(features, "image_parts", forbid)
    monkeypatch.setattr(features, "_encode_captions", forbid)
    again, counted = both(photos, model, tmp_path / "cache", other := SkipCounter()), other
    assert counted.seen == N and counted.counts == skips.counts and again.rates == {}
    assert list(again["id"]) == list(first["id"]) and "4.png" not in again["id"]
    assert np.array_equal(again["image_embeds"][:], first["image_embeds"][:])
    assert not again["image_embeds"].parts[0].flags.writeable  # mapped, not copied
    assert (first.rates, contents(tmp_path / "cache").keys()) == (first.rates, {
        *(f"{part}/{name}" for part in ("images", "captions")
          for name in ("manifest.json", "00000.arrow", "00001.arrow", "00002.arrow")),
    })  # fmt: skip


def test_worker_processes_change_nothing(fresh, photos, tmp_path):
    model = fresh()
    both(photos, model, tmp_path / "a", workers=0), both(photos, model, tmp_path / "b", workers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_interrupted_extraction_goes_on_and_writes_the_same(fresh, photos, tmp_path, monkeypatch):
    model = fresh()
    both(photos, model, tmp_path / "whole")
    encode, calls = UniMuRModel.encode_images, []

    def interrupted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 4:  # in the second part
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(UniMuRModel, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        both(photos, model, tmp_path / "cache")
    assert (tmp_path / "cache" / "images" / "00000.arrow").is_file()
    assert not (tmp_path / "cache" / "images" / "00001.arrow").exists()
    calls.clear()
    calls.extend([0] * 9)
    both(photos, model, tmp_path / "cache")
    assert sum(calls) == N - 1 - 4  # the first part's four were not encoded again
    assert contents(tmp_path / "whole") == contents(tmp_path / "cache")


def test_a_full_disk_stops_with_the_position_and_leaves_no_half_shard(fresh, photos, tmp_path, monkeypatch):
    model = fresh()
    both(photos, model, tmp_path / "whole")
    write = cache._write_table

    def full(path, table):
        if "00001" in path.name:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, table)

    monkeypatch.setattr(cache, "_write_table", full)
    with pytest.raises(OSError, match=r"the disk is full at part 2 of 3 .*rows 4-7, .*make room") as caught:
        both(photos, model, tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC
    names = {p.name for p in (tmp_path / "cache" / "images").iterdir()}
    assert names == {"00000.arrow", "00000.arrow.json", "manifest.json"}
    monkeypatch.setattr(cache, "_write_table", write)
    both(photos, model, tmp_path / "cache")
    assert contents(tmp_path / "whole") == contents(tmp_path / "cache")


def test_a_corrupt_shard_is_named_and_made_anew_once_deleted(fresh, photos, tmp_path):
    model = fresh()
    both(photos, model, tmp_path / "cache")
    before, path = contents(tmp_path / "cache"), tmp_path / "cache" / "captions" / "00002.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=r"captions/00002\.arrow is corrupt.*Delete that file"):
        both(photos, model, tmp_path / "cache")
    path.unlink()
    both(photos, model, tmp_path / "cache")
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("what", "part", "message"),
    [
        ("clip.vision_model.encoder.layers.0.mlp.fc1.weight", "images", "weights of CLIP's visual tower"),
        ("clip.text_projection.weight", "captions", "weights of CLIP's text tower"),
        ("language_model.model.decoder.layers.1.fc2.weight", "captions", "weights of the LLM"),
        ("ret_embedding", "captions", r"\[RET\]"),
    ],
)
def test_a_cache_of_other_weights_is_refused(fresh, photos, tmp_path, what, part, message):
    model = fresh()
    both(photos, model, tmp_path / "cache")
    with torch.no_grad():
        model.get_parameter(what).view(-1)[-1] += 0.5
    with pytest.raises(StaleCacheError, match=rf"cache/{part} was made of something else.*{message}.*--cache_dir"):
        both(photos, model, tmp_path / "cache")


def test_a_cache_of_another_choice_or_preprocessing_is_refused(fresh, photos, tmp_path):
    model = fresh()
    both(photos, model, tmp_path / "cache")
    model.config.image_feature = "projected"
    with pytest.raises(StaleCacheError, match=r"image_feature \(cached 'pooled', now 'projected'\)"):
        both(photos, model, tmp_path / "cache")
    model.config.image_feature = "pooled"
    model.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    vars(model.processor).pop("fingerprint")
    with pytest.raises(StaleCacheError, match="preprocessing"):
        both(photos, model, tmp_path / "cache")


@pytest.mark.parametrize(
    ("of", "field", "message"),
    [
        (lambda m: m.clip.config.vision_config, "hidden_act", "configuration of CLIP's visual tower"),
        (lambda m: m.clip.config.text_config, "hidden_act", "configuration of CLIP's text tower"),
        (lambda m: m.language_model.config, "activation_function", "configuration of the LLM"),
    ],
)
def test_a_cache_of_towers_that_compute_otherwise_is_refused(fresh, photos, tmp_path, of, field, message):
    model = fresh()
    both(photos, model, tmp_path / "cache")
    before = getattr(of(model), field)
    setattr(of(model), field, "gelu_new")
    with pytest.raises(StaleCacheError, match=message):
        both(photos, model, tmp_path / "cache")
    setattr(of(model), field, before)
    of(model)._name_or_path = "elsewhere"
    both(photos, model, tmp_path / "cache")  # where it came from computes nothing


def test_a_cache_of_other_data_is_refused_and_a_touched_file_is_not(fresh, photos, tmp_path):
    model = fresh()
    both(photos, model, tmp_path / "cache")
    os.utime(photos / "5.png", (1, 1))
    both(photos, model, tmp_path / "cache")  # its bytes are the same
    (photos / "5.png").write_bytes((photos / "6.png").read_bytes())
    with pytest.raises(StaleCacheError, match=r"images \(first among rows 4-7\)"):
        both(photos, model, tmp_path / "cache")
    picture(5).save(photos / "5.png")
    both(photos, model, tmp_path / "cache")
    listing = (photos / "metadata.jsonl").read_text()
    (photos / "metadata.jsonl").write_text(listing.replace("number 9 of", "number nine of"))
    with pytest.raises(StaleCacheError, match=r"captions \(first among rows 8-10\)"):
        both(photos, model, tmp_path / "cache")
    (photos / "metadata.jsonl").write_text("\n".join(listing.split("\n")[:-4]))
    with pytest.raises(StaleCacheError, match=r"number of rows"):
        both(photos, model, tmp_path / "cache")


def test_several_processes_make_a_part_each_and_read_all(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_barrier", threading.Barrier(2).wait)
    made, tables = {0: [], 1: []}, {}

    def run(rank):
        def make(numbers):
            for number in numbers:
                made[rank].append(number)
                yield number, {"x": np.full((number + 1, 3), number, np.float32)}, {"note": number}

        sources = [{"rows": f"{n}"} for n in range(5)]
        tables[rank] = build_cache(tmp_path, {"of": "test"}, sources, make, rank=rank, world=2)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert made == {0: [0, 2, 4], 1: [1, 3]} and tables[0] == tables[1]
    assert [record["note"] for record in tables[0]] == [0, 1, 2, 3, 4]
    column = CachedTable(tmp_path, 5).columns["x"]
    assert column.shape == (15, 3) and column[[14, 0, 3, 3]][:, 0].tolist() == [4, 0, 2, 2]
    assert column[1:4][:, 2].tolist() == [1, 1, 2] and column[5].tolist() == [2, 2, 2]
    with pytest.raises(IndexError, match="row 15 of 15"):
        column[15]


def test_a_process_leaves_the_files_that_another_is_writing(tmp_path):
    """Without a barrier between them, as the states of a real language model are made."""
    names = [f"{n:05d}.arrow{end}.7.tmp" for n in range(4) for end in ("", ".json")] + ["manifest.json.7.tmp"]
    for name in names:
        (tmp_path / name).touch()
    cache._sweep(tmp_path, 1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(n for n in names if n[4] not in "13")
    cache._sweep(tmp_path, 0, 2)
    assert not list(tmp_path.iterdir())


def test_a_record_that_moves_into_the_manifest_while_it_is_read_is_read(tmp_path, monkeypatch):
    (tmp_path / "00001.arrow").touch()
    cache.write_json(tmp_path / "00001.arrow.json", {"note": 1})
    read, moved = cache._read_json, []

    def reading(path):
        value = read(path)
        if not moved:
            moved.append(path)
            cache._gather(tmp_path, {}, 2, prune=True)
        return value

    monkeypatch.setattr(cache, "_read_json", reading)
    assert cache._records(tmp_path) == {1: {"note": 1}}
    assert moved and not (tmp_path / "00001.arrow.json").exists()


def test_another_process_maps_the_files_itself(fresh, photos, tmp_path):
    cached = both(photos, fresh(), tmp_path / "cache")
    sent = pickle.dumps(cached)
    assert len(sent) < 20_000
    for index in (0, 8):
        for name, value in pickle.loads(sent)[index].items():
            assert np.array_equal(value, cached[index][name]), name


def test_matching_states_refuse_what_changes_or_is_empty(fresh, photos, tmp_path):
    model = fresh()
    rows = cache_image_features(read_image_folder(photos), model, SkipCounter())
    with pytest.raises(ValueError, match=r"pair '7\.png' has an empty caption"):
        MatchingStates(rows, model)
    model.config.text_adapter = True
    with pytest.raises(ValueError, match="LoRA"):
        MatchingStates(rows, model)
    assert set(cache_caption_states(rows, model).captions) == {"text_embeds"}
