"""From the json that `benchmarks.run` and `benchmarks.report` write to a card's figures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from modeling_unimur.card_unimur import Result, slug


def read_results(files: Iterable[Path], fingerprint: Mapping[str, Any], system: str = "UniMuR") -> list[Result]:
    """
    The figures of one system.

    Args:
        files: json of `benchmarks.run` (a list) or `benchmarks.report` (an object with `results`).
        fingerprint: of the model whose card this is; figures of other weights are refused.
        system: whose figures.

    Raises:
        ValueError: a file has none of this system, or figures of other weights; the message names it.
    """
    found: list[Result] = []
    for file in map(Path, files):
        content = json.loads(file.read_text())
        records = content["results"] if isinstance(content, dict) else content
        own = [r for r in records if r["system"] == system and r.get("applies", True)]
        if not own:
            raise ValueError(
                f"{file.name} holds no figures of {system!r}: it has {sorted({r['system'] for r in records})}"
            )
        for record in own:
            differ = sorted(k for k in ("towers", "maps") if record["revision"].get(k) != fingerprint[k])
            if differ:
                raise ValueError(
                    f"{file.name}, {record['task']}: measured on other weights ({', '.join(differ)} differ): measure "
                    "this checkpoint with benchmarks.run"
                )
            protocol = f"{record['protocol']['variant']}, version {record['protocol']['version']}"
            data = f"{record['data']['source']}, {record['protocol']['settings']['split']} split"
            found += [
                Result(record["task"], data, protocol, name, m["value"], m["low"], m["high"], m["n"])
                for name, m in record["metrics"].items()
            ]
    return found


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
