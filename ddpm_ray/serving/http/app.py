"""The web application of a server: OpenAI's image API, jobs, models, health and a web page."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ddpm_ray.serving.http.following import Jobs, TableLostError, table_lost
from ddpm_ray.serving.http.http_server import HttpServer, HttpSettings
from ddpm_ray.serving.http.image_routes import image_routes
from ddpm_ray.serving.http.job_routes import job_routes
from ddpm_ray.serving.http.server_routes import model_routes, page_routes
from ddpm_ray.serving.request_errors import RequestError, server_error

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
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.add_exception_handler(TableLostError, _lost)
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


async def _wrong_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return await _refused(request, RequestError(f"{name}: {first['msg']}", name))


async def _lost(request: Request, _: Exception) -> Response:
    return await _refused(request, table_lost())


async def _failed(request: Request, error: Exception) -> Response:
    what = f"{request.method} {request.url.path!a} has failed"
    return await _refused(request, server_error(log, what, error))
