"""Checkpoints appear whole or not at all, and a killed run resumes from what it left, bit for bit."""

import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.checkpoints
import train.trainer
from tests.tiny import make_model
from tests.train.test_trainer import pairs, trained_tensors, trainer_of
from train.checkpoints import ASIDE, newest_whole, restore, rotate_checkpoints, what_is_broken, whole_folder

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "seed": 3, "save_total_limit": 3}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that nothing interrupted, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    model = make_model(folder / "t")
    trainer_of(model, folder / "run", pairs(16), **SAVING).train()
    return folder / "run", trained_tensors(model)


def killed_inside(point: str, folder: Path, towers: Path) -> None:
    """Trains in a process of its own that ends at once where the second save comes to `point`."""

    def run():
        calls, (owner, name) = [], POINTS[point]
        kept = getattr(owner, name)

        def ends(*args, **kwargs):
            calls.append(name)
            if len(calls) == 2:
                os._exit(9)
            return kept(*args, **kwargs)

        setattr(owner, name, ends)
        trainer_of(make_model(towers), folder, pairs(16), **SAVING).train()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == 9


POINTS = {
    "the weights are written, the optimizer is not": (train.trainer.UniMuRTrainer, "_save_optimizer_and_scheduler"),
    "all is written and has no name yet": (train.trainer, "put_in_place"),
    "it has its name, older ones are to go": (train.trainer, "rotate_checkpoints"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_inside_a_save_goes_on_to_the_same_weights(tmp_path, whole_run, point):
    killed_inside(point, tmp_path / "run", tmp_path / "t")
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    named = "checkpoint-4" if "its name" in point else "checkpoint-2"
    assert checkpoints[-1] == named  # what is half-written never has the name
    restore(tmp_path / "run")
    assert not (tmp_path / "run" / ASIDE).exists()
    newest = newest_whole(tmp_path / "run")
    assert newest is not None and newest.name == named
    model = make_model(tmp_path / "t")
    trainer_of(model, tmp_path / "run", pairs(16), **SAVING).train(resume_from_checkpoint=str(newest))
    for name, tensor in whole_run[1].items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_a_run_killed_after_its_last_step_takes_no_further_one(tmp_path, whole_run):
    shutil.copytree(whole_run[0], tmp_path / "run")
    model = make_model(tmp_path / "t")
    trainer = trainer_of(model, tmp_path / "run", pairs(20), **SAVING | {"lr_scheduler_type": "constant"})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert trainer.state.global_step == 6
    for name, tensor in whole_run[1].items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_a_run_killed_between_its_last_save_and_the_deletion_of_older_ones_keeps_to_its_limit(tmp_path, whole_run):
    shutil.copytree(whole_run[0], tmp_path / "run")
    trainer = trainer_of(make_model(tmp_path / "t"), tmp_path / "run", pairs(16), **SAVING | {"save_total_limit": 2})
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [2, 4, 6, 8]),
        (5, None, [2, 4, 6, 8]),
        (3, None, [2, 4, 6]),  # 8 is of the run before this one, which went on from 4
        (2, None, [4, 6]),
        (1, None, [6]),
        (2, "checkpoint-2", [2, 6]),
        (1, "checkpoint-2", [2, 6]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, monkeypatch, limit, best, kept):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "file").touch()
    removed, remove = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: removed.append(path) or remove(path, **options))
    rotate_checkpoints(tmp_path, limit, 6, best and str(tmp_path / best))
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == kept
    assert all(path.parent.name == ASIDE for path in removed)  # never half of one under its own name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "harm", "problem"),
    [
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        ("trainer_state.json", cut, "trainer_state.json is cut off"),
        ("model.safetensors", cut, "model.safetensors is cut off"),
        ("optimizer.pt", cut, "optimizer.pt is cut off"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken_and_a_broken_one_named(tmp_path, whole_run, caplog, name, harm, problem):
    shutil.copytree(whole_run[0], tmp_path / "run")
    harm(tmp_path / "run" / "checkpoint-6" / name)
    logging.getLogger("transformers").propagate = logging.getLogger("train").propagate = True
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    assert f"checkpoint-6 is passed over, since {problem}" in caplog.text
    trainer = trainer_of(make_model(tmp_path / "t"), tmp_path / "run", pairs(16), **SAVING)
    with pytest.raises(ValueError, match=problem):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


def test_nothing_whole_is_none(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "absent") is None
    assert what_is_broken(tmp_path / "checkpoint-9") == "there is no such folder"


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    target = tmp_path / "checkpoint"
    for text in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "first"
        assert (target / "file").read_text() == text
    with pytest.raises(OSError, match="full"), whole_folder(target) as folder:
        (folder / "file").write_text("half")
        raise OSError("the disk is full")
    assert (target / "file").read_text() == "second" and os.listdir(tmp_path) == ["checkpoint"]


def test_what_was_moved_aside_comes_back(tmp_path, monkeypatch):
    target, replace = tmp_path / "checkpoint", os.replace
    with whole_folder(target) as folder:
        (folder / "file").write_text("first")

    def killed(source, to):
        if Path(to) == target:
            raise KeyboardInterrupt
        replace(source, to)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "file").write_text("second")
    monkeypatch.undo()
    assert not target.exists()
    restore(tmp_path)
    assert (target / "file").read_text() == "first" and os.listdir(tmp_path) == ["checkpoint"]


def test_the_best_checkpoint_is_named_by_its_own_name(tmp_path, whole_run):
    state = json.loads((whole_run[0] / "checkpoint-6" / "trainer_state.json").read_text())
    assert ASIDE not in json.dumps(state)
    assert set(load_file(whole_run[0] / "checkpoint-6" / "model.safetensors")) >= {"W_t2m.weight", "W_i2t.weight"}
