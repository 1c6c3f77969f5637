"""A server on a Ray cluster, from its start to its end."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation

from ddpm_ray.config.jobs.serve import ServeConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.distributed.connection import connect
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.distributed.signals import Interrupts
from ddpm_ray.redaction import counted
from ddpm_ray.serving.ray_serve.application import QUIET, application, named_uris, server_setup
from ddpm_ray.serving.ray_serve.server_setup import ServerSetup

log = logging.getLogger(__name__)

APP = "ddpm-ray"
# Ray Serve gives its proxy 5 s to start; on a busy machine that took longer, and the start failed.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
ANSWER_S = 10.0  # the job table answers within this time


def run_until_signal(config: ServeConfig, model_uri: str, home: Path) -> dict[str, Any]:
    """Serve until the first signal; return what was served. Raises ConfigError, RunFailedError."""
    uris = named_uris(config, model_uri, home)
    setup = server_setup(config, uris, home, config.is_loopback)
    _require_port(config)
    replicas = config.replicas
    connect(
        config.address,
        replicas.max * replicas.cpus,
        replicas.min * replicas.gpus,
        options=("address", "replicas.gpus"),
    )
    is_ours = _require_free(config)
    log.info("loading %s", ", ".join(f"{name} ({uri})" for name, uri in setup.uris.items()))
    try:
        url = start_server(setup)
        who = "this machine alone" if not setup.clients else f"clients {', '.join(setup.clients)}"
        log.info("%s is ready, for %s: the web page, and the API below %sv1", url, who, url)
        log.info("Ctrl-C or SIGTERM ends it, once jobs have ended or %g s are over", config.drain_s)
        with Interrupts(most=1) as signals:
            while not signals.count:
                threading.Event().wait(0.5)  # a signal interrupts no longer wait here
            log.info("no more jobs are taken; those that run have %g s to end", config.drain_s)
            left = drain_server(config.drain_s)
    finally:  # a Ray that others use would serve on
        serve.delete(APP)
        if is_ours:
            serve.shutdown()
    return {"url": url, "models": dict(setup.uris), "jobs_cut_off": left}


def _require_port(config: ServeConfig) -> None:
    """Raise ConfigError where another program listens at the address of a local server."""
    if config.address or os.environ.get("RAY_ADDRESS"):
        return  # its proxies run on other machines
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"port is {config.port}, and {config.host} cannot listen there ({reason}): take another"
        ) from error


def _require_free(config: ServeConfig) -> bool:
    """Raise RunFailedError where this Ray serves already; return whether Ray Serve is to start.

    Ray Serve has one address for all applications of a cluster, that of its first start.
    """
    status = serve.status()
    if APP in status.applications:
        raise RunFailedError(
            f"this Ray cluster serves {APP} already: end that job, or `serve delete {APP}`"
        )
    if status.proxies and config.is_loopback:
        raise RunFailedError(
            f"host is {config.host}, and Ray Serve runs on this cluster already, at an address of "
            f"its own: give that as host and port, with tokens, or end it by `serve shutdown`"
        )
    return not status.proxies


def start_server(setup: ServerSetup) -> str:
    """Start a server on the Ray that is connected, wait until it is ready, and return its URL."""
    config = setup.config
    where = ProxyLocation.HeadOnly if config.is_loopback else ProxyLocation.EveryNode
    options = HTTPOptions(host=config.host, port=config.port)
    try:
        serve.start(proxy_location=where, http_options=options, logging_config=QUIET)
        serve.run(application(setup), name=APP, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        raise RunFailedError(f"the server did not start: {_reason(error)}") from error
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}/"


def _reason(error: RuntimeError) -> str:
    """The error of the process that did not start: the last line of what Ray Serve knows of it."""
    application = serve.status().applications.get(APP)
    deployments = application.deployments.values() if application else ()
    texts = [one.message for one in deployments if "Traceback" in one.message] or [str(error)]
    lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
    return lines[-1] if lines else "Ray Serve gave no reason"


def drain_server(drain_s: float) -> int | None:
    """Refuse new jobs, wait for those that run, end the rest; return their number, if known."""
    begun_s = time.monotonic()
    try:
        table = serve.get_deployment_handle("table", APP)
        left: int = table.drain.remote(drain_s).result(timeout_s=drain_s + ANSWER_S)
    except (RayError, TimeoutError) as error:
        log.warning("the job table does not answer (%s); its jobs are lost", type(error).__name__)
        return None
    took_s = time.monotonic() - begun_s
    log.info("%s cut off, after %.1f s", counted(left, "job"), took_s)
    return left
