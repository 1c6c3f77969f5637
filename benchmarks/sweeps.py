"""The cost of a sweep in addition to training: between trials, and in the driver for each.

    python benchmarks/sweeps.py [--rounds 2] [--trials 1000] [--search grid tpe]

`start`: from the end of a trial to the first optimiser step of the next, against a TorchTrainer
on the same cluster, from fit() to torch imported and to the first step of Adam; they take turns.
`simulated`: trials that report a made-up curve and train nothing, through searcher, ASHA, store
and tracker, as the driver calls them. Costs are CPU seconds and the wall clock per trial, in the
last hundred over those at the 100th. A request is a call of MLflow's store, one HTTP request where
that is a server; artifacts are not counted. --rounds 0 and --trials 0 leave a part out.
"""

import argparse
import functools
import json
import math
import os
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ray.train
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from PIL import Image
from ray.train.torch import TorchTrainer

from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import load_config
from ddpm_ray.distributed import connection
from ddpm_ray.sweep.driver import run_sweep, schedule_diagnostics
from ddpm_ray.sweep.mlflow_report import SweepRun
from ddpm_ray.sweep.trial import EVENT
from ddpm_ray.sweep.trial_data import SweepData
from ddpm_ray.sweep.trial_scheduler import TrialScheduler
from ddpm_ray.sweep.trial_store import TrialStore
from ddpm_ray.sweep.tune_searcher import TuneSearcher
from ddpm_ray.tracking import run_lookup
from ddpm_ray.training.validation_loss import LEVELS

CONF = Path(__file__).parents[1] / "conf"
STARTS = 4  # trials of a round, and so many bare starts less one
AT_ONCE = 4  # simulated trials side by side
PUBLISH_EVERY = 100  # trials that are over
STEPS, EVERY = 240, 40  # of a simulated trial, and between its validation losses
SCORE, PICTURE = "eval/fd_digits", "samples.png"
TINY = (
    "run.model.base_channels=16",
    "run.model.channel_mults=[1,2]",
    "run.model.groups=4",
    "run.model.attention_resolutions=[4]",
    "run.training.steps=40",
    "run.training.warmup_steps=10",
    "run.training.checkpoint_every_steps=20",
    "run.training.grid_every_steps=40",
    "run.training.log_every_steps=20",
    "run.sampling.steps=5",
    "run.evaluation.num_images=32",
    "space=[{schedule.num_steps: [1000, 750, 500, 250]}]",
    "stopping.kind=none",
    "trials_at_once=1",
)
RANGES = "{training.learning_rate: {low: 1e-5, high: 1e-1, log: true}, \
schedule.num_steps: {low: 100, high: 1000}}"
COLUMNS = "{:<10} {:>7} {:>21} {:>21} {:>9} {:>8} {:>14}"


def first_step(_: dict[str, Any]) -> tuple[float, float]:
    """Times at which a worker's function began, had torch, and had taken Adam's first step."""
    import torch

    began, layer = time.time(), torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(layer.parameters())  # imports torch's compiler: 1 to 2 s
    layer(torch.ones(1)).backward()
    optimizer.step()
    return began, time.time()


def bare_start_s(folder: Path) -> tuple[float, float]:
    """Seconds from fit() to these two."""
    run = ray.train.RunConfig(name=uuid.uuid4().hex, storage_path=str(folder / "bare"))
    scaling = ray.train.ScalingConfig(num_workers=1)
    trainer = TorchTrainer(first_step, train_loop_config={}, scaling_config=scaling, run_config=run)
    called = time.time()
    began, stepped = trainer.fit().return_value
    return began - called, stepped - called


def gaps_s(folder: Path) -> list[float]:
    """Seconds between each two trials of a real sweep, one at a time."""
    config = configured(folder, *TINY)
    outcomes = [trial.outcome for trial in run_sweep(config, folder, lambda *_: None).trials]
    pairs = pairwise(outcomes)
    return [after["first_step_at"] - before["ended"] for before, after in pairs]


