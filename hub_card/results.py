"""From the json that `benchmarks.run` and `benchmarks.report` write to a card's figures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from modeling_unimur.card_unimur import Result, slug

RECORD = ("task", "revision", "protocol", "data", "metrics")


def read_records(files: Iterable[Path], system: str = "UniMuR") -> list[dict[str, Any]]:
    """
    The records of one system in json files of `benchmarks.run` (a list) or `benchmarks.report` (an object with `results`).

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no such json, or has no figures of the system; the message names it.
    """
    records: list[dict[str, Any]] = []
    for file in map(Path, files):
        try:
            content = json.loads(file.read_text())
            written = content["results"] if isinstance(content, dict) else content
            systems = {record["system"] for record in written}
            own = [r for r in written if r["system"] == system and r.get("applies", True)]
            records += [{"file": file.name, **{key: r[key] for key in RECORD}} for r in own]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file.name} is no json of benchmarks.run or benchmarks.report ({error!r})") from error
        if not own:
            raise ValueError(f"{file.name} holds no figures of {system!r}: it has {sorted(systems)}")
    return records


def read_results(files: Iterable[Path], fingerprint: Mapping[str, Any], system: str = "UniMuR") -> list[Result]:
    """
    The figures of one system.

    Args:
        files: as `read_records` takes them.
        fingerprint: of the model whose card this is; figures of other weights are refused.
        system: whose figures.

    Raises:
        OSError, ValueError: as `read_records`, and figures of other weights; the message names the file.
    """
    results: list[Result] = []
    for record in read_records(files, system):
        differ = sorted(k for k in ("towers", "maps") if record["revision"].get(k) != fingerprint[k])
        if differ:
            raise ValueError(
                f"{record['file']}, {record['task']}: measured on other weights ({', '.join(differ)} differ): measure "
                "this checkpoint with benchmarks.run"
            )
        protocol = f"{record['protocol']['variant']}, version {record['protocol']['version']}"
        data = f"{record['data']['source']}, {record['protocol']['settings']['split']} split"
        results += [
            Result(record["task"], data, protocol, name, m["value"], m["low"], m["high"], m["n"])
            for name, m in record["metrics"].items()
        ]
    return results


def eval_results_yaml(results: Sequence[Result], datasets: Mapping[str, str]) -> dict[str, str]:
    """
    The Hub's evaluation-results files.

    Args:
        datasets: task -> the benchmark dataset's name on the Hub; a task without one has no file.

    Returns:
        Path in the repository -> content.
    """
    files = {}
    for task, dataset in datasets.items():
        entries = [
            EvalResultEntry(
                dataset_id=dataset, task_id=slug(f"{r.protocol} {r.metric}"), value=round(r.value, 6),
                notes=f"{r.protocol}; 95 % interval {r.low:.4f} to {r.high:.4f} over {r.n} items",
            )
            for r in results
            if r.task == task
        ]  # fmt: skip
        if not entries:
            raise ValueError(f"no figures of the task {task!r}; there are {sorted({r.task for r in results})}")
        files[f".eval_results/{task}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return files
