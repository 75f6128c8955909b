"""
The endpoint on this machine, as Hugging Face's containers run it: `POST /` with JSON, `GET /health`.

    python -m hub_card.serve runs/endpoint --port 8080

The folder holds a checkpoint with a `pool/` and its `handler.py` (what `hub_card.push --dry_run` leaves). Requests that
wait are answered together. On SIGTERM or Ctrl-C those that were received are answered, and no others.
"""

import argparse
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from train.command import require, run_command

if __name__ == "__main__":
    require("serve", "fastapi", "uvicorn")

import uvicorn

from .connections import BoundedConnection, ConnectionLimits
from .endpoint import Limits, make_app

TOKEN = "UNIMUR_TOKEN"
GRACE_SECONDS = 60  # for the requests that are unanswered when the server is stopped


def load_handler(folder: Path) -> Any:
    """
    The `EndpointHandler` of a repository's own `handler.py`, made for that folder.

    Raises:
        ValueError: the folder has no `handler.py`, or no pool.
    """
    file = folder.resolve() / "handler.py"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} holds no handler.py: it is not a UniMuR repository")
    spec = importlib.util.spec_from_file_location("handler", file)
    assert spec is not None and spec.loader is not None  # of a .py file they are there
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder.resolve()))


def make_server(
    handler: Any, *, token: str | None = None, limits: Limits | None = None,
    connection_limits: ConnectionLimits | None = None,
) -> uvicorn.Server:  # fmt: skip
    """A server that answers with `handler`; see [`make_app`]. `run(sockets=[listen(…)])` serves until it is stopped."""
    connection_limits = connection_limits or ConnectionLimits()
    config = uvicorn.Config(
        make_app(handler, token=token, limits=limits), http=BoundedConnection.within(connection_limits), ws="none",
        lifespan="on", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=connection_limits.idle_seconds, timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises `OSError` that names host and port."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {host} port {port} ({error}): give another --host or --port") from error


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="the repository's folder")
    made.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; by default this machine alone asks"
    )
    made.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    made.add_argument(
        "--token", default=os.environ.get(TOKEN),
        help=f"refuse requests without it. The environment variable {TOKEN} is the better place: arguments can be read by "
        "every user of the machine",
    )  # fmt: skip
    return made


def check_token_argument(token: str | None, host: str) -> None:
    """Refuses with a `ValueError` a token that no header can hold, and an address that others reach without a token."""
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise ValueError(f"--token (or {TOKEN}) must be printable ASCII without spaces around it")
    try:
        reachable = host != "localhost" and not ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise ValueError(f"--host {host!r} is no address: give one such as 127.0.0.1") from error
    if token is None and reachable:
        raise ValueError(f"--host {host} can be reached from other machines: give --token, or {TOKEN}")


def main(argv: list[str] | None = None) -> None:
    """Raises `ValueError` or `OSError`: an argument cannot be used."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    check_token_argument(arguments.token, arguments.host)
    with listen(arguments.host, arguments.port) as listening:
        handler = load_handler(arguments.folder)
        host, port = listening.getsockname()[:2]
        print(f"listening on http://{host}:{port}", flush=True)
        make_server(handler, token=arguments.token).run(sockets=[listening])


if __name__ == "__main__":
    run_command(main)
