"""
The endpoint on this machine, as Hugging Face's containers run it: `POST /` with JSON, `GET /health`.

    python -m hub_card.serve runs/endpoint --port 8080

The folder holds a checkpoint with a `pool/` and its `handler.py` (what `hub_card.push --dry_run` leaves).
"""

import argparse
import importlib.util
import json
import logging
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

MAX_BODY_BYTES = 24 * 2**20
logger = logging.getLogger(__name__)


def load_handler(folder: Path) -> Any:
    """The `EndpointHandler` of a repository's own `handler.py`, made for that folder."""
    file = folder.resolve() / "handler.py"
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} holds no handler.py: it is not a UniMuR repository")
    spec = importlib.util.spec_from_file_location("handler", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder.resolve()))


def make_server(handler: Any, port: int = 8080, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """A server that answers with `handler`, one request at a time; port 0 takes a free one."""
    lock = Lock()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send({"status": "ok"} if self.path == "/health" else {"error": "POST to /"}, 200)

        def do_POST(self):
            try:
                length = int(self.headers.get("Content-Length") or -1)
            except ValueError:
                length = -1
            if not 0 <= length <= MAX_BODY_BYTES:
                self.close_connection = True
                self._send({"error": f"a request has a Content-Length of at most {MAX_BODY_BYTES} bytes"}, 413)
                return
            try:
                try:
                    request = json.loads(self.rfile.read(length))
                except RecursionError as error:
                    raise ValueError("the request's JSON is nested too deeply") from error
                with lock:
                    answer = handler(request)
            except ValueError as error:
                self._send({"error": str(error)}, 400)
            except Exception:
                logger.exception("a request failed")
                self._send({"error": "the server failed; its log says why"}, 500)
            else:
                self._send(answer, 200)

        def _send(self, content: dict[str, Any], status: int) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, message, *arguments):
            logger.info(message, *arguments)

    return ThreadingHTTPServer((host, port), Answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8080)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    server = make_server(load_handler(arguments.folder), arguments.port)
    print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
