"""
The endpoint's server under load: many clients at once, every answer compared with the known one.

    python -m tests.stress.endpoint --clients 64 --seconds 120

Starts the server over a tiny random model, prints one JSON object (and writes it to `--output`), and exits with 1 where an
answer was wrong. A tenth of the requests is bad and must be refused by 400.
"""

import argparse
import base64
import http.client
import io
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.speed.memory import status
from hub_card.serve import load_handler
from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.tiny import make_model

MARKS = (1_000, 10_000)  # answers after which the server's memory is read


def make_repository(folder: Path) -> None:
    """A tiny random checkpoint with a pool of 40 pictures and 40 texts."""
    make_model(folder / "towers").save_pretrained(folder / "repository", with_towers=True)
    model = UniMuRModel.from_pretrained(folder / "repository")
    texts = [f"reply number {at}" for at in range(40)]
    pool = model.build_pool(images=[picture(at) for at in range(40)], texts=texts, show_progress_bar=False)
    model.save_pretrained(folder / "repository", pool=pool)


def make_requests() -> list[dict[str, Any]]:
    """Words, pictures, several turns, other parameters; one in ten is bad."""
    buffer = io.BytesIO()
    picture(99).save(buffer, "PNG")
    image = {"type": "image", "image": base64.b64encode(buffer.getvalue()).decode()}
    good = [{"inputs": "hello " * (1 + at)} for at in range(4)]
    good += [{"inputs": ["look", {"role": "user", "content": [image]}], "parameters": {"top_k": 3}}]
    good += [{"inputs": ["a", "b", f"turn {at}"], "parameters": {"exclude": [f"image-{at}"]}} for at in range(4)]
    return [*good, {"inputs": []}]


def known(handler: Any, request: dict[str, Any]) -> tuple[int, Any]:
    """Status and what identifies the answer."""
    try:
        answer = handler(request)
    except ValueError as error:
        return 400, {"error": str(error)}
    return 200, outline(answer)


def outline(answer: dict[str, Any]) -> Any:
    """An answer without its scores, whose last digits depend on the batch."""
    if "candidates" not in answer:
        return answer
    return [answer["text"], answer["image"], [(c["id"], c["rank"]) for c in answer["candidates"]]]


class Load:
    """What the clients of a server got."""

    def __init__(self, port: int, pid: int, expected: list[tuple[bytes, int, Any]]):
        self.port, self.pid, self.expected = port, pid, expected
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.memory: dict[int, float] = {}
        self.lock = threading.Lock()

    def client(self, number: int, end: float) -> None:
        """Asks one request after another, over a connection that is kept, until `end`."""
        connection, at = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60), number
        while time.monotonic() < end:
            body, status, answer = self.expected[at % len(self.expected)]
            at += 1
            start = time.monotonic()
            try:
                connection.request("POST", "/", body)
                response = connection.getresponse()
                content = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError):
                outcome = "broken"
                connection.close()
            else:
                same = response.status == status and outline(content) == answer
                outcome = "good" if same else "busy" if response.status == 503 else "wrong"
            self.note(outcome, time.monotonic() - start)
        connection.close()

    def note(self, outcome: str, seconds: float) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if outcome == "good":
                self.seconds.append(seconds)
            if self.outcomes["good"] in MARKS and outcome == "good":
                self.memory[self.outcomes["good"]] = resident(self.pid)


def resident(pid: int) -> float:
    """The memory of a process in MB; NaN where the system does not tell it as Linux does."""
    try:
        return status("VmRSS", pid) / 1e6
    except OSError:
        return float("nan")


def run(clients: int, seconds: float) -> dict[str, Any]:
    """The figures of `clients` that ask a server of its own process for `seconds`."""
    with TemporaryDirectory() as folder:
        make_repository(Path(folder))
        repository = Path(folder) / "repository"
        handler = load_handler(repository)
        expected = [(json.dumps(r).encode(), *known(handler, r)) for r in make_requests()]
        server = subprocess.Popen(
            [sys.executable, "-m", "hub_card.serve", str(repository), "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            load, end = Load(port, server.pid, expected), time.monotonic() + seconds
            threads = [threading.Thread(target=load.client, args=(at, end)) for at in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            last = resident(server.pid)
        finally:
            server.terminate()
            server.wait(timeout=60)
    p50, p99 = np.percentile(load.seconds, (50, 99)) if load.seconds else (float("nan"),) * 2
    return {
        "clients": clients, "seconds": seconds, **{name: load.outcomes[name] for name in ("good", "wrong", "busy", "broken")},
        "p50_ms": round(1000 * p50, 1), "p99_ms": round(1000 * p99, 1),
        "memory_mb": {**load.memory, "end": last},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    figures = run(arguments.clients, arguments.seconds)
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.exit(bool(figures["wrong"] or figures["broken"] or not figures["good"]))


if __name__ == "__main__":
    main()
