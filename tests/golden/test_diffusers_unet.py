"""Networks that diffusers built are ours to the last digits of float32, and ours are theirs.

The truth is diffusers itself: its UNet2DModel with random weights, run beside ours.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ddpm_ray.assembly import networks
from ddpm_ray.choices import ReverseVariance
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import NoiseSchedule, samplers, schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.x0_estimator import X0Estimator
from ddpm_ray.models.interop import convert, diffusers_folders
from ddpm_ray.models.interop.diffusers_config import UNET, image_size_of
from ddpm_ray.models.interop.diffusers_schedulers import VARIANCES, to_scheduler
from ddpm_ray.models.layers import GUIDED, HO
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.storage.object_store import write_bytes

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: no dependency of ours")

CIFAR10: dict[str, Any] = {  # google/ddpm-cifar10-32, with sides halved and channels an eighth
    "sample_size": 16,
    "block_out_channels": [16, 32, 32, 32],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "norm_num_groups": 8,
    "dropout": 0.0,
}
CONFIGS = {
    "cifar10": CIFAR10,
    "attention at two levels": {
        "sample_size": 8,
        "block_out_channels": [8, 24, 16],
        "layers_per_block": 1,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "in_channels": 1,
        "out_channels": 1,
    },
    "as guided-diffusion": {
        "sample_size": 8,
        "block_out_channels": [8, 16, 16],
        "layers_per_block": 2,
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "out_channels": 6,
        "num_class_embeds": 5,
    },
    "not square": {**CIFAR10, "sample_size": [16, 24]},
    "with a condition": {**CIFAR10, "in_channels": 5, "out_channels": 3},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def theirs(config: dict[str, Any]) -> Any:
    """A network of diffusers, no parameter of it 0 or 1."""
    model = diffusers.UNet2DModel(**config).eval()
    disturb(model)
    return model


def disturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def batch(config: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_t with its condition, t from 1, and labels where the network takes them."""
    generator = torch.Generator().manual_seed(2)
    full = {**UNET, **config}
    x_t = torch.randn(3, full["in_channels"], *image_size_of(full), generator=generator)
    classes = full["num_class_embeds"]
    labels = {"class_labels": torch.tensor([0, 1, classes - 1])} if classes else {}
    return x_t, torch.tensor([1, 500, 1000]), labels


def require_alike(ours: UNet, model: Any, config: dict[str, Any]) -> None:
    x_t, t, labels = batch(config)
    image, condition = x_t.tensor_split([x_t.shape[1] - ours.spec.condition_channels], dim=1)
    conditioning = Conditioning(
        labels.get("class_labels"), low_resolution=condition if condition.numel() else None
    )
    with torch.no_grad():
        expected = model(x_t, t - 1, **labels).sample
        found = ours(image, t, conditioning)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_answers_as_ours_and_comes_back_as_it_was(name: str) -> None:
    config = CONFIGS[name]
    model = theirs(config)
    spec, tensors = convert.from_diffusers(dict(model.config), model.state_dict())
    ours = UNet(spec).eval()
    ours.load_state_dict(tensors)
    require_alike(ours, model, config)
    back, weights = convert.to_diffusers(spec, tensors, image_size_of(config))
    assert back == {**UNET, **config, "_class_name": "UNet2DModel"}
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("variant", [HO, GUIDED])
def test_a_saved_network_of_ours_is_loaded_by_their_own_pipeline(
    variant: Any, tmp_path: Path
) -> None:
    spec = UNetSpec(
        image_channels=3,
        base_channels=8,
        channel_mults=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        dropout=0.0,
        groups=4,
        num_classes=0,
        condition_channels=0,
        learns_variance=False,
        variant=variant,
    )
    ours = UNet(spec).eval()
    disturb(ours)
    facts: dict[str, dict[str, Any]] = {
        "schedule": {"kind": "cosine", "num_steps": 100, "zero_terminal_snr": True},
        "objective": {"prediction": "v", "variance": "fixed"},
        "sampling": {"variance": "fixed_large", "clip": False},
    }
    diffusers_folders.write_folder(tmp_path, spec, ours.state_dict(), facts, (8, 12), write_bytes)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    require_alike(ours, pipeline.unet.eval(), {"sample_size": [8, 12]})
    scheduler = pipeline.scheduler
    alpha_bar = schedules.zero_terminal_snr(schedules.cosine(100))[1:]
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar, atol=1e-5, rtol=0)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.variance_type == "fixed_large"
    assert not scheduler.config.clip_sample
    read = diffusers_folders.read_folder(tmp_path)
    assert read[0] == spec
    assert all(torch.equal(read[1][key], value) for key, value in ours.state_dict().items())
    for group, values in facts.items():
        assert read[2][group].items() >= values.items()


