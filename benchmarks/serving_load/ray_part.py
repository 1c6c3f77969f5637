"""Our server and deployments with `@serve.batch`, on one local Ray, over HTTP."""

import asyncio
import base64
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# On a busy machine the proxy takes longer to start than Ray Serve waits by default, 5 s.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")

import ray
import torch
from ray import serve
from starlette.requests import Request

from benchmarks.serving_load.contestants import BATCH_WAIT_S, WIDTH, drawn_together, grouped
from benchmarks.serving_load.http_client import closed_loop, open_loop
from benchmarks.serving_load.models import untrained_run
from benchmarks.serving_load.table import Row, percentile
from benchmarks.serving_load.traffic import Arrival, backlog, offered_trace
from ddpm_ray.assembly import checkpoint_loading
from ddpm_ray.config.jobs.serve import BatchConfig, LimitsConfig, ServeConfig
from ddpm_ray.distributed.connection import connect
from ddpm_ray.serving.image_files import encoded_image
from ddpm_ray.serving.ray_serve.server import drain_server, start_server
from ddpm_ray.serving.ray_serve.server_setup import ServerSetup

PORT = 18_600
CLIENTS = 3 * WIDTH  # so that requests always wait for the next batch
LOAD = 0.8
PEERS = {"batch, largest steps": False, "batch, equal steps": True}


def count_images(arrivals: list[Arrival]) -> int:
    """The size of a batch, for Ray Serve."""
    return sum(one.images for one in arrivals)


class Batched:
    """A deployment as the documentation of `@serve.batch` has it."""

    def __init__(self, folder: str, by_steps: bool) -> None:
        torch.set_num_threads(1)
        self._model = checkpoint_loading.trained_model(folder)
        self._by_steps = by_steps

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=WIDTH, batch_wait_timeout_s=BATCH_WAIT_S, batch_size_fn=count_images
    )
    async def images(self, arrivals: list[Arrival]) -> list[list[str]]:
        """PNG files of each request, in base64."""
        drawn = (grouped if self._by_steps else drawn_together)(self._model, arrivals)
        return [
            [base64.b64encode(encoded_image(image, "png", {})).decode() for image in images]
            for images in drawn
        ]

    async def __call__(self, request: Request) -> dict[str, Any]:
        fields = await request.json()
        arrival = Arrival(0.0, fields["n"], fields["steps"], fields["seed"])
        return {"data": [{"b64_json": file} for file in await self.images(arrival)]}


@contextlib.contextmanager
def servers(name: str) -> Iterator[dict[str, str]]:
    """The URLs of ours and of the peers."""
    with tempfile.TemporaryDirectory() as home:
        folder = untrained_run(name, Path(home) / "run")
        connect("", cpus=4)
        config = ServeConfig(
            port=PORT,
            batch=BatchConfig(width=WIDTH),
            limits=LimitsConfig(max_queued_s=1e4),
        )
        setup = ServerSetup(config, {name: folder}, {}, home, f"sqlite:///{home}/mlflow.db")
        try:
            urls = {"ours": f"{start_server(setup)}v1/images/generations"}
            for number, (peer, by_steps) in enumerate(PEERS.items()):
                deployment = serve.deployment(Batched).options(max_ongoing_requests=1000)
                path = f"/peer{number}"
                serve.run(deployment.bind(folder, by_steps), name=path[1:], route_prefix=path)
                urls[peer] = f"http://127.0.0.1:{PORT}{path}"
            yield urls
            drain_server(1.0)
            serve.shutdown()
        finally:
            ray.shutdown()


def ray_rows(name: str, rounds: int, seconds: float) -> list[Row]:
    """Throughput and latency over HTTP; see arrivals_part.py."""
    with servers(name) as urls:
        for url in urls.values():
            asyncio.run(closed_loop(url, backlog(WIDTH, 0), WIDTH))
        rates: dict[str, list[float]] = {one: [] for one in urls}
        tails: dict[str, list[list[float]]] = {one: [] for one in PEERS}
        for number in range(rounds):
            for one, url in urls.items():
                trace = backlog(4 * CLIENTS, number)
                rates[one].append(asyncio.run(closed_loop(url, trace, CLIENTS)))
            for peer in PEERS:
                offered = offered_trace(LOAD * rates[peer][-1], seconds, number)
                tails[peer].append([p95_s(urls[one], offered) for one in ("ours", peer)])
    rows = [Row(f"{one}: saturation", rates[one], unit="requests/s") for one in urls]
    for peer, pairs in tails.items():
        goal = (1.3, 0.7) if peer == "batch, largest steps" else (None, None)
        gains = [own / its for own, its in zip(rates["ours"], rates[peer], strict=True)]
        rows += [
            Row(f"throughput, ours / {peer}", gains, at_least=goal[0]),
            Row(
                f"p95 at {LOAD:g} of its saturation, ours / it", [a / b for a, b in pairs], goal[1]
            ),
            Row("  ours", [a for a, _ in pairs], unit="s"),
            Row(f"  {peer}", [b for _, b in pairs], unit="s"),
        ]
    return rows


def p95_s(url: str, trace: list[Arrival]) -> float:
    answers = [answer for _, answer in asyncio.run(open_loop(url, trace))]
    if wrong := [one for one in answers if one.status != 200]:
        raise RuntimeError(f"{len(wrong)} requests failed: {wrong[0]}")
    return percentile([one.seconds for one in answers], 95)
