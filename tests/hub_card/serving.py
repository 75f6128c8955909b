"""The endpoint's server on a free port of this machine, in a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hub_card.serve import listen, make_server


@contextmanager
def served(handler: Any, **arguments: Any) -> Iterator[int]:
    """The port at which `handler` is served; `arguments` as `make_server` takes them."""
    listening = listen("127.0.0.1", 0)
    server = make_server(handler, **arguments)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    port = listening.getsockname()[1]
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
