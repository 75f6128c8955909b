"""The miniature: disjoint splits with held-out combinations, dialogues that need what they claim, towers that reload."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from train.documents import WITH_IMAGES
from train.miniature import pictures
from train.miniature.dialogues import figure1, interleaved, responses, visdial, without_context_images
from train.miniature.prepare import prepare_towers, training_documents, training_pairs
from train.miniature.sentences import ASK_IMAGE
from train.miniature.towers import documents, pretrain_clip, pretrain_opt
from train.miniature.world import captions, draw, every_scene, held_out_pairs, splits
from train.parallel import Done, side_by_side


@pytest.fixture(scope="module")
def parts():
    return splits()


def pairs_of(scenes):
    return {(s.animal, s.place) for s in scenes} | {(s.animal, s.object) for s in scenes}


def test_splits_are_disjoint_by_scene_and_by_combination(parts):
    assert len(every_scene()) == len(set(every_scene())) == 20_736
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (10_000, 1_800, 2_400)
    assert len({s for scenes in parts.values() for s in scenes}) == 14_200
    for name, held in held_out_pairs().items():
        assert held and held <= pairs_of(parts[name])
        for other in parts.keys() - {name}:
            assert not held & pairs_of(parts[other]), (name, other)
        novel = sum(bool(pairs_of([s]) & held) for s in parts[name])
        assert 0.3 < novel / len(parts[name]) < 0.7


def test_the_towers_text_never_tells_a_held_out_combination(parts):
    scenes = parts["train"][:300]
    texts = documents(scenes, 3_000, random.Random(0))
    for _, tail in texts:
        tags = set(tail.replace("#", " ").split())
        assert not any({animal, thing} <= tags for animal, thing in held_out_pairs()["test"]), tail


def test_a_picture_depends_on_its_scene_and_its_jitter(parts):
    scene, other = parts["train"][:2]
    first = draw(scene, random.Random(1))
    assert first.size == (64, 64) and first.mode == "RGB"
    assert first.tobytes() == draw(scene, random.Random(1)).tobytes() != draw(scene, random.Random(2)).tobytes()
    assert draw(other, random.Random(1)).tobytes() != first.tobytes()
    table = {"a": scene, "b": other}
    assert pictures(table)["b"].tobytes() == pictures({"b": other})["b"].tobytes()


def test_responses_follow_from_their_context(parts):
    dialogue_set = responses(parts["test"], 400, 3)
    assert len({dialogue_set.texts[i] for i in dialogue_set.texts}) == 400 == len(dialogue_set.dialogues)
    for dialogue in dialogue_set.dialogues:
        last = dialogue["turns"][dialogue["target_turn"] - 1]["elements"][-1]["text"]
        assert dialogue["wants_image"] is bool(dialogue["gold"]["image_ids"]) is (last in ASK_IMAGE)
        context = [e for t in dialogue["turns"][:-1] for e in t["elements"]]
        scene = dialogue_set.scenes[dialogue["dialogue_id"]]
        words = " ".join(e["text"] for e in context if e["type"] == "text")
        pictured = [dialogue_set.images[e["image_id"]] for e in context if e["type"] == "image"]
        if dialogue["image_informs"]:
            assert scene.animal not in words and scene.hat not in words
            assert (pictured[0].animal, pictured[0].hat) == (scene.animal, scene.hat) and pictured[0] != scene
        else:
            assert scene.animal in words and scene.hat in words and not pictured
    informed = [d for d in dialogue_set.dialogues if d["image_informs"]]
    assert len(informed) > 100
    bare = without_context_images(informed)
    assert not any(e["type"] == "image" for d in bare for t in d["turns"][:-1] for e in t["elements"])


def test_visdial_answers_never_name_the_scene_whole(parts):
    seen = visdial(parts["test"], 50, 3)
    for dialogue in seen.dialogues:
        scene = seen.scenes[dialogue["dialogue_id"]]
        for turn in dialogue["turns"][:-1]:
            named = {scene.animal, scene.hat} & set(turn["elements"][0]["text"].replace(".", " ").split())
            assert len(named) <= 1
    assert len(figure1(parts["test"]).dialogues) == 24


def test_training_shows_train_scenes_only(parts):
    scenes = parts["train"][:400]
    pairs = training_pairs(scenes, 0)
    assert pairs["id"][:] == [s.key for s in scenes] and len(pairs[0]["captions"]) == len(
        captions(scenes[0], random.Random(0))
    )
    made = interleaved(scenes, 100, 0)
    assert set(made.images.values()) <= set(scenes)
    some = training_documents(scenes, pairs, 0, n=100)
    assert len(some) >= 100 and any(some.kind(i) == WITH_IMAGES for i in range(len(some)))
    assert set(some[0]["images"]) <= set(pairs["id"][:])


def test_towers_reload_and_repeat(parts, tmp_path):
    scenes = parts["train"][:200]
    small = {"scenes": scenes, "seed": 1, "steps": 3, "batch_size": 8, "progress": False}
    for name in ("a", "b"):
        pretrain_clip(tmp_path / name / "clip", **small)
        pretrain_opt(tmp_path / name / "opt", **small)
    opts = [AutoModelForCausalLM.from_pretrained(tmp_path / n / "opt") for n in "ab"]
    clips = [CLIPModel.from_pretrained(tmp_path / n / "clip") for n in "ab"]
    for first, second in (opts, clips):
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "opt")
    ids = tokenizer("a panda in the forest.")["input_ids"]
    assert ids[0] == 2 == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == "a panda in the forest."
    words = CLIPTokenizer.from_pretrained(tmp_path / "a" / "clip")("a panda")["input_ids"]
    assert len(words) == 4 and words[-1] == clips[0].config.text_config.eos_token_id
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "a" / "clip")(
        draw(scenes[0], random.Random(0)), return_tensors="pt"
    )
    assert pixels["pixel_values"].shape == (1, 3, 64, 64)


def test_jobs_run_side_by_side_in_processes_of_their_own(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    at_start = (Path.read_bytes, {"self": Path("/proc/self/environ")})  # what OpenMP read, not what was set later
    done = side_by_side([(os.getpid, {})] * 3 + ([at_start] if Path("/proc").is_dir() else []), workers=2)
    assert len({os.getpid(), *(d.result for d in done[:3])}) == 4
    assert all(d.seconds >= 0 and d.memory > 0 for d in done)
    assert all(b"\0OMP_NUM_THREADS=1\0" in b"\0" + d.result + b"\0" for d in done[3:])
    assert "OMP_NUM_THREADS" not in os.environ


def test_jobs_end_with_a_command_that_is_killed():
    psutil = pytest.importorskip("psutil")
    script = "import signal; from train.parallel import side_by_side; side_by_side([(signal.pause, {})] * 2)"
    command = psutil.Popen([sys.executable, "-c", script])
    deadline, jobs = time.monotonic() + 60, []
    while len(jobs) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        jobs = [p for p in command.children() if any("spawn_main" in word for word in p.cmdline())]
    command.kill()
    command.wait()
    assert len(jobs) == 2 and not psutil.wait_procs(jobs, timeout=60)[1]


def test_bars_side_by_side_have_lines_of_their_own():
    script = "import io; from tqdm.auto import tqdm; print(abs(tqdm(range(3), file=io.StringIO()).pos))"
    job = (subprocess.check_output, {"args": [sys.executable, "-c", script], "text": True})
    assert {done.result for done in side_by_side([job, job])} == {"0\n", "1\n"}


def test_what_a_job_raises_is_raised():
    with pytest.raises(TypeError, match="no keyword arguments"):
        side_by_side([(os.getpid, {}), (os.getpid, {"of": "what"})])


def test_a_job_that_waits_for_one_that_failed_is_ended():
    script = "import os, signal; from train.parallel import side_by_side; "
    script += "side_by_side([(signal.pause, {}), (os.listdir, {'path': '?'})])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("FileNotFoundError")


def test_towers_of_another_seed_are_named_when_they_are_replaced(tmp_path, monkeypatch, caplog):
    made = []
    module = sys.modules["train.miniature.prepare"]
    monkeypatch.setattr(
        module, "side_by_side", lambda jobs: made.append(len(jobs)) or [Done(None, 1.0, 0.5)] * len(jobs)
    )
    (tmp_path / "towers").mkdir()
    with caplog.at_level("WARNING"):
        for seed in (0, 0, 42):
            prepare_towers(tmp_path, seed)
    assert made == [2, 2]  # the second call takes what the first made
    (message,) = [record.message for record in caplog.records if "holds the towers" in record.message]
    assert "of seed 0: those of seed 42 take their place" in message
