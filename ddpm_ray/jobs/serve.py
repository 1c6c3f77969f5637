"""Serve trained models over HTTP: images, edits and variations, and a web page.

    ddpm-ray serve MODEL_URI [key=value ...]
    python jobs/serve.py MODEL_URI [key=value ...]

The API is that of OpenAI's images (POST /v1/images/generations, edits, variations) and of jobs with
an id (/v1/jobs/ID); the web page is at /. MODEL_URI may also be the folder of a cascade. A name in
MLflow's registry, models:/NAME@ALIAS, is followed as it moves.
The server listens on this machine alone and asks for no token. With other values of `host` it needs
DDPM_RAY_TOKENS=NAME=TOKEN,... in the environment, and serves those who send one of these tokens.
Ctrl-C or SIGTERM: it takes no more jobs, those that run may end, and then it ends.
"""

from argparse import Namespace
from typing import Any

from ddpm_ray.cli.job import Job
from ddpm_ray.cli.paths import home_folder
from ddpm_ray.config.jobs.serve import ServeConfig
from ddpm_ray.config.reading.errors import ConfigError
from ddpm_ray.jobs.model_argument import MODEL_URI


def prepare(config: ServeConfig, arguments: Namespace) -> ServeConfig:
    """Make the URI of the model absolute. Raises ConfigError."""
    from ddpm_ray.tracking.model_uri import resolve_model_uri  # fsspec: after the config is read

    arguments.model_uri = resolve_model_uri(arguments.model_uri, home_folder())
    return config


def serve(config: ServeConfig, arguments: Namespace) -> dict[str, Any]:
    """Serve until the first signal; return what was served."""
    try:
        from ddpm_ray.serving.ray_serve import server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ddpm_ray"):
            raise
        raise ConfigError(
            f"serving needs the package {error.name}: pip install 'ddpm-ray[serve]'"
        ) from error
    return server.run_until_signal(config, arguments.model_uri, home_folder())


JOB = Job("serve", __doc__ or "", ServeConfig, serve, (MODEL_URI,), prepare)
