"""Offline, one thread per worker, and the fixtures that most tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from PIL import Image
from torch.multiprocessing import start_processes

from tests.tiny import make_model

torch.set_num_threads(1)  # two workers on two cores
SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"
KINDS = ("opt", "opt-350m", "gpt2", "llama", "qwen2")

# They start processes of their own, minutes in all: first, so that no worker ends with them while the other waits.
SLOW = (
    "test_distributed.py",
    "test_hub.py",
    "test_push.py",
    "test_pages.py",
    "test_speed.py",
    "test_embed.py",
    "test_kills.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SLOW)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Adapter-style models over tiny random towers, one per kind of LLM; a test must not change them."""
    made = {}

    def get(kind: str = "opt"):
        if kind not in made:
            made[kind] = make_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture
def fresh(tmp_path):
    """A new tiny model for each test."""
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with patch_environment(world_size=2, master_addr="127.0.0.1", master_port=port, accelerate_use_cpu="true"):
        start_processes(_as_rank, args=(function, arguments), nprocs=2, start_method="fork")


def _as_rank(rank: int, function: Callable, arguments: tuple) -> None:
    AcceleratorState._reset_state(True)  # what the tests before were: one process
    with patch_environment(rank=rank, local_rank=rank):
        function(*arguments)
