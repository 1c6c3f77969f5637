"""A run seen from its driver, without Ray: what it says of itself."""

from pathlib import Path

import pytest

from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.runs.train import open_or_pack
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
