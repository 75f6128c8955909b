"""
Makes `hub_card/quickstart/` of a trained miniature: its checkpoint without code, a small pool, and how both were made.

    python -m hub_card.make_quickstart runs/miniature/checkpoint --trained_by "make demo, at commit 1234567"
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.demo import packed
from benchmarks.markdown import table
from benchmarks.miniature import load_split
from modeling_unimur import UniMuRModel
from modeling_unimur.hub_unimur import POOL, WEIGHTS
from modeling_unimur.identity_unimur import GOLDEN
from train.cache import sha256
from train.command import run_command

from .quickstart import FOLDER

ABOUT = "ABOUT.md"
SPLIT, REPLIES = "validation", 48  # beside them the pool holds twelve facts
CONFIGS = (
    "config.json", "processor_config.json", "tokenizer_config.json", "clip_tokenizer/tokenizer_config.json",
)  # fmt: skip
FILES = (*CONFIGS, WEIGHTS, GOLDEN, "tokenizer.json", "clip_tokenizer/tokenizer.json")
# What names code beside the weights, which the installed package takes the place of, and the machine that saved them.
LEFT_OUT = {"auto_map", "custom_pipelines", "_name_or_path", "is_local", "local_files_only"}


def make(checkpoint: str, folder: Path, trained_by: str) -> None:
    """
    Writes the folder; what lay in it before is removed.

    Args:
        checkpoint: a full checkpoint of the miniature.
        folder: where to.
        trained_by: the command and the commit that trained it, for `ABOUT.md`.

    Raises:
        ValueError: the checkpoint is an adapter, whose towers lie elsewhere, or this is no git checkout.
        OSError: it cannot be read.
    """
    at = commit()  # before this folder itself differs from it
    model = UniMuRModel.from_pretrained(checkpoint)
    if model.config.is_adapter:
        raise ValueError(f"{checkpoint} is an adapter, whose towers lie elsewhere: give a checkpoint of --save_towers")
    pool = packed(model, load_split(SPLIT), REPLIES)
    with TemporaryDirectory() as temporary:
        saved = Path(temporary)
        model.save_pretrained(saved, pool=pool, golden=True)
        for name in CONFIGS:
            content = json.loads((saved / name).read_text())
            (saved / name).write_text(json.dumps(without(content), indent=2) + "\n")
        pooled = [path.relative_to(saved).as_posix() for path in sorted((saved / POOL).iterdir())]
        shutil.rmtree(folder, ignore_errors=True)
        for name in (*FILES, *pooled):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(saved / name, folder / name)
    (folder / ABOUT).write_text(about(folder, model, repr(pool), trained_by, at))


def without(value: Any) -> Any:
    """A json value without the keys of `LEFT_OUT`, at any depth."""
    if isinstance(value, dict):
        return {key: without(inner) for key, inner in value.items() if key not in LEFT_OUT}
    return [without(inner) for inner in value] if isinstance(value, list) else value


def files(folder: Path) -> list[str]:
    """What lies in the folder beside `ABOUT.md`, by its path there."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != ABOUT)


def about(folder: Path, model: UniMuRModel, pool: str, trained_by: str, at: str) -> str:
    """The text of `ABOUT.md`: what lies here, who made it how, and every file's size and digest."""
    rows = [
        [f"`{name}`", f"`{sha256(folder / name)}`", f"{(folder / name).stat().st_size:,}"] for name in files(folder)
    ]
    identity = model.fingerprint
    return "\n\n".join(
        [
            "# The quickstart's model",
            "A UniMuR over the miniature's towers, trained on its rendered world of animals in hats: what "
            "`python -m hub_card.quickstart` opens. It knows that world's words and pictures and no others. Everything in "
            "this folder was made by this repository alone and is under its licence.",
            f"- Trained by: {trained_by}.\n"
            f"- Written by `python -m hub_card.make_quickstart`, at commit `{at}`.\n"
            f"- Digest of the weights: towers `{identity['towers']}`, maps `{identity['maps']}`.\n"
            f"- `pool/` is a {pool}: replies of the {SPLIT} split that show a picture, the facts, and their pictures; "
            "none of the test split.\n"
            "- There is no code beside the weights: the package has to be importable.",
            table(["file", "SHA-256", "bytes"], rows, labels=2),
        ]
    ) + "\n"  # fmt: skip


def commit() -> str:
    """The checkout's commit; "-dirty" behind it says that files differed from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=Path(__file__).parent,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"this is no git checkout, whose commit ABOUT.md names: {done.stderr.strip()}")
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> None:
    """Raises `ValueError` or `OSError`: the checkpoint cannot be used, or the folder not be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a full checkpoint of the miniature: a folder")
    parser.add_argument("--trained_by", required=True, help="the command and the commit that trained it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to: hub_card/quickstart by default")
    arguments = parser.parse_args(argv)
    make(arguments.checkpoint, arguments.folder, arguments.trained_by)
    size = sum((arguments.folder / name).stat().st_size for name in files(arguments.folder))
    print(f"written: {arguments.folder}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
