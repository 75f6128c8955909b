"""
A conversation with UniMuR: the reply's words and picture, what else came near, and one's own pictures in the pool.

    python hub_card/space/app.py                                   the miniature of `make demo`, or else the quickstart's
    python hub_card/space/app.py --model org/unimur-… --pool DIR    another checkpoint, another pool
    python hub_card/space/app.py --images photos --texts lines.txt  one's own pictures and replies

As a Space it takes `checkpoint/` beside this file, or the repository that the variable UNIMUR_MODEL names. A visitor's
words and pictures stay in the visitor's session, and no usage data is sent.
"""

import argparse
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Read when these libraries are imported; set them before to send usage data.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

if __name__ == "__main__" and find_spec("gradio") is None:
    sys.exit("error: gradio must be installed for this: pip install -r hub_card/space/requirements.txt")

import torch
from PIL import Image
from transformers import AutoModel

from page import LAUNCH, build
from talk import App

HERE = Path(__file__).parent
MINIATURE = Path("runs/miniature/checkpoint")
QUICKSTART = HERE.parent / "quickstart"  # of a clone
SMALL = 512  # a language model of fewer dimensions is the miniature's


def checkpoint_of(model: str | None) -> str:
    """
    The given checkpoint, UNIMUR_MODEL's, the Space's own, the miniature's, or the quickstart's.

    Raises:
        ValueError: there is none; the message says how to get one.
    """
    if named := model or os.environ.get("UNIMUR_MODEL"):
        return named
    for folder in (HERE / "checkpoint", MINIATURE, QUICKSTART):
        if folder.is_dir():
            return str(folder)
    raise ValueError("there is no checkpoint: run `make demo` first, or give --model a folder or a name on the Hub")


def load(
    model: str | None = None, pool: str | None = None, images: Path | None = None, texts: Path | None = None
) -> App:
    """
    The app over a checkpoint and the pool that is given, made of one's own files, or packed beside the checkpoint.

    Args:
        model: a folder or a name on the Hub; by default as `checkpoint_of` says.
        pool: a saved pool's folder or name on the Hub.
        images, texts: as `own_pool` takes them.

    Raises:
        ValueError: there is no checkpoint or no pool, or a file cannot be used.
        OSError: a file cannot be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with suppress(ImportError):  # a checkpoint without code, as the quickstart's, is the installed package's
        import modeling_unimur  # noqa: F401
    loaded = AutoModel.from_pretrained(checkpoint_of(model), trust_remote_code=True).to(device)
    if images or texts:
        return App(loaded, own_pool(loaded, images, texts), openings=())
    return App(loaded, loaded.packed_pool) if pool is None else App(loaded, loaded.open_pool(pool), openings=())


def own_pool(model: Any, images: Path | None, texts: Path | None) -> Any:
    """
    A pool of one's own files.

    Args:
        images: a folder; every file in it and beneath it that is named as a picture is taken, others are counted and
            passed over. A picture's id is its path in the folder.
        texts: a UTF-8 file with a reply a line; blank lines are passed over.

    Raises:
        ValueError: a folder without pictures, a file without texts, or a picture that cannot be decoded.
        OSError: a file cannot be read.
    """
    files: list[Path] = []
    if images:
        if not images.is_dir():
            raise ValueError(f"--images {str(images)!r} is no folder: give a folder of pictures")
        all_files = sorted(file for file in images.rglob("*") if file.is_file())
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = [file for file in all_files if file.suffix.lower() in suffixes]
        if not files:
            raise ValueError(
                f"--images {str(images)!r} holds no file that is named as a picture, such as .png or .jpg"
            )
        print(f"{len(files)} pictures; {len(all_files) - len(files)} other files are passed over")
    lines: list[str] = []
    if texts:
        try:
            lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--texts {str(texts)!r} is no UTF-8 text: {error}") from error
        if not lines:
            raise ValueError(f"--texts {str(texts)!r} holds no text: write a reply on each line")
    names = [file.relative_to(images).as_posix() for file in files] if images else []
    return model.build_pool(images=files or None, texts=lines or None, image_ids=names or None)


def links(model: str | None) -> dict[str, str]:
    """Name -> URL of the checkpoint, where it is on the Hub, and of the code, where it is known."""
    known = {}
    try:
        stated = metadata("modeling-unimur").get_all("Project-URL") or []
        known = dict(line.split(", ", 1) for line in stated)
    except PackageNotFoundError:
        pass
    code = next(
        (url for name, url in known.items() if name.lower() in ("source", "repository", "code", "homepage")), None
    )
    name = checkpoint_of(model)
    on_hub = None if Path(name).is_dir() else f"https://huggingface.co/{name}"
    code = code or (on_hub and f"{on_hub}/tree/main")
    return {name: url for name, url in (("Code", code), ("Checkpoint", on_hub)) if url}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="a checkpoint's folder, or its name on the Hub")
    pools = made.add_argument_group("what is searched; by default the pool packed beside the checkpoint")
    pools.add_argument("--pool", help="a saved pool's folder, or its name on the Hub")
    pools.add_argument("--images", type=Path, metavar="DIR", help="a folder of pictures")
    pools.add_argument("--texts", type=Path, metavar="FILE", help="a file with a reply on each line")
    made.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    return made


def main(argv: list[str] | None = None) -> None:
    """Raises `SystemExit` with one sentence for a user's mistake."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.pool and (arguments.images or arguments.texts):
            raise ValueError("--pool and --images or --texts are two pools: give one")
        app = load(arguments.model, arguments.pool, arguments.images, arguments.texts)
        own = arguments.pool or arguments.images or arguments.texts
        small = app.model.config.text_config.hidden_size < SMALL and not own
        build(app, miniature=small, links=links(arguments.model)).launch(server_port=arguments.port, **LAUNCH)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
