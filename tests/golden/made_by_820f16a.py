"""A packed set, a run and a sweep of an earlier commit: what today's code must read and continue.

`tests/golden/made_by_820f16a/` holds what commit 820f16a left, the last one before options could be
renamed and before files carried format numbers:

    data/       40 images with labels, PNG inside, in 3 shards
    run/        a run after HALF of STEPS steps: run.json and one checkpoint
    quick/      a sweep of 3 trials: one finished, one stopped after HALF steps, one not begun
    ends.json   how it all ended there, and on which CPU: sha256 of its tensors and of what streams

Made there, once, by copying this file and old_runs.py into a checkout of that commit and running

    PYTHONPATH=. python -m tests.golden.made_by_820f16a
"""

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from ray.tune.search import Searcher

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.loader import ShardStream
from ddpm_ray.data.packing import packer
from ddpm_ray.distributed import worker_group
from ddpm_ray.reporting import Command, Progress
from ddpm_ray.runs import train as training_run
from ddpm_ray.storage import object_store
from ddpm_ray.sweep import capacity, driver
from ddpm_ray.sweep.trial import run_trial
from ddpm_ray.sweep.trial_store import Trial
from ddpm_ray.tracking import model_registry
from ddpm_ray.training import checkpoint_folder
from tests.golden.old_runs import cpu_model, without_ray

HALF, STEPS = 4, 8
FOLDER = Path(__file__).parent / "made_by_820f16a"
CLASSES, IMAGES, SIDE, SHARD_SAMPLES = ("owl", "tit", "wren"), 40, 8, 16
COMMON = (
    "schedule.num_steps=60",
    "model.base_channels=2",
    "model.groups=1",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[4]",
    "model.num_classes=3",
    "model.dropout=0.1",
    "training.global_batch_size=8",
    "training.learning_rate=3e-3",
    "training.grid_every_steps=0",
    "training.ema_decay_per_step=0.8",
    f"training.checkpoint_every_steps={HALF}",
    f"training.log_every_steps={HALF}",
    "training.keep_checkpoints=2",
    "sampling.steps=2",
    "tracking.flush_every_s=0.02",
    "evaluation.spectrum_every_steps=2",
    "evaluation.spectrum_images=16",
)
SWEEP = (
    *(f"run.{key}" for key in COMMON),
    "name=quick",
    f"run.training.steps={STEPS}",
    "space=[{schedule.kind: [cosine, linear, sigmoid]}]",
    "run.evaluation.num_images=8",
    "run.evaluation.features=digits",
    "run.evaluation.kernel_distance=false",
    "search.kind=grid",
    "stopping.kind=median",
    "stopping.every_steps=2",
    "pruning.max_useless_share=1",
    "pruning.max_prior_bits_per_dim=9",
)
INTERRUPTED = 1  # the trial that is half done


def train(home: Path, steps: int) -> dict[str, str]:
    """Train or continue the run below `home` to `steps`: the sha256 of its tensors."""
    overrides = [*COMMON, "name=run", "evaluation.num_images=0", f"training.steps={steps}"]
    config = load_config(RunConfig, None, [*overrides, *_places(home)])
    with without_ray():
        outcome = training_run.run_training(config, home, lambda _: None)
    assert outcome.finished
    return digests(outcome.report["checkpoint"])


def run_sweep(home: Path, interrupted: int | None = None) -> tuple[list[int], list[Trial]]:
    """Begin or continue the sweep below `home`: which trials were worked on, and all that it has.

    It ends in the trial `interrupted`, at HALF its steps. Trials run one by one in this process.
    """
    overrides = [*SWEEP, *(f"run.{key}" for key in _places(home))]
    config, begun = load_config(SweepConfig, None, overrides), list[int]()

    def command(progress: Progress) -> Command:
        stops = begun[-1] == interrupted and progress.step >= HALF
        return Command.STOP if stops else Command.NONE

    def work(assignment: dict[str, Any], **settings: Any) -> None:
        begun.append(assignment["number"])
        run_trial(assignment, **settings)

    with _without_tune(lambda: begun[-1:] == [interrupted]), without_ray(command):
        outcome = driver.run_sweep(config, home, lambda *_: None, work)
    assert outcome.finished == (interrupted is None)
    return begun, outcome.trials


