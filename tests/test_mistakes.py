"""What a user's mistake ends in, in every command: a status that is not 0, and one sentence that says what to do."""

import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import app
from benchmarks import report
from benchmarks import run as benchmark
from hub_card import push, quickstart, serve
from modeling_unimur import UniMuRModel
from tests import tiny as tiny_towers
from tests.conftest import picture
from train import embed
from train import run as train
from train.command import run_command

COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "train": train.main, "embed": embed.main, "push": push.main, "serve": serve.main, "quickstart": quickstart.main,
    "benchmark": benchmark.main, "report": report.main, "page": app.main, "tiny": tiny_towers.main,
}  # fmt: skip
TOWERS = "--text_model towers/text --clip_model towers/clip --output_dir out"
PUSHED = "--folder made --dry_run"
# command, its arguments, and what its last line says: a regular expression
MISTAKES = [
    ("train", "--train_data no/such --text_model towers/text --clip_model towers/clip --output_dir out", "no/such"),
    (
        "train",
        f"--train_data photos --lerning_rate 1 {TOWERS}",
        "--lerning_rate is not known: did you mean learning_rate",
    ),
    ("train", "--train_data photos --output_dir out", "--text_model is missing: a folder or a Hub name"),
    ("train", f"--train_data empty {TOWERS}", "empty"),
    ("train", f"--train_data uncaptioned {TOWERS}", "uncaptioned"),
    ("train", f"--train_data notes.txt {TOWERS}", "notes.txt"),
    ("train", "broken.yaml", "broken.yaml is no yaml"),
    ("train", "absent.yaml", "absent.yaml"),
    (
        "train",
        "--train_data photos --text_model no/such/folder/x --clip_model towers/clip --output_dir out",
        "no/such",
    ),
    (
        "train",
        "--train_data photos --text_model full --clip_model towers/clip --output_dir out",
        "text_model 'full' is of type 'unimur', which is no causal language model",
    ),
    (
        "train",
        "--train_data photos --text_model towerless --clip_model towers/clip --output_dir out",
        "base text_model '.*towerless'",
    ),
    (
        "train",
        "--train_data photos --text_model towers/clip --clip_model towers/text --output_dir out",
        "text_model 'towers/clip' is of type 'clip', which is no causal language model",
    ),
    (
        "train",
        "--train_data photos --text_model towers/text --clip_model towers/text --output_dir out",
        "clip_model is of type 'opt', which is not supported",
    ),
    ("train", f"--train_data photos --per_device_train_batch_size -1 {TOWERS}", "batch_size -1 must be at least 1"),
    ("train", f"--train_data photos --learning_rate -1 {TOWERS}", "--learning_rate -1.0 must not be negative"),
    ("train", f"--train_data photos --num_train_epochs -1 {TOWERS}", "--num_train_epochs -1.0 must not be negative"),
    ("train", f"--train_data photos --eval_share 2 {TOWERS}", "--eval_share 2.0: expected a share"),
    ("train", f"--train_data photos --max_steps many {TOWERS}", "--max_steps.*: invalid int value: 'many'"),
    (
        "train",
        f"--train_data photos --resume_from_checkpoint nowhere {TOWERS}",
        "nowhere is no folder: give",
    ),
    (
        "train",
        "--train_data photos --text_model towers/text --clip_model towers/clip --output_dir notes.txt",
        "notes.txt",
    ),
    ("train", f"--dialogues absent.jsonl {TOWERS}", "absent.jsonl"),
    ("train", f"--dialogues notes.txt {TOWERS}", "notes.txt"),
    ("embed", "--model no/such/folder/x --texts replies.txt --output pool", "no/such"),
    ("embed", "--model weightless --texts replies.txt --output pool", "weightless"),
    ("embed", "--model adapter --texts replies.txt --output pool", "gone"),
    ("embed", "--model full --output pool", "no candidates: give --images, --texts"),
    ("embed", "--model full --texts absent.txt --output pool", "absent.txt"),
    ("embed", "--model full --images empty --output pool", "no candidates"),
    ("embed", "--model full --images absent --output pool", "--images absent is neither a folder"),
    ("embed", "--model full --images torn --output pool", "1 of 1 .* left out .*undecodable"),
    ("embed", "--model full --texts replies.txt --shard_size -1 --output pool", "--shard_size=-1 must be"),
    ("embed", "--model full --texts replies.txt --batch_size 0 --output pool", "--batch_size=0 must be"),
    ("embed", "--model full --texts replies.txt --dtype float7 --output pool", "--dtype: invalid choice: 'float7'"),
    ("embed", "--model full --texts replies.txt --output notes.txt", "notes.txt"),
    ("embed", "--model full --texts replies.txt --output pool --nope", "--nope is not known"),
    ("push", f"full org/x --pool photos {PUSHED}", "--pool 'photos' holds no pool.json"),
    ("push", f"weightless org/x {PUSHED}", "weightless"),
    ("push", f"adapter org/x {PUSHED}", "gone"),
    ("push", f"full org/x --results absent.json {PUSHED}", "absent.json"),
    ("serve", "photos --port 0", "'photos' holds no handler.py"),
    ("serve", "no/such --port 0", "no/such"),
    ("serve", "full --port 0", "no pool is packed with .*full"),
    ("serve", "full --port 99999", "port 99999"),
    ("serve", "full --host nowhere", "--host 'nowhere' is no address"),
    ("quickstart", "--image absent.png", "absent.png"),
    ("quickstart", "--image notes.txt", "notes.txt"),
    ("quickstart", "--save notes.txt hello", "notes.txt"),
    ("quickstart", "--pool photos", "unrecognized arguments: --pool"),
    ("benchmark", "--task telepathy --model full", "--task: invalid choice: 'telepathy'"),
    ("benchmark", "--task visdial --model weightless", "weightless"),
    ("benchmark", "--task visdial --model adapter", "gone"),
    ("benchmark", "--task visdial --model full --baseline gill", "no system 'gill'; there are"),
    ("benchmark", "--task visdial --model full --data empty", "empty"),
    ("benchmark", "--task visdial --model full --data absent", "absent"),
    ("benchmark", "--task visdial --model full --limit -1", "--limit"),
    ("benchmark", "--task visdial --model full --variant backwards", "--variant backwards: visdial has .*corrected"),
    ("benchmark", "--task visdial --model full --device tpu7", "tpu7"),
    ("report", "--page --output empty", "empty: no seed-"),
    ("report", "--page --output absent", "absent: no seed-"),
    ("report", "--seeds one", "--seeds: invalid int value: 'one'"),
    ("page", "--model no/such/folder/x", "no/such"),
    ("page", "--model full", "no pool is packed with"),
    ("page", "--model full --pool photos", "photos"),
    ("page", "--model full --images empty", "--images 'empty' holds no file"),
    ("page", "--model full --images torn", "torn"),
    ("page", "--model full --texts absent.txt", "absent.txt"),
    ("page", "--model weightless", "weightless"),
    ("tiny", "--out made --text-vocab absent --clip-vocab towers/clip", "absent"),
    ("tiny", "--out made --text-vocab empty --clip-vocab towers/clip", "empty"),
    ("tiny", "--out notes.txt --text-vocab towers/text --clip-vocab towers/clip", "notes.txt"),
]


