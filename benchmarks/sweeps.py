"""What a sweep costs around its training: from trial to trial, and what the driver pays for each.

    python benchmarks/sweeps.py [--rounds 2] [--trials 300] [--search grid tpe]

`start`: from the end of a trial to the first optimiser step of the next, against a TorchTrainer
on the same cluster, from fit() to torch imported and to the first step of Adam; they take turns.
`simulated`: trials that report a made-up curve and log it as a run does, but train nothing, through
searcher, ASHA and tracker. Costs are the driver's CPU seconds and the wall clock per trial, the
last tenth of the trials over the first. A request is a call of MLflow's store, one HTTP request
where that is a server; artifacts are not counted. --rounds 0 and --trials 0 leave a part out.
"""

import argparse
import functools
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
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

from ddpm_ray.cluster import group, tracking
from ddpm_ray.cluster.sweep import SweepOutcome, sweep
from ddpm_ray.cluster.tracking import Tracker
from ddpm_ray.cluster.trial import Board, tell
from ddpm_ray.config import RunConfig
from ddpm_ray.knobs import from_dict, load
from ddpm_ray.sweep_config import SweepConfig
from ddpm_ray.training.probing import LEVELS
from ddpm_ray.training.reporting import Row

CONF = Path(__file__).parents[1] / "conf"
STARTS = 4  # trials of a round, and so many bare starts less one
AT_ONCE = 4  # simulated trials side by side
STEPS, EVERY = 240, 40  # of a simulated trial, and between its probes
SCORE, PICTURE = "eval/fd_digits", "samples.png"
TINY = (
    "run.model.base_channels=16", "run.model.channel_mults=[1,2]", "run.model.groups=4",
    "run.model.attention_resolutions=[4]", "run.training.steps=40", "run.training.warmup_steps=10",
    "run.training.checkpoint_every_steps=20", "run.training.grid_every_steps=40",
    "run.training.log_every_steps=20", "run.sampling.steps=5", "run.evaluation.num_images=32",
    "space=[{schedule.num_steps: [1000, 750, 500, 250]}]", "stopping.kind=none", "trials_at_once=1",
)  # fmt: skip
RANGES = "{training.learning_rate: {low: 1e-5, high: 1e-1, log: true}, \
schedule.num_steps: {low: 100, high: 1000}}"
COLUMNS = "{:<10} {:>7} {:>21} {:>21} {:>20} {:>9} {:>21}"


def first_step(_: dict[str, Any]) -> tuple[float, float]:
    """When a worker's function began and had torch, and when Adam had taken its first step."""
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
    outcomes = [trial.outcome for trial in sweep(config, folder, lambda *_: None).trials]
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


def simulated(told: dict[str, Any], *, board: Board, sweep_run_id: str) -> None:
    """In a trial's place: a curve that falls towards what the values are worth, and its run."""
    number, began, before = told["number"], time.time(), requests_so_far()
    config = from_dict(RunConfig, told["config"])
    uri, of = config.tracking.uri, f"{sweep_run_id} {number}"
    run = tracking.find_or_create_run(
        uri, config.tracking.experiment, told["label"], of, None, sweep_run_id
    )
    sink = Tracker(run, config.tracking.flush_every_s, [])
    worth = abs(math.log10(config.training.learning_rate) + 3) + 100 / config.schedule.num_steps
    loss = worth + float(np.random.default_rng(number).normal()) / 10
    for step in range(EVERY, STEPS + 1, EVERY):
        spectrum = [(loss + EVERY / step) / (1 + math.exp(level)) for level in LEVELS]
        tell(number, "probe", probe={"step": step, "loss": sum(spectrum), "spectrum": spectrum})
        by_level = {f"eval/loss_logsnr/{x:g}": y for x, y in zip(LEVELS, spectrum, strict=True)}
        sink.rows([Row(step, {"eval/loss_common": sum(spectrum)} | by_level)])
        if step < STEPS and board.is_to_stop(number):
            break
    sink.close(60)
    client = MlflowClient(tracking_uri=uri)
    model = client.create_logged_model(run.experiment_id, "model", run.run_id)
    client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])
    finished, ended = step == STEPS, time.time()
    tracking.finish(run, "FINISHED" if finished else "KILLED")
    scores = {SCORE: loss, f"{SCORE}_low": loss - 0.1, f"{SCORE}_high": loss + 0.1}
    outcome = {
        "run_id": run.run_id, "checkpoint": "none", "step": step, "certificate": {},
        "num_steps": config.schedule.num_steps, "samples": f"{config.data.url}/{PICTURE}",
        "metrics": scores if finished else {}, "busy_s": ended - began, "first_step_at": began,
        "last_step_at": ended, "began": began, "ended": ended, "worker_s": ended - began,
        "requests": requests_so_far() - before,
    }  # fmt: skip
    tell(number, "ended", finished=finished, outcome=outcome)


