"""A seed of the ablations' on a small world."""

import json
import sys

import pytest
import yaml

from benchmarks import ablation
from benchmarks.ablation import Seed
from benchmarks.data import miniature
from train.arguments import CONFIGS
from train.miniature.towers import pretrain_clip, pretrain_opt
from train.miniature.world import splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Towers of a few steps, where `prepare` looks for them."""
    path, scenes = tmp_path_factory.mktemp("seed-0"), splits()["train"][:300]
    pretrain_clip(path / "towers" / "clip", scenes, steps=3, batch_size=16, width=32, progress=False)
    pretrain_opt(path / "towers" / "opt", scenes, steps=3, batch_size=8, width=32, layers=1, heads=2, progress=False)
    (path / "towers" / "made.json").write_text(json.dumps({"seed": 0}))
    return path


@pytest.fixture
def bench(folder, tmp_path, monkeypatch):
    """A `Seed` on 300 scenes and steps enough to move, its runs in a folder of the test's own."""
    module = sys.modules["train.miniature.prepare"]  # the package's own name is the function
    known = splits()
    few = {"train": known["train"][:300]}
    monkeypatch.setattr(module, "splits", lambda: few)
    monkeypatch.setattr(module, "training_documents", lambda *given: None)  # the ablations train on pairs
    config = {"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config))
    files = (CONFIGS / "miniature.yaml", tmp_path / "few.yaml", CONFIGS / "paper.yaml")
    monkeypatch.setattr(ablation, "PAPER", [part for file in files for part in ("--config", str(file))])
    for name in ("mmdialog", "visdial"):
        plain = getattr(miniature, name)
        monkeypatch.setattr(miniature, name, lambda split, plain=plain: plain(split, 40))
    seed = Seed(folder, 0)
    seed.runs = tmp_path / "runs"
    seed.runs.mkdir()
    return seed
