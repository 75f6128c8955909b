"""
Python source in a process of its own, forked from one that has torch imported already.

A new interpreter takes seconds to import torch, and tests that need a process of their own are many. What reads the
environment when it is imported (transformers, huggingface_hub, datasets, gradio) is imported by each process itself.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "pandas", "pyarrow.dataset",
    "scipy.optimize",
])  # fmt: skip


def run_script(
    source: str, *arguments: object, cwd: Path, environment: dict[str, str], timeout: float = 300
) -> subprocess.CompletedProcess:
    """
    Runs `source` as `python -P -c` would: in `cwd`, with that environment alone, and without this checkout on its path.

    Raises:
        TimeoutError: it is not done after `timeout` seconds; it is killed.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        given = source, [str(a) for a in arguments], str(cwd), environment, [str(path) for path in outputs]
        process = FORKS.Process(target=_run, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"not done after {timeout:g} s:\n{source}")
        stdout, stderr = (path.read_text() for path in outputs)
        return subprocess.CompletedProcess([source, *given[1]], process.exitcode, stdout, stderr)


def _run(source: str, arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[str]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
    import torch

    gc.freeze()  # what was imported stays
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    # Not what the tests' own process has added since it started, such as its cache of remote code.
    sys.path[:] = [
        p for p in sys.path if any(Path(p).is_relative_to(prefix) for prefix in (sys.prefix, sys.base_prefix))
    ]
    exec(compile(source, "<script>", "exec"), {"__name__": "__main__"})
