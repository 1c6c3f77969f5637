"""An HTTP proxy that does to a store's answers what networks and stores do now and then."""

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
PER_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class Weather:
    """What comes over the line; the rates are shares of requests, drawn from `seed`."""

    slow_down: float = 0.0  # 503
    reset: float = 0.0  # of the connection, half of them after the store has acted
    short: float = 0.0  # a body that ends before its stated length
    truncate: float = 0.0  # one whose stated length is as wrong as the body: nobody can tell
    flip: float = 0.0  # one bit of a body
    latency_s: float = 0.0
    hang: str = ""  # the first request of this method gets no answer
    seed: int = 0
    down: bool = False  # every connection is closed at once
    done: Counter[str] = field(default_factory=Counter)  # what was done, how often

    def __post_init__(self) -> None:
        self._draw, self._lock = random.Random(self.seed), threading.Lock()
        self._calm = threading.Event()  # set at the end: what hangs lets go

    def pick(self, method: str, body_bytes: int) -> str:
        """What happens to a request: the name of a field, or "" for nothing."""
        with self._lock:
            number, chosen = self._draw.random(), ""
            if method == self.hang:
                self.hang, chosen = "", "hang"
            for name in ("slow_down", "reset", "short", "truncate", "flip"):
                share = getattr(self, name)
                if not chosen and number < share and (body_bytes or name in ("slow_down", "reset")):
                    chosen = name
                number -= share
            self.done[chosen] += 1
            return chosen

    def number_below(self, limit: int) -> int:
        with self._lock:
            return self._draw.randrange(limit)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else headers and body, sent apart, take 40 ms on loopback
    server: "_Proxy"

    def handle_any(self) -> None:
        weather, body = self.server.weather, self._body()
        if weather.down:
            self._reset()
            return
        if weather.latency_s:
            threading.Event().wait(weather.latency_s)
        # Before it is known whether there is a body: a fault of bodies waits for one.
        early = weather.pick(self.command, 0) if self.command != "GET" else ""
        self._hang_at(early)
        if early == "slow_down":
            self._answer(503, [], SLOW_DOWN)
            return
        if early == "reset" and weather.number_below(2):
            self._reset()
            return
        status, headers, answer = self._forwarded(body)
        if early == "reset":
            self._reset()
            return
        late = weather.pick("GET", len(answer)) if self.command == "GET" else ""
        self._hang_at(late)
        if late == "reset":
            self._reset()
            return
        if late == "slow_down":
            status, headers, answer = 503, [], SLOW_DOWN
        answer = self._damaged(late, answer)
        if late == "short":
            self._answer(status, headers, answer, sent=weather.number_below(len(answer)))
            self._reset()
        else:
            self._answer(status, headers, answer)

    def _hang_at(self, fault: str) -> None:
        if fault == "hang":
            self.server.weather._calm.wait()

    def _damaged(self, fault: str, answer: bytes) -> bytes:
        number_below = self.server.weather.number_below
        if fault == "truncate":
            return answer[: number_below(len(answer))]
        if fault == "flip":
            at = number_below(8 * len(answer))
            flipped = bytearray(answer)
            flipped[at // 8] ^= 1 << at % 8
            return bytes(flipped)
        return answer

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forwarded(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        store = http.client.HTTPConnection(*self.server.store, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in PER_HOP}
        with contextlib.closing(store):
            store.request(self.command, self.path, body, headers)
            answer = store.getresponse()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in PER_HOP]
            if self.command == "HEAD":
                kept.append(("Content-Length", answer.headers.get("Content-Length", "0")))
            return answer.status, kept, answer.read()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        if self.command != "HEAD" or status == 503:
            self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.wfile.flush()

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # closed with RST, not FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a fault is no news here."""


for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
    setattr(_Handler, f"do_{method}", _Handler.handle_any)


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    weather: Weather
    store: tuple[str, int]

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients break off when they are cut off."""


@contextlib.contextmanager
def through(endpoint: str, weather: Weather) -> Iterator[str]:
    """The address of a proxy to the store at `endpoint`, in this weather."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    proxy = _Proxy(("127.0.0.1", 0), _Handler)
    proxy.weather, proxy.store = weather, (host, int(port))
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        weather._calm.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
