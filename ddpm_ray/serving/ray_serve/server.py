"""A server on a Ray cluster, from its start to its end."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from ddpm_ray.config.jobs.serve import ServeConfig
from ddpm_ray.distributed.connection import connect
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.distributed.signals import Interrupts
from ddpm_ray.serving.ray_serve.application import QUIET, application, named_uris, server_setup
from ddpm_ray.serving.ray_serve.deployments import ServerSetup

log = logging.getLogger(__name__)

APP = "ddpm-ray"


def run_until_signal(config: ServeConfig, model_uri: str, home: Path) -> dict[str, Any]:
    """Serve until the first signal; return what was served. Raises ConfigError, RunFailedError."""
    uris = named_uris(config, model_uri, home)
    setup = server_setup(config, uris, home, config.is_loopback)
    replicas = config.replicas
    connect(config.address, replicas.max * replicas.cpus, replicas.min * replicas.gpus)
    if _is_serving():
        raise RunFailedError(f"this Ray cluster serves {APP} already: end that server first")
    log.info("loading %s", ", ".join(f"{name} ({uri})" for name, uri in setup.uris.items()))
    url = _start(setup)
    who = "this machine alone" if not setup.clients else f"clients {', '.join(setup.clients)}"
    log.info("%s is ready, for %s: the web page, and the API below %sv1", url, who, url)
    log.info("Ctrl-C or SIGTERM ends it, once jobs have ended or %g s are over", config.drain_s)
    with Interrupts(most=1) as signals:
        while not signals.count:
            threading.Event().wait(0.5)  # of the main thread: a signal interrupts no longer wait
        log.info("no more jobs are taken; waiting for those that run")
        left = _stop(config.drain_s)
    return {"url": url, "models": dict(setup.uris), "jobs_cut_off": left}


def _start(setup: ServerSetup) -> str:
    """Start a server on the Ray that is connected, wait until it is ready, and return its URL."""
    config = setup.config
    where = ProxyLocation.HeadOnly if config.is_loopback else ProxyLocation.EveryNode
    options = HTTPOptions(host=config.host, port=config.port)
    try:
        serve.start(proxy_location=where, http_options=options, logging_config=QUIET)
        serve.run(application(setup), name=APP, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[-1] if lines else "Ray Serve gave no reason"  # the error of a process is last
        raise RunFailedError(f"the server did not start: {why}") from error
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}/"


def _stop(drain_s: float) -> int:
    """Refuse new jobs, wait for those that run, end the server; return the jobs that were cut."""
    table = serve.get_deployment_handle("table", APP)
    begun_s = time.monotonic()
    left: int = table.drain.remote(drain_s).result(timeout_s=drain_s + 10)
    log.info("jobs have ended after %.1f s", time.monotonic() - begun_s)
    serve.shutdown()
    return left


def _is_serving() -> bool:
    return ray.is_initialized() and APP in serve.status().applications
