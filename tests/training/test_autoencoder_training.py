"""What an autoencoder's steps minimise, report and refuse; test_loop.py kills and resizes them."""

import hashlib
import logging
import math
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu.tiny import Notes, config_of, run_of
from benchmarks.gpu.tiny_keys import ADVERSARY, AUTOENCODER
from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.loader import Batch
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec, Posterior
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training import posterior_monitor
from ddpm_ray.training.autoencoder_objective import AutoencoderObjective
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.loop import take_step, train_loop
from ddpm_ray.training.posterior_monitor import PosteriorMonitor
from ddpm_ray.training.rejected_steps import handle_rejected
from ddpm_ray.training.run import Run
from tests.fixtures.same_bits import assert_same_tensors
from tests.fixtures.threaded_workers import OnWorkers

CPU, SIDE, BATCH = torch.device("cpu"), 24, 8
LATE = [*AUTOENCODER, *ADVERSARY, "autoencoder.discriminator_from_step=3"]
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


def rows(run: Run) -> dict[int, dict[str, float]]:
    assert isinstance(run.sink, Notes)
    return {row.step: dict(row.metrics) for row in run.sink.taken}


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
    handle_rejected(run, run.log.read())
    broken.data.copy_(kept)
    assert run.guard.skipped == 1
    assert_same_tensors(before, run.state.snapshot([]))


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
    alone.backward(model, batch, 0, run.workers, BATCH)
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
    alone.backward(model, batch, 0, run.workers, BATCH)
    hook.remove()
    last = model.last_layer.grad
    assert last is not None
    adversarial = last.norm()
    run.state.zero_grad()
    take_step(run)
    torch.testing.assert_close(adversary.weight, reconstruction / adversarial, rtol=1e-4, atol=0)


