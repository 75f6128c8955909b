"""
MTEB's and MIEB's tasks through the sentence-transformers interface; the data are downloaded by mteb.

    python -m benchmarks.mteb_run --model org/unimur-opt-6.7b --task Flickr30kT2IRetrieval --task MSCOCOI2TRetrieval
    python -m benchmarks.mteb_run --model runs/miniature/checkpoint --mock

`--mock` runs mteb's own stand-in tasks instead, offline: whether the interface holds, not how good the model is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from train.command import run_command

from .output import write_json

DEFAULT_TASKS = ("Flickr30kT2IRetrieval", "Flickr30kI2TRetrieval", "MSCOCOT2IRetrieval", "MSCOCOI2TRetrieval")
INSTALL = "needs mteb and sentence-transformers: pip install 'modeling-unimur[embed]'"


def wrapped(model: str, revision: str | None = None) -> Any:
    """
    A checkpoint or Hub name as mteb's encoder of texts and images.

    Raises:
        ImportError: mteb or sentence-transformers is not installed.
    """
    try:
        from mteb.models import SentenceTransformerEncoderWrapper
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(f"this {INSTALL}") from error
    encoder = SentenceTransformerEncoderWrapper(SentenceTransformer(model, revision=revision, trust_remote_code=True))
    # mteb assumes that a sentence-transformers model takes only texts.
    name = encoder.mteb_model_meta.name or f"local/{Path(model).name}"
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(
        update={"modalities": ["text", "image"], "name": name, "revision": revision}
    )
    return encoder


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Returns task -> main score, or by `--mock` task -> whether it ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint's folder or its name on the Hub")
    parser.add_argument("--revision", help="on the Hub")
    parser.add_argument("--task", action="append", help=f"by default {', '.join(DEFAULT_TASKS)}")
    parser.add_argument("--benchmark", help="all tasks of an mteb benchmark, such as 'MIEB(lite)'")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--mock", action="store_true", help="mteb's stand-in tasks, offline")
    parser.add_argument("--output", type=Path, default=Path("runs/mteb"), help="folder of the json")
    arguments = parser.parse_args(argv)
    encoder = wrapped(arguments.model, arguments.revision)
    import mteb

    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.mock:
        statuses = mteb.mock_run(encoder)
        scores = {name: type(status).__name__ for name, status in statuses.items() if status is not None}
        (arguments.output / "mock.md").write_text(statuses.to_markdown() + "\n")
        print(statuses.to_markdown())
        if not statuses.all_passed:
            raise RuntimeError("a task of mteb's failed; the table above says why")
    else:
        if arguments.benchmark:
            tasks = mteb.get_benchmark(arguments.benchmark).tasks
        else:
            tasks = mteb.get_tasks(tasks=arguments.task or list(DEFAULT_TASKS))
        result = mteb.evaluate(encoder, tasks, encode_kwargs={"batch_size": arguments.batch_size}, cache=None)
        scores = {task.task_name: task.get_score() for task in result.task_results}
        for name, score in scores.items():
            print(f"{name}: {score:.4f}")
        full = [json.loads(task.model_dump_json()) for task in result.task_results]
        write_json(arguments.output / "results.json", full)
    write_json(arguments.output / "scores.json", scores)
    return scores


if __name__ == "__main__":
    run_command(main)
