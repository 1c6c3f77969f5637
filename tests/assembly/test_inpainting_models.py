"""Models trained with `objective.inpainting_masks`, of pixels and of latents, from run to edit."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ddpm_ray
from ddpm_ray.assembly import (
    diffusers_export,
    diffusion,
    training_run,
)
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.edit import InpaintingMethod
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.diffusion.conditioning import Conditioning, known_part
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.unet import UNet
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.training.objective import Objective
from tests.data.latent_sets import TINY_UNET, commit, encode_noise, initial_run
from tests.fixtures.job_script import run_job

CPU = torch.device("cpu")
INPAINTS = "objective.inpainting_masks=true"
TINY = (
    "name=tiny",
    "schedule.num_steps=20",
    *TINY_UNET,
    "sampling.steps=3",
    "sampling.sampler=unipc",
)


def committed(url: str, folder: Path, *overrides: str) -> str:
    """The folder of a run on the data at `url`, with random weights also where they begin at 0."""
    config = load_config(RunConfig, None, [*TINY, f"data.url={url}", *overrides])
    state = initial_run(config)
    for model in (state.model, state.ema.model):
        assert isinstance(model, UNet)
        torch.manual_seed(0)
        nn.init.normal_(model.conv_out.weight, std=0.2)
    return commit(state, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs by the codec of their data and by whether they inpaint."""
    data = tmp_path_factory.mktemp("data")
    encode_noise(data, images=12)
    return {
        f"{codec}{' masks' if overrides else ''}": committed(
            str(data / codec), tmp_path_factory.mktemp("run"), *overrides
        )
        for codec in ("pixels", "latents")
        for overrides in ((), (INPAINTS,))
    }


@pytest.fixture(scope="module")
def models(runs: dict[str, str]) -> dict[str, TrainedModel]:
    return {name: ddpm_ray.load(run, "cpu") for name, run in runs.items()}


