"""Parts that the routes of a server share: client, order, and the stream of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ddpm_ray.serving.http.access import Access
from ddpm_ray.serving.http.answers import Answer, sse
from ddpm_ray.serving.http.bodies import Body, announced_bytes, read_body
from ddpm_ray.serving.http.following import Followed, Jobs, TableLostError, table_lost
from ddpm_ray.serving.http.schemas import REQUESTS
from ddpm_ray.serving.image_requests import UPLOADS, of_form, parsed_request
from ddpm_ray.serving.orders import ImageOrder, Kind
from ddpm_ray.serving.request_errors import RequestError

SEEDS = 2**31  # of requests without a seed; a client that knows it repeats the images
MOST_BODIES = 256 * 2**20  # bytes of the bodies that are read at once; other requests wait
SMALL_BODY = 2**16  # bytes
QUIET_S = 15.0  # a stream without events has a comment so often, so that no proxy ends it


@dataclass(frozen=True)
class HttpSettings:
    """Limits of the HTTP interface, and who may use it."""

    access: Access = field(default_factory=Access)
    max_body: int = 20 * 2**20  # bytes
    max_body_s: float = 30.0  # in which a body has to come


class HttpServer:
    """Jobs and settings of a server, and what its routes do alike."""

    def __init__(self, jobs: Jobs, settings: HttpSettings) -> None:
        self.jobs, self.settings = jobs, settings
        self._reading = asyncio.Semaphore(max(1, MOST_BODIES // settings.max_body))

    def client(self, request: Request) -> str:
        """The client of a request. Raises RequestError."""
        return self.settings.access.client(request)

    async def body(self, request: Request) -> Body:
        """The body of a request. Raises RequestError.

        Large ones wait for others: their sum is bounded. Small ones do not, whoever sends slowly.
        """
        is_small = 0 < announced_bytes(request) <= SMALL_BODY
        async with contextlib.nullcontext() if is_small else self._reading:
            return await read_body(request, self.settings.max_body, self.settings.max_body_s)

    def followed(self, client: str, job_id: str) -> Followed:
        """A job that is there."""
        return Followed(self.jobs, (client, job_id), None, is_kept=True)

    def streamed(self, followed: Followed, answer: Answer) -> Response:
        """Server-sent events of a job, once it has been accepted."""
        return StreamingResponse(
            self._stream(followed, answer),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _stream(self, followed: Followed, answer: Answer) -> AsyncGenerator[str, None]:
        try:
            async for text in _with_comments(_texts(followed, answer)):
                yield text
        except (RequestError, TableLostError) as error:
            problem = error if isinstance(error, RequestError) else table_lost()
            yield sse("error", problem.body())
        finally:
            await followed.leave()


def order_of(kind: Kind, body: Body, seed_text: str = "", *, is_job: bool = False) -> ImageOrder:
    """The order of a request. Raises RequestError.

    If it has no seed, its seed is a hash of `seed_text`, or is drawn where that is empty. With the
    client and id of a job as text, a job that is submitted again draws the same images.
    """
    needed, possible = UPLOADS[kind]
    for name in needed:
        if name not in body.files:
            raise RequestError(f"{name} is missing", name)
    for name in body.files:
        if name not in possible:
            raise RequestError(f"there is no field {name} in a {kind}", name)
    values = of_form(REQUESTS[kind], body.values) if body.is_form else body.values
    request, settings = parsed_request(REQUESTS[kind], values, is_job=is_job)
    if "seed" not in settings:
        digest = hashlib.sha256(seed_text.encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") if seed_text else secrets.randbits(64)
        settings["seed"] = drawn % SEEDS
    return ImageOrder(kind, request, settings, body.files.get("image"), body.files.get("mask"))


async def _texts(followed: Followed, answer: Answer) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(followed.events()) as events:
        async for event in events:
            answer.secret = followed.secret
            answer.note(event)
            for text in answer.stream_events(event):
                yield text


async def _with_comments(texts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Yield the texts, and a comment where none came for QUIET_S."""
    async with contextlib.aclosing(texts):
        coming = asyncio.ensure_future(anext(texts, None))
        try:
            while True:
                done, _ = await asyncio.wait([coming], timeout=QUIET_S)
                if not done:
                    yield ": waiting\n\n"
                    continue
                if (text := coming.result()) is None:
                    return
                yield text
                coming = asyncio.ensure_future(anext(texts, None))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
