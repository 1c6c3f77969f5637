"""The packer on a real Ray: the same bytes as without, and errors that arrive as they were."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.packing import packer
from ddpm_ray.data.packing.image_files import BadImageError
from ddpm_ray.runs.pack import pack_dataset

SHARD_BYTES = 2 << 20  # 32 of the pictures below


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    ramp = np.linspace(0, 255, 148 * 148 * 3).astype(np.uint8).reshape(148, 148, 3)
    for n in range(100):
        Image.fromarray(np.roll(ramp, n, axis=0)).save(folder / f"{n:03d}.bmp")
    return folder


@pytest.mark.ray
def test_tasks_write_what_one_process_writes(cluster: None, pictures: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    config = PackConfig(shard_bytes=SHARD_BYTES, num_workers=2)
    result = pack_dataset(
        str(pictures), str(tmp_path / "ray"), config, lambda *count: done.append(count)
    )
    plan = packer.make_plan(
        str(pictures), str(tmp_path / "here"), PackConfig(shard_bytes=SHARD_BYTES)
    )
    here = packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in range(plan.shards)])
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.report is not None
    assert (result.report.skipped, result.dataset.fingerprint) == (0, here.fingerprint)
    again = pack_dataset(str(pictures), str(tmp_path / "ray"), config).dataset
    assert again.fingerprint == here.fingerprint

    (pictures / "050.bmp").write_bytes(b"broken")
    with pytest.raises(BadImageError, match=r"050\.bmp: not a readable image"):
        pack_dataset(str(pictures), str(tmp_path / "stops"), config)
    assert not (tmp_path / "stops/manifest.json").exists()
    skip = PackConfig(shard_bytes=SHARD_BYTES, num_workers=2, on_bad_image="skip")
    result = pack_dataset(str(pictures), str(tmp_path / "skips"), skip)
    assert result.dataset.manifest.samples == 99
    assert result.report is not None
    assert result.report.skipped == 1
    # Also told when the set is found.
    assert pack_dataset(str(pictures), str(tmp_path / "skips"), skip) == result


def test_one_shard_needs_no_ray(tmp_path: Path) -> None:
    dataset = pack_dataset("digits", str(tmp_path / "digits"), PackConfig()).dataset
    assert dataset.manifest.samples == 1797
    assert not ray.is_initialized()