def compare_starts(folder: Path, rounds: int) -> None:
    bare: list[tuple[float, float]] = []
    gaps: list[float] = []
    for _ in range(rounds):
        bare += [bare_start_s(folder) for _ in range(STARTS - 1)]
        gaps += gaps_s(folder)
    began, stepped = ([pair[k] for pair in bare] for k in (0, 1))
    print(f"start      between trials {shown(gaps)} s, {len(gaps)} of each")
    for what, bare_s in ("to torch", began), ("to a step of Adam", stepped):
        ratio, over = median(gaps) / median(bare_s), median(gaps) - median(bare_s)
        print(f"           bare {what} {shown(bare_s)} s: x{ratio:.2f}, {over:+.2f} s, goal +3 s")


def simulate(folder: Path, search: str, trials: int) -> None:
    """Pass so many made-up trials through all that the driver does, and print what each cost."""
    config = configured(folder, *space_of(search, trials))
    data = SweepData(config, folder)
    sweep_run = SweepRun.find_or_create(config, f"{folder}/{config.name}", config.name, data.first)
    stopped: set[int] = set()
    store = TrialStore(sweep_run.folder)
    diagnose = partial(schedule_diagnostics, data)
    scheduler = TrialScheduler(config, store, diagnose, stopped.add)
    tune = TuneSearcher(scheduler, lambda trial: {"number": trial.number} | trial.values, AT_ONCE)
    active: dict[str, Stub] = {}
    clocks: dict[int, tuple[float, float]] = {}  # CPU and wall clock by trials that are over
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    requests, not_ours = requests_so_far(), np.zeros(3)
    while True:
        while isinstance(assignment := tune.suggest(f"{len(store.trials)}"), dict):
            before = requests_so_far(), time.process_time(), time.perf_counter()
            active[f"{assignment['number']}"] = Stub(
                assignment, sweep_run, f"{config.run.data.url}/{PICTURE}"
            )
            after = requests_so_far(), time.process_time(), time.perf_counter()
            not_ours += np.subtract(after, before)  # what the trial itself would do
        if not active:
            break
        for name, stub in [*active.items()]:
            tune.on_trial_result(name, {EVENT: json.dumps(stub.validation_loss())})
            if stub.number in stopped or stub.step >= STEPS:
                tune.on_trial_result(name, {EVENT: json.dumps(stub.ended())})
                tune.on_trial_complete(name)
                del active[name]
        sweep_run.close_trials(store)
        over = len(scheduler.ended)
        if over % PUBLISH_EVERY == 0 and over not in clocks:
            sweep_run.publish(store)
        clock = time.process_time() - not_ours[1], time.perf_counter() - not_ours[2]
        clocks.setdefault(over, clock)
    sweep_run.conclude(store, True, 1.0)
    requests = requests_so_far() - requests - int(not_ours[0])
    costs = [cost_of(clock, [*clocks]) for clock in zip(*clocks.values(), strict=True)]
    status_counts = Counter(trial.status for trial in store.trials)
    ends = f"{status_counts['stopped']}/{status_counts['finished']}"
    calls, peak = f"{requests / trials:.1f}", f"{peak_gb():.2f}"
    print(COLUMNS.format(search, trials, *costs, calls, peak, ends))


class Stub:
    """A trial that reports a curve, which falls to a level given by its values."""

    def __init__(self, assignment: dict[str, Any], sweep_run: SweepRun, picture: str) -> None:
        self.number, self.step, self._picture = assignment["number"], 0, picture
        rate, num_steps = assignment["training.learning_rate"], assignment["schedule.num_steps"]
        self._loss = abs(math.log10(rate) + 3) + 100 / num_steps
        self._loss += float(np.random.default_rng(self.number).normal()) / 10
        self._num_steps, run = num_steps, sweep_run.run
        of = f"{run.run_id} {self.number}"
        self._run = run_lookup.find_or_create_run(
            run.uri, sweep_run.config.run.tracking.experiment, f"{assignment}", of, None, run.run_id
        )
        client = MlflowClient(tracking_uri=run.uri)
        model = client.create_logged_model(run.experiment_id, "model", self._run.run_id)
        client.log_outputs(self._run.run_id, [LoggedModelOutput(model.model_id, 0)])

    def validation_loss(self) -> dict[str, Any]:
        self.step += EVERY
        spectrum = [(self._loss + EVERY / self.step) / (1 + math.exp(level)) for level in LEVELS]
        loss = {"step": self.step, "loss": sum(spectrum), "spectrum": spectrum}
        return {"number": self.number, "kind": "validation_loss", "validation_loss": loss}

    def ended(self) -> dict[str, Any]:
        finished, loss = self.step >= STEPS, self._loss
        scores = {SCORE: loss, f"{SCORE}_low": loss - 0.1, f"{SCORE}_high": loss + 0.1}
        outcome = {
            "run_id": self._run.run_id,
            "checkpoint": "none",
            "step": self.step,
            "certificate": {},
            "num_steps": self._num_steps,
            "samples": self._picture,
            "metrics": scores if finished else {},
            "busy_s": 1.0,
            "worker_s": 2.0,
        }
        return {"number": self.number, "kind": "ended", "finished": finished, "outcome": outcome}


