"""A training step inside Ray Train against a bare torch loop, and what stands around the step.

    python benchmarks/training.py [rounds] [pixels|latents]

The 2.2 M-parameter U-Net on 3x32x32 images, or a 2.5 M-parameter one on 4x16x16 latents of 64x64
images; batch 16, one worker, one thread. The bare loop has the network, a torch.randn noise, Adam
and nothing else: no EMA, no clip, no data, no log, and of latents no draw from the posterior. Both
take turns in the same worker process, step by step, and are read in CPU seconds of the calling
thread (the data thread's reading ahead is shown apart). Shares are of our step's time.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from ddpm_ray.assembly import networks
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.loading import from_dict, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.counter_rng import Purpose, normal, uniform_int
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import ShardStream
from ddpm_ray.data.packing import encoded_packer, packer
from ddpm_ray.data.packing.latent_encoder import LatentEncoder
from ddpm_ray.distributed import worker_group
from ddpm_ray.distributed.worker_context import distributed_context
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.reporting import Command
from ddpm_ray.runs.train_worker import assemble
from ddpm_ray.storage.object_store import write_bytes
from ddpm_ray.tracking import run_lookup
from ddpm_ray.training.loop import report, save, take_step
from ddpm_ray.training.masked_updates import step_optimizer
from ddpm_ray.training.objective import Objective
from ddpm_ray.training.run import Run
from ddpm_ray.training.writer_lease import Lease

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
BATCH = 16
SET = sys.argv[2] if len(sys.argv) > 2 else "pixels"
SIDE = {"pixels": 32, "latents": 64}[SET]
NETWORK = {
    "pixels": ["model.base_channels=32"],
    "latents": [
        "model.base_channels=48",
        "model.channel_mults=[1,2,2]",
        "model.blocks_per_level=1",
    ],
}
KEYS = [
    "name=bench",
    "data.lanes=8",
    *NETWORK[SET],
    "model.groups=8",
    f"training.global_batch_size={BATCH}",
    "training.steps=1000000",
]


def timed(action: Callable[[], Any]) -> float:
    """CPU seconds of this thread in `action`."""
    start = time.thread_time()
    action()
    return time.thread_time() - start


def bare_step(run: Run) -> Callable[[], None]:
    """A step of the same network with torch alone."""
    torch.manual_seed(0)
    config = from_dict(RunConfig, run.state.facts["config"])
    assert isinstance(run.stream, ShardStream)
    shape = run.stream.dataset.manifest.diffused_shape
    network = networks.network(config, shape)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, fused=True)
    x_0 = torch.rand(BATCH, shape.channels, shape.height, shape.width) * 2 - 1
    assert isinstance(run.objective, Objective)
    a = run.objective.schedule.alpha_bar.float()

    def step() -> None:
        t, noise = torch.randint(1, len(a), (BATCH,)), torch.randn_like(x_0)
        a_t = a[t].view(-1, 1, 1, 1)
        prediction = network(a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise, t)
        torch.nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def besides_network(run: Run) -> Callable[[], None]:
    """The parts of our step other than the network: noise, clip, Adam, EMA, keeping the losses."""
    objective, state, plan = run.objective, run.state, run.plan
    assert isinstance(objective, Objective)
    positions, losses = torch.arange(BATCH), torch.rand(BATCH)
    batch = run.stream.batch(state.step)
    objective.backward(run.network, batch, 0, run.workers, BATCH)
    shape = objective.noising.codec.shape(ImageShape(SIDE, SIDE, 3))

    def parts() -> None:
        t = 1 + uniform_int(0, Purpose.TIMESTEP, 1, positions, objective.schedule.num_steps)
        normal(0, Purpose.NOISE, 1, positions, shape)
        if SET == "latents":
            normal(0, Purpose.POSTERIOR, 1, positions, shape)
        norm = clip_grad_norm_(run.network.parameters(), plan.max_grad_norm, foreach=True)
        accepted = run.guard.accept(norm)
        step_optimizer(state.optimizer, 1e-9, accepted)
        state.ema.update(state.model, 0.999, accepted)
        log_snr = objective.schedule.log_snr(t)
        run.log.record(losses, log_snr, grad_norm=norm, accepted=accepted, learning_rate=1e-9)

    return parts


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds per step of each contestant, round by round."""
    config = from_dict(RunConfig, settings["config"])
    run = assemble(config, settings, lambda progress: Command.NONE, distributed_context())
    contestants = {
        "bare": bare_step(run),
        "ours": lambda: take_step(run),
    }
    for step in contestants.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    waited_s, begun = run.stream.waited_s, time.perf_counter()
    own_wall_s = 0.0
    for _ in range(settings["rounds"]):
        for name, step in contestants.items():
            wall = time.perf_counter()
            times[name].append(timed(step))
            own_wall_s += (time.perf_counter() - wall) * (name == "ours")
    around = {
        "report": timed(lambda: report(run)),
        "save": timed(lambda: save(run)),
        "grid": timed(lambda: run.draw_grid(run.state.step)),
    }
    run.checkpoints.wait()
    parts = besides_network(run)
    times["besides"] = [timed(parts) for _ in range(5 * settings["rounds"])]
    wait_share = (run.stream.waited_s - waited_s) / own_wall_s
    run.stream.close()
    if run.sink is not None:
        run.sink.close(30)
    return {
        "times": times,
        "around": around,
        "wait_share": wait_share,
        "wall_s": time.perf_counter() - begun,
    }


