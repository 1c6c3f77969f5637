"""Routes of OpenAI's image API."""

from __future__ import annotations

import contextlib
import secrets

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ddpm_ray.serving.http.answers import Answer
from ddpm_ray.serving.http.following import Followed, unless_left
from ddpm_ray.serving.http.http_server import HttpServer, order_of
from ddpm_ray.serving.http.schemas import request_schema
from ddpm_ray.serving.orders import Failed, Kind

ROUTES: dict[str, Kind] = {"generations": "generation", "edits": "edit", "variations": "variation"}


def image_routes(server: HttpServer) -> APIRouter:
    """POST /v1/images/generations, edits and variations."""
    router = APIRouter(prefix="/v1/images")

    def add(path: str, kind: Kind) -> None:
        """Add the route of one kind of request."""

        async def images(request: Request) -> Response:
            """Draw images; the answer has them, or is a stream of events."""
            client = server.client(request)
            order = order_of(kind, await server.body(request))
            key = client, secrets.token_hex(16)
            is_stream = order.request.stream
            followed = Followed(server.jobs, key, order, is_kept=False, until_end=not is_stream)
            answer = Answer(kind, order.request, "", str(request.base_url))
            try:
                await unless_left(request, _begun(followed, answer))
            except BaseException:
                await followed.leave()
                raise
            if is_stream:
                return server.streamed(followed, answer)
            return JSONResponse(answer.images())

        schema = request_schema(kind)
        content = {
            "application/json": {"schema": schema},
            "multipart/form-data": {"schema": schema},
        }
        router.add_api_route(
            f"/{path}",
            images,
            methods=["POST"],
            name=path,
            openapi_extra={"requestBody": {"content": content, "required": True}},
        )

    for path, kind in ROUTES.items():
        add(path, kind)
    return router


async def _begun(followed: Followed, answer: Answer) -> None:
    """Submit a job, and wait until it was accepted or, with `until_end`, has its images.

    Raises the RequestError of a job that was refused or has failed.
    """
    await followed.submit()
    if not followed.until_end:
        await followed.first()
        return
    async with contextlib.aclosing(followed.events()) as events:
        async for event in events:
            answer.note(event)
            if isinstance(event, Failed):
                raise event.error
    answer.secret = followed.secret
