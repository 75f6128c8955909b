"""The endpoint's server alone, before a handler that computes nothing: what slow, vanishing and lying clients can do."""

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hub_card.connections import ConnectionLimits
from hub_card.endpoint import Limits
from hub_card.serve import listen, main
from tests.hub_card.serving import served
from train.command import run_command


class Echo:
    """Answers a request by itself, and keeps the sizes of its batches; waits for `go` first."""

    def __init__(self):
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        self.batches = []

    def batch(self, requests):
        self.batches.append(len(requests))
        self.begun.set()
        assert self.go.wait(20)
        return [KeyError("secret") if request == "fail" else {"echo": request} for request in requests]


def ask(port, body, method="POST", path="/", timeout=20, **headers):
    """Status, headers and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(content) if content else None


def send(port, data):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(data)
    return connection


def received(connection):
    """How many bytes come until the server closes the connection."""
    count = 0
    try:
        while part := connection.recv(2**20):
            count += len(part)
    except ConnectionResetError:
        pass
    return count


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def head(length, more=""):
    return f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def test_paths_methods_and_health():
    with served(Echo()) as port:
        assert ask(port, "hi")[::2] == (200, {"echo": "hi"})
        assert ask(port, b"", "GET", "/health")[::2] == (200, {"status": "ok"})
        for path in ("/nothing", "/docs", "/openapi.json", "//"):
            assert ask(port, "hi", path=path)[::2] == (404, {"error": "there are POST / and GET /health"})
        status, headers, answer = ask(port, b"", "GET")
        assert (status, headers["Allow"], answer) == (405, "POST", {"error": "/ takes POST"})


def test_a_handler_without_batches_answers_one_after_another():
    def handler(request):
        if request == "bad":
            raise ValueError("a sentence")
        return {"echo": request}

    with served(handler) as port:
        assert ask(port, "hi")[::2] == (200, {"echo": "hi"})
        assert ask(port, "bad")[::2] == (400, {"error": "a sentence"})


def test_requests_that_wait_are_answered_together():
    handler = Echo()
    handler.go.clear()
    with served(handler, limits=Limits(batch=4)) as port, ThreadPoolExecutor(9) as clients:
        first = clients.submit(ask, port, 0)
        assert handler.begun.wait(10)
        rest = [clients.submit(ask, port, at) for at in range(1, 9)]
        time.sleep(0.5)
        handler.go.set()
        assert first.result()[2] == {"echo": 0}
        assert [answer.result()[2] for answer in rest] == [{"echo": at} for at in range(1, 9)]
    assert handler.batches == [1, 4, 4]


def test_a_full_queue_and_a_late_answer_are_503_with_retry_after():
    handler = Echo()
    handler.go.clear()
    with served(handler, limits=Limits(waiting=2, answer_seconds=2)) as port, ThreadPoolExecutor(3) as clients:
        under_way = clients.submit(ask, port, 0)
        assert handler.begun.wait(10)
        waiting = [clients.submit(ask, port, at) for at in (1, 2)]
        time.sleep(0.5)
        start = time.monotonic()
        status, headers, answer = ask(port, 3)
        assert time.monotonic() - start < 1.5  # at once, before the others are late
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "too many requests wait" in answer["error"]
        for late in (under_way, *waiting):
            status, headers, answer = late.result()
            assert status == 503 and headers["Retry-After"] and "no answer within 2 seconds" in answer["error"]
        handler.go.set()
        until(lambda: ask(port, 4)[0] == 200)
    assert sum(handler.batches) == 2  # what was late in the queue was not computed


def test_a_failure_is_logged_and_its_answer_holds_no_internals(caplog):
    with served(Echo()) as port:
        status, _, answer = ask(port, "fail")
        assert (status, answer) == (500, {"error": "the server failed; its log says why"})
        assert ask(port, "hi")[0] == 200
    assert "KeyError" in caplog.text


def test_a_body_is_refused_as_soon_as_it_is_too_long():
    with served(Echo(), limits=Limits(body_bytes=1000)) as port:
        assert ask(port, "x" * 998)[0] == 200
        assert ask(port, "x" * 999)[0] == 413
        with send(port, head(10**9)) as connection:  # nothing of it has been sent
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
        chunk = b"1f4\r\n" + b"x" * 500 + b"\r\n"
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with send(port, chunked + 3 * chunk) as connection:  # nor does it end
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_the_bytes_of_all_bodies_are_bounded_together():
    limits = Limits(body_bytes=1000, held_bytes=2500, body_seconds=2)
    with served(Echo(), limits=limits) as port:
        held = [send(port, head(1000) + b"x" * 900) for _ in range(2)]
        time.sleep(0.3)
        status, headers, answer = ask(port, "x" * 900)
        assert status == 503 and headers["Retry-After"] and "too many bytes wait" in answer["error"]
        for connection in held:
            connection.close()
        until(lambda: ask(port, "x" * 900)[0] == 200)


def test_an_unfinished_body_times_out():
    with served(Echo(), limits=Limits(body_seconds=0.5)) as port, send(port, head(100) + b"half") as connection:
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408") and b"within 0.5 seconds" in answer + connection.recv(1000)
        assert connection.recv(1000) == b""


def test_idle_and_slow_connections_are_closed_and_keep_nobody_out():
    limits = ConnectionLimits(connections=40, head_seconds=1, idle_seconds=1)
    with served(Echo(), connection_limits=limits) as port:
        idle = [send(port, b"") for _ in range(15)] + [send(port, b"POST / HTTP/1.1\r\nHost") for _ in range(15)]
        assert ask(port, "hi")[0] == 200
        start = time.monotonic()
        drips = send(port, b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):  # a byte now and then does not put off the end of the head
            while time.monotonic() - start < 10:
                drips.sendall(b"a")
                time.sleep(0.1)
        assert time.monotonic() - start < 5
        for connection in idle:
            with connection:
                assert received(connection) == 0
        kept = send(port, head(4) + b'"hi"')  # the second request of a connection is no slower
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        kept.sendall(b"POST / HTTP/1.1\r\n")
        start = time.monotonic()
        assert received(kept) < 100
        assert time.monotonic() - start < 5


def test_one_connection_too_many_is_closed_as_it_comes():
    with served(Echo(), connection_limits=ConnectionLimits(connections=3)) as port:
        held = [send(port, b"") for _ in range(3)]
        time.sleep(0.2)
        with send(port, b"") as more:
            start = time.monotonic()
            assert received(more) == 0 and time.monotonic() - start < 5
        for connection in held:
            connection.close()
        time.sleep(0.2)
        assert ask(port, "hi")[0] == 200


def test_an_answer_that_nobody_reads_is_given_up(caplog):
    limits = ConnectionLimits(flush_seconds=0.5, idle_seconds=1)
    with served(lambda request: {"much": "x" * 20_000_000}, connection_limits=limits) as port:
        with send(port, head(4) + b'"hi"') as connection:
            time.sleep(2)
            assert received(connection) < 20_000_000
        assert len(ask(port, "hi")[2]["much"]) == 20_000_000  # whoever reads gets it


def test_who_vanishes_leaves_the_queue():
    handler = Echo()
    handler.go.clear()
    with served(handler, limits=Limits(waiting=2)) as port, ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, port, 0)
        assert handler.begun.wait(10)
        gone = [send(port, head(1) + b"1") for _ in range(2)]
        until(lambda: ask(port, 2)[0] == 503)
        for connection in gone:
            connection.close()
        time.sleep(0.3)
        later = send(port, head(1) + b"3")
        time.sleep(0.3)
        handler.go.set()
        assert first.result()[0] == 200 and later.recv(1000).startswith(b"HTTP/1.1 200")
        later.close()
    assert handler.batches == [1, 1]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01 no http\r\n\r\n",
        head(-1),
        head("abc"),
        head(5, "Content-Length: 6\r\n") + b'"hi"',
        head(2) + b'"hi" and more',
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\n" + b"a: " + b"x" * 100_000,
    ],
)
def test_what_is_no_request_is_400_and_harms_nobody(data):
    with served(Echo()) as port:
        with send(port, data) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert ask(port, "hi")[0] == 200


def test_a_token_is_required_before_the_body_is_read():
    with served(Echo(), token="secret") as port:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"},
                        {"Authorization": "Bearer sécret"}):  # fmt: skip
            status, answer_headers, answer = ask(port, "hi", **headers)
            assert status == 401 and answer_headers["WWW-Authenticate"] == "Bearer" and "token" in answer["error"]
        with send(port, head(10**6)) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 401")
        assert ask(port, "hi", Authorization="Bearer secret")[0] == 200
        assert ask(port, b"", "GET", "/health")[0] == 200


def test_the_log_has_a_line_for_each_request_and_no_contents(caplog):
    caplog.set_level(logging.INFO)
    with served(Echo(), token="letmein") as port:
        ask(port, "confidential", Authorization="Bearer letmein")
        ask(port, "confidential", path="/confidential?confidential")
    assert "POST / 200, 14 bytes" in caplog.text and "POST (unknown path) 404" in caplog.text
    assert "confidential" not in caplog.text and "letmein" not in caplog.text


def test_sigterm_answers_what_is_under_way_and_ends(tmp_path):
    (tmp_path / "handler.py").write_text(
        "import time\n"
        "class EndpointHandler:\n"
        "    def __init__(self, path): pass\n"
        "    def __call__(self, request):\n"
        "        time.sleep(0.3)\n"
        "        return {'echo': request}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "hub_card.serve", str(tmp_path), "--port", "0"], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"UNIMUR_TOKEN": "from-the-environment"},
    )  # fmt: skip
    try:
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        idle = send(port, b"")
        assert ask(port, "hi")[0] == 401
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(ask, port, at, Authorization="Bearer from-the-environment") for at in range(8)]
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert [a.result()[::2] for a in answers] == [(200, {"echo": at}) for at in range(8)]
        assert process.wait(timeout=10) == -signal.SIGTERM
        assert idle.recv(1) == b""
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' holds no handler.py"),
        (["nowhere", "--token", ""], "printable ASCII"),
        (["nowhere", "--host", "0.0.0.0"], "give --token"),
        (["nowhere", "--port", "99999"], "cannot listen on 127.0.0.1 port 99999"),
    ],
)
def test_a_users_mistake_is_one_sentence(arguments, message, capsys):
    arguments = arguments if "--port" in arguments else [*arguments, "--port", "0"]
    with pytest.raises(SystemExit, match=message) as ended:
        run_command(lambda: main(arguments))
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)


def test_a_port_in_use_is_named():
    with (
        listen("127.0.0.1", 0) as taken,
        pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1 port .* in use"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
