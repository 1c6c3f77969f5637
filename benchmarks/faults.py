"""The cost of faults, ours and a plain TorchTrainer's, with the same faults on the same machine.

    python -m benchmarks.faults [--only kills frozen ...] [--rounds 1]

`kills`: 40 steps of two workers, a checkpoint every 5 steps, a SIGKILL at three steps, against an
ordinary TorchTrainer function (injected_faults/plain.py) on the same cluster, network and images.
Workers append their steps to a file, which is counted; at least the steps since the last multiple
of 5 are repeated. `frozen`: time from a SIGSTOP until a log line names the worker; the plain run is
watched for --patience seconds and then resumed. `useful`: with a SIGKILL each minute, the time
spent in new steps, over the time between the first and the last kill. The other rows need no Ray:
injected_faults/stores.py, injected_faults/alone.py.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
from mlflow import MlflowClient
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer

from benchmarks.injected_faults.alone import checkpoint, outage
from benchmarks.injected_faults.notes import FaultedRun, marks, note, noted
from benchmarks.injected_faults.plain import KEY, plain_worker
from benchmarks.injected_faults.stores import corrupt, refused
from benchmarks.injected_faults.table import Line, shown
from ddpm_ray import fault_injection
from ddpm_ray.assembly import networks
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.shards import fetch_shard
from ddpm_ray.distributed import connection, failures, worker_group
from ddpm_ray.runs import train, training_data
from ddpm_ray.runs.train_worker import train_worker
from ddpm_ray.storage import object_store
from ddpm_ray.tracking import mlflow_runs
from ddpm_ray.training import loop
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.run import Run

CONFIG = str(Path(__file__).parents[1] / "conf/train/digits.yaml")
WORKERS, BATCH = 2, 32  # a step of about 0.1 s
KEYS = (
    "name=ours",
    f"cluster.num_workers={WORKERS}",
    f"training.global_batch_size={BATCH}",
    "training.grid_every_steps=0",
    "sampling.steps=5",
    "evaluation.num_images=0",
)
STEPS, EVERY = 40, 5
KILLS = "kill@gradient:9/1 kill@gradient:20/1 kill@gradient:35/1"
COUNTS = "repeated", "least", "ignored", "orphans", "rows"
FREEZE = "freeze@gradient:9/1"
FOREVER, SELDOM, SETTLED, PERIOD_S = 1_000_000, 50, 60, 60.0  # of `useful`


def noting_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Our worker, which notes its steps as the plain one does."""
    step, home = loop.take_step, Path(settings["folder"]).parent

    def and_note(run: Run) -> None:
        step(run)
        committed = run.checkpoints.committed
        durable = int(object_store.name_of(committed).split("-")[1]) if committed else 0
        note(home, run.workers.rank, run.state.step, durable)

    loop.take_step = and_note
    return train_worker(settings)


def ours(home: Path, steps: int, every: int, failures: int) -> FaultedRun:
    """A run of ours to its end, as jobs/train.py starts it."""
    train.train_worker = noting_worker  # type: ignore[attr-defined]  # the driver's name of it
    config = configured(
        home,
        f"training.steps={steps}",
        f"training.checkpoint_every_steps={every}",
        f"cluster.max_failures={failures}",
    )
    report = train.run_training(config, home, lambda _: None).report
    rows = mlflow_runs.history(report["run_id"], report["tracking_uri"], "train/loss")
    checkpoints = home / config.name / CHECKPOINTS
    known = CheckpointStore(str(checkpoints)).pointer().references
    return FaultedRun(home, every, len(rows), len(list(checkpoints.glob("step-*"))) - len(known))


