"""The setup that all processes of a server are given."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ddpm_ray.config.jobs.serve import ServeConfig


@dataclass(frozen=True)
class ServerSetup:
    """All that the processes of a server need."""

    config: ServeConfig
    uris: Mapping[str, str]  # of the models, by name; folders are absolute
    clients: Mapping[str, str]  # name -> sha256 of the token
    home: str  # folder of the job, for the default tracking URI
    tracking_uri: str


def start_log() -> None:
    """Log our messages on stderr, which Ray sends to the job."""
    own = logging.getLogger("ddpm_ray")
    if not own.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        own.addHandler(handler)
        own.setLevel(logging.INFO)
