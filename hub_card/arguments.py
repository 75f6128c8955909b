"""The arguments of the push, checked before a model is loaded: everything that can be known of them by then."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_unimur.hub_unimur import POOL
from modeling_unimur.pool_files import METADATA

from .results import read_records


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of `hub_card.push`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint", help="folder of a checkpoint, or its name on the Hub")
    made.add_argument("repo_id", help="org/name to upload to")
    made.add_argument("--license", help="the Hub's identifier, of the trained maps and a full checkpoint's towers")
    made.add_argument("--training_data", help="what it was trained on and under which licence: a sentence, or a file")
    made.add_argument("--dataset", action="append", default=[], help="a training set's name on the Hub")
    made.add_argument("--results", type=Path, action="append", default=[], help="json of benchmarks.run or .report")
    made.add_argument("--evaluation_note", default="", help="what a reader must know of the figures")
    made.add_argument(
        "--eval_dataset", action="append", default=[], metavar="TASK=NAME",
        help="the Hub's name of a task's benchmark dataset: writes .eval_results/TASK.yaml",
    )  # fmt: skip
    made.add_argument("--pool", type=Path, help="a saved pool to pack beside the model")
    made.add_argument("--space", help="org/name of a Space: the page over this model, which must have a pool")
    made.add_argument("--folder", type=Path, help="where to make the repository; a temporary folder by default")
    made.add_argument("--private", action="store_true")
    made.add_argument("--dry_run", action="store_true", help="make and check, upload nothing")
    return made


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` or `OSError` that names the first argument that cannot be used, and what it takes."""
    check_repo_id("repo_id", arguments.repo_id)
    if arguments.space:
        check_repo_id("--space", arguments.space)
        if not arguments.pool:
            raise ValueError("--space needs --pool: the page searches the pool packed beside the model")
    if not arguments.dry_run:
        check_login()
    elif arguments.folder is None:
        raise ValueError("--dry_run needs --folder: where the repository is to be left")
    check_checkpoint(arguments.checkpoint)
    if arguments.pool and not (arguments.pool / METADATA).is_file():
        raise ValueError(f"--pool {str(arguments.pool)!r} holds no {METADATA}: give a folder that save_to_disk wrote")
    if arguments.folder:
        check_target(arguments.folder, has_pool=bool(arguments.pool))
    training_data(arguments.training_data)
    tasks = {record["task"] for record in read_records(arguments.results)}
    for task in eval_datasets(arguments.eval_dataset):
        if task not in tasks:
            raise ValueError(f"--eval_dataset {task}: --results have no such task, but {sorted(tasks) or 'none'}")


def check_repo_id(argument: str, name: str) -> None:
    """Refuses with a `ValueError` what is no name on the Hub with its owner."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{argument} {name!r} is no name on the Hub: {error}") from error
    if "/" not in name:
        raise ValueError(f"{argument} {name!r} names no owner: give org/name")


def check_login() -> None:
    """Refuses with a `ValueError` to begin what could not be uploaded in the end."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it, or give --folder and --dry_run")
    if get_token() is None:
        raise ValueError("not logged in: run `hf auth login`, set HF_TOKEN, or give --folder and --dry_run")


def check_checkpoint(checkpoint: str) -> None:
    """Refuses with a `ValueError` what is neither a checkpoint's folder nor a name on the Hub."""
    if Path(checkpoint).is_dir():
        if not (Path(checkpoint) / "config.json").is_file():
            raise ValueError(
                f"checkpoint {checkpoint!r} holds no config.json: give a folder that save_pretrained wrote"
            )
        return
    try:
        validate_repo_id(checkpoint)
    except HFValidationError as error:
        raise ValueError(f"checkpoint {checkpoint!r} is neither a folder nor a name on the Hub") from error


def check_target(folder: Path, *, has_pool: bool) -> None:
    """Refuses with a `ValueError` a --folder that is a file, or whose former pool would be uploaded with the new model."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--folder {str(folder)!r} is a file: give a folder")
    if not has_pool and (folder / POOL).exists():
        raise ValueError(
            f"{str(folder / POOL)!r} is a former pool, which would be uploaded: delete it, or give --pool"
        )


def training_data(given: str | None) -> str | None:
    """The text of --training_data: a file's, or what was given. Refuses a path that is no file with a `ValueError`."""
    if given is None:
        return None
    try:
        if Path(given).is_file():
            return Path(given).read_text(encoding="utf-8")
    except OSError:  # a sentence may be longer than a name can be
        return given
    except UnicodeDecodeError as error:
        raise ValueError(f"--training_data {given!r} is no UTF-8 text: {error}") from error
    if len(given.split()) == 1 and ("/" in given or Path(given).suffix):
        raise ValueError(f"--training_data {given!r} looks like a path and is no file: give a file, or a sentence")
    return given


def eval_datasets(pairs: Sequence[str]) -> dict[str, str]:
    """Task -> dataset of each --eval_dataset. Refuses with a `ValueError` what is not TASK=NAME, and a task given again."""
    datasets: dict[str, str] = {}
    for pair in pairs:
        task, equals, name = pair.partition("=")
        if not (task and equals):
            raise ValueError(f"--eval_dataset {pair!r} is not TASK=NAME, such as visdial=org/visdial")
        if task in datasets:
            raise ValueError(f"--eval_dataset names {task!r} again: give one dataset for each task")
        check_repo_id(f"--eval_dataset {task}=", name)
        datasets[task] = name
    return datasets
