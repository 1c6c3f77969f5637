"""Encode a data set to latents or embeddings with Ray actors, one per GPU or CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import ray
import torch

from ddpm_ray.assembly.newest_checkpoint import usable_device
from ddpm_ray.assembly.set_encoder_loading import set_encoder
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.packing import encoded_packer
from ddpm_ray.data.packing.encoded_packer import EncodedShard, EncodePlan
from ddpm_ray.data.packing.set_encoder import SetEncoder
from ddpm_ray.distributed import connection
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.runs.shard_tasks import as_completed
from ddpm_ray.training import determinism

Progress = Callable[[int, int, str], None]  # images done, images in total, images per second


@dataclass(frozen=True)
class EncodeResult:
    """An encoded set, and how many images this call encoded in which time."""

    dataset: Dataset
    encoded: int = 0
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float | None:
        """The rate, all actors together; None if all shards existed."""
        return self.encoded / self.seconds if self.encoded else None


class EncoderActor:
    """Encodes shards in a process of its own; loads the network once."""

    def __init__(self, url: str, sha256: str, device: str) -> None:
        self._url, self._sha256, self._device = url, sha256, device
        self._encoder: SetEncoder | None = None

    def load(self) -> SetEncoder:
        """Return the network, loaded at the first call; raises DatasetError if it changed.

        The constructor does not load it, since Ray reports errors of constructors in another form.
        """
        if self._encoder is None:
            found = set_encoder(self._url, self._device)
            if found.network.sha256 != self._sha256:
                changed = found.network.sha256
                problem = f"its weights changed while images were being encoded ({changed})"
                raise DatasetError(self._url, problem, "start the job again")
            self._encoder = found
        return self._encoder

    def ready(self) -> None:
        """Load the network, without a result, which Ray would send to the driver."""
        self.load()

    def encode(self, plan: EncodePlan, number: int) -> EncodedShard:
        """Write shard `number`; see encode_shard."""
        with reproducible(self._device):
            return encoded_packer.encode_shard(plan, number, self.load())


def encode_dataset(
    model_url: str,
    data_url: str,
    destination: str,
    config: EncodeConfig,
    on_progress: Progress | None = None,
) -> EncodeResult:
    """Encode the images at `data_url` by the model at `model_url`; a no-op if that was done.

    An autoencoder makes a set of latents at `destination`, an image and text encoder one of
    embeddings. On one kind of machine, the bytes do not depend on the number of actors. An
    interrupted job continues with the shards that exist. A single shard is encoded in this process,
    several by Ray actors at config.address. Raises CheckpointError, ConfigError, DatasetError,
    RunFailedError, ShardCorruptError or StorageError, and then writes no manifest.
    """
    source = open_dataset(data_url)
    encoder = set_encoder(model_url, "cpu")
    plan = encoded_packer.make_encoding_plan(source, destination, encoder, config)
    if (dataset := encoded_packer.find_finished_set(plan)) is not None:
        return EncodeResult(dataset)
    done = encoded_packer.find_all_encoded(plan)
    missing = sorted(set(range(plan.shards)) - {shard.number for shard in done})
    alone = plan.shards == 1
    work = _here(plan, missing, encoder, config) if alone else _on_ray(plan, missing, config)
    started_s, before = time.monotonic(), _images(done)
    if on_progress is not None:
        on_progress(before, source.manifest.samples, "")
    for shard in work:
        done.append(shard)
        rate = (_images(done) - before) / (time.monotonic() - started_s)
        if on_progress is not None:
            on_progress(_images(done), source.manifest.samples, f"{rate:.1f} images/s")
    seconds = time.monotonic() - started_s
    return EncodeResult(encoded_packer.finish_encoded(plan, done), _images(done) - before, seconds)


@contextmanager
def reproducible(device: str) -> Iterator[None]:
    """Make results independent of the number of cores and, on GPUs, of the choice of algorithms.

    On a CPU, results of matrix products depend on the number of threads: each process uses one
    thread, and there is one process per core.
    """
    if device != "cpu":
        for key, value in determinism.environment(deterministic=True).items():
            os.environ.setdefault(key, value)
        determinism.configure()
        torch.backends.cudnn.allow_tf32 = False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _images(shards: list[EncodedShard]) -> int:
    return sum(shard.row.samples for shard in shards)


def _here(
    plan: EncodePlan, numbers: list[int], encoder: SetEncoder, config: EncodeConfig
) -> Iterator[EncodedShard]:
    """Encode shards in this process."""
    device = usable_device("" if config.device == "auto" else config.device)
    encoder.network.model.to(device)
    with reproducible(device.type):
        for number in numbers:
            yield encoded_packer.encode_shard(plan, number, encoder)


def _on_ray(plan: EncodePlan, numbers: list[int], config: EncodeConfig) -> Iterator[EncodedShard]:
    """Yield shards as they are encoded, by one actor for each GPU or CPU."""
    if not numbers:
        return
    connection.connect(config.address)
    found = ray.cluster_resources()
    gpus = 0 if config.device == "cpu" else int(found.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise RunFailedError("device is cuda, but the Ray cluster has no GPU; use device=cpu")
    most = gpus or max(1, int(found.get("CPU", 1)))
    actors = min(config.num_workers or most, most, len(numbers))
    options = {"num_cpus": 1, "num_gpus": min(gpus, 1), "max_restarts": 3, "max_task_retries": 3}
    kind = ray.remote(**options)(EncoderActor)
    arguments = plan.network, plan.network_sha256, "cuda" if gpus else "cpu"
    shared = ray.put(plan)
    starting = {}
    for _ in range(actors):
        actor = kind.remote(*arguments)
        starting[actor.ready.remote()] = partial(actor.encode.remote, shared)
    yield from as_completed(numbers, (), starting)
