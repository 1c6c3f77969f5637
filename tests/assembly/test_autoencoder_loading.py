"""An autoencoder of diffusers is loaded with its sha256; what encodes nothing is refused."""

import hashlib
from pathlib import Path

import pytest
import torch

from ddpm_ray.assembly import training_run
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.storage.object_store import write_bytes
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CheckpointStore

SPEC = AutoencoderSpec(3, 2, 8, (1, 2), 1, 4, middle_attention=True)


@pytest.mark.parametrize("part", ["", "vae"])
def test_a_diffusers_folder_gives_the_autoencoder_and_the_sha256_of_its_file(
    part: str, tmp_path: Path
) -> None:
    given = Autoencoder(SPEC).eval()
    home = tmp_path / part
    autoencoder_kl.write_folder(home, SPEC, given.state_dict(), (8, 12), write_bytes)
    found = trained_autoencoder(str(tmp_path))
    weights = (home / "diffusion_pytorch_model.safetensors").read_bytes()
    assert found.sha256 == hashlib.sha256(weights).hexdigest()
    assert found.url == str(tmp_path)
    assert found.image_shape == ImageShape(8, 12, 3)
    assert found.latent_shape(found.image_shape) == (2, 4, 6)
    assert not found.model.training
    z = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(found.model.decode(z), given.decode(z))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no committed checkpoint here"):
        trained_autoencoder(str(tmp_path))


def test_a_folder_of_another_model_of_diffusers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="'UNet2DModel'; supported is AutoencoderKL"):
        trained_autoencoder(str(tmp_path))


def test_a_run_that_trained_a_denoiser_is_refused(tmp_path: Path) -> None:
    keys = ("name=a", "data.url=b", "model.base_channels=4", "model.groups=2")
    levels = ("model.channel_mults=[1,2]", "model.attention_factors=[2]")
    config = load_config(RunConfig, None, [*keys, *levels])
    facts = {"config": to_dict(config), "image_shape": [8, 8, 3], "data_fingerprint": ""}
    cpu = torch.device("cpu")
    state = training_run.training_state(config, ImageShape(8, 8, 3), cpu, facts)
    CheckpointStore(str(tmp_path / "checkpoints")).save(state.snapshot([]))
    with pytest.raises(ConfigError, match="holds a denoiser, which has no latents: name a run"):
        trained_autoencoder(str(tmp_path))
