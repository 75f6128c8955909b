"""
Training, features, embedding and pools, killed at random: each goes on to the very bytes of an undisturbed run.

    python -m tests.stress.kills --kills 50 [--job training]

Half of the kills (SIGKILL) come at a random moment, half at a random write: before the n-th file is opened for writing,
renamed or removed, or a few milliseconds after. Then the same job runs again.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_unimur import CandidatePool
from tests.conftest import picture
from tests.modeling_unimur.pools import MADE_BY, unit
from tests.tiny import make_model, make_towers
from train import embed
from train.run import main as train

WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
DELAY = 0.005  # seconds after a write, at most


@dataclass(frozen=True)
class Job:
    """
    Work that may be killed.

    Attributes:
        prepare: makes the inputs, once, in a folder.
        run: the work from those inputs, in another folder; also goes on with what a killed run left there.
        start: what lies in that folder before.
        left: raises where what a kill left cannot be used as it is.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path, Path], Any]
    start: Callable[[Path, Path], Any] = lambda inputs, folder: None
    left: Callable[[Path, Path], Any] = lambda inputs, folder: None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that the job promises to make equal, by its name."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    # A pickled state of the trainer names the run's folder, and a log has its seconds.
    return {
        name: data for name, data in files.items() if name.endswith((".safetensors", ".arrow", ".faiss", "pool.json"))
    }


# The jobs


def _photos(inputs: Path) -> None:
    make_towers(inputs / "towers")
    (inputs / "photos").mkdir()
    rows = ["file_name,caption"]
    for i in range(24):
        picture(i).save(inputs / "photos" / f"{i}.png")
        rows.append(f"{i}.png,{'abcdefghijklmnopqrstuvwx'[i] * 3} number {i}")
    (inputs / "photos" / "metadata.csv").write_text("\n".join(rows))
    make_model(inputs / "towers").save_pretrained(inputs / "model", with_towers=True)


def _train(inputs: Path, folder: Path, *more: str) -> None:
    train([
        f"--text_model={inputs}/towers/text", f"--clip_model={inputs}/towers/clip", f"--train_data={inputs}/photos",
        f"--output_dir={folder}/run", "--max_steps=8", "--save_strategy=steps", "--save_steps=2", "--save_total_limit=2",
        "--per_device_train_batch_size=6", "--learning_rate=1e-2", "--warmup_steps=0", "--alignment=paper", "--use_cpu",
        "--disable_tqdm=true", "--resume_from_checkpoint=last", "--seed=3", *more,
    ])  # fmt: skip


def _train_cached(inputs: Path, folder: Path) -> None:
    _train(inputs, folder, "--cache_features=true", f"--cache_dir={folder}/cache", "--max_steps=2")


def _embed(inputs: Path, folder: Path) -> None:
    embed.main([f"--model={inputs}/model", f"--output={folder}/pool", f"--images={inputs}/photos", "--shard_size=4",
                "--batch_size=3", "--max_bad_share=0.5"])  # fmt: skip


def _make_pool(inputs: Path) -> None:
    pool = CandidatePool.empty(MADE_BY).append("image", [picture(i) for i in range(12)], unit(12, 1))
    pool.build_index("sq8").save_to_disk(inputs / "pool", max_shard_size=3000)


def _copy_pool(inputs: Path, folder: Path) -> None:
    shutil.copytree(inputs / "pool", folder / "pool")


def _save_pool(inputs: Path, folder: Path) -> None:
    pool = CandidatePool.empty(MADE_BY).append("text", [f"text {i}" for i in range(80)], unit(80, 2))
    pool.append("image", [picture(i) for i in range(9)], unit(9, 3)).save_to_disk(folder / "pool", max_shard_size=3000)


def _append_pool(inputs: Path, folder: Path) -> None:
    pool = CandidatePool.load_from_disk(inputs / "pool").append("text", [f"text {i}" for i in range(40)], unit(40, 2))
    pool.save_to_disk(folder / "pool", max_shard_size=3000)


def _one_of(*sizes: int) -> Callable[[Path, Path], None]:
    def check(inputs: Path, folder: Path) -> None:
        pool = CandidatePool.load_from_disk(folder / "pool")
        if len(pool) not in sizes or len(pool.search(unit(2, 5), top_k=3)) != 2:
            raise AssertionError(f"a pool of {len(pool)} candidates, neither of {' nor '.join(map(str, sizes))}")

    return check


