"""
The cost of searching a pool against the bare libraries, as ratios measured in interleaved rounds on one core.

    python -m benchmarks.speed.pool --output benchmarks/results
    python -m benchmarks.speed.pool --size 2000 --rounds 3           a trial, some seconds

- *exact*: a saved pool's streamed search, images and texts, against faiss's IndexFlatIP and torch's matmul and topk over
  the same embeddings in memory; random unit vectors, 1 query and 64.
- *retrieve*: `model.retrieve` with 10 candidates fetched and decoded, against embedding the dialogue and a bare
  IndexFlatIP over the same pool, by a model of random weights.
- *approximate*: a pool of rendered scenes in the checkpoint's own CLIP; captions, embedded as dialogues, search it through
  each index, one at a time; recall@10 against exact search, and bytes per candidate.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.command import run_command

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy's, torch's and faiss's threads: read when they are imported

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from benchmarks.output import write_json
from modeling_unimur import CandidatePool, UniMuRModel
from modeling_unimur.pool_exact import CHUNK
from train.miniature.prepare import encode
from train.miniature.world import captions, draw, every_scene
from train.run import main as train

from .models import SHAPES, random_model, sentence
from .timing import interleaved, ratio

MINIATURE = Path("runs/miniature/checkpoint")
QUERIES = (1, 64)
KINDS = ("hnsw", "ivf", "sq8", "pq")


def random_pool(size: int, made_by: dict[str, Any], folder: Path, seed: int = 0) -> tuple[CandidatePool, np.ndarray]:
    """A saved and opened pool of random embeddings, half images and half texts, and the embeddings `(size, q)`."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(size, made_by["dimension"], generator=generator), dim=-1)
    image, half = encode(draw(every_scene()[0], random.Random(seed))), size // 2
    pool = CandidatePool.empty(made_by).append("image", [image] * half, embeddings[:half])
    pool = pool.append("text", [f"text {i}" for i in range(size - half)], embeddings[half:])
    pool.save_to_disk(folder)
    return CandidatePool.load_from_disk(folder), embeddings.numpy()


def exact(pool: CandidatePool, embeddings: np.ndarray, rounds: int) -> dict[str, Any]:
    """Exact search's seconds by the number of queries."""
    flat = faiss.IndexFlatIP(embeddings.shape[1])
    flat.add(embeddings)
    table, generator = torch.from_numpy(embeddings), torch.Generator().manual_seed(1)
    results = {}
    for n in QUERIES:
        queries = F.normalize(torch.randn(rounds, n, embeddings.shape[1], generator=generator), dim=-1)
        arrays = queries.numpy()
        best, rows = pool.embeddings.top(arrays[0], 10, ("text",))["text"]
        half = len(pool) // 2
        expected = (queries[0] @ table[half:].T).topk(min(10, len(pool) - half))
        np.testing.assert_allclose(best, expected.values.numpy(), atol=1e-5)
        assert (rows == expected.indices.numpy() + half).mean() > 0.99
        measured = interleaved(
            {
                "streamed": lambda i, q=arrays: pool.embeddings.top(q[i], 10),
                "faiss": lambda i, q=arrays: flat.search(q[i], 10),
                "torch": lambda i, q=queries: (q[i] @ table.T).topk(10),
            },
            rounds,
        )
        speeds = {f"{other} / streamed": ratio(measured, other, "streamed") for other in ("faiss", "torch")}
        results[f"{n} queries"] = {"seconds": measured, "ratios": speeds}
    return results


def retrieval(model: UniMuRModel, pool: CandidatePool, embeddings: np.ndarray, rounds: int) -> dict[str, Any]:
    """A whole `retrieve` against its two parts."""
    flat, rng = faiss.IndexFlatIP(embeddings.shape[1]), random.Random(0)
    flat.add(embeddings)
    dialogues = [[sentence(model, 60, rng)] for _ in range(rounds)]
    excluded = [f"image-{i}" for i in range(5)]
    pool.search(torch.from_numpy(embeddings[:1]), exclude=excluded)  # the map of ids is made once per pool

    def retrieve(number: int, exclude: Sequence[str] = ()) -> None:
        for candidate in model.retrieve(dialogues[number], pool, exclude=exclude).candidates:
            candidate.item  # noqa: B018  (decodes it)

    measured = interleaved(
        {
            "retrieve": retrieve,
            "retrieve, excluding": lambda i: retrieve(i, excluded),
            "embed + faiss": lambda i: flat.search(model.embed_dialogues([dialogues[i]]).numpy(), 10),
            "fingerprint": lambda i: model.fingerprint,
        },
        rounds,
    )
    ways = ("retrieve", "retrieve, excluding")
    return {"seconds": measured, "ratios": {f"{w} / embed + faiss": ratio(measured, w, "embed + faiss") for w in ways}}