@pytest.fixture(scope="module")
def desk(fresh_model, tmp_path_factory) -> Path:
    """A folder with what users have, and with what is broken."""
    folder = tmp_path_factory.mktemp("desk")
    model = fresh_model(folder / "towers")
    model.save_pretrained(folder / "full", with_towers=True)
    shutil.copytree(folder / "towers", folder / "gone")
    gone = UniMuRModel.from_pretrained_towers(str(folder / "gone/text"), str(folder / "gone/clip"), model.processor)
    gone.save_pretrained(folder / "adapter")
    shutil.rmtree(folder / "gone")
    shutil.copytree(folder / "full", folder / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("empty", "photos", "uncaptioned", "torn"):
        (folder / name).mkdir()
    for at in range(4):
        for name in ("photos", "uncaptioned"):
            picture(at).save(folder / name / f"{at}.png")
        (folder / "photos" / f"{at}.txt").write_text(f"a picture of block {at}")
    (folder / "torn" / "photo.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not what you look for\n")
    (folder / "replies.txt").write_text("hello there.\ngood night.\n")
    shutil.copytree(folder / "towers/text", folder / "towerless", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "broken.yaml").write_text("learning_rate: [1, 2\n")
    return folder


@pytest.fixture(scope="module")
def fresh_model():
    return lambda folder: tiny_towers.make_model(folder)


@pytest.mark.parametrize(("command", "arguments", "message"), MISTAKES)
def test_a_mistake_ends_in_a_sentence(command, arguments, message, desk, monkeypatch, capfd):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "argv", ["command", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: COMMANDS[command](arguments.split()))
    status, written = ended.value.code, "".join(capfd.readouterr())
    assert status not in (0, None)
    written += status if isinstance(status, str) else ""
    assert "Traceback" not in written
    lines = written[written.rindex("error: ") :].splitlines()
    assert re.search(message, lines[0]), written
    assert all(line.startswith("  ") for line in lines[1:]), "the error is not the last that is written"


@pytest.mark.parametrize(
    "command", ["train.run", "train.embed", "hub_card.serve", "benchmarks.run", "benchmarks.report", "benchmarks.demo"]
)
def test_a_command_without_its_packages_says_which_extra_has_them(command, monkeypatch):
    monkeypatch.setattr("train.command.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, command, raising=False)  # it runs as a script would
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command, run_name="__main__")
    (extra,) = re.findall(r"must be installed for this: pip install -e '\.\[(\w+)\]'$", ended.value.code)
    assert f"\n{extra} = [" in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_the_page_without_gradio_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="gradio must be installed"):
        runpy.run_path(app.__file__, run_name="__main__")
