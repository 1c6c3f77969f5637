"""The application of a server: for the job serve, `serve deploy`, and KubeRay's RayService."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from ddpm_ray.config.jobs.serve import ReplicasConfig, ServeConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.runs.model_sources import ModelSources
from ddpm_ray.serving.http.access import clients_of
from ddpm_ray.serving.ray_serve.autoscaling import QueuePolicy
from ddpm_ray.serving.ray_serve.deployments import ApiReplica, EngineReplica, TableReplica
from ddpm_ray.serving.ray_serve.server_setup import ServerSetup
from ddpm_ray.tracking.model_uri import resolve_model_uri, shown_name
from ddpm_ray.tracking.tracking_uri import resolve_tracking_uri

TOKENS = "DDPM_RAY_TOKENS"
MOST_REQUESTS = 10_000  # at once, of a process: the job table bounds them
HEALTH_S = 2.0  # Ray Serve looks for lost processes so often; its default is 10 s
STARTS = 3  # of a process that fails before it is ready; a replaced one is tried again later
EXIT_S = 10.0  # a process has so long to end after its jobs
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def build(args: Mapping[str, Any]) -> Application:
    """The application of a config of Ray Serve, whose `args` are `model_uri` and `options`.

    `options` are those of the job serve, as key=value; those of its own start (host, port, address)
    are the config's and have no effect. Raises ConfigError, also without $DDPM_RAY_TOKENS: Ray
    Serve says nothing of who can reach it.
    """
    if unknown := sorted(set(args) - {"model_uri", "options"}):
        raise ConfigError(f"args has {unknown[0]}; it has model_uri and options")
    if not args.get("model_uri"):
        raise ConfigError("args.model_uri is empty: name a model")
    config = load_config(ServeConfig, None, list(args.get("options", [])))
    home = Path.cwd()
    uris = named_uris(config, args["model_uri"], home)
    return application(server_setup(config, uris, home, is_local=False))


def named_uris(config: ServeConfig, model_uri: str, home: Path) -> dict[str, str]:
    """The URIs of all models by name, folders made absolute. Raises ConfigError."""
    uri = resolve_model_uri(model_uri, home)
    uris = {config.name or shown_name(uri): uri}
    for item in config.more_models:
        name, _, other = item.partition("=")
        if name in uris:
            raise ConfigError(f"more_models: {name} is the name of two models: set name")
        uris[name] = resolve_model_uri(other, home)
    return uris


def server_setup(
    config: ServeConfig, uris: Mapping[str, str], home: Path, is_local: bool
) -> ServerSetup:
    """Return what the processes of a server need; `is_local`: other machines cannot reach it.

    The folder of a run stands for its newest checkpoint now, so that all processes serve the same;
    names in the registry are followed. Raises ConfigError, and what ModelSources does.
    """
    try:
        clients = clients_of(os.environ.get(TOKENS, ""))
    except ValueError as error:
        raise ConfigError(f"${TOKENS}: {error}") from error
    if not clients and not is_local:
        raise ConfigError(
            f"${TOKENS} is empty, and other machines can reach the server: set it to "
            f"NAME=TOKEN,..., with tokens as `openssl rand -hex 32` makes them"
        )
    tracking_uri = resolve_tracking_uri(home)
    sources = ModelSources(home, tracking_uri)
    for uri in uris.values():  # here, in seconds: a process that fails is started again and again
        sources.require_drawable(uri)
    pinned = {name: sources.pinned(uri) for name, uri in uris.items()}
    return ServerSetup(config, pinned, clients, str(home), tracking_uri)


def application(setup: ServerSetup) -> Application:
    """The application of a server, for Ray Serve."""
    replicas, drain_s = setup.config.replicas, setup.config.drain_s
    common = {
        "max_ongoing_requests": MOST_REQUESTS,
        "health_check_period_s": HEALTH_S,
        "logging_config": QUIET,
    }
    light = {
        "num_replicas": 1,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": drain_s + EXIT_S,
        **common,
    }
    engine = serve.deployment(EngineReplica, name="engine").options(
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        # One that autoscaling removes takes no more jobs, and ends once its longest has ended.
        graceful_shutdown_timeout_s=setup.config.limits.max_job_s + EXIT_S,
        max_constructor_retry_count=STARTS,
        **_replicas(replicas),
        **common,
    )
    table = serve.deployment(TableReplica, name="table").options(**light)
    api = serve.deployment(serve.ingress()(ApiReplica), name="api").options(**light)
    return api.bind(setup, table.bind(setup, engine.bind(setup)))


def _replicas(config: ReplicasConfig) -> dict[str, object]:
    if config.min == config.max:
        return {"num_replicas": config.min}
    policy = AutoscalingPolicy(
        policy_function=QueuePolicy, policy_kwargs={"target_s": config.target_queued_s}
    )
    scaling = AutoscalingConfig(
        min_replicas=config.min,
        max_replicas=config.max,
        upscale_delay_s=5,
        downscale_delay_s=120,
        policy=policy,
    )
    return {"autoscaling_config": scaling}