def known_images(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two images of noise and their masks, of which large parts are known."""
    rng = np.random.default_rng(height)
    keep = np.ones((2, height, width), bool)
    keep[0, 2:5, 3:6] = keep[1, :, 5:] = False
    return rng.integers(0, 256, (2, height, width, 1), np.uint8), keep


@pytest.mark.parametrize(
    "name, method",
    [
        ("pixels", "repaint"),
        ("pixels masks", "auto"),
        ("latents", "repaint"),
        ("latents", "replacement"),
        ("latents masks", "auto"),
        ("latents masks", "repaint"),
    ],
)
@pytest.mark.parametrize("height, width", [(8, 8), (11, 9)])
def test_unknown_pixels_have_no_effect_and_known_ones_all_of_it(
    name: str, method: InpaintingMethod, height: int, width: int, models: dict[str, TrainedModel]
) -> None:
    """To the bit: also beside known latents, whose encoder sees further than their pixels."""
    model, (images, keep) = models[name], known_images(height, width)

    def painted(given: np.ndarray) -> np.ndarray:
        return model.inpaint(given, keep, method=method, resamples=1, jump_length=1)

    result = painted(images)
    np.testing.assert_array_equal(result[keep], images[keep])
    for other in (0, 255):
        given = np.where(keep[..., None], images, np.uint8(other))
        np.testing.assert_array_equal(painted(given), result)
    changed = painted(np.where(keep[..., None], 255 - images, images))
    assert (changed != result)[~keep].any()


def test_a_model_with_masks_uses_them_by_itself(models: dict[str, TrainedModel]) -> None:
    """With the run's own sampler, which repaint does not support."""
    images, keep = known_images(8, 8)
    for name in ("pixels masks", "latents masks"):
        painted = models[name].inpaint(images, keep)
        np.testing.assert_array_equal(
            painted, models[name].inpaint(images, keep, method="conditioned", sampler="unipc")
        )
        assert (painted != models[name].inpaint(images, keep, method="repaint", resamples=1)).any()
        wide = models[name].outpaint(images, left=3, bottom=2)
        np.testing.assert_array_equal(wide[:, :8, 3:], images)
        assert models[name].sample(2).shape == images.shape
    with pytest.raises(ValueError, match="'conditioned', but the model was trained without obj"):
        models["pixels"].inpaint(images, keep, method="conditioned")


def test_a_warning_says_that_known_pixels_fill_no_latent(
    models: dict[str, TrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    images, keep = known_images(8, 8)
    keep[0] = np.arange(64).reshape(8, 8) % 2 == 0
    with caplog.at_level(logging.WARNING, "ddpm_ray"):
        models["latents masks"].inpaint(images, keep)
    assert "in 1 of 2 images no latent is known" in caplog.text


Edit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edit(
    runs: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Edit:
    """The job on image.png of 11 x 9 pixels, by a run's name: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    images, keep = known_images(11, 9)
    Image.fromarray(images[0, :, :, 0]).save("image.png")
    Image.fromarray(np.where(keep[0], 0, 255).astype(np.uint8)).save("mask.png")

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        words = [runs[name], "image.png", "--out", "out.png", *arguments]
        return run_job("edit.py", words, monkeypatch, capsys)

    return run


@pytest.mark.parametrize("name", ["pixels masks", "latents masks", "latents"])
def test_the_job_edits_sides_that_the_factor_does_not_divide(
    name: str, edit: Edit, caplog: pytest.LogCaptureFixture
) -> None:
    images, keep = known_images(11, 9)
    for arguments, size, known in (
        (["--mask", "mask.png"], (11, 9), keep[0]),
        (["kind=outpaint", "right=4", "top=2"], (13, 13), None),
    ):
        caplog.clear()
        code, out, err = edit(name, *arguments)
        assert code == 0, err
        found = np.asarray(Image.open("out.png"))
        assert found.shape == size
        part = found if known is not None else found[2:, :9]
        where = known if known is not None else np.ones((11, 9), bool)
        np.testing.assert_array_equal(part[where], images[0, :, :, 0][where])
        assert json.loads(out.splitlines()[-1])["known_error"] == 0
        padded = [line for line in caplog.messages if "are padded to" in line]
        assert len(padded) == ("latents" in name)


def test_the_job_refuses_what_the_model_was_not_trained_for(edit: Edit) -> None:
    code, _, err = edit("latents", "--mask", "mask.png", "method=conditioned")
    assert code == 2
    assert err.startswith("error: method is 'conditioned', but the model was trained without")
    assert err.count("\n") == 1
    code, _, err = edit("latents masks", "--mask", "mask.png", "method=repaint")
    assert code == 0, err  # with its own sampler, ancestral


def test_diffusers_has_no_pipeline_for_it(models: dict[str, TrainedModel], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"with objective\.inpainting_masks; dif"):
        diffusers_export.write_diffusers(
            models["pixels masks"], SamplingSettings(), tmp_path / "given"
        )
    assert not (tmp_path / "given").exists()


class Layers(nn.Module):
    """Two layers that see x_t and the conditioning images of 4 x 4 pixels; t has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(48, 64), nn.SiLU(), nn.Linear(64, 16))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        seen = torch.cat([x_t, *conditioning.images], 1).flatten(1)
        found: Tensor = self.layers(seen).view_as(x_t)
        return found


def test_a_trained_network_uses_the_known_part() -> None:
    """Images of one grey level each: a known pixel tells it, and noise at t = T hides it.

    Without a known part the least error of x_0 is the variance of the levels.
    """
    keys = "data.url=none", "model.attention_factors=[]", "objective.prediction=x_0", INPAINTS
    config = load_config(RunConfig, None, [*TINY, *keys])
    state = training_run.training_state(config, ImageShape(4, 4, 1), CPU, {})
    made, torch_state = diffusion.objective(config, state, CPU), torch.manual_seed(0)
    levels = torch.randint(0, 256, (64, 1, 1, 1), generator=torch_state)
    images, labels = levels.to(torch.uint8).expand(-1, 4, 4, -1), torch.full((64,), -1)
    network = Layers()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(300):
        made.backward(network, Batch(images, labels), step, Workers(), 64)
        optimizer.step()
        optimizer.zero_grad()
    x_0 = made.noising.codec.encode(images)
    blind, seeing = (error_at_end(made, network, x_0, known) for known in (0, 2))
    assert blind > 0.9 * float(x_0.var(correction=0))
    assert seeing < 0.6 * blind


@torch.no_grad()
def error_at_end(made: Objective, network: nn.Module, x_0: Tensor, rows: int) -> float:
    """Mean squared error of x_0 at t = T, where the first `rows` rows are known, in the others."""
    mask = (torch.arange(4) < rows).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    t = torch.full((len(x_0),), made.schedule.num_steps)
    x_T = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    found = network(x_T, t, Conditioning(known=known_part(x_0, mask)))
    return float((found - x_0)[:, :, 2:].square().mean())
