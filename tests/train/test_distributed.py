"""Two processes on half of each batch train as one process on the whole: the same losses, the same weights."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import picture, two_processes
from tests.tiny import make_towers
from train.run import main

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["a red fox", "two dogs run far", "the sea", "my old hat is here", "one panda", "sky", "tiny cup", "cars"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_towers(folder / "towers")
    (folder / "photos").mkdir()
    rows = []
    for i, words in enumerate(WORDS):
        picture(i).save(folder / "photos" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "caption": words}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    (folder / "photos" / "chats.jsonl").write_text("\n".join(json.dumps(chat(i)) for i in range(len(WORDS))))
    return folder


def chat(i: int) -> dict:
    """A reply after words alone, mostly of words, and one after a picture, of a picture, of words, or of both."""
    first = "<image>" if i == 2 else "so be it"
    second = "yes " * (i + 1) if i < 4 else "<image>" + " or this" * (i == 6)
    contents = [f"{WORDS[i]}?", first, "and <image>", second]
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    shown = sum(content.count("<image>") for content in contents)
    return {"id": f"chat {i}", "messages": messages, "images": [f"{(i + n) % 8}.png" for n in range(shown)]}


def test_streamed_shards_give_two_processes_the_batches_of_one(data, tmp_path):
    more = (f"--train_data={shards_of(data)}", "--packing=false")
    more += (f"--eval_data={data}/photos", "--eval_steps=2")
    one, two = train(data, tmp_path / "1", 1, *more), train(data, tmp_path / "2", 2, *more)
    check_alike(one, two, tmp_path, seen=32)
    assert one["validation"]["eval_image_R@5"] == two["validation"]["eval_image_R@5"]
    assert one["validation"]["eval_loss"] == pytest.approx(two["validation"]["eval_loss"], rel=1e-4)
    train(data, tmp_path / "packed", 2, f"--train_data={data}/shards")


def test_streamed_shards_with_dialogues_give_two_processes_the_batches_of_one(data, tmp_path):
    more = (f"--train_data={shards_of(data)}", f"--dialogues={data}/photos/chats.jsonl", "--dialogue_share=0.6")
    more += ("--optim=sgd", "--max_bad_share=0", "--max_steps=8")
    one = train(data, tmp_path / "1", 1, *more, "--per_device_train_batch_size=4")
    two = train(data, tmp_path / "2", 2, *more, "--per_device_train_batch_size=2")
    check_alike(one, two, tmp_path, seen=32)


def shards_of(data: Path) -> Path:
    """The photos as two archives."""
    folder = data / "shards"
    folder.mkdir(exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(4 * shard, 4 * shard + 4):
                tar.add(data / "photos" / f"{i}.png", f"{i}.png")
                (data / f"{i}.txt").write_text(WORDS[i])
                tar.add(data / f"{i}.txt", f"{i}.txt")
    return folder


def flags_of(data: Path, out: Path, processes: int, *more: str) -> list[str]:
    return [
        f"--text_model={data}/towers/text", f"--clip_model={data}/towers/clip",
        f"--train_data={data}/photos", f"--output_dir={out}", "--max_steps=4", "--learning_rate=0.01", "--warmup_steps=0",
        "--logging_steps=1", "--save_strategy=no", "--disable_tqdm=true", f"--per_device_train_batch_size={8 // processes}",
        "--use_cpu=true", "--max_grad_norm=1.0", "--text_matching=infonce", "--evaluate_pairs=0", "--alignment=paper", *more,
    ]  # fmt: skip


def train(data: Path, out: Path, processes: int, *more: str) -> dict:
    flags = flags_of(data, out, processes, *more)
    if processes == 1:
        return main(flags)
    two_processes(main, flags)
    return json.loads((out / "train_results.json").read_text())


def test_the_launcher_of_the_pages_starts_two_processes_that_train_as_one(data, tmp_path):
    config = ROOT / "train" / "configs" / "accelerate" / "two_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}", "train/run.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += flags_of(data, tmp_path / "2", 2)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "2" / "train_results.json").read_text())
    check_alike(train(data, tmp_path / "1", 1), two, tmp_path, seen=32)


@pytest.mark.parametrize(
    "more", [("--schedule=alternating", "--train_ret_embedding=true"), ("--cache_features=true",)]
)
def test_two_processes_train_as_one(data, tmp_path, more):
    read_for_the_cache = 8 if "--cache_features=true" in more else 0
    one, two = train(data, tmp_path / "1", 1, *more), train(data, tmp_path / "2", 2, *more)
    check_alike(one, two, tmp_path, seen=32 + read_for_the_cache)


def test_two_processes_solve_the_canonical_alignment_as_one(data, tmp_path):
    more = ("--alignment=canonical", "--max_steps=0", "--cca_widths=3", "--cca_ridges=0.1", "--cca_powers=1",
            "--n_visual_tokens=2")  # fmt: skip
    one, two = train(data, tmp_path / "1", 1, *more), train(data, tmp_path / "2", 2, *more)
    assert (one["processes"], two["processes"]) == (1, 2) and one["pairs_seen"] == two["pairs_seen"] == 8
    assert one["closed_form"] == pytest.approx(two["closed_form"], nan_ok=True)
    first, second = (load_file(tmp_path / n / "checkpoint" / "model.safetensors") for n in "12")
    for name in ("W_t2m", "W_v2m", "W_x2m"):
        # A direction may point either way, on both sides alike; what a cosine sees is the same.
        a, b = (torch.cat([w[f"{name}.weight"], w[f"{name}.bias"][:, None]], 1) for w in (first, second))
        assert torch.allclose(a.T @ a, b.T @ b, rtol=1e-3, atol=1e-4), name
    assert torch.allclose(first["W_i2t.weight"], second["W_i2t.weight"], atol=1e-5)
    of_tokens = first["W_i2t.weight"].chunk(2)
    assert not torch.allclose(of_tokens[0], of_tokens[1], atol=1e-3)  # each holds a word of its own


def check_alike(one: dict, two: dict, folder: Path, seen: int, rel: float = 2e-4, atol: float = 2e-5) -> None:
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["pairs_seen"] == two["pairs_seen"] == seen
    compared = 0
    for a, b in zip(one["log"], two["log"], strict=True):
        for name in a.keys() & {"loss", "loss_cap", "loss_vm", "loss_tm", "grad_norm"}:
            assert b[name] == pytest.approx(a[name], rel=rel), name
            compared += 1
    assert compared >= 12
    first, second = (load_file(folder / n / "checkpoint" / "model.safetensors") for n in "12")
    for name in first:
        assert torch.allclose(first[name], second[name], atol=atol), name


def test_two_processes_train_on_dialogues_as_one_also_when_interrupted(data, tmp_path):
    # Of 4 rows a step, 2 a process, those of one process often have no picture, or no words, where the other's have.
    more = (
        f"--dialogues={data}/photos/chats.jsonl",
        "--dialogue_share=0.7",
        "--optim=sgd",
        "--lr_scheduler_type=constant",
    )
    more += ("--save_strategy=steps", "--save_steps=9", "--max_bad_share=0")
    one = train(data, tmp_path / "1", 1, *more, "--per_device_train_batch_size=4", "--max_steps=12")
    half = (*more, "--per_device_train_batch_size=2")
    train(data, tmp_path / "2", 2, *half, "--max_steps=9")  # in the second of its epochs of 7
    two = train(data, tmp_path / "2", 2, *half, "--max_steps=12", "--resume_from_checkpoint=last")
    check_alike(one, two, tmp_path, seen=48, rel=1e-6, atol=1e-6)
