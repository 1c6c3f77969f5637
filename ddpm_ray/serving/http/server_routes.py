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
from ddpm_ray.serving.request_errors import RequestError

READY_S = 5.0  # the job table answers within this time, or the server is not ready
PAGE = (
    "index.html",
    "page.css",
    "api.js",
    "drawing.js",
    "editor.js",
    "elements.js",
    "form.js",
    "history.js",
    "image-files.js",
    "job.js",
    "margins.js",
    "models.js",
    "page.js",
    "painting.js",
    "picture.js",
    "progress.js",
    "result.js",
)
MEDIA = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


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
        for facts in await patiently(server.jobs.models):
            if facts["id"] == name:
                return JSONResponse(facts)
        raise RequestError(f"there is no model {name!r}", "model", status=404)

    @router.get("/v1/tools")
    async def tools(request: Request) -> Response:
        """Tools for chat models: generate_image and edit_image, as JSON schemas."""
        server.client(request)
        return JSONResponse(chat_tools())

    @router.get("/v1/files/{secret}/{name}")
    async def file(secret: str, name: str) -> Response:
        """An image of a finished job; whoever has its URL may read it."""
        index, _, suffix = name.partition(".")
        if not index.isdecimal() or len(index) > 4:
            raise RequestError("there is no such image", status=404)
        data, made = await patiently(lambda: server.jobs.file(secret, int(index)))
        if suffix != made:
            raise RequestError("there is no such image", status=404)
        return Response(data, media_type=f"image/{made}", headers={"Cache-Control": "private"})

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
    text = resources.files("ddpm_ray.serving.http").joinpath("page", name).read_text("utf-8")
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