def plain(home: Path, steps: int, every: int, failures: int) -> FaultedRun:
    """A run of the plain trainer to its end, by Ray's own defaults but for its failures."""
    config = configured(home)
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run_id = client.create_run(client.create_experiment("plain")).info.run_id
    dataset = training_data.open_or_pack(config)
    shards = [fetch_shard(dataset, number) for number in range(dataset.manifest.shards)]
    images = np.concatenate([shard.images for shard in shards])
    np.save(home / "images.npy", images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    network = networks.unet_spec(config, dataset.manifest.image_shape)
    asked = {name: os.environ[name] for name in (fault_injection.VARIABLE,) if name in os.environ}
    settings = {
        "environment": asked,
        "home": str(home),
        "network": network,
        "steps": steps,
        "every": every,
        "images": str(home / "images.npy"),
        "batch": BATCH // WORKERS,
        "num_steps": 1000,
        "uri": config.tracking.uri,
        "run_id": run_id,
    }
    own = set(connection.TRAIN_ENVIRONMENT) | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"}
    with without(own):
        TorchTrainer(
            plain_worker,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RayRunConfig(
                name="plain",
                storage_path=str(home),
                logging_config=LoggingConfig("CRITICAL"),
                failure_config=FailureConfig(max_failures=failures),
            ),
        ).fit()
    known = (home / "plain/checkpoint_manager_snapshot.json").read_text()
    orphans = [one for one in (home / "plain").glob("checkpoint_*/") if one.name not in known]
    rows = mlflow_runs.history(run_id, config.tracking.uri, KEY)
    return FaultedRun(home, every, len(rows), len(orphans))


Contestant = Callable[[Path, int, int, int], FaultedRun]
CONTESTANTS: dict[str, Contestant] = {"ours": ours, "plain": plain}


def configured(home: Path, *keys: str) -> RunConfig:
    """The digits, in `home`."""
    uri = f"sqlite:///{home}/mlflow.db"
    places = f"storage={home}", f"data.url={home}/digits", f"tracking.uri={uri}"
    return load_config(RunConfig, CONFIG, [*KEYS, *places, *keys])


@contextlib.contextmanager
def without(names: set[str]) -> Iterator[None]:
    """The environment without these: what our group sets for itself no other driver has."""
    kept = {name: os.environ.pop(name) for name in names & set(os.environ)}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def planned(home: Path, words: str) -> Iterator[None]:
    """These faults for the workers that are started meanwhile."""
    home.mkdir(parents=True)
    os.environ[fault_injection.VARIABLE] = f"{marks(home)} {words}"
    try:
        yield
    finally:
        del os.environ[fault_injection.VARIABLE]


def kills(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Three kills by marked steps."""
    done: dict[str, list[FaultedRun]] = {name: [] for name in CONTESTANTS}
    for number in range(options.rounds):
        for name, contestant in CONTESTANTS.items():
            home = folder / f"kills-{number}-{name}"
            with planned(home, KILLS):
                done[name].append(contestant(home, STEPS, EVERY, len(KILLS.split())))
    waits = {name: [s for one in runs for s in one.to_new_step_s()] for name, runs in done.items()}
    results = {
        name: {what: " ".join(f"{getattr(one, what)}" for one in runs) for what in COUNTS}
        for name, runs in done.items()
    }
    mine, ratio = done["ours"], median(waits["ours"]) / median(waits["plain"])
    quick = median(waits["ours"]) <= 12 and ratio <= 0.5
    results_s = {name: shown(took_s) for name, took_s in waits.items()}
    return [
        Line(
            "repeated steps (the least possible)",
            {name: f"{t['repeated']} ({t['least']})" for name, t in results.items()},
            "the least",
            all(one.repeated == one.least for one in mine),
        ),
        Line(
            "newest checkpoints ignored, orphans",
            {name: f"{t['ignored']}, {t['orphans']}" for name, t in results.items()},
            "0, 0",
            not any(one.ignored or one.orphans for one in mine),
        ),
        Line(
            f"rows in MLflow for {STEPS} steps",
            {name: t["rows"] for name, t in results.items()},
            f"{STEPS}",
            all(one.rows == STEPS for one in mine),
        ),
        Line("kill to next new step, s", results_s, "12, x0.5", quick, f"x{ratio:.2f}"),
    ]


def frozen(folder: Path, options: argparse.Namespace) -> list[Line]:
    """Time until a log line names the frozen worker."""
    named_s: list[float] = []
    handler = logging.Handler()
    handler.emit = lambda record: (  # type: ignore[method-assign]
        named_s.append(record.created) if "no heartbeat" in record.getMessage() else None
    )
    worker_group.log.addHandler(handler)
    with planned(folder / "frozen-ours", FREEZE):
        mine = ours(folder / "frozen-ours", 2 * EVERY, EVERY, 1)
    worker_group.log.removeHandler(handler)
    took_s = named_s[0] - mine.fault_times_s()[0]

    home = folder / "frozen-plain"
    with planned(home, FREEZE):
        run = threading.Thread(target=plain, args=(home, 2 * EVERY, EVERY, 0))
        run.start()
        wait_for(lambda: marks(home).exists() and any(marks(home).iterdir()))
        run.join(options.patience)
        silent = run.is_alive()
        os.kill(next(one.pid for one in noted(home) if one.rank == 1), signal.SIGCONT)
        run.join()
    results = f"{'>' if silent else '<'} {options.patience:.0f}"
    both = {"ours": f"{took_s:.1f}", "plain": results}
    return [Line("frozen worker: until named, s", both, "30", took_s <= 30)]


def useful(folder: Path, options: argparse.Namespace) -> list[Line]:
    """A kill each minute, at no particular step; the last one ends the run."""
    found: dict[str, tuple[float, int]] = {}
    for name, contestant in CONTESTANTS.items():
        faulted = FaultedRun(folder / f"useful-{name}")
        faulted.home.mkdir()
        killer = threading.Thread(target=kill_each_minute, args=(faulted, options.minutes))
        killer.start()
        # Of whichever kind it is: the notes show whether it went as planned.
        with contextlib.suppress(failures.RunFailedError, ray.train.TrainingFailedError):
            contestant(faulted.home, FOREVER, SELDOM, options.minutes)
        killer.join()
        found[name] = faulted.useful()
    shares = {name: f"{share:.0%}" for name, (share, _) in found.items()}
    steps = {name: f"{count}" for name, (_, count) in found.items()}
    ratio = f"x{found['ours'][1] / found['plain'][1]:.2f}"
    return [
        Line("useful time, a kill per 60 s", shares, "75%", found["ours"][0] >= 0.75),
        Line("  new steps in that time", steps, "", True, ratio),
    ]


def kill_each_minute(faulted: FaultedRun, minutes: int) -> None:
    wait_for(lambda: bool(notes := noted(faulted.home)) and notes[-1].step >= SETTLED)
    for number in range(minutes + 1):
        threading.Event().wait(PERIOD_S if number else 0)
        victim = [one for one in noted(faulted.home) if one.rank > 0][-1]
        faulted.hits_s.append(time.time())
        with contextlib.suppress(ProcessLookupError):  # not yet up again since the last one
            os.kill(victim.pid, signal.SIGKILL)


def wait_for(done: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("the workers do not come so far")
        threading.Event().wait(0.1)


ON_RAY = {"kills": kills, "frozen": frozen, "useful": useful}
ROWS = ON_RAY | {
    "corrupt": corrupt,
    "refused": refused,
    "outage": outage,
    "checkpoint": checkpoint,
}


def main() -> None:
    """Print the table, each row once it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--rounds", type=int, default=1, help="of `kills`, `refused`")
    parser.add_argument("--patience", type=float, default=60, help="with the plain frozen run, s")
    parser.add_argument("--minutes", type=int, default=2, help="of `useful`")
    parser.add_argument("--answers", type=int, default=10_000, help="changed ones, of `corrupt`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(Line.HEAD, flush=True)
        if ON_RAY.keys() & set(options.only):
            here = max(WORKERS, os.cpu_count() or 1)
            ray.init("local", num_cpus=here, logging_level=logging.WARNING, log_to_driver=False)
        for name in options.only:
            with contextlib.redirect_stdout(sys.stderr):  # what Ray says of each death
                found = ROWS[name](Path(scratch), options)
            print(*found, sep="\n", flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
