"""
A pool of a million candidates in a real Milvus server, beside the faiss pool over the same vectors.

    python -m benchmarks.speed.milvus --output benchmarks/results
    python -m benchmarks.speed.milvus --size 20000 --seconds 2           a trial, some minutes

Loads texts with embeddings from disk, kills the server half-way (SIGKILL), starts it again and goes on with
`skip_existing`; then, for each index: the seconds to build it, recall@10 against exact search in numpy, and the latency of
`pool.search` (10 candidates of one query, fetched) under 8 clients at once. The vectors are drawn around 1,000 centres, as
embeddings of similar things are; on vectors without any structure no approximate index is of use. Server, clients and this
process share the machine.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from benchmarks.output import write_json
from modeling_unimur import CandidatePool, MilvusPool
from modeling_unimur.pool_base import Pool
from train.command import require, run_command

from .memory import status
from .milvus_server import LoopbackMilvus

BLOCK = 10_000  # candidates loaded by one call
CENTRES, SPREAD = 1_000, 0.7
CLIENTS, TOP_K, QUERIES = 8, 10, 256
# Milvus's index types with their parameters, and those of a search; by the server's names.
INDEXES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FLAT": ({}, {}),
    "IVF_FLAT": ({"nlist": 1024}, {"nprobe": 32}),
    "HNSW": ({"M": 16, "efConstruction": 128}, {"ef": 128}),
}


def write_vectors(path: Path, size: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """`(size, dimension)` float32 unit rows in a file, mapped; and `QUERIES` queries of the same kind."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, dimension), dtype=np.float32)

    def draw(count: int) -> np.ndarray:
        rows = centres[rng.integers(0, CENTRES, count)]
        rows += SPREAD * rng.standard_normal(rows.shape, dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (size, dimension))
    for start, stop in blocks(size):
        vectors[start:stop] = draw(stop - start)
    vectors.flush()
    return np.load(path, mmap_mode="r"), draw(QUERIES)


