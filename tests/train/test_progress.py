"""A resumed run is the interrupted run: passes over streamed data, the counts of what was left out, and no empty runs."""

import tarfile

import pytest
import torch
import yaml
from datasets import IterableDataset
from safetensors.torch import load_file

from tests.tiny import make_model
from tests.train.test_run import base, folder, write_shard  # noqa: F401 (a fixture)
from tests.train.test_trainer import pairs, trainer_of
from train.collate import TooManyBadPairsError
from train.data import FEATURES
from train.run import main


def run(folder, name, *more, **changes):  # noqa: F811
    settings = base(folder) | {
        "train_data": str(folder / "s-*.tar"), "per_device_train_batch_size": 4, "max_steps": 12, "evaluate_pairs": 0,
        "save_strategy": "steps", "save_steps": 6, "save_total_limit": 5, "output_dir": str(folder / name),
        "max_bad_share": 0.2, "state_noise": 0.1,
    }  # fmt: skip
    (folder / "s.yaml").write_text(yaml.safe_dump(settings | changes))
    return main([str(folder / "s.yaml"), *more])


def test_a_streamed_run_resumed_in_its_second_pass_is_the_interrupted_run(folder):  # noqa: F811
    for shard in range(2):
        write_shard(folder / f"s-{shard}.tar", ["" if (shard, i) == (1, 3) else f"words {i}" for i in range(8)])
    whole = run(folder, "whole")
    (folder / "again").mkdir()
    (folder / "whole" / "checkpoint-6").rename(folder / "again" / "checkpoint-6")
    resumed = run(folder, "again", "--resume_from_checkpoint=last")
    weights = [load_file(f"{r['checkpoint']}/model.safetensors") for r in (whole, resumed)]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name
    assert (whole["pairs_seen"], whole["skipped"]) == (resumed["pairs_seen"], resumed["skipped"])
    assert whole["pairs_seen"] == 48 and whole["skipped"] == {"empty_caption": 3}
    assert whole["log"][-1]["epoch"] == resumed["log"][-1]["epoch"] > 2
    with pytest.raises(ValueError, match=r"another order, since these differ: seed \(42 then, 5 now\)"):
        run(folder, "again", "--resume_from_checkpoint=last", "--seed=5")
    write_shard(folder / "s-2.tar", ["words"] * 2)
    with pytest.raises(ValueError, match=r"shards \(2 of them then, 3 of them now\)"):
        run(folder, "again", "--resume_from_checkpoint=last")
    (folder / "again" / "checkpoint-12" / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"holds no progress.json"):
        run(folder, "again", "--resume_from_checkpoint=last")


def test_counts_go_on_at_a_resumption(tmp_path):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "max_bad_share": 0.5, "seed": 1}
    rows = pairs(16, broken=3)
    whole = trainer_of(make_model(tmp_path / "t"), tmp_path / "run", rows, **arguments)
    whole.train()
    resumed = trainer_of(make_model(tmp_path / "t"), tmp_path / "run", rows, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert (resumed.skips.seen, resumed.skips.counts) == (whole.skips.seen, whole.skips.counts) == (32, {"empty": 6})
    # What was broken before counts too, where a run is to stop.
    strict = trainer_of(make_model(tmp_path / "t"), tmp_path / "run", rows, **arguments | {"max_bad_share": 0.1})
    with pytest.raises(TooManyBadPairsError):
        strict.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_run_that_sees_no_pair_is_refused(folder, tmp_path):  # noqa: F811
    with tarfile.open(folder / "s-0.tar", "w"):
        pass
    with pytest.raises(ValueError, match="holds no usable pair"):
        run(folder, "out")
    assert not (folder / "out" / "checkpoint").exists()
    few = trainer_of(make_model(tmp_path / "t"), tmp_path, pairs(16), per_device_train_batch_size=45,
                     dataloader_drop_last=True)  # fmt: skip
    with pytest.raises(ValueError, match=r"16 pairs fill no batch of 45, and --dataloader_drop_last"):
        few.train()
    none = IterableDataset.from_generator(lambda: iter(()), features=FEATURES)
    with pytest.raises(ValueError, match=r"took no step: 0 pairs were seen, and a step takes a batch of 4 times 2"):
        trainer_of(few.model, tmp_path, none, gradient_accumulation_steps=2).train()


@pytest.mark.parametrize("seed", range(3))
def test_one_broken_pair_in_a_batch_of_one_does_not_end_the_run(folder, seed):  # noqa: F811
    (folder / "photos" / "5.png").write_bytes(b"no picture")
    settings = {"train_data": str(folder / "photos"), "per_device_train_batch_size": 1, "save_strategy": "no"}
    summary = run(folder, "out", f"--seed={seed}", **settings)
    assert summary["skipped"] == {"undecodable": 1} and summary["pairs_seen"] == 12
