"""What takes long in `make demo-real`, in processes beside one another; what each has made stays on disk."""

from pathlib import Path
from typing import Any

from train.arguments import CONFIGS
from train.parallel import peak_memory, side_by_side
from train.run import main as train

from . import visual
from .bench import make_bench
from .settings import PAIRS

# That compute states, a thread each: on two cores 6 % faster than one process of two threads, and equal bit for bit.
PROCESSES = 2


def make_parts(folder: Path, miniature: Path | None, seed: int, split: str, own: Path) -> float:
    """
    All states of the captions and of a split, and the miniature's own language model on pairs alone in `own`.

    Args:
        folder, miniature, seed, split: as `python -m benchmarks.real` takes them.

    Returns:
        The peak memory of all processes together, this one too, in GiB.
    """
    whole = {"folder": folder, "miniature": miniature, "seed": seed, "split": split}
    jobs: list[tuple[Any, dict[str, Any]]] = [(make_states, whole | {"rank": rank}) for rank in range(PROCESSES)]
    if not any((own / "checkpoint").glob("*.safetensors")):
        towers = miniature or folder / "miniature"
        flags = ["--config", str(CONFIGS / "miniature.yaml"), f"--seed={seed}", f"--miniature={towers}",
                 "--interleaved=false", "--pair_contexts=caption", "--max_steps=0", f"--output_dir={own}"]  # fmt: skip
        jobs.append((train, {"argv": flags}))
    # All at once: the processes of the states wait for each other at the end of every table.
    return peak_memory() + sum(done.memory for done in side_by_side(jobs, workers=len(jobs)))


def make_states(folder: Path, miniature: Path | None, seed: int, split: str, rank: int) -> None:
    """The part of one process, which waits for the others' where its own is done."""
    bench = make_bench(folder, miniature, seed, rank, PROCESSES)
    pairs = bench.pairs(PAIRS)
    visual.closed_form(bench, pairs.features)
    bench.evaluation_states(split)