def simulate(folder: Path, search: str, trials: int) -> None:
    if search == "grid":
        rates = np.geomspace(1e-5, 1e-1, -(-trials // 10)).tolist()
        steps = list(range(100, 1001, 100))
        space = f"{{training.learning_rate: {rates}, schedule.num_steps: {steps}}}"
    else:
        space = RANGES
    config = configured(
        folder, f"space=[{space}]", f"search.kind={search}", f"search.trials={trials}",
        f"run.training.steps={STEPS}", f"stopping.every_steps={EVERY}", f"trials_at_once={AT_ONCE}",
    )  # fmt: skip
    seen: dict[int, tuple[float, float]] = {}  # trials that are over: when they were first seen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = requests_so_far()

    def show(ended: int, total: int, note: str) -> None:
        seen.setdefault(ended, (time.process_time(), time.perf_counter()))

    begun = time.perf_counter()
    outcome = sweep(config, folder, show, simulated)
    wall_s, rss_gb = time.perf_counter() - begun, peak_gb()
    report_costs(search, outcome, seen, requests_so_far() - before, rss_gb, wall_s)


def report_costs(
    search: str,
    outcome: SweepOutcome,
    seen: dict[int, tuple[float, float]],
    requests: int,
    rss_gb: float,
    wall_s: float,
) -> None:
    trials = len(outcome.trials)
    ends = np.array([1, trials // 10, trials - trials // 10, max(seen)])
    cells = []
    for clock in zip(*seen.values(), strict=True):
        at = np.interp(ends, [*seen], clock)
        first, last = (at[1] - at[0]) / (ends[1] - ends[0]), (at[3] - at[2]) / (ends[3] - ends[2])
        cells.append(f"{first * 1e3:.0f} -> {last * 1e3:.0f} ms, x{last / first:.2f}")
    own = sum(trial.outcome.get("requests", 0) for trial in outcome.trials) / trials
    logged = sum(len(trial.probes) for trial in outcome.trials) * (len(LEVELS) + 1) / trials
    calls = f"{requests / trials:.1f} + {own:.1f} ({logged:.0f})"
    stopped = f"{outcome.report['trials']['stopped']}/{outcome.report['trials']['finished']}"
    print(
        COLUMNS.format(search, trials, *cells, calls, f"{rss_gb:.2f}", f"{stopped}, {wall_s:.0f} s")
    )


def configured(folder: Path, *keys: str) -> SweepConfig:
    """The quick sweep with these keys, under a new name in `folder`."""
    places = f"run.storage={folder}/runs", f"run.tracking.uri=sqlite:///{folder}/mlflow.db"
    own = (
        f"name=s{uuid.uuid4().hex[:8]}",
        f"run_from={CONF}/train/digits.yaml",
        f"run.data.url={folder}/digits",
        *places,
    )
    return load(SweepConfig, f"{CONF}/sweep/quick.yaml", [*own, *keys])


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
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--search", nargs="+", default=["grid", "tpe"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        group.connect("", AT_ONCE)
        if arguments.rounds:
            compare_starts(folder, arguments.rounds)
        noise = np.random.default_rng(0).integers(0, 256, (274, 274, 3), dtype=np.uint8)
        (folder / "digits").mkdir(exist_ok=True)  # not yet packed where rounds are 0
        Image.fromarray(noise).save(folder / "digits" / PICTURE)
        if arguments.trials:
            heads = "driver CPU/trial", "wall/trial", "requests (metrics)", "peak GB", "stop/end"
            print(COLUMNS.format("simulated", "trials", *heads))
            for search in arguments.search:
                simulate(folder, search, arguments.trials)
            print("goal: last over first tenth x1.5, peak 1.5 GB; requests: driver + run")
        ray.shutdown()


if __name__ == "__main__":
    main()
