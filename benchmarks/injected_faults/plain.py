"""The anchor: a training function as Ray Train's documentation has it, on the same network.

It imports what such a function needs and no more, because a start of it is timed. Of ours it passes
the marked points, so that the same faults are injected as into our workers, and notes its steps.
"""

import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import ray.train
import torch
from ray.train import Checkpoint
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.injected_faults.notes import note
from ddpm_ray import fault_injection
from ddpm_ray.models.unet import UNet

KEY = "loss"  # of its rows in MLflow


def plain_worker(settings: dict[str, Any]) -> None:
    """Train; report a checkpoint every settings["every"] steps and go on from the newest one."""
    os.environ.update(settings["environment"])
    home, rank = Path(settings["home"]), ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model = UNet(settings["network"])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    begins = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            kept = torch.load(Path(folder, "state.pt"))
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        begins = kept["step"]
    network = ray.train.torch.prepare_model(model)
    images = TensorDataset(torch.from_numpy(np.load(settings["images"])))
    loader = DataLoader(images, settings["batch"], shuffle=True, drop_last=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    batches = (batch for _ in count() for (batch,) in loader)
    a = torch.linspace(1, 0.01, settings["num_steps"])
    if rank == 0:
        mlflow.set_tracking_uri(settings["uri"])
        mlflow.start_run(run_id=settings["run_id"])
    durable = begins
    for step in range(begins + 1, settings["steps"] + 1):
        fault_injection.set_position(rank, step)
        x_0 = next(batches)
        t, noise = torch.randint(len(a), (len(x_0),)), torch.randn_like(x_0)
        a_t = a[t].view(-1, 1, 1, 1)
        prediction = network(a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise, t)
        loss = torch.nn.functional.mse_loss(prediction, noise)
        fault_injection.at("gradient")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            mlflow.log_metric(KEY, loss.item(), step=step)
        note(home, rank, step, durable)
        if step % settings["every"] == 0:
            report(model, optimizer, step, rank)
            durable = step


def report(model: UNet, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    """All ranks report; the first one brings the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(folder, "state.pt"))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=checkpoint)
