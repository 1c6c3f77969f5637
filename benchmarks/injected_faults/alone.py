"""One worker that trains without Ray while its lines to MLflow or to the store are bad.

`outage`: a real MLflow server is away for a minute, and a plain log_metric hangs on the same line.
`checkpoint`: a checkpoint every 50 steps on a store whose answers take 50 ms; halfway between, the
same state goes there by torch.save and s3fs while the steps wait, as they do in Ray's report.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import s3fs
import torch
from mlflow import MlflowClient

from benchmarks.injected_faults.stores import store, use
from benchmarks.injected_faults.table import Line, seconds, shown
from benchmarks.streaming import BUCKET
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import from_dict, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.reporting import Command, Progress
from ddpm_ray.runs.train_worker import assemble
from ddpm_ray.runs.training_data import open_or_pack
from ddpm_ray.storage import object_store
from ddpm_ray.tracking import run_lookup
from ddpm_ray.training import loop
from ddpm_ray.training.checkpoints import CHECKPOINTS
from ddpm_ray.training.run import Run
from ddpm_ray.training.writer_lease import Lease
from tests.faults.proxy import Weather, through
from tests.fixtures.mlflow_server import Line as Cable
from tests.fixtures.mlflow_server import free_port, healthy

CONFIG = str(Path(__file__).parents[2] / "conf/train/digits.yaml")
KEYS = "name=alone", "training.steps=1000000", "training.grid_every_steps=0"
OUTAGE_S, CALM_S, WARM_S = 60.0, 30.0, 15.0
LATENCY_S = 0.05
EVERY, CYCLES = 50, 20  # steps from checkpoint to checkpoint, and how many of them


def train_alone(settings: dict[str, Any]) -> None:
    """Our loop in this process, to its last step or until there is a file `end` beside "out".

    Leaves the seconds from step to step, and when each ended, in the file settings["out"].
    """
    out, step = Path(settings["out"]), loop.take_step
    config, end = from_dict(RunConfig, settings["config"]), out.with_name("end")

    def command(_: Progress) -> Command:
        return Command.STOP if end.exists() else Command.NONE

    run = assemble(config, settings, command, Workers())
    found: dict[str, list[float]] = {"took_s": [], "ended": [], "plain_s": []}
    last_s = time.perf_counter()

    def timed(run: Run) -> None:
        nonlocal last_s
        step(run)
        now_s = time.perf_counter()
        found["took_s"].append(now_s - last_s)
        found["ended"].append(time.time())
        if settings["plain_save"] and run.state.step % EVERY == EVERY // 2:
            found["plain_s"].append(seconds(partial(save_plainly, run)))
        last_s = time.perf_counter()

    loop.take_step = timed
    loop.train_loop(run)
    run.stream.close()
    assert run.sink is not None
    assert run.sink.close(60) == 0
    out.write_text(json.dumps(found))


def save_plainly(run: Run) -> None:
    """The same state as one file, by way of the same line."""
    state, file = run.state, io.BytesIO()
    parts = state.model, state.ema, state.optimizer
    torch.save([part.state_dict() for part in parts], file)
    s3fs.S3FileSystem().pipe_file(f"{BUCKET}/plain/{state.step}", file.getvalue())


@contextlib.contextmanager
def trained_alone(home: Path, uri: str, url: str, *keys: str) -> Iterator[Path]:
    """A process that trains meanwhile; what it leaves is in the file of this path afterwards."""
    home.mkdir(parents=True, exist_ok=True)
    config = load_config(
        RunConfig, CONFIG, [*KEYS, f"data.url={home}/digits", f"storage={url}", *keys]
    )
    open_or_pack(config)
    tracked = run_lookup.find_or_create_run(uri, "alone", "alone", "alone", f"{home}/artifacts")
    folder = object_store.join(url, config.name)
    settings = {
        "config": to_dict(config),
        "folder": folder,
        "identity": "alone",
        "tracked": vars(tracked),
        "lease": vars(Lease.first(object_store.join(folder, CHECKPOINTS))),
        "out": f"{home}/steps.json",
        "plain_save": "://" in url,
    }
    worker = multiprocessing.get_context("spawn").Process(target=train_alone, args=(settings,))
    worker.start()
    try:
        yield home / "steps.json"
        (home / "end").touch()
        worker.join()
    finally:
        worker.kill()
        worker.join()


def outage(folder: Path, options: argparse.Namespace) -> list[Line]:
    """The effect of a minute without MLflow on the time of a step."""
    home = folder / "outage"
    with mlflow_server(home) as port:
        line = Cable(port)
        client = MlflowClient(tracking_uri=line.uri)
        run_id = client.create_run("0").info.run_id
        with ThreadPoolExecutor() as pool, trained_alone(home, line.uri, str(home)) as out:
            threading.Event().wait(WARM_S + CALM_S)
            for name in [name for name in os.environ if name.startswith("MLFLOW_HTTP_")]:
                del os.environ[name]  # ours (tracking.py); here MLflow's defaults are measured
            line.cut()
            cut = time.time()
            threading.Timer(OUTAGE_S, setattr, (line, "up", True)).start()
            hung = pool.submit(seconds, partial(client.log_metric, run_id, "loss", 0.0))
            threading.Event().wait(OUTAGE_S + CALM_S)
        line.close()
    found = json.loads(out.read_text())
    ended, took_s = np.array(found["ended"]), np.array(found["took_s"])
    without = (ended > cut) & (ended <= cut + OUTAGE_S)
    around = ~without & (ended > cut - CALM_S)
    slower = np.quantile(took_s[without], 0.95) / np.quantile(took_s[around], 0.95) - 1
    longest_s, stall_s = float(took_s[without].max()), hung.result()
    slow = {"ours": f"{slower:+.1%}", "plain": ""}
    longest = {"ours": f"{longest_s:.2f}", "plain": f"{stall_s:.1f}"}
    return [
        Line("MLflow away 60 s: p95 of a step", slow, "+5%", bool(slower <= 0.05)),
        Line("  the longest step, s", longest, "", True, f"x{longest_s / stall_s:.3f}"),
    ]


@contextlib.contextmanager
def mlflow_server(home: Path) -> Iterator[int]:
    """The port of a server of MLflow's, once it answers."""
    home.mkdir(parents=True)
    port, database = free_port(), f"sqlite:///{home}/mlflow.db"
    command = ["-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", database]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *command, "--port", f"{port}"],
            stdout=log,
            stderr=log,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while not healthy(port):
            if time.monotonic() > deadline:
                raise TimeoutError((home / "log").read_text())
            threading.Event().wait(0.2)
        yield port
    finally:
        os.killpg(server.pid, 15)  # its own group: the server and its one worker
        server.wait()


