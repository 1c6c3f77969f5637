"""What the tests of faults share."""

import pytest

from tests.data.latent_sets import encode_noise
from tests.noise import pack_noise


@pytest.fixture(scope="session")
def noise_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set whose epoch is 5 5/8 batches of 8: 24 steps end in the fifth epoch."""
    folder = str(tmp_path_factory.mktemp("noise"))
    pack_noise(folder, images=45, side=4)
    return folder


@pytest.fixture(scope="session")
def larger_noise_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same number of images, of a side that a discriminator takes."""
    folder = str(tmp_path_factory.mktemp("larger-noise"))
    pack_noise(folder, images=45, side=24)
    return folder


@pytest.fixture(scope="session")
def latent_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same number of latents, of 2 x 4 x 4, with both views."""
    return encode_noise(tmp_path_factory.mktemp("latents"), images=45, side=8)
