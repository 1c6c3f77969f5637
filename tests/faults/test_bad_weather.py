"""A store that refuses, resets, cuts and flips: every byte that is used is the one that was put."""

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddpm_ray.data import shards
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.shards import ShardCorruptError, fetch_shard
from ddpm_ray.storage import checksummed, object_store, remote_filesystem
from ddpm_ray.storage.errors import StorageError
from tests.faults.proxy import Weather, through
from tests.noise import pack_noise

STORM = {"slow_down": 0.05, "reset": 0.01, "short": 0.01, "truncate": 0.005, "flip": 0.005}


def test_whatever_is_read_is_what_was_written(
    s3_server: str, use_s3: Callable[[str, str], str]
) -> None:
    """Four times the storm, so that some hundred requests meet each of its kinds."""
    weather = Weather(seed=1)
    for name, share in STORM.items():
        setattr(weather, name, 4 * share)
    with through(s3_server, weather) as endpoint:
        bucket = use_s3(endpoint, "secret")
        for number in range(30):
            data = random.Random(number).randbytes(1000 + number)
            url = f"{bucket}/weather/{number}"
            object_store.write_bytes(url, data)
            digest = hashlib.sha256(data).hexdigest()
            assert checksummed.read_verified(url, digest) == data
            assert object_store.exists(url)
            object_store.delete(url)
            assert not object_store.exists(url)
    assert all(weather.done[name] for name in STORM), weather.done


def test_a_shard_is_never_taken_with_a_wrong_byte(
    s3_server: str, s3: str, use_s3: Callable[[str, str], str]
) -> None:
    pack_noise(f"{s3}/noise", images=30, side=4)
    dataset = open_dataset(f"{s3}/noise")
    wanted = [np.asarray(fetch_shard(dataset, number).images).tobytes() for number in range(3)]
    weather = Weather(truncate=0.05, flip=0.05)
    with through(s3_server, weather) as endpoint:
        use_s3(endpoint, "secret")
        for _ in range(50):
            assert [
                np.asarray(fetch_shard(dataset, n).images).tobytes() for n in range(3)
            ] == wanted
    assert weather.done["flip"] >= 3
    assert weather.done["truncate"] >= 3


def test_bytes_that_stay_wrong_are_named(s3: str) -> None:
    pack_noise(f"{s3}/rotten", images=30, side=4)
    dataset = open_dataset(f"{s3}/rotten")
    url = f"{s3}/rotten/{shards.shard_name(1)}"
    data = bytearray(object_store.read_bytes(url))
    data[-20] ^= 1
    object_store.write_bytes(url, bytes(data))
    with pytest.raises(ShardCorruptError, match=r"shard-00001.arrow.*sha256"):
        fetch_shard(dataset, 1)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_request_that_hangs_is_cut_off(
    method: str,
    s3_server: str,
    use_s3: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_filesystem, "READ_TIMEOUT_S", 2)
    object_store.set_retry_timeout(60)
    with through(s3_server, Weather(hang=method)) as endpoint:
        url = f"{use_s3(endpoint, 'secret')}/hangs"
        began_s = time.monotonic()
        object_store.write_bytes(url, b"once")
        assert object_store.read_bytes(url) == b"once"
        took_s = time.monotonic() - began_s
    # The answer never comes: only the cut ends the wait.
    assert took_s >= remote_filesystem.READ_TIMEOUT_S


def test_an_outage_is_waited_out_and_one_that_lasts_is_reported(
    s3_server: str, use_s3: Callable[[str, str], str]
) -> None:
    weather = Weather(down=True)
    with through(s3_server, weather) as endpoint:
        url = f"{use_s3(endpoint, 'secret')}/outage"
        object_store.set_retry_timeout(0.3)
        with pytest.raises(StorageError, match=r"no answer .*check that the endpoint is up"):
            object_store.write_bytes(url, b"1")
        object_store.set_retry_timeout(60)
        ends = threading.Timer(1, setattr, (weather, "down", False))
        ends.start()
        object_store.write_bytes(url, b"2")
        assert object_store.read_bytes(url) == b"2"
        ends.join()


def test_nobody_below_us_pauses_after_a_refusal(
    s3_server: str, use_s3: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s: list[float] = []
    sleep = asyncio.sleep

    async def noted(delay_s: float, result: object = None) -> object:
        pauses_s.append(delay_s)
        return await sleep(delay_s, result)

    monkeypatch.setattr(asyncio, "sleep", noted)
    weather = Weather(slow_down=0.5)
    with through(s3_server, weather) as endpoint:
        url = f"{use_s3(endpoint, 'secret')}/refused"
        object_store.write_bytes(url, b"1")
        for _ in range(10):
            assert object_store.read_bytes(url) == b"1"
    assert weather.done["slow_down"] >= 3
    assert not any(pauses_s), pauses_s


def test_only_one_creates_what_is_new_though_the_answer_was_lost(tmp_path: Path) -> None:
    """The second try finds the object of the first, whose answer nobody heard."""
    url = str(tmp_path / "claim")
    assert object_store.write_new_bytes(url, b"mine")
    assert object_store.write_new_bytes(url, b"mine")
    assert not object_store.write_new_bytes(url, b"theirs")