def scenes(model: UniMuRModel, size: int, seed: int = 0) -> tuple[CandidatePool, torch.Tensor]:
    """A pool of `size` renderings, the same number of each scene (or one fewer), and 200 captions' embeddings."""
    rng, world, parts = random.Random(seed), every_scene(), []
    order = [scene for _ in range(-(-size // len(world))) for scene in rng.sample(world, len(world))][:size]
    for start in tqdm(range(0, size, 1024), "scenes"):
        parts.append(model.embed_images([draw(s, rng) for s in order[start : start + 1024]], batch_size=128))
    pool = CandidatePool.empty(model.fingerprint).append("image", [b"not looked at"] * size, torch.cat(parts))
    queries = [[captions(scene, rng, 1, 0)[0]] for scene in rng.sample(world, 200)]
    return pool, model.embed_dialogues(queries)


def approximate(pool: CandidatePool, queries: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Each index: its recall and bytes, the seconds to build it, and those of single queries."""
    arrays = [queries[i : i + 1].numpy() for i in range(len(queries))]
    ways, about = {}, {}

    def each(searcher) -> Callable[[int], None]:
        def search(number: int) -> None:
            for i in range(20):
                searcher.top(arrays[(20 * number + i) % len(arrays)], 10, ("image",))

        return search

    flat = faiss.IndexFlatIP(queries.shape[1])
    for _, views in pool.embeddings.blocks(CHUNK):
        flat.add(np.ascontiguousarray(np.concatenate(views)))
    ways["exact"] = each(pool.embeddings)
    ways["faiss flat"] = lambda number: [flat.search(arrays[(20 * number + i) % len(arrays)], 10) for i in range(20)]
    for kind in KINDS:
        start = time.perf_counter()
        index = pool.build_index(kind, queries=queries).index
        build_seconds = time.perf_counter() - start
        own = pool.build_index(kind).index.about["recall_at_10"]["image"]
        size = index.about["bytes"]["image"] / len(pool)
        about[kind] = {
            "recall_at_10": index.about["recall_at_10"]["image"], "recall_at_10_of_own": own, "build_seconds": build_seconds,
            "bytes": size, "share_of_float32": size / (4 * queries.shape[1]), "search": index.about["search"]["image"],
            "oversample": index.about["oversample"],
        }  # fmt: skip
        ways[kind] = each(index)
    measured = interleaved(ways, rounds)
    ratios = {f"exact / {kind}": ratio(measured, "exact", kind) for kind in KINDS}
    ratios |= {f"faiss flat / {kind}": ratio(measured, "faiss flat", kind) for kind in KINDS}
    return {"dimension": queries.shape[1], "indexes": about, "seconds_of_20": measured, "ratios": ratios}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="candidates")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--checkpoint", type=Path, default=MINIATURE,
        help="whose CLIP embeds the scenes; the default one is trained if absent",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    if arguments.checkpoint == MINIATURE and not MINIATURE.is_dir():
        train([])  # what `python train/run.py` does
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    size, rounds = arguments.size, arguments.rounds
    result: dict[str, Any] = {
        "size": size, "rounds": rounds, "threads": threads, "checkpoint": str(arguments.checkpoint),
        "versions": {"torch": torch.__version__, "faiss": faiss.__version__, "numpy": np.__version__},
    }  # fmt: skip
    model = random_model(*next(iter(SHAPES.values())))
    with tempfile.TemporaryDirectory() as folder:
        pool, embeddings = random_pool(size, model.fingerprint, Path(folder))
        result["dimension"] = embeddings.shape[1]
        result["exact"] = exact(pool, embeddings, rounds)
        result["retrieve"] = retrieval(model, pool, embeddings, rounds)
        del pool, embeddings
    result["approximate"] = approximate(*scenes(UniMuRModel.from_pretrained(arguments.checkpoint), size), rounds)
    write_json(arguments.output / "pool-speed.json", result)
    for n, measured in result["exact"].items():
        _print(f"exact, {n}", measured["ratios"])
    _print("retrieve", result["retrieve"]["ratios"])
    _print("approximate", result["approximate"]["ratios"])
    for kind, about in result["approximate"]["indexes"].items():
        print(
            f"{kind}: recall@10 {about['recall_at_10']:.3f} of captions, {about['recall_at_10_of_own']:.3f} of its own; "
            f"{about['bytes']:.0f} bytes a candidate ({about['share_of_float32']:.3f} of float32), "
            f"built in {about['build_seconds']:.1f} s"
        )
    return result


def _print(what: str, ratios: dict[str, dict[str, float]]) -> None:
    line = ", ".join(f"{k} {v['median']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for k, v in ratios.items())
    print(f"{what}: {line}")


if __name__ == "__main__":
    run_command(main)
