"""Sets and models of runs that read the embeddings of their images from a set.

The imports are in the fixtures: without the extra [text] the tests are skipped, not this file.
"""

import pytest
from torch import Tensor


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pixels, latents, two contrastive runs, and the embeddings that they give."""
    from tests.assembly.stored_embeddings.stored_sets import write_sets

    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def by_key(sets: dict[str, str]) -> dict[str, Tensor]:
    """The embedding of each image, by its key, as the encoder gives it in one batch."""
    from tests.assembly.stored_embeddings.stored_sets import embeddings_by_key

    return embeddings_by_key(sets)


@pytest.fixture(scope="session")
def decoder(sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a decoder of latents."""
    from tests.assembly.stored_embeddings.stored_sets import trained_decoder

    return trained_decoder(tmp_path_factory.mktemp("decoder"), sets)
