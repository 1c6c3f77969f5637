"""The averaged weights against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm_ray.training.checkpoint_folder import TENSOR_FILE
from ddpm_ray.training.ema import (
    EMA,
    Averages,
    decay_from_half_life,
    decay_group,
    ramped,
    width_group,
)


def network(value: float) -> nn.Linear:
    linear = nn.Linear(2, 3)
    for parameter in linear.parameters():
        nn.init.constant_(parameter, value)
    return linear


@given(st.floats(0, 1), st.integers(1, 40))
def test_towards_a_constant_the_distance_falls_as_a_power(decay: float, updates: int) -> None:
    mean, target = EMA(network(5.0)), network(2.0)
    for _ in range(updates):
        mean.update(target, decay)
    expected = torch.full((3, 2), 2.0 + 3.0 * decay**updates)
    torch.testing.assert_close(mean.state_dict()["weight"], expected, atol=1e-5, rtol=1e-5)


def test_a_moving_target_is_followed_by_the_geometric_series() -> None:
    """Weights k = 1, 2, ... from 0 at decay 1/2: the mean is k - 1 + 2**-k."""
    mean = EMA(network(0.0))
    for k in range(1, 21):
        mean.update(network(float(k)), 0.5)
        torch.testing.assert_close(mean.model.bias, torch.full((3,), k - 1 + 2.0**-k))


def test_mean_has_the_models_names_and_trains_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    mean = EMA(model)
    assert list(mean.state_dict()) == ["0.weight", "0.bias"] == list(model.state_dict())
    assert not mean.model.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in mean.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_mean_does_not_move_with_the_model() -> None:
    model = network(1.0)
    mean = EMA(model)
    nn.init.zeros_(model.weight)
    assert mean.state_dict()["weight"].min() == 1


def test_mean_is_kept_in_float32_where_the_model_is_in_bfloat16() -> None:
    """A change of 1e-3 of 1 is below bfloat16's spacing, and must not be lost."""
    model = network(1.0).to(torch.bfloat16)
    mean = EMA(model)
    mean.update(network(2.0).to(torch.bfloat16), 0.999)
    torch.testing.assert_close(mean.state_dict()["bias"], torch.full((3,), 1.001))


def test_buffers_are_copied_as_they_stand() -> None:
    model = nn.BatchNorm1d(2)
    mean = EMA(model)
    model(torch.randn(4, 2) + 3)
    mean.update(model, 0.9)
    assert torch.equal(mean.state_dict()["running_mean"], model.running_mean)  # type: ignore[arg-type]
    assert mean.state_dict()["num_batches_tracked"] == 1


def test_a_loaded_mean_continues_to_the_same_bits() -> None:
    whole = EMA(network(0.0))
    whole.update(network(3.0), 0.9)
    resumed = EMA(network(7.0))
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for mean in (whole, resumed):
        mean.update(network(4.0), 0.9)
    assert torch.equal(whole.state_dict()["weight"], resumed.state_dict()["weight"])


@given(st.floats(1.0, 1e7), st.integers(1, 512))
def test_after_the_half_life_half_the_weight_is_left(half_life: float, batch: int) -> None:
    decay = decay_from_half_life(half_life, batch)
    if decay > 1e-300:
        assert half_life / batch * math.log(decay) == pytest.approx(math.log(0.5), rel=1e-6)


@pytest.mark.parametrize("half_life, batch", [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_no_half_life_is_refused(half_life: float, batch: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        decay_from_half_life(half_life, batch)


def test_ramp_starts_at_a_tenth_and_ends_at_the_decay() -> None:
    assert ramped(0.9999, 0) == 0.1
    assert ramped(0.9999, 890) == pytest.approx(0.99)
    assert ramped(0.9999, 10**7) == 0.9999
    assert ramped(0.05, 0) == 0.05


def test_further_means_are_those_that_each_decay_alone_gives() -> None:
    """Towards a constant 2 from 5 the distance is 3 times the product of the decays so far."""
    decays = {"ema-0.5": lambda step: 0.5, "ema-width-0.1": lambda step: step / (step + 1)}
    means = Averages.of(network(5.0), decays)
    for step in range(4):
        means.update(network(2.0), step)
    found = {name: mean.model.bias for name, mean in means.means.items()}
    torch.testing.assert_close(found["ema-0.5"], torch.full((3,), 2 + 3 / 16))
    torch.testing.assert_close(found["ema-width-0.1"], torch.full((3,), 2.0))


def test_further_means_have_names_that_a_checkpoint_takes() -> None:
    """As its files are called, and different for decays that six digits do not tell apart."""
    names = [decay_group(0.999), decay_group(1e-7), decay_group(0.99999999), width_group(0.05)]
    assert names == ["ema-0.999", "ema-1e-07", "ema-0.99999999", "ema-width-0.05"]
    assert all(TENSOR_FILE.fullmatch(f"{name}.safetensors") for name in names)
