"""Options of the job serve: models, the HTTP interface, limits, and processes on the cluster."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.option_fields import option

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class BatchConfig:
    """Batches of network calls, which all jobs of a model share."""

    width: int = option(
        0, "most rows of a network call; 0: measured when the model is loaded", at_least=0
    )
    most_width: int = option(32, "width=0: the largest width that is tried", at_least=1)
    exact: bool = option(
        False,
        "all calls have `width` rows: images have equal bits whoever shares a batch, and a job "
        "alone takes as long as `width` of them",
    )
    max_images: int = option(
        64, "images of the jobs that run at once in a process; other jobs wait", at_least=1
    )


@dataclass(frozen=True)
class LimitsConfig:
    """Largest requests, and the work that is accepted."""

    max_queued_s: float = option(
        60, "accepted work of a process, in seconds at its measured rate; more is refused", above=0
    )
    max_job_s: float = option(
        600, "seconds of one request at that rate; a longer one is an error", above=0
    )
    max_steps: int = option(1000, "sampling steps of a request", at_least=1)
    max_pixels: int = option(4_194_304, "pixels of an uploaded image or mask", at_least=1)
    max_body_mb: float = option(20, "megabytes of a request", above=0)
    client_megapixels_per_s: float = option(
        0,
        "megapixels of network calls a second for each token, in the long run; 0: no limit",
        at_least=0,
    )
    client_burst_s: float = option(
        60, "client_megapixels_per_s: seconds of it that a client may use at once", above=0
    )
    kept_s: float = option(3600, "seconds for which finished images can be read again", above=0)
    kept_mb: float = option(
        256, "megabytes of finished images; beyond it the oldest are forgotten", above=0
    )


@dataclass(frozen=True)
class ReplicasConfig:
    """Processes that draw, on Ray Serve."""

    min: int = option(1, "processes at any time", at_least=1)
    max: int = option(1, "processes while much work waits", at_least=1)
    target_queued_s: float = option(
        10,
        "max above min: accepted seconds of work of a process that more are started for",
        above=0,
    )
    cpus: float = option(1, "CPUs and torch threads of a process", above=0)
    gpus: float = option(0, "GPUs of a process; above 0: the models are on CUDA", at_least=0)
    stall_timeout_s: float = option(
        300, "seconds of one network call after which a process is replaced", above=0
    )


@dataclass(frozen=True)
class ServeConfig:
    """A server of trained models."""

    name: str = option(
        "", "name of the model in requests; empty: that of its run or of its registered model"
    )
    more_models: tuple[str, ...] = option(
        (), "further models, as [NAME=MODEL_URI,...]; requests choose one by its name"
    )
    host: str = option(
        "127.0.0.1", "address to listen on; other than loopback needs $DDPM_RAY_TOKENS"
    )
    port: int = option(8000, "port to listen on", at_least=1, at_most=65535)
    registry_every_s: float = option(
        30,
        "seconds between looks at models:/<name>@<alias>, which is followed as it moves",
        above=0,
    )
    drain_s: float = option(
        60, "seconds in which running jobs may end after SIGTERM or Ctrl-C", at_least=0
    )
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")
    batch: BatchConfig = field(default_factory=BatchConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)

    def problems(self) -> Iterator[str]:
        """Yield a line for each wrong name and combination."""
        names = [self.name] if self.name else []
        for item in self.more_models:
            name, equals, uri = item.partition("=")
            if not (equals and uri):
                yield f"more_models has {item!r}; write NAME=MODEL_URI"
            names.append(name)
        for name in names:
            if not NAME.fullmatch(name):
                yield f"name is {name!r}; take at most 64 letters, digits, and any of _ . -"
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"more_models: {name} is the name of two models"
        if self.replicas.max < self.replicas.min:
            yield (
                f"replicas.max is {self.replicas.max}; it must be at least replicas.min, "
                f"{self.replicas.min}"
            )
        if self.batch.exact and not self.batch.width:
            yield "batch.exact needs batch.width: the bits depend on it, and a measured one varies"

    @property
    def is_loopback(self) -> bool:
        """Whether other machines cannot reach the server."""
        return self.host in LOOPBACK
