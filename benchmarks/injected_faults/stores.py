"""The cost of a bad connection to a store, ours and s3fs's.

`corrupt`: small objects through a proxy that flips a bit in nine answers of ten, until so many came
to each reader: ours, and s3fs's range reads. `refused`: shards of 1.5 MB, one after the other, with
5 % of answers 503 and without in turns, ours and s3fs with its default retries.
"""

import argparse
import contextlib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import s3fs

from benchmarks.injected_faults.table import Line, seconds, shown
from benchmarks.streaming import BUCKET, serve
from ddpm_ray.storage import checksummed, object_store
from tests.faults.proxy import Weather, through

SMALL_BYTES, LARGE_BYTES = 4096, 3 << 19  # no packed shard is smaller than the latter
FLIPPED, REFUSED = 0.9, 0.05
READS = 400  # of each reader, in either weather, in one round of `refused`


@contextlib.contextmanager
def store(folder: Path) -> Iterator[str]:
    """The endpoint of an S3 server; its bucket is the sub-folder BUCKET."""
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)  # some have put objects there
    server, endpoint = serve(folder)
    try:
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def use(endpoint: str) -> str:
    """Point this process, and those that it starts, to the store; the URL of the bucket."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    os.environ.update(keys | {"AWS_ENDPOINT_URL": endpoint})
    s3fs.S3FileSystem.clear_instance_cache()  # those of another endpoint
    return f"s3://{BUCKET}"


def objects(folder: Path, count: int, size: int) -> dict[str, bytes]:
    """Random bytes by name, put where the server finds them."""
    made = {f"{n}": np.random.default_rng(n).bytes(size) for n in range(count)}
    for name, data in made.items():
        object_store.write_bytes(f"{folder / BUCKET / name}", data)
    return made


def corrupt(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Count the changed answers that are accepted as correct."""
    made, weather = objects(folder / "corrupt", 3, SMALL_BYTES), Weather(flip=FLIPPED)
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
    with store(folder / "corrupt") as origin, through(origin, weather) as endpoint:
        url, plain = use(endpoint), s3fs.S3FileSystem(skip_instance_cache=True)
        readers: dict[str, Callable[[str], bytes]] = {
            "ours": lambda name: checksummed.read_verified(f"{url}/{name}", sha256[name]),
            "plain": lambda name: plain.cat_file(f"{BUCKET}/{name}", start=0, end=SMALL_BYTES),
        }
        met: Counter[str] = Counter()
        accepted: Counter[str] = Counter()
        names = cycle(made)
        while late := [reader for reader in readers if met[reader] < options.answers]:
            for reader in late:
                before, name = weather.done["flip"], next(names)
                with contextlib.suppress(checksummed.DamagedError):  # five in a row
                    accepted[reader] += readers[reader](name) != made[name]
                met[reader] += weather.done["flip"] - before
    results = {reader: f"{accepted[reader]:,} of {met[reader]:,}" for reader in readers}
    return [Line("corrupt reads accepted", results, "0 of 10,000", not accepted["ours"])]


def refused(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Throughput under 503s, as a share of what it is without them."""
    made, weather = objects(folder / "refused", 20, LARGE_BYTES), Weather()
    shares: dict[str, list[float]] = {"ours": [], "plain": []}
    with store(folder / "refused") as origin, through(origin, weather) as endpoint:
        url, plain = use(endpoint), s3fs.S3FileSystem(skip_instance_cache=True)
        for _ in range(3 * options.rounds):
            took_s: defaultdict[tuple[str, float], float] = defaultdict(float)
            for turn in range(2 * READS // len(made)):  # clean and refused take turns
                weather.slow_down = turn % 2 * REFUSED
                for reader in shares:
                    read = object_store.read_bytes if reader == "ours" else plain.cat_file
                    for name in made:
                        took_s[reader, weather.slow_down] += seconds(partial(read, f"{url}/{name}"))
            for reader, found in shares.items():
                found.append(took_s[reader, 0.0] / took_s[reader, REFUSED])
    ratio = median(shares["ours"]) / median(shares["plain"])
    results = {reader: shown(found, ".0%") for reader, found in shares.items()}
    what, met = "speed with 5 % 503, share of clean", median(shares["ours"]) >= 0.7
    return [Line(what, results, "70%", met, f"x{ratio:.2f}")]
