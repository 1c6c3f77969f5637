"""Autoencoders that diffusers built are ours to the last digits of float64, and ours are theirs.

The truth is diffusers itself: its AutoencoderKL with random weights, run beside ours. In float32
gradients of biases before a group norm, which nearly cancel, would differ in the fifth digit.
"""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.storage.object_store import write_bytes

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: no dependency of ours")


def levels(count: int) -> dict[str, Any]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
    }


SD: dict[str, Any] = {  # Stable Diffusion's f8 with 4 channels, at 1/16 of its width
    **levels(4),
    "block_out_channels": [8, 16, 32, 32],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
}
CONFIGS = {
    "stable diffusion": SD,
    "16 channels, as in later models": {
        **SD,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": False,
    },
    "f4, 4 channels": {**SD, **levels(3), "block_out_channels": [8, 16, 24]},
    "no attention, one block": {
        **SD,
        **levels(2),
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "sample_size": [8, 12],
    },
    "grey, no downsampling": {
        **SD,
        **levels(1),
        "block_out_channels": [8],
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 1,
        "sample_size": 8,
    },
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def theirs(config: dict[str, Any]) -> Any:
    """A network of diffusers, no parameter of it 0 or 1."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**config)
    disturb(model)
    return model


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def loaded(spec: AutoencoderSpec, tensors: dict[str, Tensor]) -> Autoencoder:
    model = Autoencoder(spec)
    model.load_state_dict(tensors)
    return model


def image_and_noise(spec: AutoencoderSpec, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(2, spec.image_channels, *image_size, generator=generator) * 2 - 1
    return x, torch.randn(2, *spec.latent_shape(image_size), generator=generator)


def require_close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=1e-10 * scale, rtol=0)


def require_alike(ours: Autoencoder, model: Any, image_size: tuple[int, int]) -> None:
    """Equal means, log variances, divergences, images and gradients of all of them."""
    ours, model = (copy.deepcopy(network).double() for network in (ours, model))
    x, noise = (part.double() for part in image_and_noise(ours.spec, image_size))
    image, posterior = ours(x, noise)
    expected = model.encode(x).latent_dist
    expected_image = model.decode(expected.mean + expected.std * noise).sample
    require_close(posterior.mean, expected.mean)
    require_close(posterior.log_variance, expected.logvar)
    require_close(posterior.kl(), expected.kl())
    require_close(image, expected_image)
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    ((image * weights).sum() + posterior.kl().sum()).backward()
    ((expected_image * weights).sum() + expected.kl().sum()).backward()
    grads = {name: part.grad for name, part in ours.named_parameters() if part.grad is not None}
    _, named = autoencoder_kl.to_diffusers(ours.spec, grads, image_size)
    for name, parameter in model.named_parameters():
        if name.endswith("to_k.bias"):  # 0 but for rounding: a shift of all keys changes nothing
            assert named[name].abs().max() < 1e-6 * named[name.replace("to_k", "to_q")].abs().max()
        else:
            require_close(named[name], parameter.grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_answers_as_ours_and_comes_back_as_it_was(name: str) -> None:
    config = CONFIGS[name]
    model = theirs(config)
    spec, tensors = autoencoder_kl.from_diffusers(dict(model.config), model.state_dict())
    sides = config["sample_size"]
    image_size = (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
    require_alike(loaded(spec, tensors), model, image_size)
    pipeline = {key: model.config[key] for key in autoencoder_kl.PIPELINE}
    back, weights = autoencoder_kl.to_diffusers(spec, tensors, image_size, pipeline)
    assert back == {
        **autoencoder_kl.AUTOENCODER_KL,
        **config,
        "_class_name": "AutoencoderKL",
    }
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_the_spec_of_stable_diffusion_builds_their_model_tensor_by_tensor() -> None:
    spec = AutoencoderSpec(3, 4, 128, (1, 2, 4, 4), 2, 32, True)
    with torch.device("meta"):
        ours = Autoencoder(spec)
        config, tensors = autoencoder_kl.to_diffusers(spec, ours.state_dict(), (512, 512))
        model = diffusers.AutoencoderKL.from_config(config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_their_defaults_are_the_defaults_of_a_file_that_omits_keys() -> None:
    model = diffusers.AutoencoderKL()
    shown = {key: value for key, value in model.config.items() if key[0] != "_"}
    listed = {k: [*v] if isinstance(v, tuple) else v for k, v in shown.items()}
    assert listed == autoencoder_kl.AUTOENCODER_KL
    spec, _ = autoencoder_kl.from_diffusers({"sample_size": 32}, model.state_dict())
    assert spec == AutoencoderSpec(3, 4, 64, (1,), 1, 32, True)


def test_a_saved_autoencoder_of_ours_is_loaded_by_diffusers(tmp_path: Path) -> None:
    spec = AutoencoderSpec(3, 2, 8, (1, 2), 1, 4, middle_attention=True)
    ours = Autoencoder(spec)
    disturb(ours)
    pipeline = {**autoencoder_kl.PIPELINE, "scaling_factor": 0.7}
    autoencoder_kl.write_folder(
        tmp_path, spec, ours.state_dict(), (8, 12), write_bytes, pipeline=pipeline
    )
    require_alike(ours, diffusers.AutoencoderKL.from_pretrained(tmp_path), (8, 12))
    read = autoencoder_kl.read_folder(tmp_path)
    assert read.spec == spec
    assert read.image_size == (8, 12)
    assert read.pipeline == pipeline
    assert all(torch.equal(read.tensors[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("safe", [True, False])
def test_what_they_save_is_read_alone_and_as_the_vae_of_a_pipeline(
    safe: bool, tmp_path: Path
) -> None:
    model = theirs(SD)
    model.save_pretrained(tmp_path / "vae", safe_serialization=safe)
    for folder in (tmp_path, tmp_path / "vae"):
        read = autoencoder_kl.read_folder(folder)
        assert (read.weights_file.suffix == ".safetensors") == safe
        require_alike(loaded(read.spec, read.tensors), model, (16, 16))


def test_weights_under_the_old_names_of_attention_layers_are_read() -> None:
    """Stable Diffusion's files were saved before diffusers renamed them."""
    model = theirs(SD)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = model.state_dict()
    for new, name in old.items():
        renamed = {key.replace(f".{new}.", f".{name}."): value for key, value in renamed.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in renamed
    spec, tensors = autoencoder_kl.from_diffusers(dict(model.config), renamed)
    require_alike(loaded(spec, tensors), model, (16, 16))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"act_fn": "relu"}, "act_fn is 'relu'; with the other keys only 'silu' is supported"),
        ({"out_channels": 6}, "out_channels is 6; with the other keys only 3"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv is False; .* only True"),
        ({"block_out_channels": [8, 12, 32, 32]}, "block_out_channels is "),
        ({"norm_num_groups": 3}, "groups is 3, which does not divide a level's 8 channels"),
        ({"latent_channels": None}, "its config is invalid"),
        ({"sample_size": 0}, "sample_size is 0; supported is a side, or height and width"),
        ({"temporal": True}, "temporal is True, a key that is not supported"),
        ({"_class_name": "AutoencoderTiny"}, "it is 'AutoencoderTiny'; supported is AutoencoderKL"),
        (
            {"down_block_types": [*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"]},
            "down_block_types is .* is supported",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line_that_names_the_key(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as refused:
        autoencoder_kl.spec_from_config({**SD, **changes})
    assert "\n" not in str(refused.value)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    model = theirs(SD)
    tensors = model.state_dict()
    lacking = {key: value for key, value in tensors.items() if key != "quant_conv.bias"}
    with pytest.raises(UnsupportedModelError, match=r"the file lacks quant_conv\.bias"):
        autoencoder_kl.from_diffusers(dict(model.config), lacking)
    with pytest.raises(UnsupportedModelError, match=r"there is no place for teacher\.weight"):
        autoencoder_kl.from_diffusers(
            dict(model.config), {**tensors, "teacher.weight": torch.zeros(1)}
        )
