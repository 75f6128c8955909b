"""
Makes a Hub repository of a checkpoint, checks it as its users would use it, and uploads it.

    python -m hub_card.push runs/miniature/checkpoint org/unimur-miniature --license apache-2.0 \\
        --results benchmarks/results/seed-0.json --pool my_pool --training_data "…"

`--folder DIR --dry_run` leaves the repository in a folder instead.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from modeling_unimur import CandidatePool, UniMuRModel
from modeling_unimur.card_unimur import model_card
from modeling_unimur.hub_unimur import FORMER_POOL, POOL
from train.command import run_command

from .check import check_folder
from .results import eval_results_yaml, read_results


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def main(argv: list[str] | None = None) -> str | None:
    """Returns the URL of the commit, or `None` for a dry run."""
    arguments = parser().parse_args(argv)
    if arguments.space and not arguments.pool:
        raise ValueError("--space needs --pool: the page searches the pool packed beside the model")
    if arguments.dry_run and arguments.folder is None:
        raise ValueError("--dry_run needs --folder: where the repository is to be left")
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "repository"
        build(arguments, folder)
        check_folder(folder, arguments.repo_id)
        if arguments.dry_run:
            print(f"made and checked, not uploaded: {folder}")
            return None
        api = HfApi()
        api.create_repo(arguments.repo_id, private=arguments.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=arguments.repo_id, folder_path=folder, commit_message="Upload UniMuR",
            delete_patterns=FORMER_POOL if arguments.pool else None,
        )  # fmt: skip
        print(f"uploaded: {commit}")
        if arguments.space:
            push_space(api, arguments.space, arguments.repo_id, private=arguments.private)
        return str(commit)


def push_space(api: HfApi, space: str, repo_id: str, private: bool = False) -> str:
    """Uploads the page as a Space that opens `repo_id`; returns the commit's URL."""
    api.create_repo(
        space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True,
        space_variables=[{"key": "UNIMUR_MODEL", "value": repo_id}],
    )  # fmt: skip
    commit = api.upload_folder(
        repo_id=space,
        repo_type="space",
        folder_path=Path(__file__).parent / "space",
        ignore_patterns=["__pycache__/*"],
    )
    print(f"uploaded: {commit}")
    return str(commit)


def build(arguments: argparse.Namespace, folder: Path) -> None:
    """The repository's files. Raises `ValueError` where the folder holds a former pool and no pool is given."""
    if arguments.pool is None and (folder / POOL).exists():
        raise ValueError(
            f"{str(folder / POOL)!r} is a former pool, which would be uploaded: delete it, or give --pool"
        )
    model = UniMuRModel.from_pretrained(arguments.checkpoint)
    pool = CandidatePool.load_from_disk(arguments.pool) if arguments.pool else None
    results = read_results(arguments.results, model.fingerprint)
    model.save_pretrained(folder, pool=pool, golden=True)
    told = arguments.training_data
    if told and Path(told).is_file():
        told = Path(told).read_text()
    card = model_card(
        model.config, arguments.repo_id, license=arguments.license, training_data=told, datasets=arguments.dataset,
        results=results, evaluation_note=arguments.evaluation_note, has_pool=pool is not None,
    )  # fmt: skip
    card.save(folder / "README.md")
    datasets = dict(pair.split("=", 1) for pair in arguments.eval_dataset)
    for path, content in eval_results_yaml(results, datasets).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)


if __name__ == "__main__":
    run_command(main)
