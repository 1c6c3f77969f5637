import pytest

from ddpm_ray.sampling.pipeline import TrainedModel
from tests.serving.counted_model import tiny_model


@pytest.fixture
def model() -> TrainedModel:
    return tiny_model()
