"""A training run in processes that die and are started again, as Ray does it but without Ray.

The processes are forked by a server that has imported everything, so a life costs little more than
its steps. All else is real: storage, checkpoints, gloo, MLflow on SQLite, SIGKILL.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from mlflow import MlflowClient

from ddpm_ray import counter_rng, fault_injection
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import from_dict, load_config, to_dict, to_yaml
from ddpm_ray.config.run import RunConfig
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.reporting import RATES, Command, Progress
from ddpm_ray.runs import train as training_run
from ddpm_ray.runs.train_worker import assemble
from ddpm_ray.tracking import mlflow_runs
from ddpm_ray.tracking.run_info import RunMetadata, TrackedRun
from ddpm_ray.training import checkpoint_parts
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.run import Run
from ddpm_ray.training.writer_lease import Lease
from tests.fixtures.forkserver import FORKSERVER

STEPS, EVERY = 24, 5
TINY = (
    "name=tiny",
    "schedule.num_steps=60",
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[4]",
    "model.dropout=0.1",
    f"training.steps={STEPS}",
    f"training.checkpoint_every_steps={EVERY}",
    "training.global_batch_size=8",
    "training.log_every_steps=4",
    "training.learning_rate=3e-3",
    "training.learning_rate_decay=cosine",
    "training.weight_decay=0.1",
    "training.grid_every_steps=0",
    "training.ema_decay_per_step=0.8",
    "sampling.steps=2",
    "evaluation.validation_every_steps=6",
    "evaluation.validation_images=16",
    "tracking.flush_every_s=0.02",
)
TINY_AUTOENCODER = (
    "task=autoencoder",
    "autoencoder.base_channels=4",
    "autoencoder.groups=2",
    "autoencoder.channel_mults=[1,2]",
    "autoencoder.blocks_per_level=1",
    "autoencoder.discriminator_channels=8",
)
AUTOENCODER = (  # with an adversary from a step between two checkpoints on
    "name=tiny",
    *TINY_AUTOENCODER,
    "autoencoder.discriminator_from_step=8",
    f"training.steps={STEPS}",
    f"training.checkpoint_every_steps={EVERY}",
    "training.global_batch_size=8",
    "training.log_every_steps=4",
    "training.learning_rate=3e-3",
    "training.grid_every_steps=12",
    "training.ema_decay_per_step=0.8",
    "evaluation.num_images=16",
    "evaluation.features=none",
    "tracking.flush_every_s=0.02",
)
LIFE_S = 180  # most seconds of one life; it takes one or two, more while MLflow is away


@dataclass
class Ended:
    """What a run left behind: the bytes of its last checkpoint, and its rows in MLflow."""

    hashes: dict[str, str]
    rows: dict[str, list[tuple[int, float]]]  # (step, value) by key, in the order of MLflow's
    runs: int
    status: str
    orphans: int  # checkpoint folders that nobody points to

    def same_rows(self) -> dict[str, list[tuple[int, float]]]:
        """Rows without the rates, which are clocks: of these the steps alone."""
        return {
            key: [(step, 0.0 if key in RATES else value) for step, value in rows]
            for key, rows in self.rows.items()
        }


@dataclass
class Life:
    """One run's place, and how often its workers were started."""

    folder: Path
    data: str
    overrides: tuple[str, ...] = TINY
    config_file: str | None = None
    record_draws: bool = False  # what each worker draws is written down: see `drawn`
    uri: str = ""  # MLflow's; empty: a database in the folder
    meter: bool = False  # the main worker's memory and open files are written down: see `metered`
    part_bytes: int = 0  # most of a checkpoint's file; 0: no group is split
    lives: int = 0
    tracked: TrackedRun | None = None
    lease: Lease | None = None
    init_from: dict[str, Any] | None = None  # initial weights, as the driver found them
    config: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        uri = self.uri or f"sqlite:///{self.folder / 'mlflow.db'}"
        where = (f"data.url={self.data}", f"storage={self.folder}", f"tracking.uri={uri}")
        self.config = load_config(RunConfig, self.config_file, [*self.overrides, *where])

    @property
    def metadata(self) -> RunMetadata:
        return RunMetadata(
            self.config.tracking.uri,
            "faults",
            "tiny",
            "identity",
            str(self.folder / "artifacts"),
            "",
            {},
            {},
            to_yaml(self.config),
            self.data,
            "fingerprint",
        )

    def drive(self) -> None:
        """What the driver does before it starts workers: find the MLflow run, take its lease."""
        self.tracked = training_run._tracked(self.metadata)
        checkpoints = str(self.folder / "tiny" / CHECKPOINTS)
        self.lease = Lease.first(checkpoints, CheckpointStore(checkpoints).pointer().epoch)

    def live(self, count: int, planned: str = "") -> bool:
        """Start `count` workers with `planned` faults; True once all have trained to the end.

        As Ray's controller does, it kills the others where one has died.
        """
        assert self.lease is not None
        self.lives += 1
        settings = {
            "config": to_dict(self.config),
            "folder": str(self.folder / "tiny"),
            "identity": "identity",
            "init_from": self.init_from,
            "lease": vars(self.lease),
            "metadata": vars(self.metadata),
            "tracked": vars(self.tracked) if self.tracked else None,
            "draws": str(self.folder / f"draws-{self.lives}-") if self.record_draws else "",
            "meter": str(self.folder / "meter") if self.meter else "",
            "part_bytes": self.part_bytes,
        }
        meeting = self.folder / f"meeting-{self.lives}"
        workers = [
            FORKSERVER.Process(target=_work, args=(rank, count, str(meeting), settings, planned))
            for rank in range(count)
        ]
        for worker in workers:
            worker.start()
        with _none_left(workers):
            alive = {worker.sentinel: worker for worker in workers}
            while alive:
                ended = wait(list(alive), timeout=LIFE_S)
                assert ended, "a life that does not end"
                if any(alive[sentinel].exitcode for sentinel in ended):  # type: ignore[index]
                    return False
                alive = {key: worker for key, worker in alive.items() if key not in ended}
        return True

    def end(self) -> Ended:
        """Close the MLflow run and look at all there is."""
        self.tracked = self.tracked or mlflow_runs.open_run(self.metadata)
        mlflow_runs.finish(self.tracked, "FINISHED")
        client = MlflowClient(tracking_uri=self.config.tracking.uri)
        run = client.get_run(self.tracked.run_id)
        checkpoints = self.folder / "tiny" / CHECKPOINTS
        store = CheckpointStore(str(checkpoints))
        found, known = store.load(), store.pointer().references
        assert found is not None
        return Ended(
            hashes(found[0]),
            {
                key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
                for key in sorted(run.data.metrics)
            },
            len(client.search_runs([run.info.experiment_id])),
            run.info.status,
            len(list(checkpoints.glob("step-*"))) - len(known),
        )

    def drawn(self, what: str) -> dict[tuple[int, int], set[str]]:
        """By step and position: the "sample" or the "noise" (a hash) that any life drew there."""
        found: dict[tuple[int, int], set[str]] = {}
        for file in self.folder.glob("draws-*"):
            for kind, step, position, drawn in map(str.split, file.read_text().splitlines()):
                if kind == what:
                    found.setdefault((int(step), int(position)), set()).add(drawn)
        return found

    def metered(self) -> list[tuple[int, int, int]]:
        """(step, resident bytes, open files) of the main workers, told a few times a second."""
        lines = (self.folder / "meter").read_text().splitlines()
        return [(int(step), int(size), int(files)) for step, size, files in map(str.split, lines)]

    def facts(self) -> dict[str, Any]:
        """Facts of the newest checkpoint."""
        found = CheckpointStore(str(self.folder / "tiny" / CHECKPOINTS)).load(groups=())
        assert found is not None
        return found[1].facts

    def forget(self) -> None:
        """Free the disk: a hundred runs leave a gigabyte."""
        shutil.rmtree(self.folder)


