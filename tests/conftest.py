"""
Offline, one thread per worker, and the fixtures that most tests share.

What takes long to import is imported by the workers alone: pytest-xdist's controller reads this file before they start.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two workers on two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"
KINDS = ("opt", "opt-350m", "gpt2", "llama", "qwen2")

# What takes more than some ten seconds: first, so that no worker ends with it while the other waits.
SLOW = (
    "hub_card/test_hub.py", "train/test_distributed.py", "train/test_trainer.py", "hub_card/test_push.py",
    "train/test_run.py", "benchmarks/test_real.py", "benchmarks/test_miniature_data.py", "benchmarks/test_run.py",
    "hub_card/test_space.py", "modeling_unimur/test_checkpoints.py", "modeling_unimur/test_pool_saving.py",
    "modeling_unimur/test_sentence.py", "train/test_dialogues.py", "benchmarks/test_speed.py", "hub_card/test_pages.py",
    "modeling_unimur/test_loading.py", "train/test_progress.py", "train/test_kills.py", "train/test_features.py",
    "train/test_whole_checkpoints.py", "modeling_unimur/test_pool_contract.py", "benchmarks/test_quality.py",
)  # fmt: skip


def pytest_collection_finish():
    gc.freeze()  # what was imported stays, and no collection has to walk it again


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(SLOW)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Adapter-style models over tiny random towers, one per kind of LLM; a test must not change them."""
    from tests.tiny import make_model

    made = {}

    def get(kind: str = "opt"):
        if kind not in made:
            made[kind] = make_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture
def fresh(tmp_path):
    """A new tiny model for each test."""
    from tests.tiny import make_model

    return lambda kind="opt", **fields: make_model(tmp_path / "towers", kind, **fields)


@pytest.fixture(scope="session")
def samples():
    if not SAMPLES.is_dir():
        pytest.skip("the real samples are not next to this checkout (../shared/samples)")
    return SAMPLES


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of random blocks, different for each seed."""
    blocks = Image.new("RGB", (4, 4))
    rng = random.Random(seed)
    blocks.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(16)])
    return blocks.resize(size, Image.NEAREST)


def two_processes(function: Callable, *arguments: Any) -> None:
    """
    Calls `function(*arguments)` in two processes that find each other over gloo, as `accelerate launch` would with
    `train/configs/accelerate/two_cpu.yaml`. They are forks, which have everything imported already.
    """
    from accelerate.utils import patch_environment
    from torch.multiprocessing import start_processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with patch_environment(world_size=2, master_addr="127.0.0.1", master_port=port, accelerate_use_cpu="true"):
        start_processes(_as_rank, args=(function, arguments), nprocs=2, start_method="fork")


def _as_rank(rank: int, function: Callable, arguments: tuple) -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    AcceleratorState._reset_state(True)  # what the tests before were: one process
    with patch_environment(rank=rank, local_rank=rank):
        function(*arguments)