@pytest.mark.parametrize("count", [2, 4])
def test_workers_train_the_discriminator_as_one_does(
    count: int, on_workers: OnWorkers, tmp_path: Path
) -> None:
    """Group norms see one image each: the gradient of a share does not depend on the others."""
    lock = Lock()

    def trained(workers: Workers) -> list[Tensor]:
        """Gradients of the discriminator, and the adversarial weight of the next step."""
        with lock:  # weights begin from torch's one generator
            run = begun([*AUTOENCODER, *ADVERSARY], tmp_path)
        adversary, batch = run.state.adversary, run.stream.batch(0)
        assert adversary is not None
        mine = list(workers.share(BATCH))
        part = batch.map(lambda tensor: tensor[mine])
        run.objective.backward(run.state.model, part, 0, workers, BATCH)
        leaves = [*adversary.discriminator.parameters()]
        found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
        adversary.step(0.1, torch.tensor(True))
        return [*found, adversary.weight]

    (alone,) = on_workers(1, trained)
    assert alone[-1] > 0
    for several in on_workers(count, trained):
        for found, wanted in zip(several, alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


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
    losses = objective.backward(network, Batch(images, torch.zeros(2)), 0, Workers(), 2)
    values = 3 * SIDE * SIDE
    nats = 0.5 * shape[1] * shape[2] * shape[3]
    assert losses.loss.tolist() == pytest.approx([error + 2 * nats / values] * 2)
    assert losses.terms[0].tolist() == pytest.approx([error] + [0.5] * shape[1])


class Linear(nn.Module):
    """The best code of independent channels of these variances for distortions of at most tau.

    (Reverse water-filling, Cover and Thomas, Elements of Information Theory, section 10.3.3.)
    """

    def __init__(self, variances: Tensor, tau: float) -> None:
        super().__init__()
        kept = (variances - tau).clamp(min=0).sqrt()
        self.encoder = nn.Parameter(torch.diag(kept / variances).float())
        self.decoder = nn.Parameter(torch.diag(kept).float())
        self.log_variance = nn.Parameter((tau / variances).clamp(max=1).log().float())

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        mean = torch.einsum("ij,bjhw->bihw", self.encoder, x)
        posterior = Posterior(mean, self.log_variance[:, None, None].expand_as(mean))
        return torch.einsum("ij,bjhw->bihw", self.decoder, posterior.sample(noise)), posterior


@pytest.mark.parametrize("side", [1, 2])
def test_the_kl_weight_is_twice_the_distortion_where_a_channel_is_given_up(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate-distortion optimum for tau = kl_weight / 2 is the loss's, for images of any size.

    Images and noise are all sign patterns: the moments that the loss depends on are exact.
    """
    tau, levels = 0.05, torch.tensor([100, 60, 10])  # grey levels from the middle
    variances = ((2 * levels + 1) / 255).double().square()  # 0.62, 0.23, 0.0068
    signs = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 6)[:, :, None, None]
    signs = signs.expand(-1, -1, side, side)
    images = torch.where(signs[:, :3] > 0, 128 + levels.view(3, 1, 1), 127 - levels.view(3, 1, 1))
    monkeypatch.setattr("ddpm_ray.counter_rng.normal", lambda *_: signs[:, 3:].float().contiguous())
    spec = AutoencoderSpec(3, 3, 1, (1,), 1, 1, middle_attention=False)
    slopes = []
    for kl_weight in (2 * tau, 2.2 * tau):
        objective, network = AutoencoderObjective(0, spec, "mse", kl_weight), Linear(variances, tau)
        pixels = images.permute(0, 2, 3, 1).to(torch.uint8)
        losses = objective.backward(network, Batch(pixels, torch.zeros(64)), 0, Workers(), 64)
        grads = [parameter.grad for parameter in network.parameters()]
        slopes.append(max(float(grad.abs().max()) for grad in grads if grad is not None))
        nats = [0.5 * math.log(0.6213149 / tau), 0.5 * math.log(0.2251596 / tau), 0]
        distortion = (tau + tau + 0.0067820) / 3
        error, *kl = losses.terms.double().mean(0).tolist()
        assert error == pytest.approx(distortion, rel=1e-5)
        assert kl == pytest.approx(nats, abs=1e-5)
        loss = distortion + kl_weight * sum(nats) / 3
        assert losses.loss.mean().item() == pytest.approx(loss, rel=1e-5)
    assert slopes[0] < 1e-6 < 1e-3 < slopes[1]


def with_inception(assets: Path) -> list[str]:
    weights = assets / "inception_2015_12_05_to_mixed6e_folded_f32.npz"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return [f"evaluation.weights={weights}", f"evaluation.weights_sha256={sha256}"]


def test_a_step_with_inceptions_weights_lowers_the_perceptual_distance(
    assets: Path, tmp_path: Path
) -> None:
    """And its gradient is that of encoder and decoder alone."""
    keys = ["autoencoder.perceptual_weight=10", "training.learning_rate=1e-4", "data.flip=false"]
    run = begun([*AUTOENCODER, *keys, *with_inception(assets)], tmp_path)
    objective, model, batch = run.objective, run.state.model, run.stream.batch(0)
    assert isinstance(objective, AutoencoderObjective)
    assert isinstance(model, Autoencoder)
    perceptual = objective.perceptual
    assert perceptual is not None
    x = PIXELS.encode(batch.images)

    def distance() -> float:
        with torch.no_grad():
            return float(perceptual(x, model.decode(model.encode(x).mean)).mean())

    gradients = []
    for used in (perceptual, None):
        asked = replace(objective, perceptual=used)
        asked.backward(model, batch, 0, run.workers, BATCH)
        ends = model.encoder.conv_in.weight, model.decoder.conv_in.weight, model.last_layer
        gradients.append([end.grad.clone() for end in ends if end.grad is not None])
        run.state.zero_grad()
    for with_it, without in zip(*gradients, strict=True):
        assert with_it.isfinite().all()
        assert (with_it - without).abs().max() > 1e-6
    before = distance()
    take_step(run)
    assert 0 < distance() < before


def test_other_weights_than_inceptions_are_refused(assets: Path, tmp_path: Path) -> None:
    keys = ["autoencoder.perceptual_weight=10", f"evaluation.weights_sha256={64 * '0'}"]
    says = (
        r"folded_f32.npz: sha256 is \w+, expected 0+; fetch the file again, or correct the sha256"
    )
    with pytest.raises(StorageError, match=says):
        begun([*AUTOENCODER, *with_inception(assets), *keys], tmp_path)


def test_a_collapse_is_told_while_the_run_trains(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(posterior_monitor, "FIRST_CHECKED_STEP", 20)
    caplog.set_level(logging.WARNING)
    keys = [
        "autoencoder.kl_weight=1e4",
        "training.learning_rate=0.01",
        "training.log_every_steps=5",
    ]
    run = begun([*AUTOENCODER, *keys], tmp_path)
    run.plan = replace(run.plan, steps=40)
    train_loop(run)
    (logged,) = [record.getMessage() for record in caplog.records]
    assert "step 20: 0 of 4 latent channels in use; channels 0, 1, 2, 3 have a KL below" in logged
    assert logged.endswith(
        "Lower autoencoder.kl_weight (10000), or use fewer autoencoder.latent_channels"
    )
    assert {rows(run)[step]["train/channels_in_use"] for step in (20, 40)} == {0}


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
