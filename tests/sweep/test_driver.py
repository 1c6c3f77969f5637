"""What of a sweep's config may change when it continues."""

import pytest

from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.sweep import driver


def config(*overrides: str) -> SweepConfig:
    keys = (
        "name=a",
        "run.data.url=b",
        "run.model.channel_mults=[1,1,1]",
        "run.evaluation.num_images=2",
        "run.evaluation.features=digits",
        "space=[{objective.prediction: [epsilon, v]}]",
    )
    return load_config(SweepConfig, None, [*keys, *overrides])


@pytest.mark.parametrize(
    "saved, now",
    [
        ("[16]", "attention_factors=null"),  # of an earlier version, by default
        ("[8,32]", "attention_resolutions=[32,8]"),
        ("[8,32]", "attention_factors=[1,4]"),
    ],
)
def test_a_sweep_of_an_earlier_version_continues_with_the_same_attention(
    saved: str, now: str
) -> None:
    begun = {"sweep": to_dict(config(f"run.model.attention_resolutions={saved}"))}
    assert not driver._changed_keys(config(f"run.model.{now}"), begun, ImageShape(32, 32, 3))
    other = config("run.model.attention_factors=[1,2,4]")
    (line,) = driver._changed_keys(other, begun, ImageShape(32, 32, 3))
    assert line.startswith("run.model.attention_factors is (1, 2, 4), but the sweep was started")
