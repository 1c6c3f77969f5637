"""Pack a data set with Ray tasks, one for each missing shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.packing import pack_report, packer
from ddpm_ray.data.packing.pack_report import PackReport
from ddpm_ray.data.packing.packer import PackedShard, PackPlan

Progress = Callable[[int, int], None]  # shards done, shards in total


class PackResult(NamedTuple):
    """A packed data set and the report on its source; None: an earlier version packed it."""

    dataset: Dataset
    report: PackReport | None


def pack_dataset(
    source: str, destination: str, config: PackConfig, on_progress: Progress | None = None
) -> PackResult:
    """Pack `source` to `destination`; a no-op if it is packed already.

    The bytes do not depend on the number of tasks. A packing that was interrupted continues with
    the shards that exist. A single shard is packed in this process, several by Ray tasks at
    config.address. Raises DatasetError, BadImageError, RunFailedError or StorageError, and then
    writes no manifest.
    """
    plan = packer.make_plan(source, destination, config)
    if (dataset := packer.find_finished(plan)) is not None:
        return _result_of(dataset)
    done: list[PackedShard] = []
    for shard in _here(plan) if plan.shards == 1 else _on_ray(plan, config):
        done.append(shard)
        if on_progress is not None:
            on_progress(len(done), plan.shards)
    return _result_of(packer.finish_dataset(plan, done))


def _result_of(dataset: Dataset) -> PackResult:
    record = pack_report.read_record(dataset)
    return PackResult(dataset, record.report if record else None)


def _here(plan: PackPlan) -> Iterator[PackedShard]:
    return (packer.pack_shard(plan, number) for number in range(plan.shards))


def _on_ray(plan: PackPlan, config: PackConfig) -> Iterator[PackedShard]:
    """Yield shards as they are packed, at most `num_workers` at once (0: one per CPU)."""
    import ray  # takes seconds; the source is checked before

    from ddpm_ray.distributed import connection
    from ddpm_ray.runs.shard_tasks import as_completed

    connection.connect(config.address)
    most = config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    shared, task = ray.put(plan), ray.remote(max_retries=3)(packer.pack_shard)
    yield from as_completed(range(plan.shards), [partial(task.remote, shared)] * most)
