"""Exported models of latents draw in diffusers what they draw here, from equal noise.

Both run in float32, where their schedule alone moves images by 1e-5 or so.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.assembly import diffusion, latents, networks
from ddpm_ray.assembly.checkpoint_loading import trained_model
from ddpm_ray.assembly.diffusers_export import write_diffusers
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.sampling import sampling
from ddpm_ray.sampling.autoencoder import TrainedAutoencoder
from ddpm_ray.sampling.pipeline import TrainedModel
from tests.data.latent_sets import TINY_UNET, encode_noise

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: no dependency of ours")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs: numpy 2

DIT = ("model.network=dit", "model.depth=2", "model.hidden_size=8", "model.heads=2")
LABELS = ("model.num_classes=3",)
LEARNED = ("objective.variance=learned_range", "objective.loss=hybrid")
DDIM = SamplingSettings(steps=5)
ANCESTRAL = SamplingSettings(sampler="ancestral", variance="fixed_small", steps=10)
IMAGES = ImageShape(8, 8, 1)
THEIR_NOISE = (
    "pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond",
    "pipelines.dit.pipeline_dit",
    "schedulers.scheduling_ddpm",
    "schedulers.scheduling_dpmsolver_multistep",
)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> LatentCodec:
    """Latents of 2 channels that differ in mean and standard deviation."""
    folder = tmp_path_factory.mktemp("encoded")
    dataset = open_dataset(encode_noise(folder, images=12))
    found = latents.codec_of_data(replace(RunConfig().data, url=dataset.url), dataset)
    assert isinstance(found, LatentCodec)
    return replace(found, mean=(0.7, -3.0), std=(0.2, 5.0))


def trained(codec: Codec, *overrides: str) -> TrainedModel:
    """A model as loaded from a checkpoint, without a weight that is 0."""
    keys = ("name=a", "data.url=b", "schedule.num_steps=20", "sampling.steps=5", *overrides)
    config = load_config(RunConfig, None, [*keys])
    channels, height, width = codec.shape(IMAGES)
    generator = torch.Generator().manual_seed(3)
    network = networks.network(config, ImageShape(height, width, channels))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    denoiser = diffusion.denoiser(
        config, network.eval().requires_grad_(False), torch.device("cpu"), codec
    )
    provenance = {"config": to_dict(config), "checkpoint": "", "step": 0, "weights_sha256": ""}
    names = "rose", "tulip, red", "oak"
    return TrainedModel(denoiser, IMAGES, provenance, find_label_names=lambda: names)


def drawn(
    model: TrainedModel, settings: SamplingSettings, monkeypatch: pytest.MonkeyPatch, count: int = 2
) -> np.ndarray[Any, Any]:
    """Our images [N, H, W, C] in [0, 1]; diffusers then draws the same noise."""
    noises: list[Tensor] = []

    def recorded(*key: Any) -> Tensor:
        noises.append(normal(*key))
        return noises[-1].clone()

    monkeypatch.setattr(sampling, "normal", recorded)
    plan = sampling.sampling_plan(settings, model.denoiser.schedule)
    index = torch.arange(count)
    images = sampling.draw(model.denoiser, plan, index, model.image_shape, "cpu")
    if isinstance(codec := model.denoiser.codec, LatentCodec):
        assert isinstance(codec.autoencoder, TrainedAutoencoder)
        images = codec.autoencoder.model.decode(codec.latents(images))
    left = iter(noises)

    def noise(shape: Any, **_: Any) -> Tensor:
        """None is left in the last step, where theirs is scaled to 0; guidance has two halves."""
        found = next(left, torch.zeros(shape))
        return found.repeat(shape[0] // len(found), 1, 1, 1)

    for module in THEIR_NOISE:
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", noise)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def require_equal_images(found: Any, expected: np.ndarray[Any, Any]) -> None:
    assert expected.std() > 0.01, "nothing to compare"
    np.testing.assert_allclose(found, expected, atol=5e-5)


def loaded(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "overrides, settings, scheduler",
    [
        (TINY_UNET, DDIM, "DDIMScheduler"),
        (
            (*TINY_UNET, "objective.prediction=v", "schedule.kind=cosine"),
            ANCESTRAL,
            "DDPMScheduler",
        ),
        (
            (*TINY_UNET, *LEARNED),
            replace(ANCESTRAL, variance="learned", steps=20),
            "DDPMScheduler",
        ),
        (
            TINY_UNET,
            SamplingSettings(sampler="dpm_solver_pp", steps=5),
            "DPMSolverMultistepScheduler",
        ),
        (DIT, DDIM, "DDIMScheduler"),
        ((*DIT, "schedule.kind=sigmoid", *LABELS), replace(ANCESTRAL, labels=(2, 0)), "DDPM"),
        ((*DIT, *LEARNED), DDIM, "DDIMScheduler"),
        (
            (*DIT, *LABELS, *LEARNED),
            SamplingSettings(
                sampler="dpm_solver_pp_sde", steps=10, labels=(2, 0), guidance_scale=3.0
            ),
            "DPMSolverMultistepScheduler",
        ),
    ],
    ids=str,
)
def test_the_pipeline_draws_our_images(
    overrides: tuple[str, ...],
    settings: SamplingSettings,
    scheduler: str,
    codec: LatentCodec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained(codec, *overrides)
    export = write_diffusers(model, settings, tmp_path)
    assert export.no_equivalent == ()
    pipeline = loaded(tmp_path)
    assert type(pipeline).__name__ == export.pipeline
    assert type(pipeline.scheduler).__name__.startswith(scheduler)
    expected = drawn(model, settings, monkeypatch)
    call = dict(export.call)
    if export.pipeline == "DiTPipeline":
        call["class_labels"] = (call["class_labels"] * 2)[:2]
        assert pipeline.get_label_ids(["red", "oak"]) == [1, 2]
    else:
        call["batch_size"] = 2
    require_equal_images(pipeline(output_type="np", **call).images, expected)


@pytest.mark.parametrize("overrides", [TINY_UNET, (*DIT, *LABELS, *LEARNED)], ids=["unet", "dit"])
def test_a_folder_of_latents_is_read_as_the_model_that_it_was(
    overrides: tuple[str, ...], codec: LatentCodec, tmp_path: Path
) -> None:
    model = trained(codec, *overrides)
    write_diffusers(model, DDIM, tmp_path)
    back = trained_model(str(tmp_path))
    assert back.image_shape == model.image_shape
    assert back.settings == replace(DDIM, clip=False)
    kept, given = (one.denoiser.network for one in (back, model))
    assert isinstance(kept, nn.Module)
    assert isinstance(given, nn.Module)
    held = kept.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in given.state_dict().items())
    images = [one.sample(4, steps=5).astype(int) for one in (model, back)]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("convs", [True, False])
def test_a_standardised_autoencoder_scales_each_channel(convs: bool) -> None:
    spec = AutoencoderSpec(3, 2, 4, (1, 2), 1, 2, middle_attention=True, latent_convs=convs)
    generator = torch.Generator().manual_seed(1)
    ours = Autoencoder(spec).eval().requires_grad_(False)
    for parameter in ours.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    mean, std = (40.0, -0.2), (7.0, 0.05)
    folded, tensors = autoencoder_kl.standardised(spec, ours.state_dict(), mean, std)
    config, weights = autoencoder_kl.to_diffusers(folded, tensors, (8, 8), autoencoder_kl.UNSCALED)
    theirs = diffusers.AutoencoderKL.from_config(config).eval()
    theirs.load_state_dict(weights)
    x = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    m, s = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    posterior, z = ours.encode(x), torch.randn(2, 2, 4, 4, generator=generator)
    with torch.no_grad():
        found = theirs.encode(x).latent_dist
        images = theirs.decode(z).sample
    torch.testing.assert_close(found.mean * s + m, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.std * s, (posterior.log_variance / 2).exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(images, ours.decode(z * s + m), rtol=1e-4, atol=1e-4)
    assert theirs.config.scaling_factor == 1


def by_hand(folder: Path, steps: int, x: Tensor, **inputs: Tensor) -> Tensor:
    """Step by step, as docs/toolbox.md shows."""
    if (folder / "unet").is_dir():
        network = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    else:
        network = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = network(x, t.expand(len(x)), **inputs).sample
            x = scheduler.step(output, t, x).prev_sample
        if (folder / "vqvae").is_dir():
            vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vqvae")
            x = vae.decode(x).sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "latent, overrides, missing",
    [
        (True, (*TINY_UNET, *LABELS), "num_classes=3"),
        (False, (*TINY_UNET, *LABELS), "num_classes=3"),
        (False, (*DIT, *LABELS), "pipeline"),
    ],
    ids=["latents, unet", "pixels, unet", "pixels, dit"],
)
def test_what_no_pipeline_draws_is_drawn_step_by_step(
    latent: bool,
    overrides: tuple[str, ...],
    missing: str,
    codec: LatentCodec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained(codec if latent else PIXELS, *overrides)
    settings = replace(DDIM, clip=False)
    export = write_diffusers(model, settings, tmp_path)
    assert [one.split(" (")[0] for one in export.no_equivalent] == [missing]
    expected = drawn(model, settings, monkeypatch)
    shape = model.denoiser.codec.shape(model.image_shape)
    x = normal(settings.seed, Purpose.SAMPLE_START, 0, torch.arange(2), shape)
    found = by_hand(tmp_path, settings.steps, x, class_labels=torch.tensor([0, 1]))
    require_equal_images(found, expected)
    assert (tmp_path / "model_index.json").exists() == bool(export.pipeline)
    back = trained_model(str(tmp_path)).sample(2).astype(int)
    assert np.abs(back - model.sample(2, **vars(settings))).max() <= 1


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """LDMPipeline warns that it expects a VQModel, whose decoder it calls as it calls this one."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)