def blocks(size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The first and the last row but one of each block."""
    yield from ((at, min(at + BLOCK, size)) for at in range(start, size, BLOCK))


def exact(vectors: np.ndarray, queries: np.ndarray) -> list[set[str]]:
    """The ids of each query's nearest candidates."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start, stop in blocks(len(vectors)):
        scores = np.concatenate([scores, queries @ vectors[start:stop].T], axis=1)
        rows = np.concatenate([rows, np.tile(np.arange(start, stop), (len(queries), 1))], axis=1)
        best = np.argpartition(-scores, TOP_K, axis=1)[:, :TOP_K]
        scores, rows = (np.take_along_axis(part, best, axis=1) for part in (scores, rows))
    return [{f"text-{row}" for row in mine} for mine in rows]


def load(server: LoopbackMilvus, made_by: dict[str, Any], vectors: np.ndarray) -> tuple[MilvusPool, dict[str, Any]]:
    """All vectors in a new collection, over a server that is killed half-way; what it took."""
    pool = MilvusPool.create(server.address, "million", made_by, timeout=60)
    about: dict[str, Any] = {}
    start, at, size = time.perf_counter(), 0, len(vectors)
    with tqdm(total=size, desc="candidates to Milvus") as bar:
        while at < size:
            stop = min(at + BLOCK, size)
            if "killed_after" not in about and at >= size // 2:
                threading.Timer(0.5, server.kill).start()
                about["killed_after"] = at
            try:
                texts = [f"reply number {i}" for i in range(at, stop)]
                ids = [f"text-{i}" for i in range(at, stop)]
                pool.append("text", texts, vectors[at:stop], ids, skip_existing="message" in about)
            except ConnectionError as error:
                if "message" in about:
                    raise
                about["message"], begin = str(error), time.perf_counter()
                server.start()
                pool = MilvusPool(server.address, "million", timeout=60)
                about["restarted_in_s"] = time.perf_counter() - begin
                about["kept"] = len(pool)
                continue
            at = stop
            bar.update(stop - bar.n)
    seconds = time.perf_counter() - start - about.get("restarted_in_s", 0)
    if len(pool) != size:
        raise ValueError(f"the server holds {len(pool)} candidates of {size}: some were lost or came twice")
    return pool, about | {"seconds": seconds, "candidates_per_second": size / seconds}


def rebuild(pool: MilvusPool, kind: str) -> float:
    """Gives the loaded collection another index; the seconds until every row is in it and it can be searched."""
    parameters, pool.search_params = INDEXES[kind]
    client, name, start = pool.client, pool.collection, time.perf_counter()
    client.release_collection(name)
    client.drop_index(name, "embedding")
    wanted = client.prepare_index_params()
    wanted.add_index("embedding", index_type=kind, metric_type="COSINE", params=parameters)
    client.create_index(name, wanted, timeout=None)
    while (state := client.describe_index(name, "embedding")).get("pending_index_rows") or state.get(
        "state"
    ) != "Finished":
        time.sleep(1)
    client.load_collection(name, timeout=None)
    return time.perf_counter() - start


def measure(
    open_pool: Callable[[], Pool], queries: np.ndarray, expected: list[set[str]], seconds: float
) -> dict[str, Any]:
    """Recall@10, and milliseconds of a search with as many clients at once, each with a pool of its own."""
    pools = [open_pool() for _ in range(CLIENTS)]
    replies = [pools[0].search(query[None], top_k=TOP_K)[0] for query in queries]
    hits = [len({c.id for c in reply.candidates} & mine) for reply, mine in zip(replies, expected, strict=True)]
    taken: list[float] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        rng, pool = np.random.default_rng(number), pools[number]
        while (begin := time.perf_counter()) < end:
            pool.search(queries[rng.integers(len(queries))][None], top_k=TOP_K)
            taken.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = (1000 * np.percentile(taken, (50, 99))).tolist()
    return {
        "recall_at_10": sum(hits) / (TOP_K * len(hits)),
        "p50_ms": p50,
        "p99_ms": p99,
        "searches_per_second": len(taken) / seconds,
    }


def milvus(folder: Path, made_by: dict[str, Any], vectors: np.ndarray, queries: np.ndarray, expected: list[set[str]],
           seconds: float) -> dict[str, Any]:  # fmt: skip
    """The server's part."""
    with LoopbackMilvus(folder) as server:
        pool, about = load(server, made_by, vectors)
        print(about, flush=True)
        indexes = {}
        for kind, (_, searched) in INDEXES.items():
            built = rebuild(pool, kind)
            indexes[kind] = {"built_in_s": built} | measure(
                lambda searched=searched: MilvusPool(server.address, "million", search_params=searched, timeout=60),
                queries, expected, seconds,
            )  # fmt: skip
            indexes[kind]["server_gib"] = status("VmRSS", server.pid) / 2**30
            print(kind, indexes[kind], flush=True)
        version = pool.client.get_server_version()
        pool.close()
    return {"version": version, "loading": about, "indexes": indexes}


def faiss_pool(folder: Path, made_by: dict[str, Any], vectors: np.ndarray, queries: np.ndarray, expected: list[set[str]],
               seconds: float) -> dict[str, Any]:  # fmt: skip
    """The same vectors in a saved pool, searched exactly and by an index."""
    start = time.perf_counter()
    pool = CandidatePool.empty(made_by).append(
        "text", [f"reply number {i}" for i in range(len(vectors))], np.asarray(vectors)
    )
    pool.save_to_disk(folder)
    pool = CandidatePool.load_from_disk(folder)
    results: dict[str, Any] = {"saved_in_s": time.perf_counter() - start, "indexes": {}}
    for kind in ("exact", "ivf", "hnsw"):
        start = time.perf_counter()
        searched = pool if kind == "exact" else pool.build_index(kind, queries=queries)
        built = time.perf_counter() - start
        results["indexes"][kind] = {"built_in_s": built} | measure(lambda p=searched: p, queries, expected, seconds)
        results["indexes"][kind]["search"] = "" if kind == "exact" else searched.index.about["search"]["text"]
        results["indexes"][kind]["process_gib"] = status("VmRSS") / 2**30
        print("faiss pool,", kind, results["indexes"][kind], flush=True)
    return results


PARTS = {"milvus": milvus, "faiss": faiss_pool}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000, help="candidates")
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=30, help="for which the clients of an index ask")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="the other's figures are kept")
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    require("search", "faiss", "pymilvus")
    require("milvus-server", "milvus")
    made_by = {
        "towers": "t",
        "maps": "m",
        "text_candidates": "ret",
        "preprocessing": "p",
        "dimension": arguments.dimension,
    }
    about = {
        "size": arguments.size, "dimension": arguments.dimension, "clients": CLIENTS, "queries": QUERIES,
        "cores": os.cpu_count(),
    }  # fmt: skip
    path = arguments.output / "milvus-speed.json"
    result = about | kept(path, about, arguments.parts)
    with tempfile.TemporaryDirectory() as folder:
        vectors, queries = write_vectors(Path(folder) / "vectors.npy", arguments.size, arguments.dimension)
        given = made_by, vectors, queries, exact(vectors, queries), arguments.seconds
        for part in arguments.parts:
            result[part] = PARTS[part](Path(folder) / part, *given)
            write_json(path, result)
    return result


def kept(path: Path, about: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """
    What an earlier run measured of the other parts.

    Raises:
        ValueError: it measured something else.
    """
    others = [part for part in PARTS if part not in parts]
    if not others or not path.is_file():
        return {}
    former = json.loads(path.read_text())
    if differ := [name for name, value in about.items() if former.get(name) != value]:
        raise ValueError(
            f"{path} is of another run ({', '.join(differ)} differ): give another --output, or all --parts"
        )
    return {part: former[part] for part in others if part in former}


if __name__ == "__main__":
    run_command(main)
