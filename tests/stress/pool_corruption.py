"""
Saved pools damaged at random: every one must answer as before or be refused by an error that names the damage.

    python -m tests.stress.pool_corruption --cases 4000

Each case damages one file of a copy of a pool (a bit flipped, the end cut off, the file deleted, a run of bytes zeroed),
opens and searches it in a process of its own, and counts what came of it.
"""

import argparse
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from modeling_unimur import CandidatePool
from tests.conftest import picture
from tests.modeling_unimur.pools import MADE_BY, unit

SAME, REFUSED, WRONG, UNDOCUMENTED, ENDED = "same", "refused", "wrong", "undocumented", "ended"
CODES = {0: SAME, 10: REFUSED, 11: WRONG, 12: UNDOCUMENTED}
KINDS = ("exact", "by block", "sq8", "hnsw", "pq")
QUERIES = unit(5, 11)


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file; what was done, in words."""
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    how = rng.choice(("flip", "flip", "flip", "cut", "delete", "zero"))
    place = rng.randrange(len(data))
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:place])
    elif how == "zero":
        path.write_bytes(data[:place] + bytes(len(data[place : place + 64])) + data[place + 64 :])
    else:
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return f"{how} {path.name} at {place} of {len(data)}"


def answers(folder: Path) -> list:
    """What a pool gives: ids, scores, texts and pictures, with and without `calibrate`, and its ids."""
    pool = CandidatePool.load_from_disk(folder)
    replies = [*pool.search(QUERIES, top_k=20), *pool.search(QUERIES, calibrate=True, exclude=["image-2", "text-60"])]
    shown = [
        [(c.id, c.modality, c.score, c.item if c.modality == "text" else c.item.tobytes()) for c in reply.candidates]
        for reply in replies
    ]
    return [shown, pool.ids, len(pool)]


def in_child(check: Callable[[], int]) -> str:
    """The outcome of a check in a forked process, which a damaged file may end."""
    child = os.fork()
    if not child:
        code = 12
        try:
            code = check()
        except (ValueError, OSError):  # what a pool documents; a damaged picture's is a ValueError
            code = 10
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return CODES.get(os.waitstatus_to_exitcode(status), ENDED)


@contextmanager
def saved(kind: str, folder: Path) -> Iterator[Path]:
    """A small pool in several files with its statistics; `"by block"` is read as one of more than 1 GiB."""
    pool = CandidatePool.empty(MADE_BY).append("image", [picture(i) for i in range(40)], unit(40, 1))
    pool = pool.append("text", [f"the text of number {i}" for i in range(60)], unit(60, 2))
    if kind not in ("exact", "by block"):
        pool = pool.build_index(kind, oversample=50)
    pool.search(QUERIES, calibrate=True)
    block = 512 if kind == "by block" else 2**20
    with (
        patch("modeling_unimur.pool_digests.BLOCK", block),
        patch("modeling_unimur.pool_arrow.CHECKED_AT_ONCE", 0 if kind == "by block" else 2**30),
        patch("modeling_unimur.pool_arrow.BATCH_ROWS", 30),
    ):
        pool.save_to_disk(folder, max_shard_size=4000)
        yield folder


def run(cases: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> tuple[Counter[str], list[str]]:
    """Damages pools so many times, the kinds by turns; the outcomes, and what was done where one was not good."""
    outcomes, bad = Counter[str](), []
    for number, kind in enumerate(kinds):
        with tempfile.TemporaryDirectory() as made, saved(kind, Path(made) / "pool") as folder:
            expected = answers(folder)
            for case in range(number, cases, len(kinds)):
                copy = Path(made) / "copy"
                shutil.copytree(folder, copy)
                done = damage(copy, random.Random(f"{seed} {case}"))
                outcome = in_child(lambda copy=copy, expected=expected: 0 if answers(copy) == expected else 11)
                shutil.rmtree(copy)
                outcomes[outcome] += 1
                if outcome not in (SAME, REFUSED):
                    bad.append(f"{outcome}: {kind}, case {case}, {done}")
    return outcomes, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4000, help="How many, over all kinds of pool.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcomes, bad = run(arguments.cases, arguments.seed)
    print("\n".join([*bad, ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))]))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
