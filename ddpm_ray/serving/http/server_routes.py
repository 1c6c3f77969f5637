"""Routes of the server itself: models, tools, files, health, metrics and the web page."""

from __future__ import annotations

import asyncio
from importlib import resources

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ddpm_ray.serving.http.following import TableLostError, patiently
from ddpm_ray.serving.http.http_server import HttpServer
from ddpm_ray.serving.http.schemas import chat_tools
from ddpm_ray.serving.request_errors import RequestError, unknown_model

READY_S = 5.0  # the job table answers within this time, or the server is not ready
MEDIA = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
FOLDER = resources.files("ddpm_ray.serving.http").joinpath("page")
PAGE = {file.name for file in FOLDER.iterdir() if file.name.rpartition(".")[2] in MEDIA}


def model_routes(server: HttpServer) -> APIRouter:
    """Routes of models, tools of chat models, and images of finished jobs."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        """The models, with what they draw and take."""
        server.client(request)
        return JSONResponse({"object": "list", "data": await patiently(server.jobs.models)})

    @router.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        """One of them."""
        server.client(request)
        known = {facts["id"]: facts for facts in await patiently(server.jobs.models)}
        if name not in known:
            raise unknown_model(name, known)
        return JSONResponse(known[name])

    @router.get("/v1/tools")
    async def tools(request: Request) -> Response:
        """Tools for chat models: generate_image and edit_image, as JSON schemas."""
        server.client(request)
        return JSONResponse(chat_tools())

    @router.get("/v1/files/{secret}/{name}")
    async def file(secret: str, name: str) -> Response:
        """An image of a finished job; whoever has its URL may read it."""
        data = await patiently(lambda: server.jobs.file(secret, name))
        kind = name.rpartition(".")[2]
        return Response(data, media_type=f"image/{kind}", headers={"Cache-Control": "private"})

    return router


def page_routes(server: HttpServer) -> APIRouter:
    """Routes of health, metrics, and the web page."""
    router = APIRouter()

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counts of jobs, in Prometheus' format."""
        server.client(request)
        return PlainTextResponse(await patiently(server.jobs.metrics_text))

    @router.get("/healthz")
    async def health() -> Response:
        """Whether this process answers."""
        return JSONResponse({"status": "ok"})

    @router.get("/readyz")
    async def ready() -> Response:
        """Whether jobs are taken: 200, or 503 while models are loaded and while the server ends."""
        try:
            async with asyncio.timeout(READY_S):
                is_ready = await server.jobs.is_ready()
        except (TimeoutError, TableLostError, RequestError):
            is_ready = False
        state = {"status": "ready" if is_ready else "not ready"}
        return JSONResponse(state, status_code=200 if is_ready else 503)

    @router.get("/{name}")
    async def page(name: str) -> Response:
        """The web page."""
        if name not in PAGE:
            raise HTTPException(404)
        return _page_file(name)

    router.add_api_route("/healthz", health, methods=["HEAD"], include_in_schema=False)
    router.add_api_route(
        "/", lambda: _page_file("index.html"), methods=["GET", "HEAD"], include_in_schema=False
    )
    return router


def _page_file(name: str) -> Response:
    text = FOLDER.joinpath(name).read_text("utf-8")
    policy = (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
        "base-uri 'none'; form-action 'self'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",  # a newer server has a newer page
    }
    return Response(text, media_type=MEDIA[name.rpartition(".")[2]], headers=headers)
