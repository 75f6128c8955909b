"""A real Milvus server on loopback, from the package `milvus`, that can be killed and started again on its data."""

import os
import signal
import socket
import tempfile
from pathlib import Path

from filelock import FileLock

SECONDS, SECONDS_WAITED = 120, 900  # to start in; for another to end
ETCD_PORTS = (2379, 2380)  # of the etcd inside, whatever the server is configured to: two servers cannot run at once


class LoopbackMilvus:
    """
    A Milvus server on loopback, its data in a folder; a context that starts and stops it. It waits for another of its
    kind to end, since there can be one on a machine.

    Raises:
        ImportError: the package `milvus`, which bundles the server, is not installed.
        RuntimeError: something else listens on a port of etcd's.
        TimeoutError: it does not start within two minutes, or another does not end within fifteen.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.lock = FileLock(Path(tempfile.gettempdir()) / "unimur-milvus.lock", timeout=SECONDS_WAITED)
        self.lock.acquire()
        try:
            self.start()
        except BaseException:
            self.lock.release()
            raise

    def start(self) -> None:
        """Starts it, also after `kill`, then on another port."""
        from milvus import MilvusServer, MilvusServerConfig

        for port in ETCD_PORTS:
            check_free(port)
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
        self.lock.release()

    def __enter__(self) -> "LoopbackMilvus":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def check_free(port: int) -> None:
    """Raises a `RuntimeError` where something listens on a port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server just killed do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RuntimeError(
                f"port {port} is taken: end the etcd or Milvus server that listens there and start again"
            ) from error
