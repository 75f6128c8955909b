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
from modeling_unimur.hub_unimur import FORMER_POOL
from train.command import run_command

from .arguments import check_arguments, eval_datasets, parser, training_data
from .check import check_folder
from .results import eval_results_yaml, read_results


def main(argv: list[str] | None = None) -> str | None:
    """
    Returns the URL of the commit, or `None` for a dry run.

    Raises:
        ValueError: an argument cannot be used, which is known before the model is loaded; or the repository is not fit.
        OSError: a file cannot be read, or the Hub refuses.
    """
    arguments = parser(__doc__).parse_args(argv)
    check_arguments(arguments)
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
    """The repository's files. Raises `ValueError` where the results are of another model."""
    model = UniMuRModel.from_pretrained(arguments.checkpoint)
    pool = CandidatePool.load_from_disk(arguments.pool) if arguments.pool else None
    results = read_results(arguments.results, model.fingerprint)
    model.save_pretrained(folder, pool=pool, golden=True)
    card = model_card(
        model.config, arguments.repo_id, license=arguments.license,
        training_data=training_data(arguments.training_data), datasets=arguments.dataset,
        results=results, evaluation_note=arguments.evaluation_note, has_pool=pool is not None,
    )  # fmt: skip
    card.save(folder / "README.md")
    for path, content in eval_results_yaml(results, eval_datasets(arguments.eval_dataset)).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)


if __name__ == "__main__":
    run_command(main)