def hashes(checkpoint: str) -> dict[str, str]:
    """sha256 of each file of tensors in the folder `checkpoint`."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _work(rank: int, count: int, meeting: str, settings: dict[str, Any], planned: str) -> None:
    if planned:
        os.environ[fault_injection.VARIABLE] = planned
    if settings["part_bytes"]:
        checkpoint_parts.PART_BYTES = settings["part_bytes"]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=LIFE_S),
    )
    config = from_dict(RunConfig, settings["config"])
    show = partial(_show, settings["meter"])
    run = assemble(config, settings, show, Workers(rank, count))
    if settings["draws"]:
        _record_draws(run, Path(f"{settings['draws']}{rank}"))
    try:
        train_loop(run)
    finally:
        run.stream.close()
    if run.sink is not None:
        assert run.sink.close(LIFE_S) == 0


def _show(meter: str, progress: Progress) -> Command:
    if meter:
        process = psutil.Process()
        with Path(meter).open("a") as lines:
            lines.write(f"{progress.step} {process.memory_info().rss} {process.num_fds()}\n")
    return Command.NONE


def _record_draws(run: Run, file: Path) -> None:
    """Write down which sample and which noise each position of each step is given."""
    batch, normal = run.stream.batch, counter_rng.normal
    first = run.workers.share(run.plan.global_batch_size).start

    def note(kind: str, step: int, positions: Iterable[int], drawn: Iterable[str]) -> None:
        with file.open("a") as draws:
            for position, one in zip(positions, drawn, strict=True):
                draws.write(f"{kind} {step} {position} {one}\n")

    def noted_batch(step: int, out: Any = None) -> Any:
        keys = run.stream.keys(step)
        note("sample", step, range(first, first + len(keys)), keys)
        return batch(step, out)

    def noted_normal(seed: int, purpose: Purpose, step: int, index: Any, *rest: Any) -> Any:
        noise = normal(seed, purpose, step, index, *rest)
        if purpose is Purpose.NOISE:
            digests = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in noise]
            note("noise", step, index.tolist(), digests)
        return noise

    run.stream.batch = noted_batch  # type: ignore[method-assign]
    counter_rng.normal = noted_normal  # type: ignore[assignment]


@contextlib.contextmanager
def _none_left(workers: Sequence[BaseProcess]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