JOBS = {
    "training": Job(_photos, _train),
    "features": Job(_photos, _train_cached),
    "embed": Job(_photos, _embed),
    "pool saved over another": Job(_make_pool, _save_pool, _copy_pool, _one_of(12, 89)),
    "pool appended to": Job(_make_pool, _append_pool, _copy_pool, _one_of(12, 52)),
}


# Killing


class Writes:
    """Counts the writes of a process under a folder, by Python's audit events, and ends it at the n-th."""

    def __init__(self, folder: Path, end: int | None = None, delay: float | None = None):
        self.folder, self.end, self.delay, self.count, self.pid = str(folder), end, delay, 0, os.getpid()

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in WRITES or os.getpid() != self.pid or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        self.count += 1
        if self.count == self.end:
            threading.Timer(self.delay, _end).start() if self.delay else _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], int]) -> int:
    """The process id of `work` in a fork whose exit code is what it returns (255 where it raises), its output thrown away."""
    child = os.fork()
    if not child:
        code = 255
        # tqdm's own lock is one of all forks: who is killed while it is held would keep it from the others for ever.
        tqdm.set_lock(threading.RLock())
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            code = work()
        finally:
            os._exit(code)
    return child


def killed(job: Job, inputs: Path, folder: Path, at: float | int, delay: float | None) -> bool:
    """Runs a job that is killed after `at` seconds (a float) or at its `at`-th write; whether it was, before its end."""

    def work() -> int:
        if isinstance(at, int):
            sys.addaudithook(Writes(folder, at, delay))
        job.run(inputs, folder)
        return 0

    child = forked(work)
    if isinstance(at, float):
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise AssertionError(f"the job itself failed with exit code {code}")
    return code != 0


def completes(job: Job, inputs: Path, folder: Path) -> tuple[float, int]:
    """Seconds and writes of a job that nothing disturbs; raises `AssertionError` where it fails."""
    counts = folder.with_suffix(".writes")

    def work() -> int:
        writes = Writes(folder)
        sys.addaudithook(writes)
        job.run(inputs, folder)
        counts.write_text(str(writes.count))
        return 0

    start = time.perf_counter()
    code = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
    if code:
        raise AssertionError(f"it does not go on: exit code {code}")
    return time.perf_counter() - start, int(counts.read_text())


def run(name: str, kills: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kills a job so many times; the outcomes ("recovered" or "lost"), and what happened where it was lost."""
    job, rng, outcomes, bad = JOBS[name], random.Random(f"{seed} {name}"), Counter[str](), []
    with tempfile.TemporaryDirectory() as made:
        inputs, whole, folder = (Path(made) / part for part in ("inputs", "whole", "killed"))
        inputs.mkdir()
        job.prepare(inputs)

        def fresh(path: Path) -> None:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            job.start(inputs, path)

        fresh(whole)
        seconds, writes = completes(job, inputs, whole)
        expected = contents(whole)
        if not expected:
            raise AssertionError(f"{name}: no file to compare")
        while outcomes.total() < kills:
            at, delay = rng.uniform(0.05, 1) * seconds, None
            if outcomes.total() % 2:
                at, delay = rng.randint(1, writes), rng.choice((None, rng.uniform(0, DELAY)))
            fresh(folder)
            if not killed(job, inputs, folder, at, delay):
                continue
            try:
                job.left(inputs, folder)
                completes(job, inputs, folder)
                other = contents(folder)
                wrong = sorted(n for n in expected.keys() | other.keys() if expected.get(n) != other.get(n))
                if wrong:
                    raise AssertionError(f"other bytes in {', '.join(wrong)}")
                outcomes["recovered"] += 1
            except Exception as error:  # whatever the job raises is what is reported of it
                outcomes["lost"] += 1
                bad.append(f"{name}, killed at {at} (delay {delay}): {type(error).__name__}: {error}")
    return outcomes, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each job")
    parser.add_argument("--job", choices=list(JOBS), action="append", help="this one alone; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lost = []
    for name in arguments.job or JOBS:
        outcomes, bad = run(name, arguments.kills, arguments.seed)
        print("\n".join([*bad, f"{name}: {outcomes['recovered']} of {outcomes.total()} recovered"]), flush=True)
        lost += bad
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
