"""Runs of an earlier commit, half done: what today's code must continue to the same bits.

`tests/golden/old_runs/<name>/` holds what commit c58b265 left after HALF steps (run.json, one
checkpoint, the packed data) and `end.safetensors`, the weights that it had after STEPS steps, with
the model of the CPU that it ran on.
Made there, once, by copying this file into a checkout of that commit and running

    PYTHONPATH=. python -m tests.golden.old_runs
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import torch as safetensors

from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.distributed import placement_groups, worker_group
from ddpm_ray.reporting import Command, Progress
from ddpm_ray.runs import train as training_run
from ddpm_ray.runs import train_worker
from ddpm_ray.tracking import model_registry
from ddpm_ray.training import checkpoint_folder
from tests.noise import pack_noise

HALF, STEPS = 4, 8
FOLDER = Path(__file__).parent / "old_runs"
COMMON = (
    "schedule.num_steps=60",
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[4]",
    "model.dropout=0.1",
    "training.global_batch_size=8",
    "training.learning_rate=3e-3",
    "training.grid_every_steps=0",
    "training.ema_decay_per_step=0.8",
    f"training.checkpoint_every_steps={HALF}",
    "training.keep_checkpoints=2",
    "sampling.steps=2",
    "tracking.flush_every_s=0.02",
    "evaluation.num_images=0",
    "data.flip=true",
)
RUNS = {
    "ho": ("evaluation.spectrum_every_steps=2", "evaluation.spectrum_images=16"),
    "toolbox": (
        "objective.variance=learned_range",
        "objective.loss=hybrid",
        "objective.prediction=v",
        "objective.timesteps=second_moment",
        "objective.self_conditioning=true",
        "objective.offset_noise=0.1",
        "training.ema_more_decays=[0.5]",
        "training.reduction=elastic",
        "training.reduction_slots=2",
        "training.on_divergence=skip",
        "training.spike_factor=5",
        "schedule.kind=cosine",
        "training.warmup_steps=3",
    ),
}


def train(name: str, home: Path, steps: int) -> dict[str, torch.Tensor]:
    """Train or continue the run `name` below `home` to `steps`; the weights of its checkpoint.

    All is as in a real run, the driver's checks too, but for Ray: the one worker is this process.
    """
    where = (f"name={name}", f"data.url={home / 'data'}", f"storage={home}")
    mlflow = f"tracking.uri=sqlite:///{home / 'mlflow.db'}"
    overrides = [*COMMON, *RUNS[name], *where, mlflow, f"training.steps={steps}"]
    with without_ray():
        config = load_config(RunConfig, None, overrides)
        outcome = training_run.run_training(config, home, lambda _: None)
    assert outcome.finished
    snapshot = checkpoint_folder.read_checkpoint(outcome.report["checkpoint"])
    assert snapshot.step == steps
    return {
        f"{group}.{key}": tensor
        for group, tensors in snapshot.tensors.items()
        for key, tensor in tensors.items()
    }


def cpu_model() -> str:
    """The processor; kernels, and so the last bits of a sum, are chosen by it.

    Its name alone is too little: virtual machines call processors of different families AMD EPYC,
    and two of them gave different bits with the same code (3d80003).
    """
    text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    parts = [line.partition(":") for line in text.splitlines()]
    pairs = {key.strip(): value.strip() for key, _, value in parts}
    keys = ("cpu family", "model", "stepping")
    return ", ".join([pairs.get("model name", ""), *(f"{key} {pairs.get(key)}" for key in keys)])


@contextmanager
def without_ray(command: Callable[[Progress], Command] = lambda _: Command.NONE) -> Iterator[None]:
    """Runs train in this process; `command(progress)` is what their driver asks of them."""

    def run(work: Any, settings: dict[str, Any], *_: Any) -> Any:
        control = mock.MagicMock()
        control.status.return_value.fatal = None
        control.report.side_effect = command
        return work(settings | {"control": control})

    with (
        mock.patch.object(worker_group, "run", run),
        mock.patch.object(train_worker, "distributed_context", return_value=Workers(0, 1)),
        mock.patch.object(placement_groups, "current_group", return_value="none"),
        mock.patch("socket.gethostname", return_value="host"),
        mock.patch.object(model_registry, "log_model"),
    ):
        yield


def _make(name: str) -> None:
    home = Path(tempfile.mkdtemp())
    pack_noise(str(home / "data"), images=20, side=4)
    train(name, home, HALF)
    kept = FOLDER / name
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(home / "data", kept / "data")
    shutil.copytree(home / name, kept / name, ignore=shutil.ignore_patterns("pictures"))
    ended = train(name, home, STEPS)
    safetensors.save_file(ended, kept / "end.safetensors", {"cpu": cpu_model()})
    shutil.rmtree(home)


if __name__ == "__main__":
    for each in RUNS:
        _make(each)
        print(each, sum(file.stat().st_size for file in (FOLDER / each).rglob("*")), "bytes")