def packed(folder: Path) -> str:
    """A data set of 2,048 random images, or of their latents, in the format of training."""
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (2048, SIDE, SIDE, 3), dtype=np.uint8)
    (folder / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "png" / f"{i:05}.png", compress_level=0)
    plan = packer.make_plan(str(folder / "png"), str(folder / "shards"), PackConfig())
    pixels = packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in range(plan.shards)])
    return encoded(pixels, folder) if SET == "latents" else pixels.url


def encoded(images: Dataset, folder: Path) -> str:
    """Latents of factor 4 and 4 channels of `images`, by an autoencoder with random weights."""
    spec = AutoencoderSpec(3, 4, 8, (1, 1, 1), 1, 8, middle_attention=False)
    tensors = Autoencoder(spec).state_dict()
    autoencoder_kl.write_folder(folder / "autoencoder", spec, tensors, (SIDE, SIDE), write_bytes)
    encoder = LatentEncoder(trained_autoencoder(str(folder / "autoencoder")))
    plan = encoded_packer.make_encoding_plan(
        images, str(folder / "latents"), encoder, EncodeConfig()
    )
    parts = [encoded_packer.encode_shard(plan, n, encoder) for n in range(plan.shards)]
    return encoded_packer.finish_encoded(plan, parts).url


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        url = packed(folder)
        config = load_config(RunConfig, None, [*KEYS, f"data.url={url}", f"tracking.uri={uri}"])
        tracked = run_lookup.find_or_create_run(uri, "bench", "bench", "bench", scratch)
        settings = {
            "config": to_dict(config),
            "folder": str(folder / "run"),
            "identity": "bench",
            "tracked": vars(tracked),
            "rounds": ROUNDS,
            "lease": vars(Lease.first(str(folder / "run/checkpoints"))),
        }
        cluster = ClusterConfig(num_workers=1)
        found = worker_group.run(worker, settings, cluster, lambda progress: None)
    times, around, training = found["times"], found["around"], config.training
    ratios = [bare / ours for bare, ours in zip(times["bare"], times["ours"], strict=True)]
    step_s = median(times["ours"])
    per_step = (
        around["report"] / ROUNDS
        + around["save"] / training.checkpoint_every_steps
        + around["grid"] / training.grid_every_steps
    )
    print(f"{SET}, batch {BATCH}, {ROUNDS} rounds; median (min .. max)")
    for name, seconds in times.items():
        print(f"{name:<44} {median(seconds) * 1e3:8.1f} ms CPU")
    print(f"{'ours / bare, images per CPU s':<44} {shown(ratios)}")
    besides = median(times["besides"]) / step_s
    print(f"{'noise, clip, Adam, EMA, log: share of step':<44} {besides:8.4f}")
    print(f"{'ours: waiting for data, share of wall':<44} {found['wait_share']:8.4f}")
    print(
        f"{'rows, checkpoint copy, grid: share of step':<44} {per_step / step_s:8.4f}"
        f"   (grid {around['grid']:.1f} s, copy {around['save']:.2f} s)"
    )
    print(json.dumps({"ours_over_bare": median(ratios), "besides_network": besides}))


def shown(values: list[float]) -> str:
    """Median and range."""
    return f"{median(values):8.3f} ({min(values):.3f} .. {max(values):.3f})"


if __name__ == "__main__":
    main()