def trial_ends(trials: list[Trial]) -> list[dict[str, Any]]:
    """What is compared of each trial: its values, its losses, its scores and its weights."""
    return [
        {
            "values": trial.values,
            "status": trial.status,
            "losses": [[one["step"], one["loss"]] for one in trial.validation_losses],
            "metrics": trial.metrics,
        }
        for trial in trials
    ]


def digests(checkpoint: str) -> dict[str, str]:
    """The sha256 of each group of tensors in the checkpoint folder at this URL: names and bytes."""
    return {
        group: _sha256(b"".join(name.encode() + _bytes(tensors[name]) for name in sorted(tensors)))
        for group, tensors in checkpoint_folder.read_checkpoint(checkpoint).tensors.items()
    }


def streamed(url: str) -> list[str]:
    """The sha256 of each of 12 batches of 10 images of the set at `url`: pixels, labels, keys."""
    dataset = open_dataset(url)
    stream = ShardStream(
        dataset,
        seed=3,
        global_batch_size=10,
        positions=range(10),
        lanes=2,
        window_samples=1000 // dataset.manifest.sample_bytes,
    )
    found = []
    for step in range(12):
        batch, keys = stream.batch(step), stream.keys(step)
        parts = batch.images.numpy().tobytes(), batch.labels.numpy().tobytes(), "\n".join(keys)
        found.append(_sha256(parts[0] + parts[1] + parts[2].encode()))
    stream.close()
    return found


def _places(home: Path) -> list[str]:
    return [
        f"data.url={home / 'data'}",
        f"storage={home}",
        f"tracking.uri=sqlite:///{home}/mlflow.db",
    ]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _without_tune(stops: Callable[[], bool]) -> Iterator[None]:
    """A sweep's trials run one after the other in this process, until `stops()`."""

    def run_all(function: Callable[[Any], None], searcher: Any) -> None:
        for trial_id in map(str, itertools.count()):
            assignment = searcher.suggest(trial_id)
            if assignment is None or assignment == Searcher.FINISHED:
                return
            report = partial(searcher.on_trial_result, trial_id)
            with mock.patch("ray.tune.report", report):
                function(assignment)
            searcher.on_trial_complete(trial_id)
            searcher._scheduler.closing = stops()

    stop_signals = mock.MagicMock()
    stop_signals.return_value.is_set.return_value = False
    with (
        mock.patch.object(driver, "_run_tune", run_all),
        mock.patch.object(driver, "StopSignals", stop_signals),
        mock.patch("ray.tune.with_parameters", partial),
        mock.patch.object(worker_group, "connect"),
        mock.patch.object(capacity, "trials_at_once", return_value=1),
        mock.patch.object(model_registry, "promote", return_value=None),
    ):
        yield


def _pack(home: Path) -> None:
    """Noise in three classes, packed from a folder of PNG files."""
    noise = np.random.default_rng(5).integers(0, 256, (IMAGES, SIDE, SIDE)).astype(np.uint8)
    for number, image in enumerate(noise):
        folder = home / "source" / CLASSES[number % len(CLASSES)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    options = PackConfig(encoding="png", shard_bytes=SHARD_SAMPLES * SIDE * SIDE)
    plan = packer.make_plan(str(home / "source"), str(home / "data"), options)
    packer.finish_dataset(plan, [packer.pack_shard(plan, number) for number in range(plan.shards)])


def _make() -> None:
    home = Path(tempfile.mkdtemp())
    _pack(home)
    train(home, HALF)
    run_sweep(home, INTERRUPTED)
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in ("data", "run", "quick"):
        shutil.copytree(home / name, FOLDER / name, ignore=shutil.ignore_patterns("pictures"))
    shutil.rmtree(FOLDER / "quick/runs/trial-00000")  # of a trial that is over nothing is read
    begun, trials = run_sweep(home)
    assert begun == [1, 2]
    ends = {
        "cpu": cpu_model(),
        "run": train(home, STEPS),
        "begun": begun,
        "trials": trial_ends(trials),
        "weights": [digests(trial.outcome["checkpoint"]) for trial in trials],
        "fingerprint": open_dataset(str(home / "data")).fingerprint,
        "streamed": streamed(object_store.join(str(home), "data")),
    }
    (FOLDER / "ends.json").write_text(json.dumps(ends, indent=1) + "\n")
    shutil.rmtree(home)


if __name__ == "__main__":
    _make()
    print(sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()), "bytes")
