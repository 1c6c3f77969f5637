"""Trials on several sets of latents: one network and one budget for each, or a refusal by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm_ray.assembly import networks
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.data import encoding_record
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.encoding_record import EncodingCost
from ddpm_ray.data.packing import encoded_packer
from ddpm_ray.data.packing.latent_encoder import LatentEncoder
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.models.interop import autoencoder_kl
from ddpm_ray.models.unet import UNet
from ddpm_ray.storage.object_store import write_bytes
from ddpm_ray.sweep import driver
from ddpm_ray.sweep.trial_data import SweepData
from tests.noise import pack_noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's and MLflow's

SETS = {"f2c2": (1, 1), "f4c3": (1, 1, 1)}  # levels of the autoencoder, by the name of its latents


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 images in pixels/ and other/, and the latents of pixels/ in SETS."""
    folder = tmp_path_factory.mktemp("home")
    pack_noise(str(folder / "pixels"), 12, 8)
    pack_noise(str(folder / "other"), 13, 8)
    for name, levels in SETS.items():
        spec = AutoencoderSpec(1, int(name[-1]), 4, levels, 1, 2, middle_attention=False)
        place = folder / f"autoencoder-{name}"
        autoencoder_kl.write_folder(
            place, spec, Autoencoder(spec).state_dict(), (8, 8), write_bytes
        )
        encoder = LatentEncoder(replace(trained_autoencoder(str(place)), core_seconds=30.0))
        plan = encoded_packer.make_encoding_plan(
            open_dataset(str(folder / "pixels")), str(folder / name), encoder, EncodeConfig()
        )
        shards = [encoded_packer.encode_shard(plan, n, encoder) for n in range(plan.shards)]
        encoded_packer.finish_encoded(plan, shards)
        encoding_record.write_cost(str(folder / name), "latents", EncodingCost(12.5, 30.0))
    return folder


def sweep(*overrides: str, urls: tuple[str, ...] = (*SETS, "pixels")) -> SweepConfig:
    keys = (
        "name=a",
        f"space=[{json.dumps({'data.url': urls})}]",
        "stopping.kind=none",
        "run.schedule.num_steps=20",
        "run.sampling.steps=2",
        "run.model.base_channels=4",
        "run.model.groups=2",
        "run.model.channel_mults=[1,2]",
        "run.model.blocks_per_level=1",
        "run.model.attention_factors=[2]",
        "run.evaluation.num_images=4",
        "run.evaluation.reference_url=pixels",
    )
    return load_config(SweepConfig, None, [*keys, *overrides])


def test_each_trial_has_the_network_of_its_own_latents(home: Path) -> None:
    data = SweepData(sweep(), home)
    for url, shape in (("f2c2", (2, 4, 4)), ("f4c3", (3, 2, 2)), ("pixels", (1, 8, 8))):
        assert driver.schedule_diagnostics(data, {"data.url": url}) is not None
        run = data.trial_run({"data.url": url}, "trial")
        assert Path(run.data.url) == home / url
        assert Path(run.evaluation.reference_url) == home / "pixels"
        assert not run.evaluation.validation_every_steps
        network = networks.network(run, data.of(run).dataset.manifest.diffused_shape)
        assert isinstance(network, UNet)
        x_t = torch.zeros(1, *shape)
        assert network(x_t, torch.tensor([3])).shape == x_t.shape


def test_autoencoder_and_encoding_are_a_part_of_a_trial_s_core_seconds(home: Path) -> None:
    data = SweepData(sweep("core_seconds=100"), home)
    left = [
        data.trial_run({"data.url": url}, "trial").training.core_seconds
        for url in (*SETS, "pixels")
    ]
    assert left == [57.5, 57.5, 100.0]
    data = SweepData(sweep("run.training.core_seconds=100"), home)
    alone = [data.trial_run({"data.url": url}, "trial") for url in (*SETS, "pixels")]
    assert [run.training.core_seconds for run in alone] == [100.0] * 3


def test_a_budget_that_leaves_nothing_to_train_is_refused(home: Path) -> None:
    data = SweepData(sweep("core_seconds=42"), home)
    with pytest.raises(ConfigError, match=r"core_seconds is 42, of which .*f2c2 take 4[23]: nothi"):
        data.trial_run({"data.url": "f2c2"}, "trial")


def test_a_budget_with_an_autoencoder_of_unknown_cost_is_refused(home: Path) -> None:
    where = home / "f2c2" / encoding_record.COST
    known = where.read_bytes()
    for unknown in (EncodingCost(12.5, None), None):
        if unknown is None:
            where.unlink()
        else:
            encoding_record.write_cost(str(home / "f2c2"), "latents", unknown)
        data = SweepData(sweep("core_seconds=100"), home)
        with pytest.raises(ConfigError, match=r"of .*f2c2 are not recorded: set run.training.core"):
            data.trial_run({"data.url": "f2c2"}, "trial")
    where.write_bytes(known)


def test_latents_of_other_images_are_not_compared(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"names sets of different images: those of .*f2c2 are"):
        SweepData(sweep(urls=("f2c2", "other")), home)


def test_a_set_that_was_exchanged_does_not_continue_a_sweep(home: Path) -> None:
    found = SweepData(sweep(), home).fingerprints
    assert list(found) == [*SETS, "pixels"]
    assert not driver._changed_data(found, found)
    (line,) = driver._changed_data(found, found | {"f4c3": "0" * 64})
    assert line.startswith(f"f4c3 holds data set {found['f4c3'][:12]}, but the sweep was started")


def test_a_trial_that_trains_an_autoencoder_has_no_schedule(home: Path) -> None:
    space = "space=[{autoencoder.latent_channels: [2, 3], autoencoder.channel_mults: [[1, 1]]}]"
    keys = ("run.task=autoencoder", "run.data.url=pixels", "run.evaluation.features=none", space)
    tiny = ("run.autoencoder.base_channels=4", "run.autoencoder.groups=2", "stopping.kind=none")
    config = load_config(SweepConfig, None, ["name=a", "run.evaluation.num_images=4", *keys, *tiny])
    data = SweepData(config, home)
    values = {"autoencoder.latent_channels": 3, "autoencoder.channel_mults": [1, 1]}
    assert driver.schedule_diagnostics(data, values) is None
    assert data.trial_run(values, "trial").autoencoder.latent_channels == 3
    with pytest.raises(ConfigError, match=r"autoencoder: with the images of .*pixels: "):
        driver.schedule_diagnostics(data, values | {"autoencoder.channel_mults": [1] * 5})
