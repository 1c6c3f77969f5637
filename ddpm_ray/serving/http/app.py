"""The web application of a server: OpenAI's image API, jobs, models, health and a web page."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ddpm_ray.serving.http.following import Jobs, TableLostError
from ddpm_ray.serving.http.http_server import HttpServer, HttpSettings, lost_error
from ddpm_ray.serving.http.image_routes import image_routes
from ddpm_ray.serving.http.job_routes import job_routes
from ddpm_ray.serving.http.server_routes import model_routes, page_routes
from ddpm_ray.serving.request_errors import RequestError

log = logging.getLogger(__name__)


def build_app(jobs: Jobs, settings: HttpSettings) -> FastAPI:
    """The application over a job table."""
    # FastAPI's own pages of the API load their scripts from another host.
    app = FastAPI(title="ddpm-ray", docs_url=None, redoc_url=None)
    server = HttpServer(jobs, settings)
    app.include_router(image_routes(server))
    app.include_router(job_routes(server))
    app.include_router(model_routes(server))
    app.include_router(page_routes(server))
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = f"{request.method} {request.url.path}: {error.detail}"
    found = RequestError(problem, status=error.status_code, headers=dict(error.headers or {}))
    return await _refused(request, found)


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, TableLostError):
        return await _refused(request, lost_error())
    log.error("%s %s has failed", request.method, request.url.path, exc_info=error)
    return await _refused(request, RequestError("the server has failed", status=500))
