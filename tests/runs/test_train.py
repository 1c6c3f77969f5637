"""A run seen from its driver and a worker, without Ray."""

from pathlib import Path

import pytest
import torch

from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.reporting import Command
from ddpm_ray.runs.train_worker import assemble
from ddpm_ray.runs.training_data import open_or_pack
from ddpm_ray.training import determinism
from tests.noise import pack_noise


def test_a_built_in_set_is_packed_once_and_another_set_is_not_taken_for_it(tmp_path: Path) -> None:
    """Commit c58b265 trained on whatever lay in data.url."""

    def config(folder: str, source: str) -> RunConfig:
        url = tmp_path / folder
        return load_config(RunConfig, None, ["name=a", f"data.url={url}", f"data.source={source}"])

    packed = open_or_pack(config("digits", "digits"))
    assert packed.manifest.samples == 1797
    assert open_or_pack(config("digits", "digits")).fingerprint == packed.fingerprint
    pack_noise(str(tmp_path / "noise"), images=9, side=4)
    with pytest.raises(ConfigError, match=r"data.source is 'digits', but data.url"):
        open_or_pack(config("noise", "digits"))
    assert open_or_pack(config("noise", "")).manifest.samples == 9


@pytest.mark.parametrize("wanted", [True, False])
def test_a_worker_selects_deterministic_algorithms_if_asked_before_it_opens_anything(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["name=a", f"data.url={tmp_path / 'none'}", f"training.deterministic={wanted}"]
    config, selected = load_config(RunConfig, None, words), []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(determinism, "configure", lambda: selected.append(True))
    with pytest.raises(DatasetError, match="none"):
        assemble(config, {}, lambda progress: Command.NONE, Workers())
    assert selected == [True] * wanted
