"""Requests to a store end at their deadline."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ddpm_ray.storage import object_store, remote_filesystem
from ddpm_ray.storage.errors import StorageError
from tests.limits import ENDS_S

UseS3 = Callable[[str, str], str]


@pytest.fixture
def dripping() -> Iterator[str]:
    """The endpoint of a server whose answers, and whose reading of bodies, never come to an end."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def drip(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            letters: Iterator[int] = itertools.cycle(b"X-Slow: aaaaaaaaaaaaaaaaaaaaaaaa\r\n")
            if self.command == "GET":  # headers at once, then its body byte by byte
                self.wfile.write(b"Content-Length: 1000000\r\n\r\n")
                letters = itertools.repeat(ord("x"))
            with contextlib.suppress(OSError):
                while not over.wait(0.05):
                    self.wfile.write(bytes([next(letters)]))
            self.close_connection = True

        do_GET = do_HEAD = do_PUT = drip  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    over.set()
    server.shutdown()
    thread.join(ENDS_S)
    server.server_close()


@pytest.mark.parametrize("request_", ["GET", "GET of known size", "HEAD", "PUT"])
def test_a_server_that_drips_is_cut_off(
    request_: str, dripping: str, use_s3: UseS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never silent for long, so that time-outs of silence wait for ever."""
    bucket = use_s3(dripping, "secret")
    monkeypatch.setattr(remote_filesystem, "REQUEST_S", 1.0)
    object_store.set_retry_timeout(0)
    acts: dict[str, Callable[[], object]] = {
        "GET": lambda: object_store.read_bytes(f"{bucket}/x", 10),
        "GET of known size": lambda: object_store.read_sized(f"{bucket}/x", 10**6),
        "HEAD": lambda: object_store.exists(f"{bucket}/x"),
        "PUT": lambda: object_store.write_bytes(f"{bucket}/x", b"data"),
    }
    begun_s = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer \(FSTimeoutError\).*AWS_ENDPOINT_URL"):
        acts[request_]()
    assert time.monotonic() - begun_s < 30
