"""The metrics as `evaluate` modules, a folder each, and their functions per item, which the tasks bootstrap."""

import tempfile
import uuid
from pathlib import Path

import evaluate

from .clip_sim.clip_sim import cosine_per_item
from .image_retrieval_rate.image_retrieval_rate import image_rate_per_item
from .recall_at_k.recall_at_k import hit_rate_per_item
from .visdial.visdial import visdial_per_item
from .vqa_accuracy.vqa_accuracy import normalise_answer, vqa_accuracy_per_item

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.parent.name for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name))

__all__ = [
    "NAMES",
    "cosine_per_item",
    "hit_rate_per_item",
    "image_rate_per_item",
    "load",
    "normalise_answer",
    "visdial_per_item",
    "vqa_accuracy_per_item",
]


def load(name: str) -> evaluate.Metric:
    """
    The metric of that name, loaded from its folder; nothing is asked of the Hub.

    Each call gives a metric of its own, with its own temporary folder, which is deleted with the metric: neither two
    processes nor two callers in one process see each other's batches. The module's code is imported once.

    Raises:
        ValueError: there is no metric of that name.
    """
    if name not in NAMES:
        raise ValueError(f"no metric {name!r}; there are {', '.join(NAMES)}")
    scratch = tempfile.TemporaryDirectory(prefix=f"{name}-")
    metric = evaluate.load(str(FOLDER / name), cache_dir=scratch.name, experiment_id=uuid.uuid4().hex)
    metric.scratch = scratch
    return metric