def space_of(search: str, trials: int) -> list[str]:
    """The keys of a sweep of so many trials over learning rate and T."""
    space = RANGES
    if search == "grid":
        rates = np.geomspace(1e-5, 1e-1, -(-trials // 10)).tolist()
        steps = list(range(100, 1001, 100))
        space = f"{{training.learning_rate: {rates}, schedule.num_steps: {steps}}}"
    return [
        f"space=[{space}]",
        f"search.kind={search}",
        f"search.trials={trials}",
        f"run.training.steps={STEPS}",
        f"stopping.every_steps={EVERY}",
    ]


def cost_of(clock: tuple[float, ...], over: list[int]) -> str:
    """Cost of the 100th and the last trial, in ms, and their ratio."""
    per_trial = [
        (np.interp(end, over, clock) - np.interp(end - 100, over, clock)) * 10
        for end in (min(150, over[-1]), over[-1])
    ]
    return f"{per_trial[0]:.0f} -> {per_trial[1]:.0f} ms, x{per_trial[1] / per_trial[0]:.2f}"


def configured(folder: Path, *keys: str) -> SweepConfig:
    """The quick sweep with these keys, under a new name in `folder`."""
    places = f"run.storage={folder}/runs", f"run.tracking.uri=sqlite:///{folder}/mlflow.db"
    own = (
        f"name=s{uuid.uuid4().hex[:8]}",
        f"run_from={CONF}/train/digits.yaml",
        f"run.data.url={folder}/digits",
        *places,
    )
    return load_config(SweepConfig, f"{CONF}/sweep/quick.yaml", [*own, *keys])


def requests_so_far() -> int:
    """Calls of MLflow's store by this process since this was first asked."""
    if not hasattr(SqlAlchemyStore, "calls"):
        SqlAlchemyStore.calls = 0
        inside = threading.local()  # the store calls itself as well
        for name in vars(AbstractStore):
            method = getattr(SqlAlchemyStore, name)
            if callable(method) and not name.startswith("_"):
                setattr(SqlAlchemyStore, name, _counted(method, inside))
    return int(SqlAlchemyStore.calls)


def _counted(method: Callable[..., Any], inside: threading.local) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "a_call", False):
            return method(*args, **kwargs)
        SqlAlchemyStore.calls += 1
        inside.a_call = True
        try:
            return method(*args, **kwargs)
        finally:
            inside.a_call = False

    return counted


def peak_gb() -> float:
    """Resident memory of this process at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6


def shown(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--search", nargs="+", default=["grid", "tpe"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        connection.connect("", AT_ONCE)
        if arguments.rounds:
            compare_starts(folder, arguments.rounds)
        noise = np.random.default_rng(0).integers(0, 256, (274, 274, 3), dtype=np.uint8)
        (folder / "digits").mkdir(exist_ok=True)  # not yet packed where rounds are 0
        Image.fromarray(noise).save(folder / "digits" / PICTURE)
        if arguments.trials:
            heads = "CPU/trial", "wall/trial", "requests", "peak GB", "stopped/ended"
            print(COLUMNS.format("simulated", "trials", *heads))
            for search in arguments.search:
                simulate(folder, search, arguments.trials)
            print("goal: x1.50, peak 1.50 GB")
        ray.shutdown()


if __name__ == "__main__":
    main()
