"""Lanes and shuffle window: fixed at a run's first start, from then on those of the run."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.assembly import data_order, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import ConfigError, from_dict, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.runs.run_start import begin_run, settled_config
from tests.noise import pack_noise

MIB = 2**20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = str(tmp_path_factory.mktemp("data"))
    pack_noise(folder, images=9, side=4)
    return open_dataset(folder)


def configured(*overrides: str) -> RunConfig:
    tiny = "model.attention_factors=[]", "model.channel_mults=[1]"
    return load_config(RunConfig, None, ["name=a", "data.url=/data", *tiny, *overrides])


def of_an_earlier_version(**data: Any) -> RunConfig:
    """A run config as versions before 2026-11-28 stored it: numbers for lanes and bytes."""
    stored = to_dict(configured())
    del stored["data"]["shuffle_window_samples"]
    stored["data"] |= {"lanes": 8, "shuffle_window_bytes": 16 * MIB} | data
    return from_dict(RunConfig, stored)


@pytest.mark.parametrize(
    "batch, workers, lanes",
    [
        (128, 1, 8),  # as in earlier versions, up to 8 workers
        (128, 8, 8),
        (96, 3, 8),
        (128, 16, 16),
        (1024, 64, 64),
        (8000, 1000, 1000),
        (36, 3, 9),  # 8 does not divide it
        (12, 12, 12),
        (10, 1, 10),
        (7, 7, 7),
        (4, 2, 2),
    ],
)
def test_default_lanes_are_enough_for_the_workers(batch: int, workers: int, lanes: int) -> None:
    assert data_order.default_lanes(batch, workers) == lanes


@given(st.integers(1, 300), st.integers(1, 40))
def test_default_lanes_divide_the_batch_and_are_no_fewer_than_workers(share: int, n: int) -> None:
    lanes = data_order.default_lanes(share * n, n)
    assert (share * n) % lanes == 0
    assert lanes >= n


@pytest.mark.parametrize(
    "sample_bytes, workers, samples",
    [(64, 1, 8192), (3072, 64, 8192), (512 * 512 * 3, 1, 1365), (512 * 512 * 3, 8, 8192)],
)
def test_the_default_window_is_8192_samples_in_bounded_memory(
    sample_bytes: int, workers: int, samples: int
) -> None:
    assert data_order.default_window(sample_bytes, workers) == samples


def test_a_window_in_bytes_is_the_same_number_of_samples_as_in_earlier_versions() -> None:
    old, new = of_an_earlier_version().data, configured("data.shuffle_window_bytes=2097152").data
    assert data_order.window_samples(old, 3072) == 5461
    assert data_order.window_samples(new, 3072) == 682
    assert new.shuffle_window_samples is None


def test_of_the_two_forms_of_the_window_the_later_one_counts() -> None:
    both = "data.shuffle_window_bytes=1048576", "data.shuffle_window_samples=7"
    with pytest.raises(ConfigError, match="are names of one option"):
        configured(*both)
    with pytest.raises(ConfigError, match="shuffle_window_samples is 0; it must be at least 1"):
        configured("data.shuffle_window_samples=0")


def test_a_run_keeps_the_order_of_its_first_start(dataset: Dataset, tmp_path: Path) -> None:
    """With twice the workers, and without naming either option."""
    batch = "training.global_batch_size=96"
    few, many = (
        dataclasses.replace(configured(batch, f"cluster.num_workers={n}"), storage=str(tmp_path))
        for n in (12, 24)
    )
    folder = str(tmp_path / "a")
    begun = settled_config(few, dataset, folder)
    assert (begun.data.lanes, begun.data.shuffle_window_samples) == (12, 8192)
    identity = begin_run(begun, dataset, folder).identity
    later = settled_config(many, dataset, folder)
    assert later.data == begun.data
    assert begin_run(later, dataset, folder).identity == identity
    other = dataclasses.replace(many, data=dataclasses.replace(many.data, lanes=24))
    with pytest.raises(ConfigError, match=r"data.lanes is 24, but the run began with 12"):
        begin_run(settled_config(other, dataset, folder), dataset, folder)


def test_a_run_of_an_earlier_version_keeps_its_order(dataset: Dataset, tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    begin_run(of_an_earlier_version(lanes=16), dataset, folder)
    now = settled_config(configured(), dataset, folder)
    assert (now.data.lanes, now.data.shuffle_window_bytes) == (16, 16 * MIB)
    assert now.data.shuffle_window_samples is None
    begin_run(now, dataset, folder)


def test_an_imported_run_takes_its_order_when_it_is_trained(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Its stored config names none."""
    folder = str(tmp_path / "a")
    begin_run(configured(), dataset, folder)
    now = settled_config(configured(), dataset, folder)
    assert now.data.lanes == 8
    begin_run(now, dataset, folder)


def test_fewer_lanes_than_workers_are_reported_with_the_arithmetic(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    sizes = "training.global_batch_size=1024", "cluster.num_workers=64"
    settled_config(configured(*sizes), dataset, str(tmp_path / "a"))
    assert caplog.messages == []
    settled_config(configured(*sizes, "data.lanes=8"), dataset, str(tmp_path / "a"))
    (line,) = caplog.messages
    assert line.startswith("data.lanes is 8 and cluster.num_workers is 64: 64 / 8 = 8 of them read")
    assert line.endswith("a new run without data.lanes takes 64")


def test_a_stream_of_a_config_without_order_has_the_defaults(dataset: Dataset) -> None:
    stream = training_run.stream(configured(), dataset, Workers())
    assert (stream.order.lanes, stream.order.window_samples) == (8, 8192)
    stream.close()
