"""Routes of jobs with an id, which a client may come back to."""

from __future__ import annotations

import asyncio
import contextlib
import re

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ddpm_ray.config.option_fields import shown
from ddpm_ray.serving.http.answers import Answer, job_fields
from ddpm_ray.serving.http.following import OPEN, Followed, patiently, unless_left
from ddpm_ray.serving.http.http_server import HttpServer, order_of
from ddpm_ray.serving.http.schemas import REQUESTS
from ddpm_ray.serving.request_errors import RequestError

JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
MOST_WAIT_S = 300.0
NO_EVENTS = 2**31  # number of an event that no job has: a report without events


def job_routes(server: HttpServer) -> APIRouter:
    """PUT, GET and DELETE /v1/jobs/{id}, and GET of its events."""
    router = APIRouter(prefix="/v1/jobs")

    @router.put("/{job_id}")
    async def put(request: Request, job_id: str) -> Response:
        """Begin a job, or come back to it: the same request has one job, and the same images."""
        client = server.client(request)
        if not JOB_ID.fullmatch(job_id):
            raise RequestError("id has 1 to 128 letters, digits, and then any of _ . : -", "id")
        body = await server.body(request)
        kind = body.values.pop("kind", "generation")
        if not isinstance(kind, str) or kind not in REQUESTS:
            raise RequestError(f"kind is {shown(kind)}; choose from {', '.join(REQUESTS)}", "kind")
        order = order_of(kind, body, f"{client}/{job_id}", is_job=True)
        followed = Followed(server.jobs, (client, job_id), order, is_kept=True)
        await followed.submit()  # it waits for the first event
        answer = Answer(kind, order.request, "", str(request.base_url), is_job=True)
        await followed.first(0.0)
        if order.request.stream:
            return server.streamed(followed, answer)
        return await _job(followed, answer, job_id, 0.0, request)

    @router.get("/{job_id}")
    async def get(request: Request, job_id: str, wait: float = 0.0) -> Response:
        """The state of a job, with its images; waits up to `wait` seconds, at most 300."""
        if not 0 <= wait <= MOST_WAIT_S:
            raise RequestError(f"wait is {wait:g}; it has to be 0 to {MOST_WAIT_S:g} s", "wait")
        followed, answer = await found(request, job_id)
        return await _job(followed, answer, job_id, wait, request)

    @router.get("/{job_id}/events")
    async def events(request: Request, job_id: str) -> Response:
        """All events of a job, from its first one on, until it has ended."""
        followed, answer = await found(request, job_id)
        return server.streamed(followed, answer)

    @router.delete("/{job_id}")
    async def delete(request: Request, job_id: str) -> Response:
        """End a job before its next step; one that has ended is forgotten."""
        key = server.client(request), job_id
        state = await patiently(lambda: server.jobs.cancel(key))
        return JSONResponse({"id": job_id, "object": "job", "status": state})

    async def found(request: Request, job_id: str) -> tuple[Followed, Answer]:
        """A job that is there, and an answer about it."""
        followed = server.followed(server.client(request), job_id)
        report = await patiently(lambda: server.jobs.report(followed.key, NO_EVENTS, 0.0))
        answer = Answer(
            report.kind, report.request, report.secret, str(request.base_url), is_job=True
        )
        return followed, answer

    return router


async def _job(
    followed: Followed, answer: Answer, job_id: str, wait_s: float, request: Request
) -> Response:
    """The state of a job, after up to `wait_s`, with its images if it has ended."""

    async def ended() -> None:
        """Wait for its end."""
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(wait_s),
                contextlib.aclosing(followed.events()) as events,
            ):
                async for _ in events:
                    pass

    if wait_s:
        await unless_left(request, ended())
    report = await patiently(lambda: followed.jobs.report(followed.key, NO_EVENTS, 0.0))
    if report.state not in OPEN:
        report = await patiently(lambda: followed.jobs.report(followed.key, 0, 0.0))
    for event in report.events:
        answer.note(event)
    answer.secret = report.secret
    status = 202 if report.state in OPEN else 200
    return JSONResponse(job_fields(job_id, report, answer), status_code=status)
