"""A real Milvus server on loopback, from the package `milvus`, that can be killed and started again on its data."""

import os
import signal
from pathlib import Path

SECONDS = 120  # to start in


class LoopbackMilvus:
    """
    A Milvus server on free ports of loopback, its data in a folder; a context that starts and stops it.

    Raises:
        ImportError: the package `milvus`, which bundles the server, is not installed.
        RuntimeError: it does not start within two minutes.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.start()

    def start(self) -> None:
        """Starts it, also after `kill`, then on another port."""
        from milvus import MilvusServer, MilvusServerConfig

        self.server = MilvusServer(MilvusServerConfig(), wait_for_started=False)
        self.server.set_base_dir(str(self.folder))
        try:
            self.server.start()
            self.server.wait_started(timeout=1000 * SECONDS)
        except BaseException:
            self.stop()
            raise

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.listen_port}"

    @property
    def pid(self) -> int:
        return self.server.server_proc.pid

    def kill(self) -> None:
        """Ends it at once (SIGKILL), as a crash would."""
        self.server.server_proc.send_signal(signal.SIGKILL)
        self.server.server_proc.wait()

    def stop(self) -> None:
        self.server.stop()  # the process that it started

    def __enter__(self) -> "LoopbackMilvus":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
