"""An autoencoder trains in the same loop: killed, continued and resized, it keeps its bits."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu.tiny import Notes, config_of, run_of
from benchmarks.gpu.tiny_keys import ADVERSARY, AUTOENCODER
from ddpm_ray.collectives import Workers
from ddpm_ray.models.autoencoder import Autoencoder, Posterior
from ddpm_ray.training.autoencoder_objective import AutoencoderObjective
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.loop import Run, save, take_step, train_loop
from ddpm_ray.training.posterior_monitor import PosteriorMonitor
from ddpm_ray.training.state import Snapshot

CPU, SIDE, BATCH = torch.device("cpu"), 24, 8
LATE = [*AUTOENCODER, *ADVERSARY, "autoencoder.discriminator_from_step=3"]
ELASTIC = ["training.reduction=elastic", "training.reduction_slots=4"]
TASKS = {"alone": AUTOENCODER, "adversary": LATE}
STEPS = 6


def begun(keys: list[str], folder: Path) -> Run:
    """A run, from the newest checkpoint in `folder` if there is one."""
    more = [f"training.steps={STEPS}", "training.checkpoint_every_steps=2"]
    run = run_of(config_of([*keys, *more]), CPU, SIDE, str(folder))
    if found := CheckpointStore(str(folder)).load():
        run.state.restore(found[1])
        run.log.resume(found[1].facts["bands"])
        run.guard.resume(found[1].facts["guard"])
    return run


def assert_same_bits(one: Snapshot, other: Snapshot) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for group, tensors in one.tensors.items():
        unequal = [k for k, v in tensors.items() if not torch.equal(v, other.tensors[group][k])]
        assert tensors.keys() == other.tensors[group].keys()
        assert not unequal, f"{group}: {unequal}"


def rows(run: Run) -> dict[int, dict[str, float]]:
    assert isinstance(run.sink, Notes)
    return {row.step: dict(row.metrics) for row in run.sink.taken}


@pytest.mark.parametrize("name", TASKS)
def test_a_continued_run_ends_with_the_bits_of_an_unbroken_one(name: str, tmp_path: Path) -> None:
    """Both networks, both optimisers, the EMA and the adversarial weight."""
    whole = begun(TASKS[name], tmp_path / "whole")
    assert train_loop(whole)
    for steps in range(1, STEPS):
        broken = begun(TASKS[name], tmp_path / f"broken-{steps}")
        for _ in range(steps):
            take_step(broken)
        save(broken)
        broken.checkpoints.wait()
        again = begun(TASKS[name], tmp_path / f"broken-{steps}")
        assert again.state.step == steps
        assert train_loop(again)
        assert_same_bits(whole.state.snapshot([]), again.state.snapshot([]))
    groups = whole.state.snapshot([]).tensors
    assert ("discriminator" in groups) == (name == "adversary")
    if name == "adversary":
        assert groups["discriminator"]["adversarial_weight"] > 0
        assert groups["discriminator-optimizer"]  # its moments


@pytest.mark.parametrize("name", TASKS)
def test_micro_batches_change_rounding_alone(name: str, tmp_path: Path) -> None:
    one = begun(TASKS[name], tmp_path / "one")
    two = begun([*TASKS[name], "training.micro_batch_size=3"], tmp_path / "two")
    for _ in range(4):
        take_step(one)
        take_step(two)
    for a, b in zip(one.state.model.parameters(), two.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    if one.state.adversary is not None and two.state.adversary is not None:
        torch.testing.assert_close(
            one.state.adversary.weight, two.state.adversary.weight, rtol=1e-3, atol=0
        )


def test_a_bad_gradient_of_the_discriminator_stops_the_run(tmp_path: Path) -> None:
    run = begun([*AUTOENCODER, *ADVERSARY, "training.on_divergence=skip"], tmp_path)
    assert run.state.adversary is not None
    take_step(run)
    before = run.state.snapshot([])
    with torch.no_grad():
        broken = next(run.state.adversary.discriminator.parameters())
        kept = broken.clone()
        broken.fill_(math.nan)
    take_step(run)
    broken.data.copy_(kept)
    assert run.guard.skipped == 1
    assert_same_bits(before, run.state.snapshot([]))


def test_the_adversarial_weight_is_the_ratio_of_gradients_at_the_last_layer(
    tmp_path: Path,
) -> None:
    """By two whole backward passes, of which each sees one of the losses alone."""
    run = begun([*AUTOENCODER, *ADVERSARY, "autoencoder.kl_weight=0"], tmp_path)
    adversary, model, objective = run.state.adversary, run.state.model, run.objective
    assert adversary is not None
    assert isinstance(model, Autoencoder)
    assert isinstance(objective, AutoencoderObjective)
    batch, seen = run.stream.batch(0), list[Tensor]()

    def keep(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen.append(outputs[0])

    hook = model.register_forward_hook(keep)
    alone = replace(objective, adversary=None)
    alone.backward(model, batch.images, batch.labels, 0, run.workers, BATCH)
    hook.remove()
    last = model.last_layer.grad
    assert last is not None
    reconstruction = last.norm()
    run.state.zero_grad()
    x_hat = seen[0].detach().requires_grad_()
    (-adversary.discriminator(x_hat)).flatten(1).mean(1).mean().backward()

    def replace_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: x_hat.grad)

    hook = model.decoder.conv_out.register_forward_hook(replace_gradient)
    alone.backward(model, batch.images, batch.labels, 0, run.workers, BATCH)
    hook.remove()
    last = model.last_layer.grad
    assert last is not None
    adversarial = last.norm()
    run.state.zero_grad()
    take_step(run)
    torch.testing.assert_close(adversary.weight, reconstruction / adversarial, rtol=1e-4, atol=0)


def test_rows_say_what_was_reconstructed_and_told(tmp_path: Path) -> None:
    run = begun([*LATE, "autoencoder.kl_weight=0.25", "training.log_every_steps=2"], tmp_path)
    train_loop(run)
    found = rows(run)
    assert sorted(found) == [*range(1, STEPS + 1)]
    for step, row in found.items():
        assert not [key for key in row if key.startswith("train/loss_logsnr")]
        assert (row["train/discriminator"] > 0) == (step >= 3)
        assert row["train/channels_in_use"] in range(5)
        assert row["train/kl_bits"] >= 0
    assert "train/images_per_s" in found[2]


class OneDraw(nn.Module):
    """A network that gives back a fixed image and posterior."""

    def __init__(self, x_hat: Tensor, posterior: Posterior) -> None:
        super().__init__()
        self.x_hat, self.posterior = nn.Parameter(x_hat), posterior

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        return self.x_hat, self.posterior


@pytest.mark.parametrize("loss, error", [("l1", 0.5), ("mse", 0.25)])
def test_the_loss_is_that_of_a_known_error_and_a_known_posterior(
    loss: Any, error: float, tmp_path: Path
) -> None:
    """KL(N(1, 1) || N(0, 1)) is 1/2 nat per value; a constant error has no gradient difference."""
    run = begun(AUTOENCODER, tmp_path)
    objective = run.objective
    assert isinstance(objective, AutoencoderObjective)
    objective = replace(objective, loss=loss, kl_weight=2.0, flip=False)
    images = torch.full((2, SIDE, SIDE, 3), 255, dtype=torch.uint8)
    shape = (2, *objective.spec.latent_shape((SIDE, SIDE)))
    posterior = Posterior(torch.ones(shape), torch.zeros(shape))
    network = OneDraw(torch.full((2, 3, SIDE, SIDE), 0.5), posterior)
    losses = objective.backward(network, images, torch.zeros(2), 0, Workers(), 2)
    values = 3 * SIDE * SIDE
    nats = 0.5 * shape[1] * shape[2] * shape[3]
    assert losses.loss.tolist() == pytest.approx([error + 2 * nats / values] * 2)
    assert losses.terms[0].tolist() == pytest.approx([error] + [0.5] * shape[1])


def test_a_collapse_is_told_once_and_again_when_it_spreads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = PosteriorMonitor((3, 2, 2), 0.1, adversary=False)
    caplog.set_level(logging.WARNING)
    for step, kl in ((100, [0, 0, 0]), (200, [1, 0, 1]), (300, [1, 0, 1]), (400, [1, 0, 0])):
        row = monitor.metrics(torch.tensor([0.1, *kl], dtype=torch.float64), step)
        monitor.end_window(step, row, is_main=True)
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("step 200: 2 of 3 latent channels in use; channels 1 have")
    assert second.startswith("step 400: 1 of 3 latent channels in use; channels 1, 2 have")
    assert "Lower autoencoder.kl_weight (0.1)" in first
    assert row["train/kl_bits"] == pytest.approx(4 / math.log(2))