def checkpoint(folder: Path, options: argparse.Namespace) -> list[Line]:
    """The time for which a checkpoint blocks the steps, and its total cost."""
    home = folder / "checkpoint"
    with store(home) as origin, through(origin, Weather(latency_s=LATENCY_S)) as endpoint:
        keys = (
            f"training.checkpoint_every_steps={EVERY}",
            f"training.steps={EVERY * CYCLES}",
            "evaluation.num_images=0",
            "training.global_batch_size=32",
        )
        uri = f"sqlite:///{home}/mlflow.db"
        with trained_alone(home, uri, use(endpoint), *keys) as out:
            while not out.exists():
                threading.Event().wait(0.5)
    found = json.loads(out.read_text())
    # A row for each cycle: its first step comes after a save, its second half after the plain one.
    cycles = np.array(found["took_s"]).reshape(CYCLES, EVERY)[1:]
    first, second = cycles[:, : EVERY // 2], cycles[:, EVERY // 2 :]
    usual_s = float(np.median(second))
    stalls_s = [float(one) - usual_s for one in first[:, 0]]
    uploads_s = found["plain_s"]
    shares = ((first.sum(1) - second.sum(1)) / cycles.sum(1)).tolist()
    plain = sum(uploads_s) / (sum(uploads_s) + sum(found["took_s"]))
    stalls = {"ours": shown(stalls_s, ".2f"), "plain": shown(uploads_s, ".2f")}
    costs = {"ours": shown(shares, ".1%"), "plain": f"{plain:.1%}"}
    ratio, goal = f"x{median(stalls_s) / median(uploads_s):.2f}", f"step {usual_s:.2f}"
    return [
        Line("stall at a checkpoint, s", stalls, goal, median(stalls_s) <= usual_s, ratio),
        Line(f"  share of time, one per {EVERY} steps", costs, "3%", median(shares) <= 0.03),
    ]