@pytest.mark.parametrize("trained, sampled", [*VARIANCES.values()])
def test_their_scheduler_draws_the_transition_that_ours_does(trained: str, sampled: str) -> None:
    """Of every kind of variance that is exported, from one answer and the same noise."""
    table, t = NoiseSchedule(schedules.linear(1000)), 400
    model_output = torch.randn(4, 2 if trained != "fixed" else 1, 3, 3, generator=seeded(1))
    x_t, fresh = (
        torch.randn(4, 1, 3, 3, generator=seeded(2)),
        torch.randn(4, 1, 3, 3, generator=seeded(3)),
    )
    config = to_scheduler(
        {
            "schedule": {"kind": "linear", "num_steps": 1000},
            "objective": {"prediction": "epsilon", "variance": trained},
            "sampling": {"variance": sampled, "clip": True},
        }
    )
    scheduler = diffusers.DDPMScheduler.from_config(config)
    scheduler.set_timesteps(1000)
    expected = scheduler.step(model_output, t - 1, x_t, generator=seeded(3)).prev_sample
    seen: dict[int, Tensor] = {}
    samplers.ancestral(
        X0Estimator(table, lambda x, t: model_output),
        x_t,
        (t, t - 1, 0),
        noise=lambda t: fresh,
        variance=cast(ReverseVariance, sampled if trained == "fixed" else trained),
        on_step=lambda t, x, x_0: seen.update({t: x.clone()}),
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(seen[t - 1], expected, rtol=1e-5, atol=1e-5)


def test_heads_of_the_config_are_theirs() -> None:
    """model.head_channels is diffusers' attention_head_dim, in outputs and gradients."""
    sizes = ["model.base_channels=8", "model.groups=4", "model.channel_mults=[1,2]"]
    options = ["model.attention_factors=[1,2]", "model.head_channels=4"]
    run = load_config(RunConfig, None, ["name=a", "data.url=b", *sizes, *options])
    ours = UNet(networks.unet_spec(run, ImageShape(8, 8, 3))).eval()
    disturb(ours)
    config, weights = convert.to_diffusers(ours.spec, ours.state_dict(), (8, 8))
    assert config["attention_head_dim"] == 4
    model = diffusers.UNet2DModel.from_config(config).eval()
    model.load_state_dict(weights)
    assert {getattr(module, "heads", 2) for module in model.modules()} == {2, 4}
    require_alike(ours, model, config)
    x_t, t, _ = batch(config)
    ours(x_t, t).square().sum().backward()
    model(x_t, t - 1).sample.square().sum().backward()
    gradients = {
        key: value.grad for key, value in ours.named_parameters() if value.grad is not None
    }
    _, by_their_names = convert.to_diffusers(ours.spec, gradients, (8, 8))
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            by_their_names[key], parameter.grad, atol=1e-5 * largest, rtol=1e-4
        )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("safe", [True, False])
def test_what_their_pipeline_saves_is_read(safe: bool, tmp_path: Path) -> None:
    model = theirs(CIFAR10)
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / "unet/diffusion_pytorch_model.bin").exists() != safe
    spec, tensors, facts, size, *_ = diffusers_folders.read_folder(tmp_path)
    assert isinstance(spec, UNetSpec)
    ours = UNet(spec).eval()
    ours.load_state_dict(tensors)
    require_alike(ours, model, CIFAR10)
    assert size == (16, 16)
    assert facts["schedule"]["kind"] == "linear"
    assert facts["sampling"] == {"variance": "fixed_large", "clip": True}


def test_weights_under_the_old_names_of_attention_layers_are_read() -> None:
    """google/ddpm-cifar10-32 was saved before diffusers renamed them."""
    model = theirs(CIFAR10)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = model.state_dict()
    for new, name in old.items():
        renamed = {key.replace(f".{new}.", f".{name}."): value for key, value in renamed.items()}
    assert "mid_block.attentions.0.proj_attn.bias" in renamed
    spec, tensors = convert.from_diffusers(dict(model.config), renamed)
    ours = UNet(spec).eval()
    ours.load_state_dict(tensors)
    require_alike(ours, model, CIFAR10)
