"""Lanes and shuffle window of a run: those that it began with, or defaults for its workers."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ddpm_ray.config.data import DataConfig
from ddpm_ray.config.run import RunConfig

LANES = 8  # by default, where they are enough for all workers
WINDOW_SAMPLES = 8192
WINDOW_BYTES_PER_WORKER = 2**30  # of the default window; large images get fewer samples


def continued(config: RunConfig, begun: RunConfig) -> RunConfig:
    """`config` with the order of `begun`, the run that it continues, where it sets none."""
    data, then = config.data, begun.data
    if data.lanes is None:
        data = replace(data, lanes=then.lanes)
    if not _has_window(data):
        data = replace(
            data,
            shuffle_window_samples=then.shuffle_window_samples,
            shuffle_window_bytes=then.shuffle_window_bytes,
        )
    return replace(config, data=data)


def settled(config: RunConfig, sample_bytes: int) -> RunConfig:
    """`config` with default lanes and window where it has none, as stored at a run's first start.

    `sample_bytes`: of a decoded sample.
    """
    data, workers = config.data, config.cluster.num_workers
    if data.lanes is None:
        data = replace(data, lanes=default_lanes(config.training.global_batch_size, workers))
    if not _has_window(data):
        data = replace(data, shuffle_window_samples=default_window(sample_bytes, workers))
    return replace(config, data=data)


def default_lanes(global_batch_size: int, workers: int) -> int:
    """LANES if they are enough for the workers and divide the batch.

    Otherwise the least multiple of `workers` from LANES on that divides the batch; `workers` if
    there is none.
    """
    if workers <= LANES and global_batch_size % LANES == 0:
        return LANES
    first = workers * math.ceil(LANES / workers)
    several = range(first, global_batch_size + 1, workers)
    return next((lanes for lanes in several if global_batch_size % lanes == 0), workers)


def default_window(sample_bytes: int, workers: int) -> int:
    """Samples of the default shuffle window of all workers together."""
    return min(WINDOW_SAMPLES, max(1, workers * WINDOW_BYTES_PER_WORKER // sample_bytes))


def window_samples(config: DataConfig, sample_bytes: int) -> int:
    """Samples of the shuffle window; `sample_bytes` are those of a decoded sample."""
    if config.shuffle_window_samples is not None:
        return config.shuffle_window_samples
    if config.shuffle_window_bytes is not None:
        return config.shuffle_window_bytes // sample_bytes
    return default_window(sample_bytes, 1)


def provenance(config: DataConfig) -> dict[str, Any]:
    """The facts on which the choice of images depends; those of earlier runs are as they were."""
    if config.shuffle_window_samples is None:
        return {"lanes": config.lanes, "shuffle_window_bytes": config.shuffle_window_bytes}
    return {"lanes": config.lanes, "shuffle_window_samples": config.shuffle_window_samples}


def lane_warnings(config: RunConfig) -> Iterator[str]:
    """Yield a line if lanes are so few that workers read the same shards."""
    lanes, workers = config.data.lanes, config.cluster.num_workers
    if lanes is not None and lanes < workers:
        yield (
            f"data.lanes is {lanes} and cluster.num_workers is {workers}: {workers} / {lanes} = "
            f"{workers / lanes:.3g} of them read each shard, and each node that has one of these "
            f"downloads it; lanes stay for a run's life, a new run without data.lanes takes "
            f"{default_lanes(config.training.global_batch_size, workers)}"
        )


def _has_window(data: DataConfig) -> bool:
    return data.shuffle_window_samples is not None or data.shuffle_window_bytes is not None
