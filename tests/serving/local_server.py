"""A server in this process: HTTP on a free port of loopback, a job table and an engine, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn

from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.serving.engine_settings import EngineSettings
from ddpm_ray.serving.http.app import build_app
from ddpm_ray.serving.http.http_server import HttpSettings
from ddpm_ray.serving.image_service import ImageService, ServiceSettings
from ddpm_ray.serving.job_table import JobTable
from ddpm_ray.serving.limits import TokenBucket
from ddpm_ray.serving.order_runner import OrderRunner
from ddpm_ray.serving.orders import Draw
from ddpm_ray.serving.served_models import ServedModels
from ddpm_ray.serving.table_settings import TableSettings
from tests.limits import ENDS_S


class Loaded:
    """A loader of models that are there; `moves` gives other sources to their names."""

    def __init__(self, models: Mapping[str, DrawingModel]) -> None:
        self.models = dict(models)
        self.moves: dict[str, str] = {}

    def source(self, uri: str) -> str:
        return self.moves.get(uri, uri)

    def load(self, source: str) -> DrawingModel:
        return self.models[source]


def served(models: Mapping[str, DrawingModel], **engine: Any) -> ServedModels:
    """The models by name, each its own source."""
    return ServedModels({name: name for name in models}, Loaded(models), EngineSettings(**engine))


class LocalJobs(JobTable):
    """A job table with the models that are served."""

    models_by_name: ServedModels

    async def models(self) -> list[dict[str, Any]]:
        return [one.facts for one in self.models_by_name.current]

    async def is_ready(self) -> bool:
        return not self.is_draining

    async def metrics_text(self) -> str:
        return self.metrics.text()


@contextlib.contextmanager
def local_server(
    models: ServedModels,
    *,
    http: HttpSettings | None = None,
    service: ServiceSettings | None = None,
    table: TableSettings | None = None,
    buckets: Mapping[str, TokenBucket] | None = None,
    draw: Callable[[Draw], Draw] = lambda draw: draw,
) -> Iterator[tuple[str, LocalJobs]]:
    """Yield the URL and the job table of a server of these models."""
    runner = OrderRunner(ImageService(models, service))
    jobs = LocalJobs(draw(runner.draw), table or TableSettings(), buckets)
    jobs.models_by_name = models
    app = build_app(jobs, http or HttpSettings())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
        )
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/", jobs
        finally:
            server.should_exit = True
            models.close()
            thread.join(ENDS_S)
