"""A small HTTP client: one connection for each request, so that it costs little CPU."""

import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.serving_load.traffic import Arrival


@dataclass(frozen=True)
class HttpAnswer:
    """An answer, and the seconds from the arrival of the request to its last byte."""

    status: int
    headers: dict[str, str]
    seconds: float
    body: bytes = b""


async def post(url: str, fields: dict[str, object], timeout_s: float = 300.0) -> HttpAnswer:
    """Send a request as JSON and read the whole answer; status 0: there was none."""
    begun_s = time.perf_counter()
    try:
        status, headers, body = await asyncio.wait_for(_exchange(url, fields), timeout_s)
    except (OSError, TimeoutError, ValueError, IndexError) as error:
        seconds = time.perf_counter() - begun_s
        return HttpAnswer(0, {"error": f"{type(error).__name__}: {error}"}, seconds)
    return HttpAnswer(status, headers, time.perf_counter() - begun_s, body)


async def _exchange(url: str, fields: dict[str, object]) -> tuple[int, dict[str, str], bytes]:
    parts, body = urlsplit(url), json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = [
            f"POST {parts.path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.strip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return int(first.split()[1]), headers, await reader.read()
    finally:
        writer.close()


def request_of(arrival: Arrival) -> dict[str, object]:
    """The JSON of a request to our server."""
    return {"n": arrival.images, "steps": arrival.steps, "seed": arrival.seed}


async def open_loop(url: str, trace: list[Arrival]) -> list[tuple[Arrival, HttpAnswer]]:
    """Send each request at its time, whatever has been answered; return all answers."""
    begun_s = time.perf_counter()
    sent: list[tuple[Arrival, asyncio.Task[HttpAnswer]]] = []
    for arrival in trace:
        await asyncio.sleep(max(0.0, arrival.at_s - (time.perf_counter() - begun_s)))
        sent.append((arrival, asyncio.create_task(post(url, request_of(arrival)))))
    return [(arrival, await task) for arrival, task in sent]


async def closed_loop(url: str, trace: list[Arrival], clients: int) -> float:
    """Send the requests by `clients` that wait for their answers; return answers a second."""
    left, begun_s = iter(trace), time.perf_counter()

    async def client() -> None:
        for arrival in left:
            answer = await post(url, request_of(arrival))
            if answer.status != 200:
                raise RuntimeError(f"the server answers {answer.status}: {answer.headers}")

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(trace) / (time.perf_counter() - begun_s)
